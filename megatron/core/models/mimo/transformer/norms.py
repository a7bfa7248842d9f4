# SPDX-License-Identifier: Apache-2.0
"""LayerNorm and RMSNorm for Megatron-Core's local layers, with sequence parallelism.

Under sequence parallelism each TP rank normalises its own part of the sequence, so the gradient
of a norm's weight and bias is a partial sum. Megatron-Core's ``finalize_model_grads`` sums the
gradients of parameters that carry ``sequence_parallel = True`` over the TP group; all that the
norm has to do is to carry it. Stock's wrapper of the PyTorch norms refuses instead.
"""

from __future__ import annotations

from typing import Any

import torch

from megatron.core.transformer.transformer_config import TransformerConfig

_CLASSES: dict[str, type[torch.nn.Module]] = {
    "LayerNorm": torch.nn.LayerNorm,
    "RMSNorm": torch.nn.RMSNorm,
}


class SequenceParallelNorm:
    """Builds PyTorch's norm of ``config.normalization``; use the class itself in a spec.

    The call returns the PyTorch module, so parameter names are ``weight`` and ``bias``.

    Args:
        config: ``normalization``, ``sequence_parallel``, ``params_dtype`` and
            ``use_cpu_initialization`` count. ``persist_layer_norm`` and
            ``memory_efficient_layer_norm`` choose a kernel, not a function, and are ignored.
        hidden_size: size of the last dim, which is normalised.
        eps: added to the variance.
        unused: what other Megatron-Core versions pass to their own norm classes.

    Raises:
        ValueError: another normalization, or zero-centred gamma.
    """

    def __new__(
        cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: Any
    ) -> torch.nn.Module:
        """Build the norm and mark its parameters."""
        norm_class = _CLASSES.get(config.normalization)
        if norm_class is None:
            raise ValueError(
                f"normalization={config.normalization!r} is not one of {sorted(_CLASSES)}"
            )
        if config.layernorm_zero_centered_gamma:
            raise ValueError(
                "layernorm_zero_centered_gamma=True is not supported by PyTorch's norms; set it "
                "to False or use Transformer Engine"
            )
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        norm = norm_class(hidden_size, eps=eps, device=device, dtype=config.params_dtype)
        parameter: Any
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm
