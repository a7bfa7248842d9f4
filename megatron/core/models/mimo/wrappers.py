# SPDX-License-Identifier: Apache-2.0
"""Wrappers around modules, which do not show in names.

DDP, ``Float16Module``, ``torch.compile`` and checkpoint wrappers hold a module under a key of their
own (``module``, ``_orig_mod``, ``_checkpoint_wrapped_module``). Whatever goes by the names of
weights (initial weights, checkpoints, messages) leaves those levels out, so that wrapping a part,
or not, makes no difference.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedObject,
    ShardedTensor,
    ShardedTensorFactory,
)
from megatron.core.distributed import (
    DistributedDataParallel,
    TorchFullyShardedDataParallel,
)
from megatron.core.transformer.module import Float16Module

# What nothing but a wrapper calls what it holds. The second one takes names without it.
_COMPILED, _CHECKPOINTED = "_orig_mod", "_checkpoint_wrapped_module"
_KEYS = (_COMPILED, _CHECKPOINTED)
# Wrappers that hold a "module", as others do, too.
_CLASSES = (
    DistributedDataParallel,
    TorchFullyShardedDataParallel,
    Float16Module,
    torch.nn.parallel.DistributedDataParallel,
)
_HIDDEN = re.compile(rf"(?:^|(?<=\.))(?:{'|'.join(_KEYS)})\.")

# A module of the model, and the wrappers around it as a whole.
_WHOLE_MODULE = re.compile(r"(?<![^.])(language_model|modality_submodules\.[^.]+)\.((?:module\.)*)")


def wrapped_key(module: nn.Module) -> str | None:
    """Return the key under which a wrapper holds what it wraps; ``None`` for other modules."""
    if isinstance(module, _CLASSES):
        return "module"
    return next((key for key in _KEYS if key in module._modules), None)


def unwrapped(module: Any) -> Any:
    """Return what is within all wrappers; anything but a wrapper as it is."""
    while isinstance(module, nn.Module) and (key := wrapped_key(module)) is not None:
        module = module._modules[key]
    return module


def stepped(module: Any) -> Any:
    """Return the module whose parameters an optimizer steps: plain ones, under the same names.

    A torch-native module's are ``DTensor``; their plain parts are in its ``local_shards``.

    Args:
        module: bare or wrapped.
    """
    shards = getattr(module, "local_shards", None)
    return shards if isinstance(shards, nn.Module) else module


def is_torch_native(module: Any) -> bool:
    """Return whether a wrapped module is one that PyTorch's own tools shard."""
    return stepped(module) is not module


def clean_name(module: nn.Module, name: str) -> str:
    """Return the name of a parameter or buffer of ``module`` without its wrappers.

    Args:
        module: bare or wrapped.
        name: as ``named_parameters`` or a state has it, wrappers in it or not.
    """
    return ".".join(part for part, wraps in _levels(module, name) if not wraps)


def loaded_name(module: nn.Module, name: str) -> str:
    """Return the name under which ``module.load_state_dict`` takes a weight.

    Args:
        module: bare or wrapped.
        name: of the weight, with or without any of the wrappers, also of ones that are not there.
    """
    return ".".join(part for part, _ in _levels(module, name) if part != _CHECKPOINTED)


def _levels(module: nn.Module | None, name: str) -> Iterator[tuple[str, bool]]:
    """(key, whether a wrapper's) on the way to a weight; all wrappers that are there, no others."""
    for part in name.split("."):
        while module is not None and (key := wrapped_key(module)) not in (None, part):
            yield key, True
            module = module._modules[key]
        wraps = module is not None and wrapped_key(module) == part
        if part in _KEYS and not wraps:
            continue
        yield part, wraps
        module = None if module is None else module._modules.get(part)


def hide_in_states(module: nn.Module) -> None:
    """Make ``module.state_dict()`` name no wrappers, and loading ask for none.

    The names of modules without wrappers stay as they are.
    """
    module.register_state_dict_post_hook(_clean_state)
    module.register_load_state_dict_pre_hook(_name_as_loaded)


def _clean_state(module: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    for key in [key for key in state if key.startswith(prefix)]:  # all, to keep their order
        state[prefix + clean_name(module, key[len(prefix) :])] = state.pop(key)


def _name_as_loaded(module: nn.Module, state: dict[str, Any], prefix: str, *_unused: Any) -> None:
    for key in [key for key in state if key.startswith(prefix)]:
        state[prefix + loaded_name(module, key[len(prefix) :])] = state.pop(key)


def hide_in_checkpoint(state: dict[str, Any]) -> None:
    """Take ``torch.compile`` and checkpoint wrappers out of the names on the disk, in place.

    Args:
        state: a sharded state; its own keys, for ``load_state_dict``, stay.
    """
    for entry in nested_values(state):
        if isinstance(entry, (ShardedTensor, ShardedTensorFactory, ShardedObject)):
            entry.key = _HIDDEN.sub("", entry.key)


def name_as_saved(state: dict[str, Any], saved: Iterable[str]) -> None:
    """Ask for the weights of a checkpoint by its names, in place: with its DDP, or without.

    As in stock, DDP and ``Float16Module`` around a whole module are in the names on the disk.

    Args:
        state: the sharded state that is to be loaded, of a model or an optimizer.
        saved: the names of weights in the checkpoint.
    """
    found = (_WHOLE_MODULE.search(name) for name in saved)
    there = {match[1]: match[2] for match in found if match}
    for entry in nested_values(state):
        if isinstance(entry, (ShardedTensor, ShardedTensorFactory, ShardedObject)):
            match = _WHOLE_MODULE.search(entry.key)
            if match and match[1] in there:
                rest = entry.key[match.end() :]
                entry.key = f"{entry.key[: match.start()]}{match[1]}.{there[match[1]]}{rest}"
