# SPDX-License-Identifier: Apache-2.0
"""Language replicas without samples, as at the tail of an epoch, on 8 ranks.

The second microbatch has samples for the first replica only; encoders of all ranks encode its
images. The oracle is one process with the samples that there are: loss, counted tokens and every
gradient. A rank that waits in vain ends with the test's deadline.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from examples.mimo.digits.data import Batch
from megatron.core.models.mimo.comm.plan.token_runs import split_items
from tests.models.model import Experts, ModelOptions
from tests.models.trainer import Trainer
from tests.parity.tensors import local_gradients, whole_tensors
from tests.unit_tests.mimo.test_pipeline_step_8rank import (
    OPTIONS,
    SAMPLES,
    Model,
    Result,
    check,
    microbatches,
    model,
)

pytestmark = pytest.mark.ranks(8, timeout=180)

EXPERTS = replace(OPTIONS, experts=Experts(count=4, per_token=2))
CASES = {
    "cp_sp": ("tp=2,cp=2,dp=2", replace(OPTIONS, sequence_parallel=True)),
    "pipeline": ("tp=1,cp=2,pp=2,dp=2", OPTIONS),
    "experts": ("tp=1,cp=2,dp=4,ep=4", EXPERTS),
}


def global_microbatches(dp: int) -> list[Batch]:
    """One whole microbatch, and one of what the first of ``dp`` replicas gets of it."""
    first, second = microbatches(([1, 1, 1, 1], [1, 1, 1, 1]))
    tail = SAMPLES // dp
    return [first, second.samples(0, tail).images_of(SAMPLES, tail)]


def local(trainer: Trainer, batch: Batch, first: int) -> dict[str, Any]:
    """One rank's inputs; replicas beyond the samples get none.

    Images of a replica's samples, numbered from ``first`` on, go to the encoders of its exchange
    group; with pipeline stages (``dp`` last) one group has all encoders.
    """
    parts = trainer.parts()
    (encoder, all_encoders), (replica, replicas) = parts["images"], parts["language"]
    size, start = SAMPLES // replicas, replica * (SAMPLES // replicas)
    groups = 1 if trainer.groups.pp.size() > 1 else replicas
    encoders, samples = all_encoders // groups, SAMPLES // groups
    group, place = divmod(encoder, encoders)
    images = batch.images_of(first + group * samples, samples).images
    mine = split_items(len(images), encoders)[place]
    part = replace(batch.samples(start, size), images=images[mine.start : mine.stop])
    return trainer.inputs(part.to(trainer.device))


def step(made: Model, dp: int) -> Result:
    """A step on the microbatches that ``dp`` replicas share."""
    trainer = made.trainer
    trainer.model.zero_grad_buffer()
    inputs = [local(trainer, b, n * SAMPLES) for n, b in enumerate(global_microbatches(dp))]
    replica = trainer.parts()["language"][0]
    assert (inputs[1]["input_ids"].numel() == 0) == (replica > 0)
    nothing = torch.zeros(2, dtype=torch.float64, device=trainer.device)
    total = torch.stack(trainer.schedule(iter(inputs), 2) or [nothing]).sum(0)
    dist.all_reduce(total, group=trainer.groups.dp_cp)
    loss, tokens = trainer.from_last_stage(total).tolist()
    gradients = local_gradients(made.built.model)
    whole = whole_tensors(made.built.model, made.built.collections, gradients)
    return Result(loss, int(tokens), whole)


def alone(dp: int, options: ModelOptions) -> Result:
    """The oracle: one process, with the samples of all replicas."""
    options = replace(options, sequence_parallel=False)
    with model("tp=1,dp=1", "tp=1,dp=1", options, rank_offset=dist.get_rank()) as made:
        trainer = made.trainer
        trainer.model.zero_grad_buffer()
        inputs = [trainer.inputs(b.to(trainer.device)) for b in global_microbatches(dp)]
        loss, tokens = torch.stack(trainer.schedule(iter(inputs), 2)).sum(0).tolist()
        gradients = local_gradients(made.built.model)
        whole = whole_tensors(made.built.model, made.built.collections, gradients)
        return Result(loss, int(tokens), whole)


@pytest.mark.parametrize("name", list(CASES))
def test_replicas_without_samples_change_nothing(name: str) -> None:
    language, options = CASES[name]
    dp = int(language.partition("dp=")[2][0])
    expected = alone(dp, options)
    with model("tp=1,dp=8", language, options) as made:
        found = step(made, dp)
    check(found, expected)


def test_router_losses_that_padding_would_change_are_refused() -> None:
    """On the ranks of the exchange groups that have such a replica, before anything moves."""
    experts = replace(EXPERTS.experts, balance="aux_loss", balance_coeff=0.1)
    options = replace(OPTIONS, experts=experts)
    with model("tp=1,dp=8", "tp=1,cp=2,dp=4,ep=4", options) as made:
        batch = local(made.trainer, global_microbatches(4)[1], SAMPLES)
        (bridge,) = made.built.model.colocated_comms.values()
        group = bridge.layout.group_of(dist.get_rank())
        whole = 0 in group.dest_dps and group.dest_dps.size == 1
        if whole:  # nobody of this exchange group is without samples
            return
        message = "this rank's language batch has no samples, and {'moe_aux_loss_coeff': 0.1} of"
        with pytest.raises(ValueError, match=message):
            made.trainer.model(**batch)
