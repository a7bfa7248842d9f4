# SPDX-License-Identifier: Apache-2.0
"""Weights that were loaded before training: initial weights leave them, and all ranks have them.

What ``transformers``' ``from_pretrained`` read from a file is known: it marks those parameters, and
not the ones that the file lacked. Whatever else loads weights says so with :func:`keep_weights`.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.nn import Module, Parameter

from megatron.core.models.mimo.training.agreement import gathered
from megatron.core.models.mimo.training.global_names import global_modules, join
from megatron.core.models.mimo.wrappers import unwrapped
from megatron.core.process_groups_config import ProcessGroupCollection

logger = logging.getLogger(__name__)

ModuleType = TypeVar("ModuleType", bound=Module)

_MARK = "keeps_pretrained_weights"
# On parameters that transformers (5) read from a file; on no others.
_LOADED_BY_TRANSFORMERS = "_is_hf_initialized"
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def keep_weights(module: ModuleType) -> ModuleType:
    """Mark the weights of ``module`` as loaded, so that ``initialize_weights`` leaves them.

    Call it where the weights were loaded, on all ranks. Not needed after ``from_pretrained`` of
    transformers, which marks what it read.

    Args:
        module: an encoder, a projection or a part of one, bare or wrapped.

    Returns:
        The module.
    """
    setattr(unwrapped(module), _MARK, True)
    return module


def kept_parameters(root: Module) -> dict[int, Parameter]:
    """Return what was loaded below ``root``, by ``id``."""
    marked = [module for module in root.modules() if _MARK in module.__dict__]
    kept = {id(p): p for module in marked for p in module.parameters()}
    loaded = {id(p): p for p in root.parameters() if getattr(p, _LOADED_BY_TRANSFORMERS, False)}
    return kept | loaded


def say_what_is_kept(root: Module, name: str, kept: Mapping[int, Parameter]) -> None:
    """Log on rank 0 how many weights ``initialize_weights`` leaves as they are, if only some."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    others = len(list(root.parameters())) - len(kept)
    if kept and others and rank == 0:
        logger.warning(
            "initialize_weights kept %d pretrained parameters of %s and draws the other %d",
            len(kept),
            name or type(unwrapped(root)).__name__,
            others,
        )


def refuse_different_weights(
    modules: Mapping[str, Sequence[Module]], collections: Mapping[str, ProcessGroupCollection]
) -> None:
    """Compare pretrained weights over the ranks that hold copies; all ranks call it together.

    Args:
        modules: module name -> its parts on this rank.
        collections: module name -> its process groups.

    Raises:
        ValueError: the same on all ranks: copies differ, as where a rank read another file.
    """
    mine = {}
    for name, parts in modules.items():
        mine.update(_digests(name, parts, collections[name]))
    everywhere: list[dict[tuple, str]] = gathered(mine)
    for place in sorted({place for told in everywhere for place in told}):
        found: dict[str, list[int]] = {}
        for rank, told in enumerate(everywhere):
            if place in told:
                found.setdefault(told[place], []).append(rank)
        if len(found) > 1:
            raise ValueError(
                f"pretrained weights of module '{place[0]}' differ between ranks "
                f"{' and '.join(map(str, found.values()))}, which hold copies of one another; load "
                "the same file, and mark it with keep_weights, on all of them"
            )


def _digests(
    name: str, parts: Sequence[Module], groups: ProcessGroupCollection
) -> Iterator[tuple[tuple, str]]:
    """(who holds copies, digest): of weights that TP does not cut, and of those that it does."""
    places = (getattr(groups, axis, None) for axis in ("pp", "tp"))
    pp, tp = (0 if group is None else group.rank() for group in places)
    sums: dict[bool, list[tuple[str, torch.Tensor]]] = {False: [], True: []}
    for part in parts:
        kept = kept_parameters(part)
        for path, module in global_modules(part):
            for key, parameter in module.named_parameters(recurse=False):
                # Experts are spread over ranks of their own.
                if id(parameter) in kept and getattr(parameter, "allreduce", True):
                    cut = bool(getattr(parameter, "tensor_model_parallel", False))
                    sums[cut].append((join(path, key), _sum_of_bits(parameter)))
    for cut, told in sums.items():
        numbers = torch.stack([x for _, x in told]).tolist() if told else []
        text = repr([[key for key, _ in told], numbers]).encode()
        yield (name, pp, tp if cut else -1), hashlib.blake2b(text, digest_size=8).hexdigest()


def _sum_of_bits(parameter: Parameter) -> torch.Tensor:
    """Of integers, so that the order of summing does not matter."""
    data = parameter.detach().contiguous()
    return data.view(_INTEGERS[data.element_size()]).sum(dtype=torch.int64)
