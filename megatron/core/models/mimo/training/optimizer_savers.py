# SPDX-License-Identifier: Apache-2.0
"""What stock's savers of optimizers leave out.

Padding between buckets, step counts before the first step, and fp32 parameters among half-precision
ones.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import torch

from megatron.core.dist_checkpointing.optimizer import (
    get_param_id_to_sharded_param_map,
    make_sharded_optimizer_tensor,
    optim_state_to_sharding_state,
)
from megatron.core.models.mimo.training.inner_optimizers import inner_optimizers
from megatron.core.optimizer.optimizer import (
    Float16OptimizerWithFloat16Params,
    FP32Optimizer,
    MegatronOptimizer,
)

MAIN_COPIES = "fp32_from_fp16_params"
"""Stock's name of the fp32 copies of half-precision weights in a state."""


@contextlib.contextmanager
def mended(optimizer: MegatronOptimizer) -> Iterator[None]:
    """Let savers of the inner optimizers do, inside, what stock's leave out.

    A distributed optimizer puts its buckets together without their padding and then cuts
    parameters out at their padded places: from the second bucket of a module on, moments and main
    weights would be saved shifted. The plain ones number their parameters without the fp32 ones
    among half-precision ones, and save no step count before the first step. What they load to
    allocate state has been allocated.
    """
    patched = []
    for inner in inner_optimizers([optimizer]):
        replaced: dict[str, Callable[..., Any]] = {}
        if hasattr(inner, "get_parameter_state_dp_zero"):
            gather = inner.get_parameter_state_dp_zero
            replaced["get_parameter_state_dp_zero"] = functools.partial(
                _gather_padded, inner, gather
            )
            replaced["load_state_dict"] = lambda _state: None
        elif isinstance(inner, (FP32Optimizer, Float16OptimizerWithFloat16Params)):
            replaced["sharded_state_dict"] = functools.partial(_sharded_plain, inner)
        vars(inner).update(replaced)
        patched.append((inner, replaced))
    try:
        yield
    finally:
        for inner, replaced in patched:
            for name in replaced:
                delattr(inner, name)


def _sharded_plain(inner: Any, model_state: dict, *_args: Any, **_kwargs: Any) -> dict[str, Any]:
    """Sharded state of a plain optimizer; the keys of tensors are stock's."""
    state = inner.state_dict()
    torch_state = state.get("optimizer", state)  # the fp32 optimizer's is the torch optimizer's own
    numbers = _numbers(inner)
    parameters: Any = model_weights(inner)
    weights: Any = get_param_id_to_sharded_param_map(model_state, parameters)
    step = inner._extract_common_per_param_step(torch_state)
    optim_state_to_sharding_state(torch_state, weights, exclude_keys=("step",))
    if step is not None:
        torch_state["state"]["common_step"] = step
    if MAIN_COPIES in state:
        state[MAIN_COPIES] = [
            [
                make_sharded_optimizer_tensor(
                    weights[numbers[id(copy)]], copy, "optimizer.state.fp32_param"
                )
                for copy in group
            ]
            for group in state[MAIN_COPIES]
        ]
    return state


def _numbers(inner: Any) -> dict[int, int]:
    """The id of a tensor that the torch optimizer steps -> its number in that optimizer's state."""
    stepped = chain.from_iterable(group["params"] for group in inner.param_groups)
    return {id(tensor): number for number, tensor in enumerate(stepped)}


def model_weights(inner: Any) -> list[torch.Tensor]:
    """Return the model's parameters behind the tensors that the torch optimizer steps, in order."""
    halves = chain.from_iterable(getattr(inner, "float16_groups", ()))
    copies = chain.from_iterable(getattr(inner, "fp32_from_float16_groups", ()))
    behind = {id(copy): half for half, copy in zip(halves, copies, strict=True)}
    stepped = chain.from_iterable(group["params"] for group in inner.param_groups)
    return [behind.get(id(tensor), tensor) for tensor in stepped]


def _gather_padded(inner: Any, gather: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Stock's gathered state by buffer and dtype, each tensor as long as its buffer."""
    state: Any = gather(*args, **kwargs)
    if state is None:
        return None
    for number, buffer in enumerate(inner.buffers):
        for tensors in state[number].values():
            for key, value in tensors.items():
                if torch.is_tensor(value):
                    tensors[key] = _spread(value, buffer)
    return state


def _spread(gathered: torch.Tensor, buffer: Any) -> torch.Tensor:
    """Buckets without padding, one after the other, put where they are in the buffer."""
    whole, start = gathered.new_zeros(buffer.numel), 0
    for bucket in buffer.buckets:
        size = bucket.numel_unpadded
        whole[bucket.offset : bucket.offset + size] = gathered[start : start + size]
        start += size
    return whole
