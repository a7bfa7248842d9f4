# SPDX-License-Identifier: Apache-2.0
"""Position ids of the user in packed batches that are cut over CP: each token gets its own.

The model is the digits job's with other position embeddings, on two ranks: encoder DP2, language
model CP2. Samples have different lengths. The oracle is one process that runs them one per row,
padded, not packed, with the same position ids; loss and gradients must be its.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist

from examples.mimo.digits.data import DigitsBatches
from megatron.core.models.mimo.job.packing import pack, padded_lengths
from mimo_colocated.launch.layouts import Layout
from tests.harness.backend import own_device
from tests.models import model as digits_model
from tests.models.model import BuiltModel, ModelOptions, build_model
from tests.models.trainer import Trainer, TrainOptions
from tests.parity.compare import GRADIENTS, tensor_checks, worst_by_kind
from tests.parity.tensors import local_gradients
from tests.unit_tests.mimo.digits_runs import SIZE, ended

pytestmark = pytest.mark.ranks(2, timeout=120)

SAMPLES, LENGTH = 4, 32
KINDS = ["learned_absolute", "mrope"]
# Half of the 8 channels of a head.
SECTION = [1, 1, 2]


def position_ids(kind: str) -> torch.Tensor:
    """Of every sample and token another one than its place says; three channels for mrope."""
    generator = torch.Generator().manual_seed(5)
    shape = (3, SAMPLES, LENGTH) if kind == "mrope" else (SAMPLES, LENGTH)
    return torch.randint(0, LENGTH, shape, generator=generator).to(own_device())


@dataclass
class Outcome:
    """Sum of the counted losses, and summed gradients before they are finalised."""

    loss: float
    gradients: dict[str, torch.Tensor]


@contextlib.contextmanager
def built(kind: str, vision: str, language: str, **options: Any) -> Iterator[BuiltModel]:
    """The digits model with the position embeddings of a kind."""
    place = {name: options.pop(name) for name in ("rank_offset", "audio") if name in options}
    specs = digits_model.language_specs

    def with_positions(config: Any, *args: Any) -> Any:
        config.mrope_section = SECTION if kind == "mrope" else None
        found = specs(config, *args)
        for spec in found:
            spec.params["position_embedding_type"] = kind
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digits_model, "language_specs", with_positions)
        layouts = Layout.parse(vision, "vision"), Layout.parse(language, "language")
        settings = {"overlap_grad_reduce": False, "distributed_optimizer": False, **options}
        made = build_model(*layouts, ModelOptions(**{"size": SIZE, **settings}), **place)
    with ended(made):
        yield made


def run(made: BuiltModel, kind: str) -> Outcome:
    trainer = Trainer(made, TrainOptions(steps=1, global_batch_size=SAMPLES), False)
    batches = DigitsBatches(7, "train", SAMPLES, varied=True)
    batch = trainer.local_batch(batches, 0, 0, 1)
    inputs, positions = trainer.inputs(batch), position_ids(kind).to(trainer.device)
    if made.packed:
        padded = padded_lengths(batch.lengths, trainer.multiple)
        rows = positions if kind == "mrope" else positions[None]
        positions = torch.stack([pack(channel, padded) for channel in rows])
        positions = positions if kind == "mrope" else positions[0]
    trainer.model.zero_grad_buffer()
    losses, mask = trainer.model(**{**inputs, "position_ids": positions})
    loss = (losses * mask).sum()
    loss.backward()
    made.finalize([trainer.model], mask.sum().to(torch.int))
    total = loss.detach().double()
    dist.all_reduce(total, group=trainer.groups.dp_cp)
    gradients = local_gradients(trainer.model)
    return Outcome(total.item(), {name: g.clone() for name, g in gradients.items()})


@pytest.mark.parametrize("kind", KINDS)
def test_position_ids_reach_the_tokens_they_were_given_for(kind, monkeypatch):
    with built(kind, "tp=1,dp=1", "tp=1,dp=1", rank_offset=dist.get_rank()) as made:
        expected = run(made, kind)
        elsewhere = position_ids(kind).flip(-1)
        with monkeypatch.context() as patch:
            patch.setattr(f"{__name__}.position_ids", lambda kind: elsewhere)
            assert run(made, kind).loss != pytest.approx(expected.loss, rel=1e-3)
    for packed in (True, False):
        with built(kind, "tp=1,dp=2", "tp=1,cp=2,dp=1", packed=packed) as made:
            found = run(made, kind)
        assert found.loss == pytest.approx(expected.loss, rel=1e-6)
        checks = tensor_checks("gradients", found.gradients, expected.gradients, GRADIENTS)
        (worst,) = worst_by_kind(list(checks))
        assert worst.passed, f"{worst.where}: {worst.error:.2e}"


def test_fused_rotary_kernels_count_by_themselves_and_are_refused():
    with built("mrope", "tp=1,dp=2", "tp=1,cp=2,dp=1", packed=True) as made:
        made.configs["language"].apply_rope_fusion = True
        with pytest.raises(ValueError, match="apply_rope_fusion=True does not take the position"):
            run(made, "mrope")
