# SPDX-License-Identifier: Apache-2.0
"""A part of the model that runs again in backward instead of keeping its activations.

Megatron-Core's own checkpoint does it: it puts back the random states, those of its tracker
included, so that dropout drops the same elements. It runs the part before any gradient of the
part's weights is there. So the weights are still those of forward, no gradient bucket of theirs
has been reduced, and DDP's hooks, which run again too, find them gathered. All TP ranks of an
encoder get there in the same order: after the bridge's backward exchange.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn

from megatron.core.tensor_parallel import checkpoint


def recomputed(
    function: Callable[..., torch.Tensor | None],
    arguments: tuple[torch.Tensor, ...],
    parameters: Iterable[nn.Parameter],
) -> torch.Tensor | None:
    """``function(*arguments)``, whose activations are computed again in backward.

    Without anything to train there is no backward pass, and nothing is computed twice.

    Args:
        function: the part; tensors that it closes over must not change until backward.
        arguments: the tensors of which it gives a gradient.
        parameters: those of the part.
    """
    trains = any(parameter.requires_grad for parameter in parameters)
    needs_gradient = trains or any(argument.requires_grad for argument in arguments)
    if not (needs_gradient and torch.is_grad_enabled()):
        return function(*arguments)
    # Whether the output has a backward pass is decided by the arguments: this one says that the
    # weights need it, where the inputs (pixels) do not.
    anchor = torch.empty(0, requires_grad=True)
    return checkpoint(lambda _, *rest: function(*rest), False, anchor, *arguments)
