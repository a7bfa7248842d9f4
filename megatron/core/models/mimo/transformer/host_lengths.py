# SPDX-License-Identifier: Apache-2.0
"""Which layers read the lengths of packed sequences on the host, so that no device is waited for.

Megatron's rotary embeddings do, unless they are fused, and so does this project's attention. That
of Transformer Engine wants them on the device; it gets them there by :func:`te_attention`.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from megatron.core.models.gpt import GPTModel
from megatron.core.models.mimo.partition.packed_lengths import for_kernels
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.core.utils import unwrap_model

_found: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def reads_lengths_on_host(model: nn.Module) -> bool:
    """Return whether every layer of a language model takes cumulative lengths on the host.

    Layers say so by ``takes_host_lengths`` of their core attention. Others get them on the device.

    Args:
        model: a stage, bare or wrapped; its layers are looked at once.
    """
    inner: Any = unwrap_model(model)
    # A fused kernel of rotary embeddings reads them on the device.
    if not isinstance(inner, GPTModel) or inner.config.apply_rope_fusion:
        return False
    if inner not in _found:
        layers = [each for each in inner.modules() if isinstance(each, TransformerLayer)]
        _found[inner] = all(_attention_takes_host_lengths(each.self_attention) for each in layers)
    return _found[inner]


def _attention_takes_host_lengths(attention: nn.Module) -> bool:
    core = getattr(attention, "core_attention", None)
    return getattr(core, "takes_host_lengths", False)


@functools.cache
def te_attention() -> type[nn.Module]:
    """Return Megatron's attention of Transformer Engine, for lengths that are on the host.

    Raises:
        ImportError: Transformer Engine is not there.
    """
    from megatron.core.extensions.transformer_engine import TEDotProductAttention

    engine: Any = TEDotProductAttention.__bases__[0]
    is_told = "pad_between_seqs" in inspect.signature(engine.forward).parameters

    class DeviceLengthsAttention(TEDotProductAttention):
        """As its base; takes cumulative lengths on the host, too, and hands them on uploaded."""

        takes_host_lengths = True

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            if is_told:
                self.kept_packed_seq_params.add("pad_between_seqs")

        def forward(
            self,
            query: Tensor,
            *args: Any,
            packed_seq_params: PackedSeqParams | None = None,
            **kwargs: Any,
        ) -> Tensor:
            """Attend; arguments as for the base."""
            if packed_seq_params is not None:
                packed_seq_params = for_kernels(packed_seq_params, query.device)
            return super().forward(query, *args, packed_seq_params=packed_seq_params, **kwargs)

    return DeviceLengthsAttention
