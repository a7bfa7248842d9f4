# SPDX-License-Identifier: Apache-2.0
"""Loss and every gradient of whole training steps on 8 ranks, against one unsharded process.

The model is the digits job's (vision transformer, projector, GPT with GQA and a gated MLP). The
oracle is the same model on grids of one rank, fed the whole global batch in one microbatch: no
TP, CP or DP, no bridge to speak of. Both start from layout-independent initial weights. Gradients
are compared before the optimizer, where a wrong factor cannot hide.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

EXAMPLE = Path(__file__).resolve().parents[3] / "examples" / "mimo" / "digits"
sys.path.insert(0, str(EXAMPLE))

from data import Batch, DigitsBatches  # noqa: E402
from layouts import Layout  # noqa: E402
from model import (  # noqa: E402
    LANGUAGE,
    VISION,
    DigitsModel,
    ModelOptions,
    ModelSize,
    build_model,
)
from trainer import Trainer, TrainOptions  # noqa: E402

from megatron.core.models.mimo.training.initial_weights import tp_shard  # noqa: E402

pytestmark = pytest.mark.ranks(8)

BATCH = 16
# fp32 sums in another order: a few units in the last place of each element, well below 1e-5 of a
# whole tensor's norm; a missing or doubled contribution is of order 1.
GRADIENT_TOLERANCE = 1e-5
LOSS_TOLERANCE = 1e-6
SIZE = ModelSize(
    vision_hidden=32,
    vision_layers=1,
    language_hidden=64,
    language_layers=2,
    language_query_groups=4,
)


@dataclass(frozen=True)
class Case:
    """One parallel run to compare with the oracle."""

    name: str
    vision: str
    language: str
    micro_batches: int = 1
    masks: str = "uniform"
    sequence_parallel: bool = False
    overlap: bool = False
    freeze_vision: bool = False


FAN_IN = ("tp=2,dp=4", "tp=2,cp=2,dp=2")
FAN_OUT = ("tp=4,dp=2", "tp=1,cp=2,dp=4")
CASES = [
    Case("fan_in_cp2", *FAN_IN),
    Case("fan_in_cp2_uneven_4mb", *FAN_IN, micro_batches=4, masks="uneven"),
    Case("fan_in_cp2_sp_overlap", *FAN_IN, masks="uneven", sequence_parallel=True, overlap=True),
    Case("fan_in_cp4", "tp=1,dp=8", "tp=2,cp=4,dp=1", micro_batches=2, masks="uneven"),
    Case("fan_out_cp2", *FAN_OUT),
    Case("fan_out_cp2_uneven_4mb", *FAN_OUT, micro_batches=4, masks="uneven", overlap=True),
    Case("fan_in_cp1_many_samples", "tp=2,dp=4", "tp=4,dp=2", masks="uneven"),
    Case("equal_cp2", "tp=4,dp=2", "tp=2,cp=2,dp=2", masks="uneven", sequence_parallel=True),
    Case("equal_cp1", "tp=2,dp=4", "tp=2,dp=4", masks="uneven"),
    Case("empty_on_some_ranks", *FAN_IN, masks="one_sample"),
    Case("empty_everywhere", *FAN_IN, masks="none"),
    Case("frozen_vision", *FAN_IN, masks="uneven", freeze_vision=True),
]


class _MaskedBatches(DigitsBatches):
    """Batches whose loss masks are cut down to one sample's, or to nothing."""

    def __init__(self, keep_samples: int) -> None:
        super().__init__(7, "train", BATCH)
        self._keep = keep_samples

    def batch(self, step: int) -> Batch:
        whole = super().batch(step)
        mask = whole.loss_mask.clone()
        mask[self._keep :] = 0
        return replace(whole, loss_mask=mask)


def batches(masks: str) -> DigitsBatches:
    """The data of a case, the same on all ranks."""
    if masks in ("one_sample", "none"):
        return _MaskedBatches(1 if masks == "one_sample" else 0)
    return DigitsBatches(7, "train", BATCH, uneven_loss_mask=masks == "uneven")


def options(case: Case) -> ModelOptions:
    """Model options of a case; the gradient buffers stay whole without the sharded optimizer."""
    return ModelOptions(
        size=SIZE,
        distributed_optimizer=False,
        overlap_grad_reduce=case.overlap,
        sequence_parallel=case.sequence_parallel,
        freeze_vision=case.freeze_vision,
    )


def gradients(built: DigitsModel) -> dict[str, torch.Tensor]:
    """Parameter name -> finalised gradient of this rank."""
    return {
        name: parameter.main_grad.clone()
        for name, parameter in built.model.named_parameters()
        if parameter.requires_grad
    }


@pytest.fixture(scope="module")
def oracle() -> Iterator[Callable[[str], tuple[float, int, dict[str, torch.Tensor]]]]:
    """(loss, counted tokens, gradients) of the unsharded model, by kind of masks."""
    single = Layout()
    built = build_model(
        single, single, options(Case("oracle", "", "")), rank_offset=dist.get_rank()
    )
    trainer = Trainer(built, TrainOptions(steps=10, global_batch_size=BATCH), False)
    known: dict[str, tuple[float, int, dict[str, torch.Tensor]]] = {}

    def compute(masks: str) -> tuple[float, int, dict[str, torch.Tensor]]:
        if masks not in known:
            loss, tokens = trainer.gradients(batches(masks), 0)
            known[masks] = (loss, tokens, gradients(built))
        return known[masks]

    yield compute
    dist.barrier()
    built.destroy()


def expected_shard(
    name: str, parameter: torch.nn.Parameter, whole: torch.Tensor, built: DigitsModel
) -> torch.Tensor:
    """This TP rank's part of a whole gradient."""
    if not getattr(parameter, "tensor_model_parallel", False):
        return whole
    module = LANGUAGE if name.startswith("language_model") else VISION
    tp = built.collections[module].tp
    # A gated MLP's first layer holds the gate's shard and then the value's.
    gated = module == LANGUAGE and "mlp.linear_fc1" in name
    return tp_shard(
        whole,
        rank=tp.rank(),
        size=tp.size(),
        dim=parameter.partition_dim,
        blocks=2 if gated else 1,
    )


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm of what is expected."""
    scale = expected.double().norm().clamp(min=1e-30)
    return float((actual.double() - expected.double()).norm() / scale)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_loss_and_every_gradient_equal_the_unsharded_model(case: Case, oracle: Callable) -> None:
    loss, tokens, whole = oracle(case.masks)
    built = build_model(
        Layout.parse(case.vision, "vision"),
        Layout.parse(case.language, "language"),
        options(case),
    )
    trainer = Trainer(
        built,
        TrainOptions(steps=10, global_batch_size=BATCH, micro_batches=case.micro_batches),
        False,
    )
    try:
        run_loss, run_tokens = trainer.gradients(batches(case.masks), 0)
        found = gradients(built)
        parameters = dict(built.model.named_parameters())
    finally:
        dist.barrier()
        built.destroy()
    assert run_tokens == tokens
    assert run_loss == pytest.approx(loss, rel=LOSS_TOLERANCE, abs=LOSS_TOLERANCE)
    trained = [n for n in whole if not (case.freeze_vision and n.startswith("modality"))]
    assert sorted(found) == sorted(trained)
    if case.masks == "none":
        assert all(torch.count_nonzero(grad) == 0 for grad in found.values())
        return
    errors = {
        name: relative_error(
            grad, expected_shard(name, parameters[name], whole[name], built)
        )
        for name, grad in found.items()
    }
    worst = max(errors, key=errors.get)
    assert errors[worst] <= GRADIENT_TOLERANCE, f"{worst}: {errors[worst]:.2e}"
    if case.freeze_vision:
        frozen = [p for n, p in parameters.items() if n.startswith("modality")]
        assert all(p.grad is None and not hasattr(p, "main_grad") for p in frozen)


def test_no_gradient_of_the_oracle_is_zero(oracle: Callable) -> None:
    """A parameter without a gradient could not tell a right run from a wrong one."""
    _, _, whole = oracle("uneven")
    assert whole
    assert not [name for name, grad in whole.items() if torch.count_nonzero(grad) == 0]


@pytest.mark.parametrize("distributed_optimizer", [False, True], ids=["whole", "sharded"])
@pytest.mark.parametrize("pair", [FAN_IN, FAN_OUT], ids=["fan_in", "fan_out"])
def test_grad_norm_is_that_of_the_unsharded_model(
    pair: tuple[str, str], distributed_optimizer: bool, oracle: Callable
) -> None:
    _, _, whole = oracle("uneven")
    expected = torch.stack([g.double().norm() for g in whole.values()]).norm().item()
    case = dataclasses.replace(CASES[0], vision=pair[0], language=pair[1])
    built = build_model(
        Layout.parse(case.vision, "vision"),
        Layout.parse(case.language, "language"),
        replace(options(case), distributed_optimizer=distributed_optimizer),
    )
    trainer = Trainer(
        built, TrainOptions(steps=10, global_batch_size=BATCH), distributed_optimizer
    )
    try:
        result = trainer.step(batches("uneven"), 0)
        norms = [0.0] * dist.get_world_size()
        dist.all_gather_object(norms, result.grad_norm)
    finally:
        dist.barrier()
        built.destroy()
    assert result.success
    assert len(set(norms)) == 1
    assert norms[0] == pytest.approx(expected, rel=GRADIENT_TOLERANCE)
