# SPDX-License-Identifier: Apache-2.0
"""The steps of a forward pass that stock's model has as methods: subclasses may replace them.

Code that was written against stock overrides them or hands in an object that has them. So they are
looked up on the model when they are used, called with stock's arguments, and nowhere else.
"""

from __future__ import annotations

from operator import attrgetter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron.core.models.mimo.model.base import MimoModel


def _method(name: str) -> Any:
    return property(attrgetter(f"_model.{name}"), doc=f"``MimoModel.{name}``.")


class ReplaceableSteps:
    """The model's own methods, by what they do.

    Args:
        model: a ``MimoModel``, or what stands in for one.
    """

    def __init__(self, model: MimoModel) -> None:
        self._model = model

    pack = _method("_build_packed_seq_params")
    bridge = _method("_apply_colocated_comms")
    embed_text = _method("get_text_embeddings")
    align = _method("align_embeddings_by_token_positions")
    cut = _method("_shard_language_inputs")
    empty_output = _method("_empty_encoder_output")
    has_tokens = _method("_has_encoder_tokens")
    attach_split_sizes = _method("_attach_modality_split_sizes")
