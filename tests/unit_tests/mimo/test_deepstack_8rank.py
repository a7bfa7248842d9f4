# SPDX-License-Identifier: Apache-2.0
"""Levels of rows that are added after layers, on 8 ranks against one unsharded process.

The proof model's images bring three levels, for layers 0 to 2 of 4. Over two pipeline stages the
second one's is the last layer of its stage, the third's is on the other one; over two times two
virtual stages the second is, and the third comes back to the first. Loss and every gradient are
compared before the optimizer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron.core.models.mimo.memory.policy import EncoderMemory
from megatron.core.models.mimo.model import deepstack
from mimo_colocated.launch.layouts import Layout
from tests.models import model
from tests.models.model import ModelOptions, ModelSize, build_model
from tests.models.trainer import Trainer, TrainOptions
from tests.parity.compare import GRADIENTS, tensor_checks, worst_by_kind
from tests.parity.rows import FAN_IN, FAN_OUT, Reference
from tests.parity.tasks import batches
from tests.parity.tensors import local_gradients, whole_tensors
from tests.unit_tests.mimo.test_end_to_end_8rank import LOSS_TOLERANCE, names_on_all_stages

pytestmark = pytest.mark.ranks(8, timeout=120)

BATCH = 16
SIZE = ModelSize(
    vision_hidden=32,
    vision_layers=1,
    audio_hidden=32,
    audio_layers=1,
    language_hidden=32,
    language_layers=4,
    language_query_groups=4,
)
OPTIONS = ModelOptions(size=SIZE, distributed_optimizer=False, deepstack=(0, 1, 2))
PP2 = {"vision": "tp=2,dp=4", "language": "tp=1,cp=2,pp=2,dp=2"}
PP2_SP = {"vision": "tp=2,dp=4", "language": "tp=2,cp=2,pp=2,dp=1"}


@dataclass(frozen=True)
class Case:
    """A layout, options and data."""

    name: str
    vision: str
    language: str
    micro_batches: int = 1
    images: str = "mixed"
    audio: str = ""
    step: int = 1  # without images in the middle, see ``MixedBatches``
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def reference(self) -> Reference:
        return Reference("images", BATCH, "uneven", images=self.images, audio=bool(self.audio))


CASES = [
    Case("fan_in_sp", **FAN_IN, options={"sequence_parallel": True}),
    Case("fan_in_copies_4mb", **FAN_IN, micro_batches=4),
    Case("fan_out_4mb", **FAN_OUT, micro_batches=4),
    Case("packed", **FAN_IN, options={"sequence_parallel": True, "packed": True}),
    Case("full", **FAN_IN, micro_batches=2, options={"recompute": "full"}),
    Case("selective", **FAN_OUT, options={"recompute": "selective"}),
    Case("frozen", **FAN_IN, options={"freeze": "encoder+projector"}),
    Case("gather", **FAN_IN, images="all",
         options={"sequence_parallel": True, "bridge": "gather", "recompute": "full"}),
    Case("hears", **FAN_IN, images="all", audio="tp=1,dp=8"),
    Case("pp2", **PP2, micro_batches=4, options={"memory": EncoderMemory("offload", "recompute")}),
    Case("pp2_sp_full", **PP2_SP, micro_batches=4,
         options={"sequence_parallel": True, "recompute": "full"}),
    Case("pp2_packed", **PP2, micro_batches=2, step=3, options={"packed": True}),
    Case("pp2_gather", **PP2_SP, micro_batches=2, images="all",
         options={"bridge": "gather", "sequence_parallel": True}),
    Case("virtual", **PP2, micro_batches=4, options={"virtual_stages": 2}),
    Case("virtual_gather_full", **PP2, micro_batches=2, images="all",
         options={"virtual_stages": 2, "bridge": "gather", "recompute": "full"}),
]  # fmt: skip
BY_NAME = {case.name: case for case in CASES}

Found = tuple[float, int, dict[str, torch.Tensor]]


def run(case: Case, **place: int) -> Found:
    """(loss, counted tokens, whole gradients of this rank's stages)."""
    audio = Layout.parse(case.audio, "audio") if case.audio else None
    layouts = Layout.parse(case.vision, "vision"), Layout.parse(case.language, "language")
    built = build_model(*layouts, replace(OPTIONS, **case.options), audio=audio, **place)
    options = TrainOptions(steps=10, global_batch_size=BATCH, micro_batches=case.micro_batches)
    trainer = Trainer(built, options, False)
    try:
        loss, tokens = trainer.gradients(batches(case.reference), case.step)
        return loss, tokens, whole_tensors(
            built.model, built.collections, local_gradients(built.model)
        )
    finally:
        dist.barrier()
        built.destroy()


@pytest.fixture(scope="module")
def oracle() -> Callable[[Case], Found]:
    """What one process finds, by data."""
    known: dict[tuple[Reference, int], Found] = {}

    def compute(case: Case) -> Found:
        key = case.reference, case.step
        if key not in known:
            one = "tp=1,dp=1"
            alone = replace(case, vision=one, language=one, micro_batches=1, options={})
            alone = replace(alone, audio=one if case.audio else "")
            known[key] = run(alone, rank_offset=dist.get_rank())
        return known[key]

    return compute


def worst_error(found: Found, expected: Found) -> float:
    assert found[1] == expected[1]
    (worst,) = worst_by_kind(list(tensor_checks("gradients", found[2], expected[2], GRADIENTS)))
    return worst.error


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_loss_and_every_gradient_equal_the_unsharded_model(case: Case, oracle: Callable) -> None:
    expected, found = oracle(case), run(case)
    assert found[0] == pytest.approx(expected[0], rel=LOSS_TOLERANCE)
    trained = [n for n in expected[2] if not (case.name == "frozen" and n.startswith("modality"))]
    assert names_on_all_stages(found[2]) == set(trained)
    assert worst_error(found, expected) < GRADIENTS


def test_levels_matter_and_where_they_are_added(
    oracle: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Controls: what the comparison must notice."""
    case = BY_NAME["pp2"]
    expected = oracle(case)
    late = run(replace(case, options={"deepstack": (0, 1, 3)}))
    assert abs(late[0] / expected[0] - 1) > 100 * LOSS_TOLERANCE
    add = deepstack._add

    def dropped_on_the_last_stage(hidden: torch.Tensor, level: Any, place: Any) -> torch.Tensor:
        # The second stage's ranks of two, of which dp comes first.
        return hidden if dist.get_rank() >= 4 else add(hidden, level, place)

    monkeypatch.setattr(deepstack, "_add", dropped_on_the_last_stage)
    dropped = run(case)
    assert abs(dropped[0] / expected[0] - 1) > 100 * LOSS_TOLERANCE
    errors = [0.0] * dist.get_world_size()
    dist.all_gather_object(errors, worst_error(dropped, expected))
    assert min(errors) > 100 * GRADIENTS


def test_rows_of_another_width_are_refused_on_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    configs = model.transformer_configs

    def without_levels(vision: Any, language: Any, options: ModelOptions, audio: Any) -> Any:
        return configs(vision, language, replace(options, deepstack=()), audio)

    monkeypatch.setattr(model, "transformer_configs", without_levels)
    for bridge in ("routed", "gather"):
        with pytest.raises(
            ValueError, match=r"rows of images are 32 wide, but with 3 levels .* \(1 \+ 3\) \* 32"
        ):
            run(Case("narrow", **FAN_IN, images="all", options={"bridge": bridge}))
