# SPDX-License-Identifier: Apache-2.0
"""Keys and values of a microbatch's samples, kept so that a further token costs itself alone.

They lie in Megatron-Core's static inference context. Its attention makes that memory itself, on a
GPU alone, unless it is there: here it is made beforehand, on the model's device.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.models.mimo.job.built_model import LANGUAGE, BuiltModel
from megatron.core.models.mimo.wrappers import is_torch_native
from megatron.core.utils import unwrap_model

_CUT = ("tp", "cp", "pp", "ep")


def can_cache(built: BuiltModel) -> bool:
    """Return whether the keys and values of a model can be kept: the same on all ranks.

    Every rank needs the whole language model, each sample in a row of its own, and positions that
    count tokens. Elsewhere a token's forward pass is that of the whole sequence.

    Args:
        built: the model.
    """
    groups, language = built.collections[LANGUAGE], built.model.language_model
    sizes = (getattr(groups, axis, None) for axis in _CUT)
    if built.packed or any(group is not None and group.size() > 1 for group in sizes):
        return False
    if is_torch_native(language):
        return False
    return getattr(unwrap_model(language), "position_embedding_type", None) in (
        "rope",
        "learned_absolute",
    )


class KeyValueCache:
    """The cache of one microbatch, of a model for which :func:`can_cache` holds.

    Args:
        built: the model, in evaluation mode.
        samples: of the microbatch.
        length: places of each sample.
    """

    def __init__(self, built: BuiltModel, samples: int, length: int) -> None:
        self._language: Any = unwrap_model(built.model.language_model)
        self._context: Any = StaticInferenceContext(samples, length)
        # megatron-core 0.19 has it in a configuration of the context.
        getattr(self._context, "config", self._context).materialize_only_last_token_logits = False
        # The vocabulary is whole here; stock wants to be told so.
        self._how = {"inference_context": self._context, "runtime_gather_output": True}
        weight = next(self._language.parameters())
        dtype = built.configs[LANGUAGE].params_dtype
        for layer in self._language.decoder.layers:
            own = layer.self_attention
            shape = (length, samples, own.num_query_groups_per_partition)
            self._context.key_value_memory_dict[own.layer_number] = tuple(
                torch.zeros(*shape, width, dtype=dtype, device=weight.device)
                for width in (own.key_hidden_size, own.val_hidden_size)
            )

    @contextmanager
    def filled(self) -> Iterator[None]:
        """Keep the keys and values of the forward pass inside, which has all samples whole."""

        def with_context(_module: Any, given: Any, named: dict[str, Any]) -> Any:
            return given, {**named, **self._how}

        hook = self._language.register_forward_pre_hook(with_context, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()

    @torch.no_grad()
    def logits(self, tokens: Tensor, positions: Sequence[int]) -> Tensor:
        """Return the logits behind one further token of each sample, ``(samples, V)``.

        Args:
            tokens: int64 ``(samples,)``; none stands for an encoder's row.
            positions: of each in its sample; everything before it is kept.
        """
        found, first = [], 0
        # Neighbours at the same place go together.
        for position, run in itertools.groupby(positions):
            last = first + len(list(run))
            self._context.batch_size_offset = first
            self._context.sequence_len_offset = position
            ids = tokens[first:last, None]
            logits = self._language(
                input_ids=ids,
                position_ids=torch.full_like(ids, position),
                attention_mask=None,
                **self._how,
            )
            found.append(logits[:, 0])
            first = last
        return torch.cat(found)
