# SPDX-License-Identifier: Apache-2.0
"""Names of modules that do not depend on the layout or on wrapping.

They are those of ``named_modules`` with wrappers (:mod:`..wrappers`) left out, layers counted over
all pipeline stages (virtual ones, too) and experts over all expert-parallel ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.nn import Module

from megatron.core.models.mimo.model.rank_modules import LANGUAGE_MODEL, VIRTUAL_STAGES
from megatron.core.models.mimo.wrappers import unwrapped, wrapped_key


def global_modules(module: Module, name: str = "") -> Iterator[tuple[str, Module]]:
    """Yield ``(global name, module)`` of ``module`` and all below it, parents first.

    Args:
        module: where to start.
        name: its own global name.
    """
    yield name, module
    for key, child in module.named_children():
        if key == wrapped_key(module):
            yield from global_modules(child, name)
        elif key == VIRTUAL_STAGES:
            for stage in child.children():
                yield from global_modules(stage, join(name, LANGUAGE_MODEL))
        elif key == "local_experts" and hasattr(module, "ep_group"):
            yield from _global_experts(child, join(name, key), module)
        else:
            yield from global_modules(child, join(name, _global_key(key, child)))


def _global_experts(experts: Module, name: str, owner: Any) -> Iterator[tuple[str, Module]]:
    """Experts under their indices over all expert-parallel ranks."""
    experts = unwrapped(experts)
    rank = 0 if owner.ep_group is None else owner.ep_group.rank()
    first = rank * len(list(experts.children()))
    yield name, experts
    for key, child in experts.named_children():
        yield from global_modules(child, join(name, str(first + int(key))))


def _global_key(key: str, child: Module) -> str:
    """A list index becomes the layer's index over all pipeline stages; names stay."""
    number = getattr(unwrapped(child), "layer_number", None)
    if key.isdigit() and isinstance(number, int):
        return str(number - 1)
    return key


def join(prefix: str, name: str) -> str:
    """Return ``prefix.name``, or ``name`` alone under no prefix."""
    return f"{prefix}.{name}" if prefix else name
