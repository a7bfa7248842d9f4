# SPDX-License-Identifier: Apache-2.0
"""A part of the model that runs again in backward instead of keeping its activations.

PyTorch's checkpoint without a second backward pass inside the first (``use_reentrant=False``): the
part's operations keep their place in the graph, so that each weight gets its gradient once per
backward pass, as without recomputation. DDP counts gradients to know when to reduce a bucket, and
several microbatches that go back together would be counted one by one otherwise.

The part runs again when its first operation asks for what it kept. All TP ranks of an encoder get
there in the same order: after the bridge's backward exchange. DDP's hooks, which run again too,
find the weights gathered.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from megatron.core.models.mimo.randomness import capture_states, restore_states


def recomputed(
    function: Callable[..., torch.Tensor | None], *arguments: torch.Tensor, trains: bool
) -> torch.Tensor | None:
    """Return ``function(*arguments)``, whose activations are computed again in backward.

    Dropout drops the same elements again: the random states, those of Megatron-Core's tracker
    included, are put back. What needs no gradient is not run again.

    Args:
        function: the part; tensors that it closes over must not change until backward.
        arguments: further tensors that it reads; they are kept as autograd keeps others.
        trains: whether one of its weights needs a gradient.
    """
    needs_gradient = trains or any(argument.requires_grad for argument in arguments)
    if not (needs_gradient and torch.is_grad_enabled()):
        return function(*arguments)
    drawn = _AsBefore()
    return checkpoint(
        function,
        *arguments,
        use_reentrant=False,
        preserve_rng_state=False,
        context_fn=lambda: (nullcontext(), drawn),
    )


class _AsBefore:
    """Within it, random numbers are those that followed when it was made; once or more often."""

    def __init__(self) -> None:
        self._then = _states()
        self._after: Any = None

    def __enter__(self) -> None:
        self._after = _states()
        _restore(self._then)

    def __exit__(self, *_: Any) -> None:
        _restore(self._after)


def _states() -> tuple[torch.Tensor, dict[str, Any]]:
    return torch.get_rng_state(), capture_states()


def _restore(states: tuple[torch.Tensor, dict[str, Any]]) -> None:
    torch.set_rng_state(states[0])
    restore_states(states[1])
