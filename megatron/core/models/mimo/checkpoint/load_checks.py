# SPDX-License-Identifier: Apache-2.0
"""What is checked of a checkpoint before a tensor of it is read; all ranks check together."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron.core.models.mimo.checkpoint import integrity, safe_pickles
from megatron.core.models.mimo.checkpoint.errors import (
    CheckpointError,
    alone,
)
from megatron.core.models.mimo.checkpoint.history import History
from megatron.core.models.mimo.checkpoint.manifest import Manifest
from megatron.core.models.mimo.config.role import MIMO_LANGUAGE_MODULE_KEY
from megatron.core.models.mimo.training.agreement import gathered

Shapes = Mapping[str, list[int]]


def read_manifest(history: History, step: int) -> Manifest:
    """Read the manifest of ``step`` on all ranks.

    Raises:
        CheckpointError: on all ranks if one cannot read it, or reads another one.
    """
    manifest, problem, digest = None, "", ""
    try:
        manifest = history.manifest(step)
        digest = hashlib.sha256(manifest.to_json().encode()).hexdigest()
    except CheckpointError as error:
        problem = str(error)
    said = gathered((problem, digest))
    for rank, (problem, digest) in enumerate(said):
        if problem:
            raise CheckpointError(problem)
        if digest != said[0][1]:
            raise CheckpointError(
                f"rank {rank} sees another checkpoint in {history.path(step)} than rank 0; give "
                "all ranks one folder on a file system that all nodes share"
            )
    assert manifest is not None
    return manifest


def check_files(path: Path, manifest: Manifest, *, digests: bool) -> None:
    """Compare all files with the manifest, each rank its share."""
    rank, world = dist.get_rank(), dist.get_world_size()
    if manifest.files is None:
        if rank == 0:
            warnings.warn(
                f"checkpoint {path} was saved without digests; damage to its files would not be "
                "seen",
                stacklevel=4,
            )
        return
    sizes = {name: saved["bytes"] for name, saved in manifest.files.items()}
    mine = {name: manifest.files[name] for name in integrity.share(rank, world, sizes)}
    alone(
        lambda: integrity.check(path, mine, digests=digests),
        f"read checkpoint {path}",
        "remove that folder to use an earlier one",
    )


def check_pickles(path: Path) -> None:
    """Make sure that loading executes nothing, each rank its share."""
    rank, world = dist.get_rank(), dist.get_world_size()
    alone(lambda: safe_pickles.check(path, rank, world), f"read checkpoint {path}")


def check_same_optimizer(path: Path, manifest: Manifest, config: Any) -> None:
    """Refuse state of another kind of optimizer; the distributed one's has its own form, too.

    Args:
        path: of the checkpoint.
        manifest: of it.
        config: ``OptimizerConfig`` of this run.
    """
    distributed = config.use_distributed_optimizer
    saved = (manifest.optimizer or {}).get("optimizer", config.optimizer)
    if saved != config.optimizer:
        raise CheckpointError(
            f"checkpoint {path} was saved with optimizer={saved!r}, this "
            f"run has optimizer={config.optimizer!r}; go on with optimizer={saved!r}"
        )
    if manifest.distributed_optimizer in (None, distributed):
        return
    kinds = {True: "the distributed optimizer", False: "the plain optimizer"}
    raise CheckpointError(
        f"checkpoint {path} was saved with {kinds[not distributed]}, this "
        f"run has {kinds[distributed]}; go on with {kinds[not distributed]}"
    )


def check_same_model(path: Path, there: Shapes, here: Shapes) -> None:
    """Refuse weights of other names or shapes."""
    if there == here:
        return
    name = next(n for n in sorted({*there, *here}) if there.get(n) != here.get(n))
    raise CheckpointError(
        f"checkpoint {path} is of another model: '{name}' is {there.get(name, 'absent')} there "
        f"and {here.get(name, 'absent')} here; use the same model options, another output "
        "folder, or start afresh"
    )


def module_of(key: str) -> str:
    """Return the module that a weight belongs to.

    >>> module_of("language_model.decoder.final_layernorm.weight")
    'language'
    >>> module_of("modality_submodules.images.encoders.vit.weight")
    'images'
    """
    first, second = key.split(".")[:2]
    return second if first == "modality_submodules" else MIMO_LANGUAGE_MODULE_KEY


def weights_of(modules: Collection[str], shapes: Shapes, owner: str) -> Shapes:
    """Return the weights of some modules.

    Args:
        modules: their names.
        shapes: of all weights that ``owner`` has.
        owner: the subject of the error.

    Raises:
        CheckpointError: a module that it does not have.
    """
    known = sorted({module_of(key) for key in shapes})
    unknown = sorted(set(modules) - set(known))
    if unknown:
        raise CheckpointError(f"{owner} has no module {unknown[0]!r}; it has {known}")
    return {key: shape for key, shape in shapes.items() if module_of(key) in modules}


def check_no_main_copies(state: Mapping[str, Any]) -> None:
    """Refuse to load weights under an optimizer that keeps fp32 copies of them.

    Its next step would put the copies in place of what was loaded.
    """
    weights = [getattr(entry, "data", None) for entry in state.values()]
    copied = any(
        getattr(weight, "main_param", weight) is not weight
        for weight in weights
        if isinstance(weight, torch.nn.Parameter)
    )
    if any(gathered(copied)):
        raise CheckpointError(
            "an optimizer keeps fp32 copies of this model's weights, and its next step would put "
            "them back; load weights before the optimizer is built, or load the optimizer, too"
        )
