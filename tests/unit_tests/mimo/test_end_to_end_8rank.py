# SPDX-License-Identifier: Apache-2.0
"""Loss and every gradient of whole training steps on 8 ranks, against one unsharded process.

The model is the digits job's (vision transformer, projector, GPT with GQA and a gated MLP). The
oracle is the same model on grids of one rank, fed the whole global batch in one microbatch: no
TP, CP or DP, no bridge to speak of. Both start from layout-independent initial weights. Gradients
are compared before the optimizer, where a wrong factor cannot hide.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import pytest
import torch
import torch.distributed as dist

from mimo_colocated.launch.layouts import Layout
from tests.models.model import BuiltModel, ModelOptions, build_model
from tests.models.trainer import Trainer, TrainOptions
from tests.parity.compare import GRADIENTS, tensor_checks, worst_by_kind
from tests.parity.rows import FAN_IN, FAN_OUT, Reference
from tests.parity.tasks import batches
from tests.parity.tensors import local_gradients, whole_tensors
from tests.unit_tests.mimo import digits_runs

pytestmark = pytest.mark.ranks(8)

BATCH = 16
# One number, so fp32 rounding is not averaged over a tensor.
LOSS_TOLERANCE = 1e-6
SIZE = replace(digits_runs.SIZE, language_layers=2)


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
    freeze: str = ""
    bridge: str = "routed"
    packed: bool = False
    images: str = "all"
    step: int = 0  # which microbatches have images, see ``MixedBatches``

    @property
    def reference(self) -> Reference:
        """What the oracle has in common with it."""
        return Reference("images", BATCH, self.masks, images=self.images)


FIRST_AND_LAST_WITHOUT, MIDDLE_WITHOUT, FIRST_WITHOUT, LAST_WITHOUT = (
    {"images": "mixed", "step": step} for step in range(4)
)
CASES = [
    Case("fan_in_cp2", **FAN_IN),
    Case("fan_in_cp2_uneven_4mb", **FAN_IN, micro_batches=4, masks="uneven",
         **FIRST_AND_LAST_WITHOUT),
    Case("fan_in_cp2_sp_overlap", **FAN_IN, masks="uneven", sequence_parallel=True, overlap=True),
    Case("fan_in_cp4", "tp=1,dp=8", "tp=2,cp=4,dp=1", micro_batches=2, masks="uneven",
         **FIRST_WITHOUT),
    Case("fan_out_cp2", **FAN_OUT),
    Case("fan_out_cp2_uneven_4mb", **FAN_OUT, micro_batches=4, masks="uneven", overlap=True,
         **MIDDLE_WITHOUT),
    Case("fan_in_cp1_many_samples", "tp=2,dp=4", "tp=4,dp=2", masks="uneven"),
    Case("equal_cp2", "tp=4,dp=2", "tp=2,cp=2,dp=2", masks="uneven", sequence_parallel=True),
    Case("equal_cp1", "tp=2,dp=4", "tp=2,dp=4", masks="uneven"),
    Case("empty_on_some_ranks", **FAN_IN, masks="one_sample"),
    Case("empty_everywhere", **FAN_IN, masks="none"),
    Case("packed_cp2_sp", **FAN_IN, masks="uneven", sequence_parallel=True, packed=True),
    Case("packed_cp4_2mb", "tp=1,dp=8", "tp=2,cp=4,dp=1", 2, masks="uneven", packed=True,
         **LAST_WITHOUT),
    Case("packed_cp1", "tp=1,dp=8", "tp=4,dp=2", packed=True),
    Case("frozen_vision", **FAN_IN, masks="uneven", freeze="encoder+projector"),
]  # fmt: skip
PIPELINED = [
    Case("pp2_cp2_dp2", "tp=1,dp=8", "tp=1,cp=2,pp=2,dp=2", micro_batches=2, masks="uneven",
         **LAST_WITHOUT),
    Case("pp2_cp2_tp2_sp", "tp=2,dp=4", "tp=2,cp=2,pp=2,dp=1", micro_batches=4, masks="uneven",
         sequence_parallel=True, overlap=True, **FIRST_AND_LAST_WITHOUT),
    Case("pp2_dp4_one_microbatch", "tp=4,dp=2", "tp=1,pp=2,dp=4", masks="uneven"),
    Case("pp2_packed", "tp=2,dp=4", "tp=1,cp=2,pp=2,dp=2", micro_batches=2, masks="uneven",
         packed=True, **FIRST_WITHOUT),
    Case("pp2_frozen_vision", "tp=2,dp=4", "tp=2,cp=2,pp=2,dp=1", masks="uneven", micro_batches=4,
         freeze="encoder+projector", **MIDDLE_WITHOUT),
]  # fmt: skip
# One of each kind over the other bridge, which wants as many rows of all siblings.
CASES += [
    replace(case, name=f"gather_{case.name}", bridge="gather", images="all")
    for case in CASES
    if case.name
    in {
        "fan_in_cp2_sp_overlap",
        "fan_in_cp4",
        "fan_out_cp2_uneven_4mb",
        "packed_cp4_2mb",
        "frozen_vision",
    }
]
CASES += PIPELINED
UNEVEN = Case("uneven", **FAN_IN, masks="uneven")


def options(case: Case) -> ModelOptions:
    """Model options of a case; the gradient buffers stay whole without the sharded optimizer."""
    return ModelOptions(
        size=SIZE,
        distributed_optimizer=False,
        overlap_grad_reduce=case.overlap,
        sequence_parallel=case.sequence_parallel,
        bridge=case.bridge,
        packed=case.packed,
        freeze=case.freeze,
    )


def gradients(built: BuiltModel) -> dict[str, torch.Tensor]:
    """Global name -> finalised gradient, whole."""
    return whole_tensors(built.model, built.collections, local_gradients(built.model))


def names_on_all_stages(found: dict[str, torch.Tensor]) -> set[str]:
    """Each pipeline stage has gradients of its own; without stages all ranks have all."""
    names: list[list[str]] = [[]] * dist.get_world_size()
    dist.all_gather_object(names, sorted(found))
    return set().union(*names)


@pytest.fixture(scope="module")
def oracle() -> Iterator[Callable[[Case], tuple[float, int, dict[str, torch.Tensor]]]]:
    """(loss, counted tokens, gradients) of the unsharded model, by data."""
    single = Layout()
    built = build_model(
        single, single, options(Case("oracle", "", "")), rank_offset=dist.get_rank()
    )
    trainer = Trainer(built, TrainOptions(steps=10, global_batch_size=BATCH), False)
    known: dict[tuple[Reference, int], tuple[float, int, dict[str, torch.Tensor]]] = {}

    def compute(case: Case) -> tuple[float, int, dict[str, torch.Tensor]]:
        key = case.reference, case.step
        if key not in known:
            loss, tokens = trainer.gradients(batches(case.reference), case.step)
            known[key] = (loss, tokens, gradients(built))
        return known[key]

    yield compute
    dist.barrier()
    built.destroy()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_loss_and_every_gradient_equal_the_unsharded_model(case: Case, oracle: Callable) -> None:
    loss, tokens, whole = oracle(case)
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
        run_loss, run_tokens = trainer.gradients(batches(case.reference), case.step)
        found = gradients(built)
    finally:
        dist.barrier()
        built.destroy()
    assert run_tokens == tokens
    assert run_loss == pytest.approx(loss, rel=LOSS_TOLERANCE, abs=LOSS_TOLERANCE)
    trained = [n for n in whole if not (case.freeze and n.startswith("modality"))]
    assert names_on_all_stages(found) == set(trained)
    # Where the oracle has zeros, as without any counted token, nothing but zeros passes.
    (worst,) = worst_by_kind(list(tensor_checks("gradients", found, whole, GRADIENTS)))
    assert worst.passed, f"{worst.where}: {worst.error:.2e}"


def test_no_gradient_of_the_oracle_is_zero(oracle: Callable) -> None:
    """A parameter without a gradient could not tell a right run from a wrong one."""
    _, _, whole = oracle(UNEVEN)
    assert whole
    assert not [name for name, grad in whole.items() if torch.count_nonzero(grad) == 0]


@pytest.mark.parametrize("distributed_optimizer", [False, True], ids=["whole", "sharded"])
@pytest.mark.parametrize("pair", [FAN_IN, FAN_OUT], ids=["fan_in", "fan_out"])
def test_grad_norm_is_that_of_the_unsharded_model(
    pair: dict[str, str], distributed_optimizer: bool, oracle: Callable
) -> None:
    _, _, whole = oracle(UNEVEN)
    expected = torch.stack([g.double().norm() for g in whole.values()]).norm().item()
    case = replace(UNEVEN, **pair)
    built = build_model(
        Layout.parse(case.vision, "vision"),
        Layout.parse(case.language, "language"),
        replace(options(case), distributed_optimizer=distributed_optimizer),
    )
    trainer = Trainer(
        built, TrainOptions(steps=10, global_batch_size=BATCH), distributed_optimizer
    )
    try:
        result = trainer.step(batches(case.reference), 0)
        norms = [0.0] * dist.get_world_size()
        dist.all_gather_object(norms, result.grad_norm)
    finally:
        dist.barrier()
        built.destroy()
    assert result.success
    assert len(set(norms)) == 1
    assert norms[0] == pytest.approx(expected, rel=GRADIENTS)
