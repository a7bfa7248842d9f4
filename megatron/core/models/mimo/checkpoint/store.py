# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that are whole or absent.

``megatron.core.dist_checkpointing`` writes and reads the tensors. ``history.py`` decides where, and
makes the result visible in one step: a checkpoint is written under a hidden name and renamed
after every rank is done and the data is on the disk. A run killed at any moment leaves either a
complete checkpoint or a hidden folder that the next run removes.
"""

from __future__ import annotations

import contextlib
import copy
import shutil
import warnings
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.models.mimo.checkpoint import global_tensors, integrity
from megatron.core.models.mimo.checkpoint.background_save import ShardWriter
from megatron.core.models.mimo.checkpoint.errors import (
    CheckpointError,
    alone,
    on_rank_0,
    together,
)
from megatron.core.models.mimo.checkpoint.frozen_state import Frozen, start_fresh, whole_stacks
from megatron.core.models.mimo.checkpoint.history import History, remove_partial
from megatron.core.models.mimo.checkpoint.load_checks import (
    check_files,
    check_no_main_copies,
    check_pickles,
    check_same_model,
    check_same_optimizer,
    module_of,
    read_manifest,
    weights_of,
)
from megatron.core.models.mimo.checkpoint.manifest import FORMAT, MANIFEST, Manifest
from megatron.core.models.mimo.checkpoint.shared_folder import check_shared
from megatron.core.models.mimo.compat import fully_parallel_load, plan_save
from megatron.core.models.mimo.randomness import (
    ModuleRandomness,
    get_rng_state,
    set_rng_state,
)
from megatron.core.models.mimo.training import optimizer_settings
from megatron.core.models.mimo.training.agreement import gathered
from megatron.core.models.mimo.wrappers import name_as_saved
from mimo_colocated import phases

# Optimizer state that any layout can load (parameters of the model's own shapes).
SHARDING = {"distrib_optim_sharding_type": "fully_reshardable"}

__all__ = [
    "FORMAT",
    "MANIFEST",
    "CheckpointError",
    "CheckpointStore",
    "Manifest",
    "remove_partial",
]


class RankState(Protocol):
    """What each rank saves and restores for itself, where a run goes on in the same layout."""

    def state_dict(self) -> dict[str, Any]:
        """Return numbers, texts and tensors, in any containers."""
        ...

    def load_state_dict(self, saved: Mapping[str, Any], /) -> None:
        """Go on from what ``state_dict`` returned."""
        ...


class CheckpointStore:
    """Checkpoints of one run below ``root``.

    All ranks build it together, and call every method but the pure look-ups together.

    Args:
        root: folder; made on first save.
        layouts: module name -> parallel sizes of this run.
        randomness: random states of the modules, saved and restored along.
        group: ranks that share the reading of what they all need, in place of all ranks; the
            language model's data and context parallel ranks are a good choice on large clusters.
        keep: how many of the newest checkpoints of the line stay; older ones go after a save.
        digests: take a digest of every file when saving and compare it when loading; without,
            only the files' sizes (``integrity.py`` says what that costs).

    Attributes:
        rank_state: saved along if it is set, and restored in the same layout. A checkpoint that
            was saved with it is loaded with it set, one without it without.

    Raises:
        ValueError: if ``keep`` is less than 1.
        CheckpointError: on every rank if not all of them see ``root`` as one folder, or some
            cannot write there (``shared_folder.py``).
    """

    def __init__(
        self,
        root: str | Path,
        layouts: dict[str, dict[str, int]],
        randomness: ModuleRandomness | None = None,
        group: dist.ProcessGroup | None = None,
        keep: int = 2,
        digests: bool = True,
    ) -> None:
        if keep < 1:
            raise ValueError(f"keep={keep} would remove the checkpoint just saved; give at least 1")
        self.root = Path(root)
        self.history = History(self.root, keep)
        self.layouts = layouts
        self.randomness = randomness
        self.group = group
        self.digests = digests
        self.rank_state: RankState | None = None
        self._under_way: tuple[Manifest, ShardWriter] | None = None
        if dist.is_initialized():
            check_shared(self.root)

    # ---- look-ups -------------------------------------------------------------------------

    def steps(self) -> list[int]:
        """Return the steps of the complete checkpoints, ascending."""
        return self.history.steps()

    def path(self, step: int) -> Path:
        """Return the folder of the checkpoint of ``step``."""
        return self.history.path(step)

    def manifest(self, step: int) -> Manifest:
        """Read the manifest of a complete checkpoint.

        Raises:
            CheckpointError: if it is missing, unreadable or of another format.
        """
        return self.history.manifest(step)

    # ---- saving ---------------------------------------------------------------------------

    def save(
        self,
        step: int,
        model: torch.nn.Module,
        optimizer: Any,
        extra: dict[str, Any] | None = None,
        *,
        background: bool = False,
    ) -> Path:
        """Write the checkpoint of ``step``; when this returns it is complete on the disk.

        It becomes the end of the line: checkpoints that come after the step where this run goes
        on (the one loaded or saved last; all of them if it loaded none), or that have this step
        already, move to ``abandoned/<n>`` below the root, and rank 0 warns. Of the line the
        newest ``keep`` stay.

        Args:
            step: training steps done.
            model: the MimoModel (modules wrapped as trained).
            optimizer: the MimoOptimizer.
            extra: JSON values for the manifest.
            background: return once the state is copied to host memory; the files are written
                while training goes on. The checkpoint is not there before ``poll`` or ``wait``
                finds that all ranks have written; the next ``save`` and ``load`` wait for it.

        Raises:
            CheckpointError: on every rank if any rank could not write, this checkpoint or one
                that was being written; nothing is left behind.
        """
        self.wait()
        with phases.during(phases.SAVE):
            self._under_way = self._begin(step, model, optimizer, extra, background)
            if not background:
                self._finish()
        return self.path(step)

    def poll(self) -> bool:
        """Complete the save in the background if all ranks have written; all ranks call it.

        Between two steps: it costs one small exchange while a save is under way, else nothing.

        Returns:
            Whether no save is under way any more.

        Raises:
            CheckpointError: on every rank if any rank could not write; nothing is left behind.
        """
        if self._under_way is None:
            return True
        writer = self._under_way[1]
        said = gathered((writer.is_done(), writer.failed()))
        if not (all(done for done, _ in said) or any(failed for _, failed in said)):
            return False
        self.wait()
        return True

    def wait(self) -> None:
        """Complete the save in the background, however long it takes; all ranks call it.

        Call it before a run ends. Without a save under way it does nothing.

        Raises:
            CheckpointError: on every rank if any rank could not write; nothing is left behind.
        """
        if self._under_way is not None:
            with phases.during(phases.SAVE):
                self._finish()

    def _begin(
        self,
        step: int,
        model: torch.nn.Module,
        optimizer: Any,
        extra: dict[str, Any] | None,
        background: bool,
    ) -> tuple[Manifest, ShardWriter]:
        state = self._sharded_state(model, optimizer, is_loading=False)
        frozen = Frozen.find(state["model"], state["optimizer"])
        state["frozen"] = whole_stacks(frozen, state["model"])
        weights, moments = (_tensors(state[part]) for part in ("model", "optimizer"))
        size = global_tensors.total_bytes(weights) + global_tensors.total_bytes(moments)
        manifest = Manifest(
            step=step,
            layouts=self.layouts,
            world_size=dist.get_world_size(),
            shapes=global_tensors.shapes(weights),
            extra=copy.deepcopy(extra or {}),
            distributed_optimizer=optimizer.config.use_distributed_optimizer,
            frozen=sorted(frozen.names),
            optimizer=optimizer_settings.described(optimizer.config),
        )
        with self._nothing_left_behind(step):
            on_rank_0(lambda: self.history.begin(step, size), self._writing(step))
            return manifest, self._writer(step, state, background)

    def _writer(self, step: int, state: dict[str, Any], background: bool) -> ShardWriter:
        """What writes this rank's files, at work where it is to work in the background."""
        folder, made = self.history.partial(step), []
        together(lambda: made.append(plan_save(state, str(folder))), self._writing(step))

        def take() -> None:
            digests = self.digests
            made.append(ShardWriter(made[0], folder, digests=digests, background=background))

        alone(take, self._writing(step))
        if background:
            made[1].start()
        return made[1]

    def _finish(self) -> None:
        assert self._under_way is not None
        (manifest, writer), self._under_way = self._under_way, None
        step = manifest.step
        with self._nothing_left_behind(step):
            alone(writer.join, self._writing(step))
            together(writer.complete, self._writing(step))
            files = [file for part in gathered(writer.files) for file in part.items()]
            manifest = replace(manifest, files=dict(files))
            final = self.path(step)
            on_rank_0(lambda: self._publish(manifest), f"complete checkpoint {final}")
        self.history.stands_at = step
        on_rank_0(self.history.rotate, f"remove checkpoints older than {final}")

    def _publish(self, manifest: Manifest) -> None:
        """Describe the files that belong to no rank, then put the checkpoint on the line."""
        folder = self.history.partial(manifest.step)
        mine = manifest.files or {}
        rest = sorted({path.name for path in folder.iterdir()} - mine.keys())
        files = mine | integrity.describe(folder, rest, digests=self.digests)
        moved = self.history.publish(replace(manifest, files=files))
        if moved:
            warnings.warn(moved, stacklevel=4)

    @contextlib.contextmanager
    def _nothing_left_behind(self, step: int) -> Iterator[None]:
        """Inside, an error takes what was written along."""
        try:
            yield
        except CheckpointError:
            # Each rank does: after some failures rank 0 still waits for ranks that are gone.
            shutil.rmtree(self.history.partial(step), ignore_errors=True)
            raise

    def _writing(self, step: int) -> str:
        return f"write checkpoint {self.path(step)}"

    # ---- loading --------------------------------------------------------------------------

    def load(
        self,
        step: int,
        model: torch.nn.Module,
        optimizer: Any = None,
        *,
        modules: Collection[str] | None = None,
        settings: str | None = None,
    ) -> Manifest:
        """Load the checkpoint of ``step`` into model, optimizer and random generators.

        Random generators are restored where the layout is the one that saved. In another layout a
        rank's state has no counterpart: they are seeded from the run's seed, ``step`` and the
        rank's coordinates (``ModuleRandomness.reseed``).

        What trains may differ from when the checkpoint was saved, see ``frozen_state``.

        Without an optimizer the weights alone are loaded, whatever optimizer they were saved
        with: no optimizer state, no random states, and the run does not move to ``step``.

        Args:
            step: of the checkpoint.
            model: the MimoModel.
            optimizer: the MimoOptimizer, or None for weights alone.
            modules: names of the modules whose weights to load, such as ``("images",)``; the
                others stay as they are and may be of another shape, or absent from one side.
            settings: with an optimizer. ``"run"``, the default: what this run's
                ``OptimizerConfig`` changes counts, the rest goes on from where it was.
                ``"checkpoint"``: the saved parameter groups count. Rank 0 logs what differs;
                docs/checkpoints.md has the table.

        Returns:
            The checkpoint's manifest.

        Raises:
            CheckpointError: on every rank; before any tensor is read if the checkpoint is of
                another model or kind of optimizer, has no such module, or a file of it is
                missing, damaged or would execute code.
            ValueError: ``modules`` together with an optimizer, or none named; ``settings`` without
                one, or neither of the two.
        """
        if modules is not None and optimizer is not None:
            raise ValueError(
                "modules= loads weights alone; leave the optimizer out, or load all of the run"
            )
        if settings is not None:
            optimizer_settings.check_choice(settings)
            if optimizer is None:
                raise ValueError("settings= is for an optimizer; give one, or leave settings out")
        names = (modules,) if isinstance(modules, str) else modules
        if names is not None and not names:
            raise ValueError("modules= names none; leave it out to load the weights of all modules")
        self.wait()
        with phases.during(phases.LOAD):
            manifest = read_manifest(self.history, step)
            if optimizer is None:
                self._load_weights(manifest, model, names)
            else:
                self._load_run(manifest, model, optimizer, settings or optimizer_settings.RUN)
        return manifest

    def _load_run(
        self, manifest: Manifest, model: torch.nn.Module, optimizer: Any, settings: str
    ) -> None:
        path = self.path(manifest.step)
        check_same_optimizer(path, manifest, optimizer.config)
        state = self._sharded_state(model, optimizer, is_loading=True)
        name_as_saved(state, manifest.shapes)
        check_same_model(path, manifest.shapes, global_tensors.shapes(_tensors(state["model"])))
        if not self.same_layout(manifest):
            state.pop("rng")
            state.pop("rank_state", None)
        self._request_what_was_trained(state, frozenset(manifest.frozen or ()))
        loaded = self._read(manifest, state)
        model.load_state_dict(loaded["model"])
        optimizer.load_state_dict(loaded["optimizer"], settings=settings)
        if "rng" in loaded:
            set_rng_state(loaded["rng"], self.randomness)
        elif self.randomness:
            self.randomness.reseed(manifest.step)
        if self.rank_state is not None and "rank_state" in loaded:
            self.rank_state.load_state_dict(loaded["rank_state"])
        self.history.stands_at = manifest.step

    def _load_weights(
        self, manifest: Manifest, model: Any, modules: Collection[str] | None
    ) -> None:
        path = self.path(manifest.step)
        state = model.sharded_state_dict(metadata=dict(SHARDING))
        name_as_saved(state, manifest.shapes)
        here, there = global_tensors.shapes(_tensors(state)), manifest.shapes
        if modules is not None:
            here = weights_of(modules, here, "this model")
            there = weights_of(modules, there, f"checkpoint {path}")
            state = {k: entry for k, entry in state.items() if module_of(entry.key) in modules}
        check_same_model(path, there, here)
        check_no_main_copies(state)
        loaded = self._read(manifest, {"model": state})
        model.load_state_dict(loaded.get("model", {}), strict=modules is None)

    def _read(self, manifest: Manifest, state: dict[str, Any]) -> dict[str, Any]:
        """What the checkpoint holds of ``state``, after all checks of its files."""
        path = self.path(manifest.step)
        check_files(path, manifest, digests=self.digests)
        check_pickles(path)
        loaded: dict[str, Any] = {}
        together(
            lambda: loaded.update(
                cast(
                    dict, dist_checkpointing.load(state, str(path), fully_parallel_load(self.group))
                )
            ),
            f"read checkpoint {path}",
        )
        return loaded

    @staticmethod
    def _request_what_was_trained(state: dict[str, Any], then: frozenset[str]) -> None:
        """Fit the request to a checkpoint in which the weights ``then`` did not train."""
        now = Frozen.find(state["model"], state["optimizer"])
        state["frozen"] = whole_stacks(now, state["model"], skip=then)
        if then:
            state["optimizer"] = start_fresh(state["optimizer"], state["model"], then)

    def same_layout(self, manifest: Manifest) -> bool:
        """Return whether this run has the layout and world size that wrote the checkpoint."""
        return manifest.layouts == self.layouts and manifest.world_size == dist.get_world_size()

    # ---- state ----------------------------------------------------------------------------

    def _sharded_state(
        self, model: Any, optimizer: Any, is_loading: bool
    ) -> dict[str, Any]:
        """State of the whole run: model, optimizer, each rank's random generators."""
        model_state = model.sharded_state_dict(metadata=dict(SHARDING))
        rank, world = dist.get_rank(), dist.get_world_size()
        more = {}
        if self.rank_state is not None:
            own = self.rank_state.state_dict()
            more["rank_state"] = ShardedObject("rank_state", own, (world,), (rank,))
        return {
            **more,
            "model": model_state,
            "optimizer": optimizer.sharded_state_dict(
                model_state, is_loading=is_loading, metadata=dict(SHARDING)
            ),
            "rng": ShardedObject("rng", get_rng_state(self.randomness), (world,), (rank,)),
        }


def _tensors(part: dict[str, Any]) -> global_tensors.Described:
    """The tensors of a part of the state, those of all ranks, which call it together."""
    return global_tensors.of_all_ranks(global_tensors.described(part))
