# SPDX-License-Identifier: Apache-2.0
"""One run, parallel or not, from its first weight to its last loss."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from examples.mimo.digits.data import DigitsBatches, even_slice
from megatron.core.models.mimo.memory.policy import EncoderMemory
from mimo_colocated.launch.layouts import Layout
from tests.models.model import LANGUAGE, BuiltModel, Experts, ModelOptions, ModelSize, build_model
from tests.models.trainer import Trainer, TrainOptions
from tests.parity.compare import Measurement
from tests.parity.language import LanguageTrainer, build_language_model
from tests.parity.rows import CHANGE_STEPS, Reference, Row, axis_sizes
from tests.parity.tasks import batches
from tests.parity.tensors import (
    complete_gradients,
    local_gradients,
    local_weights,
    whole_tensors,
)

# 8 query groups of two heads: TP up to 8 divides them and attention is still grouped.
SIZE = ModelSize(
    vision_hidden=32,
    vision_layers=1,
    audio_hidden=32,
    audio_layers=1,
    language_hidden=64,
    language_layers=2,
    language_heads=16,
    language_query_groups=8,
)
# One layer for each of four stages.
TEXT_SIZE = ModelSize(
    language_hidden=64, language_layers=4, language_heads=8, language_query_groups=4
)

# Their own losses are sums over samples and over tokens: no layout changes them.
EXPERTS = Experts(4, balance="seq_aux_loss", balance_coeff=0.1, z_coeff=0.01)


def measure(row: Row, reference: Reference, micro_batches: int, steps: int) -> Measurement:
    """Run ``row`` on all ranks.

    Args:
        row: layouts and options.
        reference: which data it shares.
        micro_batches: the option's value, for rows that leave it open.
        steps: how long to train, at least ``CHANGE_STEPS``.
    """
    with _built(row) as built:
        kind = Trainer if row.vision else LanguageTrainer
        options = TrainOptions(
            steps=steps,
            global_batch_size=reference.batch,
            micro_batches=row.resolved_micro_batches(micro_batches),
            warmup_steps=2,
            encode_ahead=row.encode_ahead or None,
            encode_in_bubbles=row.encode_in_bubbles,
            # float16: far from its largest number, so that no step is skipped.
            initial_loss_scale=2.0**8,
        )
        trainer = kind(built, options, row.distributed_optimizer)
        return _measure(trainer, batches(reference), steps)


def _measure(trainer: Trainer, data: DigitsBatches, steps: int) -> Measurement:
    model, collections = trainer.model, trainer.built.collections

    def whole(values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors = whole_tensors(model, collections, values)
        return {name: tensor.cpu() for name, tensor in tensors.items()}

    initial = whole(local_weights(model))
    start, logits = _logits(trainer, data)
    loss, tokens = trainer.gradients(data, 0)
    complete_gradients(model)
    gradients = whole(local_gradients(model))
    results = [trainer.step(data, step) for step in range(CHANGE_STEPS)]
    if hasattr(model, "start_param_sync"):
        model.start_param_sync(force_sync=True)
    after = whole(local_weights(model))
    change = {name: weight.float() - initial[name].float() for name, weight in after.items()}
    results += [trainer.step(data, step) for step in range(CHANGE_STEPS, steps)]
    return Measurement(
        initial=initial,
        logits=None if logits is None else logits.cpu(),
        logits_start=start,
        loss=loss,
        tokens=tokens,
        gradients=gradients,
        grad_norm=results[0].grad_norm,
        change=change,
        curve=[result.loss for result in results],
    )


def _logits(trainer: Trainer, data: DigitsBatches) -> tuple[int, torch.Tensor]:
    """(first sample, logits) of this rank's share of the first step, in one microbatch.

    Zero behind the end of a sample, where logits mean nothing and packed samples have none.
    """
    dp = trainer.groups.dp
    start, _ = even_slice(data.global_batch_size, dp.rank(), dp.size(), "batch", "DP ranks")
    batch = trainer.local_batch(data, 0, 0, 1)
    logits = trainer.logits(batch)
    ends = torch.tensor(batch.lengths, device=logits.device)
    content = torch.arange(logits.size(1), device=logits.device) < ends[:, None]
    return start, logits * content[..., None]


@contextmanager
def _built(row: Row) -> Iterator[BuiltModel]:
    options = ModelOptions(
        size=dataclasses.replace(SIZE, language_layers=row.layers) if row.vision else TEXT_SIZE,
        dtype=getattr(torch, row.dtype),
        sequence_parallel=row.sequence_parallel,
        bridge=row.bridge,
        packed=row.packed,
        varied_lengths=row.varied,
        distributed_optimizer=row.distributed_optimizer,
        overlap_grad_reduce=row.overlap,
        overlap_param_gather=row.overlap and row.distributed_optimizer and bool(row.vision),
        freeze=row.freeze,
        experts=EXPERTS if row.experts else None,
        tied=row.tied,
        native=row.native,
        virtual_stages=row.virtual_stages,
        recompute=row.recompute,
        memory=EncoderMemory(row.encoder_memory, row.projector_memory, offload_from=0),
    )
    if row.vision:
        layouts = Layout.parse(row.vision, "vision"), Layout.parse(row.language, LANGUAGE)
        audio = Layout.parse(row.audio, "audio") if row.audio else None
        built = build_model(*layouts, options, audio=audio)
    else:
        built = build_language_model(axis_sizes(row.language), options, row.tied)
    try:
        yield built
    finally:
        # gloo may still be connecting the groups of this row.
        dist.barrier()
        built.destroy()


def one_process(reference: Reference) -> Row:
    """The row of a reference: the same model and data, nothing sharded, one microbatch."""
    images = reference.task == "images"
    return Row(
        reference.name,
        "tp=1,dp=1" if images else "tp=1,pp=1,dp=1",
        "tp=1,dp=1" if images else "",
        masks=reference.masks,
        tied=reference.tied,
        freeze=reference.freeze,
        dtype=reference.dtype,
        experts=reference.experts,
        images=reference.images,
        layers=reference.layers,
        varied=reference.varied,
        audio="tp=1,dp=1" if reference.audio else "",
        native=reference.native,
    )
