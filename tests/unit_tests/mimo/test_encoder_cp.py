# SPDX-License-Identifier: Apache-2.0
"""Encoders that cut their items over CP, in a model: all ranks as threads of one process.

A user's own encoder takes part by the contract of ``ModalitySubmodules``; towers of the package do
by Megatron's layers. Compared with the same batch on one rank; what breaks the contract is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from megatron.core.hyper_comm_grid import HyperCommGrid
from megatron.core.models.mimo import MimoModel, VisionModalitySubmodules
from megatron.core.models.mimo.comm.item_exchange import ItemExchange
from megatron.core.models.mimo.comm.plan.balance import EncoderBalance
from megatron.core.models.mimo.comm.plan.token_runs import TokenRuns, split_items
from megatron.core.models.mimo.comm.routed_bridge import RoutedBridge
from megatron.core.models.mimo.config.checks import check_model_config
from megatron.core.models.mimo.randomness import seed_everything
from megatron.core.models.mimo.submodules.encoder_outputs import EncoderOutput
from megatron.core.models.mimo.towers.whisper import WhisperEncoder
from megatron.core.models.mimo.training.groups import create_process_groups, make_grid
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from tests.unit_tests.mimo.in_process_ranks import InProcessWorld
from tests.unit_tests.mimo.model_stubs import (
    LinearEncoder,
    StubGrid,
    mimo_config,
    modality_spec,
)
from tests.unit_tests.mimo.test_routed_model import BALANCE, Case, assert_as_on_one_rank

ROWS = 2  # of an image


class CuttingEncoder(LinearEncoder):
    """``(items, 2, 4)`` -> this CP rank's part of each item; ``turned``: another rank's."""

    cuts_items = True

    def __init__(self, place: tuple[int, int], turned: bool = False) -> None:
        super().__init__()
        self.rank, self.size = place
        self.rank = self.size - 1 - self.rank if turned else self.rank

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Encode."""
        own = split_items(x.size(1), self.size)[self.rank]
        return self.layer(x[:, own.start : own.stop])


def rows_of(inputs: dict[str, Any]) -> list[int]:
    return [inputs["x"].size(1)] * len(inputs["x"])


@dataclass
class CutCase(Case):
    """A case whose encoder cuts its images over ``cp`` ranks."""

    cp: int = 2
    turned: bool = False
    encoder: Callable[..., nn.Module] = CuttingEncoder

    @property
    def size(self) -> int:
        return self.src[0] * self.cp * self.src[1]

    def src_grid(self) -> HyperCommGrid:
        tp, dp = self.src
        return HyperCommGrid([tp, self.cp, dp], ["tp", "cp", "dp"])

    def spec(self, grid: HyperCommGrid) -> ModuleSpec:
        spec = modality_spec(rows_per_item=dict.fromkeys(self.encoders, rows_of))
        place = grid.coords(dist.get_rank())["cp"], self.cp
        params = {"place": place, "turned": self.turned}
        made = ModuleSpec(module=self.encoder, params=params)
        spec.submodules["encoders"] = dict.fromkeys(self.encoders, made)
        return spec


PAIRS = {
    "fan_in": ((1, 4), 2, (2, 2, 2)),
    "fan_out": ((2, 2), 2, (1, 2, 4)),
    "equal": ((2, 2), 2, (2, 2, 2)),
    "ranks_without_rows": ((1, 2), 4, (2, 2, 2)),
    "one_replica": ((1, 1), 8, (1, 1, 8)),
    "3_to_2": ((1, 3), 2, (1, 3, 2)),
}


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["tp_copies", "sp"])
@pytest.mark.parametrize("name", list(PAIRS))
def test_an_encoder_of_ones_own_trains_as_on_one_rank(name: str, sequence_parallel: bool) -> None:
    src, cp, dest = PAIRS[name]
    images = [0, 3, 1, 2, 5, 0, 0, 1]
    # The two exchange groups of fan-in and fan-out have six images each.
    encoded = {1: [12], 2: [6, 6], 3: [5, 0, 7], 4: [0, 6, 5, 1]}[src[1]]
    sequence_parallel = sequence_parallel and dest[0] > 1
    assert_as_on_one_rank(CutCase(src, dest, images, encoded, sequence_parallel, cp=cp))


def test_two_encoders_of_a_modality_cut_each_ones_rows() -> None:
    case = CutCase((1, 4), (2, 2, 2), [0, 3, 1, 2, 5, 0, 0, 1], [0, 6, 5, 1])
    case.encoders = ("linear", "second")
    assert_as_on_one_rank(case)


def test_whole_items_stand_as_their_tokens_do() -> None:
    """Item by item, and of an item encoder by encoder, each with rows of its own."""
    encoders = {name: CuttingEncoder((0, 2)) for name in ("a", "b")}
    rows = dict.fromkeys(encoders, lambda inputs: inputs["rows"])
    modality = VisionModalitySubmodules(encoders, rows_per_item=rows)
    modality.cut_items(1, 2)
    assert modality.cp == (1, 2)
    assert modality.whole_items({"a": {"rows": [1, 2]}, "b": {"rows": [3, 4]}}) == [1, 3, 2, 4]


def test_items_of_an_output_are_parts_of_those_that_are_counted() -> None:
    output = EncoderOutput("vit", rows_per_item=lambda given: given["rows"], cp=(1, 3))
    rows, items = output.rows(torch.zeros(3, 2), {"rows": [5, 1, 4]})
    assert (len(rows), items) == (3, [2, 0, 1])
    with pytest.raises(ValueError, match=r"4 rows on CP rank 1 of 3, whose parts .* of \[9\] rows"):
        output.rows(torch.zeros(4, 2), {"rows": [9]})


@pytest.mark.parametrize("options", [{"overlap": True}, {"frozen": True}])
def test_batches_without_images(options: dict[str, bool]) -> None:
    """All ranks come through, and the encoder's weights get zeros where DDP waits for them."""
    case = CutCase((1, 4), (2, 2, 2), [0] * 4, [0] * 4, **options)
    for result in case.run():
        encoder = [name for name in result.gradients if name.startswith("modality")]
        assert not any(result.gradients[name].any() for name in encoder)
        assert bool(set(encoder) & set(result.missing)) is ("frozen" in options)


def test_parts_in_another_order_do_not_train_as_on_one_rank() -> None:
    """The control: each rank returns as many rows as it should, those of another part."""
    with pytest.raises(AssertionError):
        assert_as_on_one_rank(CutCase((1, 4), (2, 2, 2), [3] * 4, [3] * 4, turned=True))


# ---- what is refused, on every rank ------------------------------------------------------------


class WholeEncoder(CuttingEncoder):
    """Says that it cuts its items, and does not."""

    def __init__(self, place: tuple[int, int], turned: bool = False) -> None:
        super().__init__((0, 1), turned)


def refusals(case: CutCase) -> list[str]:
    """What each rank says."""

    def body(rank: int) -> str:
        with pytest.raises(ValueError) as caught:
            case._on_rank(rank)
        return str(caught.value)

    return InProcessWorld(case.size).run(body)


def test_whole_items_from_an_encoder_that_promised_parts() -> None:
    said = refusals(CutCase((1, 2), (2, 2, 1), [3], [1, 2], encoder=WholeEncoder))
    assert len(set(said)) == 1
    for rank in range(4):
        words = f"{['2', '4'][rank // 2]} rows on CP rank {rank % 2} of 2, whose parts of items of "
        assert f"rank {rank}: an encoder raised ValueError: Encoder 'linear' returned {words}" \
            in said[0]  # fmt: skip


def test_ranks_of_a_replica_that_encode_other_items() -> None:
    """The rows are as many on each: who looks at numbers of rows alone sees nothing."""

    def other_items(rank: int, inputs: dict[str, Any]) -> None:
        if rank == 1:
            x = inputs["modality_inputs"]["images"]["linear"]["x"]
            inputs["modality_inputs"]["images"]["linear"]["x"] = x.view(2, 4, 4)

    said = refusals(CutCase((1, 1), (2, 1, 1), [4], [4], change=other_items))
    assert len(set(said)) == 1
    assert "ranks 0 and 1 are of one encoder replica, but encode items of [2, 2, 2, 2] and [4, 4]" \
        in said[0]  # fmt: skip


UNDECLARED = ModuleSpec(module=LinearEncoder)


class Configured(LinearEncoder):
    cuts_items = True
    config = SimpleNamespace(context_parallel_size=1)


@pytest.mark.parametrize(
    ("encoder", "params", "words"),
    [
        (LinearEncoder, {"rows_per_item": {"linear": rows_of}},
         r"Modality 'images': The grid has cp=2, but encoder 'linear' \(LinearEncoder\) does not "
         r"say that it cuts its items over CP \(cuts_items = True on its class\)"),
        (Configured, {"rows_per_item": {"linear": rows_of}},
         r"encoder 'linear' was built with context_parallel_size=1; they must be equal"),
        (CuttingEncoder, {}, r"say in the spec how many rows each whole item has, .*got None"),
        (CuttingEncoder, {"rows_per_item": {"linear": 2}}, r"with a function of .*, got 2"),
    ],
)  # fmt: skip
def test_encoders_that_do_not_cut_are_refused_when_the_model_is_built(
    encoder: type, params: dict[str, Any], words: str
) -> None:
    class Refused(CutCase):
        def spec(self, grid: HyperCommGrid) -> ModuleSpec:
            spec = modality_spec(**params)
            place = {"place": (0, 2)} if encoder is CuttingEncoder else {}
            spec.submodules["encoders"] = {"linear": ModuleSpec(module=encoder, params=place)}
            return spec

    said = refusals(Refused((1, 1), (2, 1, 1), [1], [1]))
    assert len(set(said)) == 1
    assert re.search(words, said[0])


def test_a_modality_of_another_kind_is_refused() -> None:
    class Other(nn.Module):
        @classmethod
        def from_spec(cls, spec: ModuleSpec, **stage: bool) -> Other:
            return cls()

    class Refused(CutCase):
        def spec(self, grid: HyperCommGrid) -> ModuleSpec:
            return ModuleSpec(module=Other)

    said = refusals(Refused((1, 1), (2, 1, 1), [1], [1]))
    assert set(said) == {"Modality 'images': Other is no ModalitySubmodules, which cuts items"}


@pytest.mark.parametrize(
    ("options", "language_at", "words"),
    [
        ({"bridge": "gather"}, 0, r"has cp=2 .* needs bridge='routed' \(bridge='gather'\)"),
        ({"encoder_balance": {"images": BALANCE}}, 0, "needs no encoder_balance"),
        ({}, 2, "needs the language model's ranks"),
    ],
)
def test_models_that_give_parts_no_way_are_refused(
    options: dict[str, Any], language_at: int, words: str
) -> None:
    dims = ["tp", "cp", "dp"]
    grids = {
        "images": StubGrid(0, 2, [1, 2, 1], dims),
        "language": StubGrid(language_at, 2, [2, 1, 1], dims),
    }
    with pytest.raises(ValueError, match=words):
        MimoModel(mimo_config(module_to_grid_map=grids, **options))
    grids["images"] = StubGrid(0, 2, [1, 1, 2], dims)
    check_model_config(mimo_config(module_to_grid_map=grids, **options))


def bridges(body: Callable[[int, RoutedBridge], Any]) -> list[Any]:
    """What a function of rank and bridge returns on two CP ranks of one encoder replica."""

    def on_rank(rank: int) -> Any:
        grids = [HyperCommGrid(shape, ["tp", "cp", "dp"]) for shape in ([1, 2, 1], [1, 1, 2])]
        bridge = RoutedBridge(*grids, "images", "language")
        return body(rank, bridge)

    return InProcessWorld(2).run(on_rank)


def test_items_do_not_move_between_replicas_that_cut_them() -> None:
    def body(rank: int, bridge: RoutedBridge) -> None:
        with pytest.raises(ValueError, match="images do not move between replicas whose cp=2"):
            ItemExchange(bridge, EncoderBalance())

    bridges(body)


def test_the_bridge_plans_from_whole_items() -> None:
    """Three rows of the first item and two of the second, and the tokens of two replicas."""

    def body(rank: int, bridge: RoutedBridge) -> tuple[list[int], int]:
        count = [3, 2][rank]
        tokens = TokenRuns.from_positions(torch.arange(count).numpy(), 1, 4)
        parts = [[0, 3], [1, 2, 4]][rank]
        rows = torch.tensor(parts, dtype=torch.float32)[:, None].repeat(1, 3).requires_grad_()
        plan = bridge.plan(tokens, rows, items=[3, 2])
        own = bridge.move(rows, plan)
        own.sum().backward()
        assert torch.equal(rows.grad, torch.ones_like(rows))
        with pytest.raises(ValueError, match=r"bring \[2, 3\] rows.*\[1, 4\]; rows_per_item mu"):
            bridge.plan(tokens, rows, items=[1, 1, 1, 2])
        return own[plan.place.argsort(), 0].tolist(), plan.held

    assert bridges(body) == [([0, 1, 2], 2), ([3, 4], 3)]


def test_pooled_sounds_do_not_say_that_they_are_cut() -> None:
    def body(rank: int) -> bool:
        groups = create_process_groups(make_grid())
        seed_everything(1)
        config = TransformerConfig(
            num_layers=1, hidden_size=8, num_attention_heads=2, add_qkv_bias=True
        )
        return WhisperEncoder(config, groups, 5, 6, pooled=True).cuts_items

    assert InProcessWorld(1).run(body) == [False]
