# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that are whole or absent.

``megatron.core.dist_checkpointing`` writes and reads the tensors. This module decides where, and
makes the result visible in one step: a checkpoint is written under a hidden name and renamed
after every rank is done and the data is on the disk. A run killed at any moment leaves either a
complete checkpoint or a hidden folder that the next run removes.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.models.mimo.compat import fully_parallel_load, fully_parallel_save
from megatron.core.models.mimo.training import global_tensors, integrity, safe_pickles
from megatron.core.models.mimo.training.agreement import Failure, run_together
from megatron.core.models.mimo.training.frozen_state import Frozen, start_fresh, whole_stacks
from megatron.core.models.mimo.training.manifest import FORMAT, MANIFEST, Manifest
from megatron.core.models.mimo.training.randomness import ModuleRandomness
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from mimo_colocated import phases

_NAME = re.compile(r"step_(\d{8})")
_PARTIAL_PREFIX = ".saving_"
# Room for file headers and metadata on top of the tensors' bytes.
_DISK_MARGIN = 1.05
_DISK_SLACK_BYTES = 4 << 20
# Optimizer state that any layout can load (parameters of the model's own shapes).
SHARDING = {"distrib_optim_sharding_type": "fully_reshardable"}


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read; the message is one sentence for the user."""


class CheckpointStore:
    """Checkpoints of one run below ``root``.

    Every method but the pure look-ups must be called by all ranks together.

    Args:
        root: folder; made on first save.
        layouts: module name -> parallel sizes of this run.
        randomness: random states of the modules, saved and restored along.
        group: ranks that share the reading of what they all need, in place of all ranks; the
            language model's data and context parallel ranks are a good choice on large clusters.
        keep: how many of the newest checkpoints stay; older ones go after a save.
        digests: take a digest of every file when saving and compare it when loading; without,
            only the files' sizes (``integrity.py`` says what that costs).

    Raises:
        ValueError: if ``keep`` is less than 1.
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
        self.layouts = layouts
        self.randomness = randomness
        self.group = group
        self.keep = keep
        self.digests = digests

    # ---- look-ups -------------------------------------------------------------------------

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        if not self.root.is_dir():
            return []
        names = (_NAME.fullmatch(p.name) for p in self.root.iterdir() if p.is_dir())
        return sorted(int(m.group(1)) for m in names if m)

    def path(self, step: int) -> Path:
        """Folder of the checkpoint of ``step``."""
        return self.root / f"step_{step:08d}"

    def manifest(self, step: int) -> Manifest:
        """Read the manifest of a complete checkpoint.

        Raises:
            CheckpointError: if it is missing, unreadable or of another format.
        """
        file = self.path(step) / MANIFEST
        try:
            manifest = Manifest.from_json(file.read_text())
            if manifest.step != step:
                raise ValueError(f"its {MANIFEST} is not that of step {step}")
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(
                f"checkpoint {self.path(step)} cannot be read ({error}); "
                "remove that folder to use an earlier one"
            ) from error
        if manifest.format != FORMAT:
            raise CheckpointError(
                f"checkpoint {self.path(step)} has format {manifest.format}, "
                f"this version reads format {FORMAT}"
            )
        return manifest

    # ---- saving ---------------------------------------------------------------------------

    def save(
        self,
        step: int,
        model: torch.nn.Module,
        optimizer: Any,
        extra: dict[str, Any] | None = None,
    ) -> Path:
        """Write the checkpoint of ``step``; when this returns it is complete on the disk.

        Args:
            step: training steps done.
            model: the MimoModel (modules wrapped as trained).
            optimizer: the MimoOptimizer.
            extra: JSON values for the manifest.

        Raises:
            CheckpointError: on every rank if any rank could not write; nothing is left behind.
        """
        with phases.during(phases.SAVE):
            return self._save(step, model, optimizer, extra)

    def _save(
        self,
        step: int,
        model: torch.nn.Module,
        optimizer: Any,
        extra: dict[str, Any] | None,
    ) -> Path:
        final, partial = self.path(step), self.root / f"{_PARTIAL_PREFIX}{step:08d}"
        if final.exists():
            return final
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
            extra=extra or {},
            distributed_optimizer=optimizer.config.use_distributed_optimizer,
            frozen=sorted(frozen.names),
        )
        try:
            self._on_rank_0(lambda: self._prepare(partial, size), f"write checkpoint {final}")
            self._on_all_ranks(
                lambda: dist_checkpointing.save(state, str(partial), fully_parallel_save()),
                f"write checkpoint {final}",
            )
            manifest = replace(manifest, files=self._describe(partial, final))
            self._on_rank_0(
                lambda: self._publish(partial, final, manifest), f"complete checkpoint {final}"
            )
        except CheckpointError:
            # Each rank does: after some failures rank 0 still waits for ranks that are gone.
            shutil.rmtree(partial, ignore_errors=True)
            raise
        return final

    def _prepare(self, partial: Path, tensor_bytes: int) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        remove_partial(self.root)
        need = int(tensor_bytes * _DISK_MARGIN) + _DISK_SLACK_BYTES
        free = shutil.disk_usage(self.root).free
        if free < need:
            raise OSError(
                f"{need / 1e6:.1f} MB needed, {free / 1e6:.1f} MB free: make room on that disk"
            )
        partial.mkdir()

    def _describe(self, partial: Path, final: Path) -> dict[str, dict[str, Any]]:
        """Sizes and digests of the files; each rank reads what it wrote."""
        found: list[list[str]] = [[]]
        self._on_rank_0(
            lambda: found[0].extend(sorted(p.name for p in partial.iterdir())),
            f"write checkpoint {final}",
        )
        dist.broadcast_object_list(found, src=0)
        own = integrity.written_by(dist.get_rank(), dist.get_world_size(), found[0])
        mine: dict[str, dict[str, Any]] = {}
        self._agreed(
            run_together(
                lambda: mine.update(integrity.describe(partial, own, digests=self.digests)),
                has_collectives=False,
            ),
            f"write checkpoint {final}",
        )
        parts: list = [None] * dist.get_world_size()
        dist.all_gather_object(parts, mine)
        return {name: part[name] for part in parts for name in sorted(part)}

    def _publish(self, partial: Path, final: Path, manifest: Manifest) -> None:
        (partial / MANIFEST).write_text(manifest.to_json())
        for file in partial.iterdir():
            _fsync(file)
        _fsync(partial)
        os.rename(partial, final)
        _fsync(self.root)
        for step in self.steps()[: -self.keep]:
            # Hidden first: a run killed in between leaves no half of a checkpoint under its name.
            old = self.root / f"{_PARTIAL_PREFIX}over_{step:08d}"
            os.rename(self.path(step), old)
            shutil.rmtree(old, ignore_errors=True)

    # ---- loading --------------------------------------------------------------------------

    def load(self, step: int, model: torch.nn.Module, optimizer: Any) -> Manifest:
        """Load the checkpoint of ``step`` into model, optimizer and random generators.

        Random generators are restored where the layout is the one that saved. In another layout a
        rank's state has no counterpart: they are seeded from the run's seed, ``step`` and the
        rank's coordinates (``ModuleRandomness.reseed``).

        What trains may differ from when the checkpoint was saved, see ``frozen_state``.

        Returns:
            The checkpoint's manifest.

        Raises:
            CheckpointError: on every rank; before any tensor is read if the checkpoint is of
                another model or kind of optimizer, or a file of it is missing, damaged or would
                execute code.
        """
        with phases.during(phases.LOAD):
            return self._load(step, model, optimizer)

    def _load(self, step: int, model: torch.nn.Module, optimizer: Any) -> Manifest:
        manifest = self.manifest(step)
        self._check_same_optimizer(manifest, optimizer.config.use_distributed_optimizer)
        state = self._sharded_state(model, optimizer, is_loading=True)
        self._check_same_model(manifest, global_tensors.shapes(_tensors(state["model"])))
        if not self.same_layout(manifest):
            state.pop("rng")
        self._request_what_was_trained(state, frozenset(manifest.frozen or ()))
        path = self.path(step)
        self._check_files(path, manifest)
        self._check_pickles(path)
        loaded: dict[str, Any] = {}
        self._on_all_ranks(
            lambda: loaded.update(
                dist_checkpointing.load(state, str(path), fully_parallel_load(self.group))
            ),
            f"read checkpoint {path}",
        )
        model.load_state_dict(loaded["model"])
        optimizer.load_state_dict(loaded["optimizer"])
        if "rng" in loaded:
            self._set_rng_state(loaded["rng"])
        elif self.randomness:
            self.randomness.reseed(step)
        return manifest

    @staticmethod
    def _request_what_was_trained(state: dict[str, Any], then: frozenset[str]) -> None:
        """Fit the request to a checkpoint in which the weights ``then`` did not train."""
        now = Frozen.find(state["model"], state["optimizer"])
        state["frozen"] = whole_stacks(now, state["model"], skip=then)
        if then:
            state["optimizer"] = start_fresh(state["optimizer"], state["model"], then)

    def _check_files(self, path: Path, manifest: Manifest) -> None:
        """Compare all files with the manifest, each rank its share."""
        rank, world = dist.get_rank(), dist.get_world_size()
        if manifest.files is None:
            if rank == 0:
                warnings.warn(
                    f"checkpoint {path} was saved without digests; damage to its files would not "
                    "be seen",
                    stacklevel=3,
                )
            return
        sizes = {name: saved["bytes"] for name, saved in manifest.files.items()}
        mine = {name: manifest.files[name] for name in integrity.share(rank, world, sizes)}
        self._agreed(
            run_together(
                lambda: integrity.check(path, mine, digests=self.digests), has_collectives=False
            ),
            f"read checkpoint {path}",
            "remove that folder to use an earlier one",
        )

    def _check_pickles(self, path: Path) -> None:
        """Make sure that loading executes nothing, each rank its share."""
        rank, world = dist.get_rank(), dist.get_world_size()
        self._agreed(
            run_together(lambda: safe_pickles.check(path, rank, world), has_collectives=False),
            f"read checkpoint {path}",
        )

    def same_layout(self, manifest: Manifest) -> bool:
        """Whether this run has the layout and world size that wrote the checkpoint."""
        return manifest.layouts == self.layouts and manifest.world_size == dist.get_world_size()

    def _check_same_optimizer(self, manifest: Manifest, distributed: bool) -> None:
        """The distributed optimizer's state has a form of its own."""
        if manifest.distributed_optimizer in (None, distributed):
            return
        kinds = {True: "the distributed optimizer", False: "the plain optimizer"}
        raise CheckpointError(
            f"checkpoint {self.path(manifest.step)} was saved with {kinds[not distributed]}, this "
            f"run has {kinds[distributed]}; go on with {kinds[not distributed]}"
        )

    def _check_same_model(self, manifest: Manifest, shapes: dict[str, list[int]]) -> None:
        if manifest.shapes == shapes:
            return
        names = sorted(set(manifest.shapes) | set(shapes))
        name = next(n for n in names if manifest.shapes.get(n) != shapes.get(n))
        raise CheckpointError(
            f"checkpoint {self.path(manifest.step)} is of another model: '{name}' is "
            f"{manifest.shapes.get(name, 'absent')} there and {shapes.get(name, 'absent')} here; "
            "use the same model options, another output folder, or start afresh"
        )

    # ---- state ----------------------------------------------------------------------------

    def _sharded_state(
        self, model: torch.nn.Module, optimizer: Any, is_loading: bool
    ) -> dict[str, Any]:
        """State of the whole run: model, optimizer, each rank's random generators."""
        model_state = model.sharded_state_dict(metadata=dict(SHARDING))
        rank, world = dist.get_rank(), dist.get_world_size()
        return {
            "model": model_state,
            "optimizer": optimizer.sharded_state_dict(
                model_state, is_loading=is_loading, metadata=dict(SHARDING)
            ),
            "rng": ShardedObject("rng", self._get_rng_state(), (world,), (rank,)),
        }

    def _get_rng_state(self) -> dict[str, Any]:
        return {
            "python": random.getstate(),
            "numpy": np.random.get_state(),
            "torch": torch.get_rng_state(),
            "device": torch.cuda.get_rng_state(),
            "tracker": get_cuda_rng_tracker().get_states(),
            "modules": self.randomness.get_states() if self.randomness else {},
        }

    def _set_rng_state(self, state: dict[str, Any]) -> None:
        random.setstate(state["python"])
        np.random.set_state(state["numpy"])
        torch.set_rng_state(state["torch"])
        torch.cuda.set_rng_state(state["device"])
        get_cuda_rng_tracker().set_states(state["tracker"])
        if self.randomness:
            self.randomness.set_states(state["modules"])

    # ---- agreement ------------------------------------------------------------------------

    def _on_rank_0(self, action: Callable[[], Any], doing: str) -> None:
        mine = action if dist.get_rank() == 0 else lambda: None
        self._agreed(run_together(mine, has_collectives=False), doing)

    def _on_all_ranks(self, action: Callable[[], Any], doing: str) -> None:
        """Run ``action``; if it fails on any rank, fail on all with that rank's reason."""
        self._agreed(run_together(action, has_collectives=True), doing)

    @staticmethod
    def _agreed(failure: Failure | None, doing: str, advice: str = "") -> None:
        if failure is not None:
            text = f"rank {failure.rank} could not {doing}: {failure.reason}"
            raise CheckpointError(f"{text}; {advice}" if advice else text)


def remove_partial(root: Path) -> list[str]:
    """Remove what interrupted saves left below ``root``; returns the removed names."""
    removed = []
    for path in sorted(root.glob(f"{_PARTIAL_PREFIX}*")) if root.is_dir() else []:
        shutil.rmtree(path, ignore_errors=True)
        removed.append(path.name)
    return removed


def _tensors(part: dict[str, Any]) -> global_tensors.Described:
    """The tensors of a part of the state, those of all ranks, which call it together."""
    return global_tensors.of_all_ranks(global_tensors.described(part))


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
