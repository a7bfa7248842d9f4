# SPDX-License-Identifier: Apache-2.0
"""Where numbers stopped being finite: gradients by parameter and rank, outputs by module and rank.

Only looked for when a step has failed; all ranks look together and all learn the same.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron.core.models.mimo.config.role import MIMO_LANGUAGE_MODULE_KEY
from megatron.core.models.mimo.model.rank_modules import LANGUAGE_MODEL
from megatron.core.models.mimo.training.agreement import gathered
from megatron.core.models.mimo.training.global_names import global_modules, join
from megatron.core.models.mimo.wrappers import stepped

_NAMED, _LISTED = 3, 4


@dataclass(frozen=True)
class NonFiniteGradients:
    """What one rank holds of a module's gradients that are not finite.

    After DDP's reduction a rank may hold what another one computed: without a distributed
    optimizer all replicas hold the same, with one the rank that computed them and the one that
    updates that part.

    Attributes:
        module: its name.
        rank: of the world.
        parameters: global names of at most 3 parameters, the last in the module first: backward
            comes to it first.
        count: of all such parameters.
    """

    module: str
    rank: int
    parameters: tuple[str, ...]
    count: int


def find_nonfinite_gradients(
    modules: Mapping[str, Sequence[torch.nn.Module]],
) -> tuple[NonFiniteGradients, ...]:
    """Find gradients that are not finite; all ranks call it together and get the same.

    Args:
        modules: module name -> its parts on this rank, bare or wrapped; empty if there are none.
    """
    rank, mine = dist.get_rank(), []
    for name in sorted(modules):
        found = [key for key, gradient in _gradients(name, modules[name]) if _broken(gradient)]
        if found:
            named = tuple(reversed(found[-_NAMED:]))
            mine.append(NonFiniteGradients(name, rank, named, len(found)))
    return tuple(each for found in gathered(mine) for each in found)


def gradients_sentence(modules: Sequence[str], found: Sequence[NonFiniteGradients]) -> str:
    """Say ``gradients of images are not finite (rank 3: modality_submodules.images…weight)``.

    Args:
        modules: whose gradient norms are not finite.
        found: of :func:`find_nonfinite_gradients`.
    """
    parts = [_where(name, [each for each in found if each.module == name]) for name in modules]
    return f"gradients of {' and '.join(modules)} are not finite ({'; '.join(parts)})"


def find_nonfinite_outputs(
    modules: Iterable[tuple[str, torch.nn.Module]], run: Any
) -> dict[str, tuple[int, ...]]:
    """Return module name -> the ranks on which one of its outputs was not finite during ``run()``.

    All ranks call it together and get the same answer.

    Args:
        modules: (name, module) of this rank, bare or wrapped.
        run: a forward pass of all of them.
    """
    with _watched(modules) as mine:
        run()
    everywhere: list[list[str]] = gathered(sorted(mine))
    names = sorted({name for found in everywhere for name in found})
    return {
        name: tuple(rank for rank, found in enumerate(everywhere) if name in found)
        for name in names
    }


def outputs_sentence(found: Mapping[str, Sequence[int]]) -> str:
    """Say ``the output of images is not finite (rank 3)``; of encoders only, if they have any.

    What an encoder puts out goes into the language model, whose output is not finite then, either.
    """
    encoders = {name: ranks for name, ranks in found.items() if name != MIMO_LANGUAGE_MODULE_KEY}
    parts = [f"{name} is not finite ({ranks_text(r)})" for name, r in (encoders or found).items()]
    if not parts:
        return "in a second forward pass, without dropout, every output is finite"
    return "the output of " + ", that of ".join(parts)


def ranks_text(ranks: Sequence[int]) -> str:
    """Say ``rank 3``, ``ranks 0, 1``, ``ranks 0, 1, 2, 3 and 4 more``."""
    listed = ", ".join(map(str, ranks[:_LISTED]))
    more = f" and {len(ranks) - _LISTED} more" if len(ranks) > _LISTED else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {listed}{more}"


def _gradients(
    name: str, modules: Sequence[torch.nn.Module]
) -> Iterator[tuple[str, torch.Tensor | None]]:
    """(global name in the model, gradient) of a module's parameters."""
    language = name == MIMO_LANGUAGE_MODULE_KEY
    prefix = LANGUAGE_MODEL if language else f"modality_submodules.{name}"
    for module in map(stepped, modules):
        for path, part in global_modules(module, prefix):
            for key, parameter in part.named_parameters(recurse=False):
                yield join(path, key), getattr(parameter, "main_grad", parameter.grad)


def _broken(tensor: torch.Tensor | None) -> bool:
    return tensor is not None and not bool(torch.isfinite(tensor).all())


def _where(name: str, found: Sequence[NonFiniteGradients]) -> str:
    if not found:
        return f"{name}: no single element, their norm overflows"
    first = found[0]
    ranks = [each.rank for each in found if each.parameters[0] == first.parameters[0]]
    more = f" and {first.count - 1} more" if first.count > 1 else ""
    return f"{ranks_text(ranks)}: {first.parameters[0]}{more}"


@contextlib.contextmanager
def _watched(modules: Iterable[tuple[str, torch.nn.Module]]) -> Iterator[set[str]]:
    """Names of modules that put out something that is not finite, while inside."""
    found: set[str] = set()

    def watch(name: str, module: torch.nn.Module) -> torch.utils.hooks.RemovableHandle:
        def look(_module: Any, _inputs: Any, output: Any) -> None:
            if torch.is_tensor(output) and _broken(output):
                found.add(name)

        return module.register_forward_hook(look)

    handles = [watch(name, module) for name, module in modules]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
