# SPDX-License-Identifier: Apache-2.0
"""The two halves of a step in stages: encoders on several microbatches, then stages on each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from megatron.core.models.mimo.model.encoded import EncodedMicrobatch, EncodedMicrobatches
from megatron.core.models.mimo.model.language_batch import LanguageBatch
from megatron.core.models.mimo.model.language_runner import LanguageRunner
from megatron.core.models.mimo.model.later import LaterMicrobatches
from megatron.core.models.mimo.model.leaves import Leaves
from megatron.core.models.mimo.model.no_samples import cut_back, without_items
from megatron.core.models.mimo.model.row_path import EncodesLater, RowPath, levels_of, settled
from megatron.core.models.mimo.partition.packed_lengths import forget_lengths
from megatron.core.utils import unwrap_model


def encode_together(
    path: RowPath, microbatches: Sequence[Mapping[str, Any]], later: int
) -> EncodedMicrobatches:
    """Run the encoders on every microbatch, then one exchange per modality.

    Args:
        path: of the rows.
        microbatches, later: as for ``MimoModel.encode_microbatches``.
    """
    leaves = Leaves()
    for batch in microbatches:
        forget_lengths(batch.get("packing_kwargs"))
    first = len(microbatches) - later
    further = LaterMicrobatches(path, microbatches[first:], leaves) if later else None
    planned = (
        path.plan(
            LanguageBatch.of(batch),
            without_items(batch.get("modality_inputs")),
            batch.get("route_plan"),
        )
        for batch in microbatches[:first]
    )
    with settled(path):
        encoded = [EncodedMicrobatch(rows) for rows in path.move_together(planned, leaves)]
        if further is not None:
            further.check()
    return EncodedMicrobatches(encoded, leaves, path.backward_per_microbatch, further)


def later_problem(path: RowPath, microbatches: Sequence[Mapping[str, Any]]) -> str | None:
    """Return why some microbatches cannot be encoded later than the others of their step."""
    if microbatches and not isinstance(path, EncodesLater):
        return "rows move over a bridge whose ranks meet when they encode; set encode_in_bubbles=0"
    problems = (path.later_problem(batch.get("route_plan")) for batch in microbatches)  # type: ignore[attr-defined]
    return next(filter(None, problems), None)


def run_stage(
    path: RowPath,
    language: LanguageRunner,
    language_model: nn.Module,
    encoded: EncodedMicrobatch,
    batch: LanguageBatch,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Run a microbatch through a stage.

    Args:
        path, language: of the rank.
        language_model: the stage, bare or wrapped.
        encoded, batch: both sides of the microbatch.

    Returns:
        (output, CP-local loss mask). The output is hidden states before the last stage.
    """
    language.check_mask(batch)
    batch, stage = language.packed(batch), unwrap_model(language_model)
    if getattr(stage, "pre_process", True):
        sharded = path.fuse(batch, encoded.rows)
    else:
        sharded = language.cut(batch, None)
    levels = levels_of(path, language, language_model, batch, encoded.rows)
    output, loss_mask = language.call(batch, sharded, language_model, levels)
    if encoded.stands_for is not None:
        loss_mask = cut_back(loss_mask, encoded.stands_for)
        if getattr(stage, "post_process", True):
            output = cut_back(output, encoded.stands_for)
    return output, loss_mask
