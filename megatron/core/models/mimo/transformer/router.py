# SPDX-License-Identifier: Apache-2.0
"""What the router of experts lacks in Megatron-Core 0.16: a layout-independent loss, and CPUs."""

from __future__ import annotations

from typing import Any, cast

import torch

from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler, z_loss_func
from megatron.core.transformer.moe.router import TopKRouter

_DTYPES: dict[str | None, torch.dtype] = {"fp32": torch.float32, "fp64": torch.float64}


class PerTokenRouter(TopKRouter):
    """Stock's router with balancing and z losses scaled for ``calculate_per_token_loss``.

    All gradients are divided by the tokens of the global batch, so a loss that is a mean over a
    microbatch has to be multiplied by the tokens of that microbatch. Megatron-Core 0.16 takes the
    tokens of this rank: with the sequence cut over TP x CP the losses come out that many times too
    small, and the loss per sequence ("seq_aux_loss") smaller still by the number of samples.

    Every token counts; there is no padding mask in a :class:`MimoModel`.
    """

    def gating(self, input: torch.Tensor) -> torch.Tensor:
        """Return logits (..., experts) of ``input`` (..., H), in the router's dtype.

        Stock's own product looks for Transformer Engine's, and fails where that is not installed.
        """
        if hasattr(moe_utils, "te_general_gemm"):
            return super().gating(input)
        dtype = _DTYPES.get(self.config.moe_router_dtype, input.dtype)
        # Stock builds the router on the host, wherever the rest of the model is.
        weight = self.weight.to(input.device, dtype)
        bias = None if self.bias is None else self.bias.to(input.device, dtype)
        return torch.nn.functional.linear(input.to(dtype), weight, bias)

    def attach_and_log_load_balancing_loss(
        self, activation: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Attach stock's loss, told the tokens of the whole microbatch of this replica.

        Args:
            activation: (tokens of this rank, experts), which the loss is attached to.
            *args, **kwargs: as in stock.
        """
        tokens = activation.shape[0] * self.tp_cp_group.size()
        return super().attach_and_log_load_balancing_loss(
            activation, *args, **{**kwargs, "valid_token_count": tokens}
        )

    def apply_z_loss(
        self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Apply stock's, which counts this rank's tokens, and as much per other TP x CP rank.

        Raises:
            ValueError: a padding mask; it would have to say what the other ranks have.
        """
        if padding_mask is not None:
            raise ValueError(
                "PerTokenRouter counts every token and takes no padding_mask, got one of shape "
                f"{tuple(padding_mask.shape)}; leave padding out by the loss mask"
            )
        logits = super().apply_z_loss(logits, padding_mask)
        ranks, coefficient = self.tp_cp_group.size(), self.config.moe_z_loss_coeff
        missed = (ranks - 1) * logits.shape[0]
        applies = coefficient is not None and self.training and torch.is_grad_enabled()
        if not (applies and self.calculate_per_token_loss and missed):
            return logits
        loss = z_loss_func(logits, cast(float, coefficient) / ranks)
        return MoEAuxLossAutoScaler.apply(logits, loss * missed)
