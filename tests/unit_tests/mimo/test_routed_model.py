# SPDX-License-Identifier: Apache-2.0
"""``MimoModel`` over the routed bridge, all ranks as threads of one process.

The oracle is the gather bridge on the same ranks where it can run (the same number of rows on
every encoder replica), and one rank with the whole batch where it cannot. What the language model
gets is compared bit for bit; gradients to the last digits, since the sums run in another order.
"""

from __future__ import annotations

import doctest
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron.core.hyper_comm_grid import HyperCommGrid
from megatron.core.models.mimo import MimoModel
from megatron.core.models.mimo.comm.input_balance import InputBalance
from megatron.core.models.mimo.comm.plan.balance import EncoderBalance
from megatron.core.models.mimo.comm.plan.routes import RoutePlan, plan_routes
from megatron.core.models.mimo.comm.plan.token_runs import TokenRuns
from megatron.core.models.mimo.model import local_text
from megatron.core.models.mimo.model.construction import make_bridges
from megatron.core.models.mimo.model.local_text import LocalText
from megatron.core.models.mimo.partition.sequence_order import dense_positions, packed_positions
from megatron.core.transformer.spec_utils import ModuleSpec
from tests.unit_tests.mimo.in_process_ranks import InProcessWorld
from tests.unit_tests.mimo.model_stubs import (
    HIDDEN,
    IMAGE,
    LinearEncoder,
    language_config,
    mimo_config,
    modality_spec,
)

LENGTH = 16
FAN_IN, FAN_OUT, EQUAL = ((2, 4), (2, 2, 2)), ((4, 2), (1, 2, 4)), ((4, 2), (2, 2, 2))
RATIO = ((2, 3), (1, 3, 2))
BALANCE = EncoderBalance(
    threshold=1, tokens_per_item=lambda inputs: [2] * len(inputs["linear"]["x"])
)


@dataclass
class Result:
    """What one rank of a forward and backward pass leaves."""

    fused: torch.Tensor
    labels: torch.Tensor | None
    gradients: dict[str, torch.Tensor]
    missing: list[str]


@dataclass
class Case:
    """Two layouts and a global batch.

    ``images``: images of each sample, two tokens each. ``encoded``: how many of all images each
    encoder replica encodes. ``encoders``: each makes its share of the two rows of every image.
    ``first``: the first rank; those before it are in no grid.
    """

    src: tuple[int, int]
    dest: tuple[int, int, int]
    images: list[int]
    encoded: list[int]
    sequence_parallel: bool = False
    bridge: str = "routed"
    packed: list[int] | None = None
    frozen: bool = False
    ahead: bool = False
    overlap: bool = False
    balanced: bool = False
    encoders: tuple[str, ...] = ("linear",)
    image: int = IMAGE
    first: int = 0
    change: Callable[[int, dict[str, Any]], None] = lambda rank, inputs: None

    @property
    def size(self) -> int:
        return self.src[0] * self.src[1]

    def length(self) -> int:
        return LENGTH * 3 if self.dest[1] == 3 else LENGTH

    def input_ids(self) -> torch.Tensor:
        """(samples, S): text, with the sample's image tokens from its second position on."""
        ids = torch.arange(len(self.images) * self.length()).view(len(self.images), -1) % 40 + 1
        for sample, count in enumerate(self.images):
            ids[sample, 1 : 1 + 2 * count] = self.image
        return ids

    def pixels(self) -> torch.Tensor:
        """(images, 2, 4), every value another one."""
        total = sum(self.images)
        return torch.linspace(-1, 1, total * 8).view(total, 2, 4)

    def run(self) -> list[Result]:
        def body(rank: int) -> Any:
            return self._on_rank(rank) if rank >= self.first else self._outside()

        return InProcessWorld(self.first + self.size).run(body)[self.first :]

    def src_grid(self) -> HyperCommGrid:
        return HyperCommGrid(list(self.src), ["tp", "dp"], rank_offset=self.first)

    def spec(self, grid: HyperCommGrid) -> ModuleSpec:
        spec = modality_spec()
        spec.submodules["encoders"] = {
            name: ModuleSpec(module=LinearEncoder) for name in self.encoders
        }
        return spec

    def settings(self) -> tuple[Any, dict[str, HyperCommGrid]]:
        """The model's configuration and its grids."""
        grids = {
            "images": self.src_grid(),
            "language": HyperCommGrid(
                list(self.dest), ["tp", "cp", "dp"], rank_offset=self.first
            ),
        }
        for dim in ("tp", "cp"):
            grids["language"].create_pg(dim)
        tp, cp, _ = self.dest
        config = language_config(
            tensor_model_parallel_size=tp,
            context_parallel_size=cp,
            sequence_parallel=self.sequence_parallel,
        )
        kv_format = "thd" if self.packed else "sbhd"
        options: dict[str, Any] = {"bridge": self.bridge, "kv_format": kv_format}
        options["special_token_ids"] = {"images": self.image}
        if self.balanced:
            options["encoder_balance"] = {"images": BALANCE}
        modalities = {"images": self.spec(grids["images"])}
        return mimo_config(config, modalities, module_to_grid_map=grids, **options), grids

    def build(self) -> tuple[MimoModel, dict[str, HyperCommGrid]]:
        settings, grids = self.settings()
        torch.manual_seed(3)
        model = MimoModel(settings)
        model.modality_submodules["images"].requires_grad_(not self.frozen)
        if self.overlap:
            model.modality_submodules["images"].ddp_config = type(
                "Config", (), {"overlap_grad_reduce": True}
            )()
        return model, grids

    def _outside(self) -> None:
        """A rank of no grid takes part where groups are made, and in nothing else."""
        settings, grids = self.settings()
        config = settings.language_model_spec.params["config"]
        model: Any = SimpleNamespace(mimo_config=settings, config=config)
        for _, made in list(make_bridges(model)):
            made.destroy()
        for grid in grids.values():
            grid.destroy()

    def _inputs(self, rank: int, model: MimoModel, grids: Mapping) -> dict[str, Any]:
        mine = grids["language"].coords(rank)["dp"]
        ids = self.input_ids().tensor_split(self.dest[2])[mine]
        bounds = np.cumsum([0, *self.encoded])
        src = grids["images"].coords(rank)["dp"]
        pixels = self.pixels()[bounds[src] : bounds[src + 1]]
        inputs: dict[str, Any] = {
            "input_ids": ids,
            "position_ids": torch.arange(ids.size(1)).expand_as(ids),
            "labels": ids,
            "loss_mask": torch.ones(ids.shape),
            "modality_inputs": {"images": self._pixels_of_encoders(pixels)},
        }
        if self.packed:
            lengths = torch.tensor(self.packed, dtype=torch.int32)
            inputs["packing_kwargs"] = {
                "cu_seqlens_q": lengths,
                "cu_seqlens_kv": lengths,
                "max_seqlen_q": 16,
                "max_seqlen_kv": 16,
            }
        if self.ahead:
            inputs["route_plan"] = {"images": self._plan(rank, model)}
        return inputs

    def _pixels_of_encoders(self, pixels: torch.Tensor) -> dict[str, Any] | None:
        shares = pixels.chunk(len(self.encoders), dim=1)
        inputs = {name: {"x": share} for name, share in zip(self.encoders, shares, strict=True)}
        return inputs if len(pixels) else None

    def _plan(self, rank: int, model: MimoModel) -> RoutePlan:
        layout = model.colocated_comms[("images", "language")].layout
        group = layout.group_of(rank)
        batches = self.input_ids().tensor_split(self.dest[2])
        tokens = [
            TokenRuns.from_mask(batches[dp].numpy() == self.image, self.packed)
            for dp in group.dest_dps
        ]
        return plan_routes(layout, rank, tokens, [2 * self.encoded[dp] for dp in group.src_dps])

    def _on_rank(self, rank: int) -> Result:
        model, grids = self.build()
        inputs = self._inputs(rank, model, grids)
        self.change(rank, inputs)
        output, _ = model(**inputs)
        seen = model.language_model.called_with
        fused = seen["decoder_input"]
        # A function of the values at a place, so the same in every layout; no two are alike.
        if inputs["input_ids"].numel():
            weight = torch.cos(fused.detach() * 7) + torch.sin(output.detach())
            output = output * weight
        output.sum().backward()
        gradients = {
            name: torch.zeros_like(p) if p.grad is None else p.grad
            for name, p in model.named_parameters()
        }
        missing = [name for name, p in model.named_parameters() if p.grad is None]
        model.destroy()
        for grid in grids.values():
            grid.destroy()
        return Result(fused.detach(), seen["labels"], gradients, missing)


def assert_equal(case: Case, one: list[Result], other: list[Result]) -> None:
    for rank in range(case.size):
        assert torch.equal(one[rank].fused, other[rank].fused)
        assert torch.equal(one[rank].labels, other[rank].labels)
        for name, gradient in one[rank].gradients.items():
            # The same addends in another order: the embedding's duplicates are summed by place.
            torch.testing.assert_close(gradient, other[rank].gradients[name], rtol=1e-5, atol=1e-6)


def coords(dest: tuple[int, int, int], rank: int) -> dict[str, int]:
    """Coordinates of a rank of (tp, cp, dp)."""
    tp, cp, _ = dest
    return {"tp": rank % tp, "cp": rank // tp % cp, "dp": rank // (tp * cp)}


def uniform(pair: tuple, **options: Any) -> Case:
    """Two images in each of 8 samples, shared out equally."""
    src, dest = pair
    return Case(src, dest, [2] * 8, [16 // src[1]] * src[1], **options)


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["tp_copies", "sp"])
@pytest.mark.parametrize("pair", [FAN_IN, FAN_OUT, EQUAL], ids=["fan_in", "fan_out", "equal"])
def test_equal_to_the_gather_bridge(pair, sequence_parallel):
    options = {"sequence_parallel": sequence_parallel and pair[1][0] > 1}
    gathered = uniform(pair, bridge="gather", **options).run()
    for ahead in (False, True):
        case = uniform(pair, ahead=ahead, **options)
        assert_equal(case, case.run(), gathered)


@pytest.mark.parametrize("bridge", ["routed", "gather"])
def test_token_0_stands_for_images_like_any_other(bridge):
    case = uniform(FAN_IN, bridge=bridge, image=0)
    assert not (case.input_ids() == IMAGE).any()
    found, expected = case.run(), uniform(FAN_IN, bridge=bridge).run()
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.fused, other.fused)
        for name, gradient in one.gradients.items():
            assert torch.equal(gradient, other.gradients[name])


UNEVEN = {
    "uneven_images": (FAN_IN, [0, 3, 1, 2, 5, 0, 0, 4], [1, 5, 5, 4]),
    "empty_encoders": (FAN_IN, [2, 2, 1, 1, 1, 1, 2, 2], [6, 0, 0, 6]),
    "empty_language_replica": (FAN_OUT, [2, 1, 0, 0, 3, 0, 1, 1], [3, 5]),
    "one_group_without": (FAN_IN, [0, 0, 0, 0, 1, 2, 3, 1], [0, 0, 3, 4]),
    "within_one_sample": (((1, 8), (2, 4, 1)), [7], [1, 1, 0, 1, 1, 1, 2, 0]),
    "3_to_2": (RATIO, [3, 1, 0, 4], [3, 2, 3]),
    # Language replicas of three and of two samples.
    "batch_of_5": (FAN_IN, [2, 0, 1, 3, 1], [1, 2, 4, 0]),
    "3_to_2_batch_of_5": (RATIO, [3, 1, 0, 4, 2], [3, 2, 5]),
    "nothing": (FAN_IN, [0] * 4, [0] * 4),
    # The last language replicas have no samples: of a group, a whole group, with images of others.
    "no_samples": (FAN_OUT, [3], [3, 0]),
    "no_samples_of_groups": (FAN_OUT, [2, 1], [3, 0]),
    "no_samples_sp": (FAN_IN, [2], [0, 2, 0, 0]),
    "no_samples_cp_3": (RATIO, [4], [1, 1, 2]),
}


def whole(case: Case) -> Result:
    """The same batch on one rank."""
    single = Case((1, 1), (1, 1, 1), case.images, [sum(case.images)], encoders=case.encoders)
    single.length = case.length
    return single.run()[0]


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["tp_copies", "sp"])
@pytest.mark.parametrize("balanced", [False, True], ids=["as_read", "balanced"])
@pytest.mark.parametrize("name", list(UNEVEN))
def test_any_number_of_tokens_against_one_rank(name, balanced, sequence_parallel):
    (src, dest), images, encoded = UNEVEN[name]
    sequence_parallel = sequence_parallel and dest[0] > 1
    case = Case(src, dest, images, encoded, sequence_parallel, balanced=balanced)
    case.ahead = name in ("uneven_images", "no_samples") and not balanced
    assert_as_on_one_rank(case)


@pytest.mark.parametrize("how", ["gather", "routed", "sp", "balanced"])
def test_grids_need_not_begin_at_rank_0(how):
    assert_as_on_one_rank(
        uniform(
            EQUAL,
            bridge="gather" if how == "gather" else "routed",
            sequence_parallel=how == "sp",
            balanced=how == "balanced",
            first=3,
        )
    )


@pytest.mark.parametrize("how", ["gather", "routed", "balanced"])
@pytest.mark.parametrize("pair", [FAN_IN, FAN_OUT, EQUAL], ids=["fan_in", "fan_out", "equal"])
def test_two_encoders_of_one_modality(pair, how):
    """Rows of both stand in each sample, so their order must not follow the layout."""
    encoders = ("linear", "second")
    if how == "gather":
        assert_as_on_one_rank(uniform(pair, bridge="gather", encoders=encoders))
        return
    (src, dest), images = pair, [0, 3, 1, 2, 5, 0, 0, 1]
    encoded = [6, 6] if src[1] == 2 else [0, 6, 5, 1]
    balanced = how == "balanced"
    assert_as_on_one_rank(Case(src, dest, images, encoded, balanced=balanced, encoders=encoders))


def assert_as_on_one_rank(case: Case) -> None:
    """Each rank's part of the fused sequence, and the sums of gradients over all ranks."""
    (tp, cp, dp), src, sequence_parallel = case.dest, case.src, case.sequence_parallel
    found, expected = case.run(), whole(case)
    batches = torch.arange(len(case.images)).tensor_split(dp)
    totals: dict[str, torch.Tensor] = {}
    for rank, result in enumerate(found):
        at = coords(case.dest, rank)
        kept = dense_positions(case.length(), at["cp"], cp, at["tp"] * sequence_parallel,
                               tp if sequence_parallel else 1)  # fmt: skip
        mine = batches[at["dp"]]
        if len(mine):
            assert torch.equal(result.fused, expected.fused[kept][:, mine])
        else:
            assert result.fused.size(1) == 1, "padding stands for no samples"
        for name, gradient in result.gradients.items():
            # Copies of a gradient: the encoder's TP ranks, and the language model's, whose text
            # gradient is whole on each. With SP each TP rank's head sees another part.
            if name.startswith("modality"):
                copies = src[0]
            else:
                copies = 1 if sequence_parallel and ".head." in name else tp
            totals[name] = totals.get(name, 0) + gradient / copies
    for name, gradient in expected.gradients.items():
        torch.testing.assert_close(totals[name], gradient, rtol=1e-4, atol=1e-5)


def test_no_samples_over_the_gather_bridge():
    """As over the routed one, in which the last replica has neither samples nor images."""
    options = {"images": [2], "encoded": [2, 0]}
    gathered = Case(*EQUAL, bridge="gather", **options)
    assert_equal(gathered, gathered.run(), Case(*EQUAL, **options).run())


def misspell(rank: int, inputs: dict[str, Any]) -> None:
    inputs["modality_inputs"] = {"image": inputs["modality_inputs"]["images"]}


def plan_for_others(rank: int, inputs: dict[str, Any]) -> None:
    inputs["route_plan"] = {"image": object()}


@pytest.mark.parametrize(
    ("change", "argument"), [(misspell, "modality_inputs"), (plan_for_others, "route_plan")]
)
def test_what_nobody_reads_is_one_error_in_an_exchange_group(change, argument):
    def only_on_rank_1(rank: int, inputs: dict[str, Any]) -> None:
        if rank == 1:
            change(rank, inputs)

    def body(rank: int) -> str:
        case = Case((1, 2), (1, 2, 1), [1, 1], [1, 1], change=only_on_rank_1)
        with pytest.raises(ValueError) as caught:
            case._on_rank(rank)
        return str(caught.value)

    found = InProcessWorld(2).run(body)
    assert found[0] == found[1]
    assert f"rank 1: {argument} has ['image'], but this model's modalities are" in found[0]


def test_balanced_encoders_have_equal_work_and_say_so(monkeypatch):
    """12 images of two replicas on four, in two exchange groups; text only is nobody's work."""
    seen, balance = [], InputBalance.balance

    def record(self, inputs, device):
        encodes, plan = balance(self, inputs, device)
        images = 0 if encodes is None else len(encodes["linear"]["x"])
        seen.append((images, plan.before, plan.after))
        return encodes, plan

    monkeypatch.setattr(InputBalance, "balance", record)
    src, dest = FAN_IN
    Case(src, dest, [2, 2, 1, 1, 1, 1, 2, 2], [6, 0, 0, 6], balanced=True).run()
    assert seen == [(3, 2.0, 1.0)] * 8
    seen.clear()
    Case(src, dest, [0] * 4, [0] * 4, balanced=True).run()
    assert seen == [(0, 1.0, 1.0)] * 8


@pytest.mark.parametrize(
    ("rank", "change", "message"),
    [
        (2, lambda x: x[:-1], r"ranks \[2, 3\] are copies of one encoder replica .* \[\[2, 2"),
        (7, lambda x: 3, r"rank 7 cannot describe its inputs: TypeError\(.* no len"),
        (None, lambda x: x.half() if len(x) == 8 else x, "all ranks give the same arguments"),
    ],
)
def test_balancing_refuses_inputs_that_do_not_fit_on_all_ranks(rank, change, message):
    told = {}

    def alter(at: int, inputs: dict[str, Any]) -> None:
        images = (inputs["modality_inputs"]["images"] or {}).get("linear")
        if images is not None and rank in (None, at):
            images["x"] = change(images["x"])

    def body(at: int) -> None:
        with pytest.raises(ValueError, match=message) as raised:
            case._on_rank(at)
        told[at] = str(raised.value)

    case = Case((2, 4), (2, 4, 1), [3, 4, 4, 4], [8, 4, 0, 3], balanced=True, change=alter)
    InProcessWorld(8).run(body)
    assert len(told) == 8
    assert len(set(told.values())) == 1


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize(
    ("lengths", "images"),
    [
        ([0, 4, 4, 12, 16], [3, 6]),
        ([0, 16], [3, 6]),  # one sequence
        ([0, 4, 8, 12, 16], [3, 6]),  # a token per chunk; images in some sequences only
        ([0, 4, 12, 16], [0, 0]),  # text only
        ([0, 8, 16], [0, 2]),  # text only on one replica
    ],
)
def test_packed_sequences(lengths, images, ahead):
    """One row of packed samples per replica, cut sample by sample."""
    encoded = {(3, 6): [1, 2, 4, 2], (0, 0): [0] * 4, (0, 2): [0, 0, 1, 1]}[tuple(images)]
    case = Case(*FAN_IN, images, encoded, packed=lengths, ahead=ahead)
    found = case.run()
    for rank, result in enumerate(found):
        at = coords(case.dest, rank)
        kept = packed_positions(lengths, at["cp"], 2)
        assert torch.equal(result.labels, case.input_ids()[at["dp"] : at["dp"] + 1, kept])
        expected = whole(case).fused[kept][:, at["dp"] : at["dp"] + 1]
        assert torch.equal(result.fused, expected)


def test_a_frozen_encoder_gets_no_gradient_and_sends_none():
    case = uniform(FAN_IN, frozen=True)
    for result in case.run():
        assert [name.partition(".")[0] for name in result.missing] == ["modality_submodules"] * 4
    case.encoded = [8, 0, 0, 8]
    case.run()


def test_a_group_without_rows_gives_zero_gradients_where_they_are_waited_for():
    for overlap in (False, True):
        case = Case(*FAN_IN, [0] * 4, [0] * 4, overlap=overlap)
        for result in case.run():
            assert len(result.missing) == (0 if overlap else 4)


def drop_images(rank: int, inputs: dict[str, Any]) -> None:
    inputs["modality_inputs"] = None


def shift_tokens(rank: int, inputs: dict[str, Any]) -> None:
    if rank in (0, 1, 2, 3):
        inputs["input_ids"] = inputs["input_ids"].roll(1, dims=1)


def longer_batch(rank: int, inputs: dict[str, Any]) -> None:
    if rank in (0, 1, 2, 3):
        inputs["input_ids"] = inputs["input_ids"].repeat(1, 2)


def pack(rank: int, inputs: dict[str, Any]) -> None:
    if rank < 4:
        lengths = torch.tensor([0, 8, 16], dtype=torch.int32)
        inputs["packing_kwargs"] = {"cu_seqlens_q": lengths, "cu_seqlens_kv": lengths}


def packed_as(ends: list[int], padded: list[int] | None = None, **fields: Any) -> Any:
    """All ranks but two pack properly; those two, copies of one replica, pack like this."""

    def change(rank: int, inputs: dict[str, Any]) -> None:
        lengths = torch.tensor(ends if rank < 2 else [0, 8, 16], dtype=torch.int32)
        inputs["packing_kwargs"] = {"cu_seqlens_q": lengths, "cu_seqlens_kv": lengths}
        if rank < 2:
            inputs["packing_kwargs"] |= fields
            if padded:
                inputs["packing_kwargs"]["cu_seqlens_q_padded"] = torch.tensor(padded)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (packed_as([0, 12, 8, 16]), r"must not decrease, but entry 2 is 8 after 12"),
        (packed_as([0, 8, 12]), "rows of 16 tokens and cu_seqlens that end at 12"),
        (packed_as([4, 8, 16]), r"must start with 0 and hold .* got \[4, 8, 16\]"),
        (packed_as([0, 6, 16]), r"sequence 0 has 6 tokens, .* not divisible by 2 \* cp = 4"),
        (packed_as([0, 8, 16], max_seqlen_q=4), "max_seqlen_q is 4, but the longest .* has 8"),
        (packed_as([0, 8, 16], max_seqlen_kv=4), "max_seqlen_kv is 4, but the longest .* has 8"),
        (packed_as([0, 9, 16], [0, 8, 16]), "does not fit into cu_seqlens_q_padded"),
        (packed_as([0, 8, 4], [0, 8, 16]), "does not fit into cu_seqlens_q_padded"),
        (packed_as([0, 8, 16], cu_seqlens=3), r"packing_kwargs has \['cu_seqlens'\]"),
    ],
)
@pytest.mark.parametrize("cp", [1, 2])
def test_packing_that_does_not_fit_is_one_error_before_anything_moves(cp, change, message):
    """Without CP too, where nothing is cut but layers would misread it."""
    if cp == 1 and "2 \\* cp" in message:
        return
    dest = (2, cp, 2 // cp)

    def body(rank: int) -> str:
        case = Case((2, 2), dest, [2] * dest[2], [2 // cp] * 2, change=change)
        if rank // 2 and cp == 1:  # in another exchange group
            case._on_rank(rank)
            return "fine"
        with pytest.raises(ValueError) as caught:
            case._on_rank(rank)
        return str(caught.value)

    found = InProcessWorld(4).run(body)
    assert len(set(found[:2])) == 1
    assert re.search(message, found[0]), found[0]
    assert cp == 1 or len(set(found)) == 1


def odd_length(rank: int, inputs: dict[str, Any]) -> None:
    inputs["input_ids"] = inputs["input_ids"][:, :15]


def flat_rows(rank: int, inputs: dict[str, Any]) -> None:
    """One encoder replica's encoders return rows whose items nobody knows."""
    if rank < 2:
        for each in inputs["modality_inputs"]["images"].values():
            each["x"] = each["x"].flatten(0, 1)


@pytest.mark.parametrize(
    ("options", "change", "error", "message"),
    [
        ({}, drop_images, RuntimeError, r"images inputs are missing, .* \(16 of them\)"),
        ({"encoded": [3, 4, 4, 4]}, None, ValueError, r"images tokens \(16\) .* \(14\)"),
        ({"ahead": True}, shift_tokens, ValueError, r"in other places than input_ids \(16 tok"),
        ({"ahead": True}, longer_batch, ValueError, r"batch \(4, 16\), input_ids is \(4, 32\)"),
        (
            {"ahead": True, "images": [2, 2], "encoded": [1] * 4},
            pack,
            ValueError,
            r"lengths None, the batch has \(0, 8, 16\)",
        ),
        ({}, odd_length, ValueError, r"divisible by 4 .* got 15"),
        (
            {"encoders": ("linear", "second")},
            flat_rows,
            ValueError,
            r"ranks 0-1: .*item by item.* \['linear', 'second'\] returned flat rows",
        ),
    ],
)
def test_what_does_not_fit_is_one_error_in_an_exchange_group(options, change, error, message):
    case = uniform(FAN_IN)
    for name, value in options.items():
        setattr(case, name, value)
    if change is not None:
        case.change = change
    # The other exchange group is not concerned where only the first one's batch is changed.
    first_only = change in (shift_tokens, longer_batch, flat_rows) or options.get("encoded")
    concerned = range(4 if first_only else 8)

    def body(rank: int) -> str:
        if rank not in concerned:
            case._on_rank(rank)
            return "fine"
        with pytest.raises(error) as caught:
            case._on_rank(rank)
        return str(caught.value)

    found = InProcessWorld(case.size).run(body)
    assert len(set(found[:4])) == 1
    assert re.search(message, found[0]), found[0]
    assert set(found[len(concerned) :]) <= {"fine"}


def test_a_plan_of_the_step_before_is_noticed_on_the_host():
    """All ranks alike have as many tokens, elsewhere: the plans themselves are equal."""
    case = uniform(FAN_IN, ahead=True)

    def body(rank: int) -> str:
        model, grids = case.build()
        inputs = case._inputs(rank, model, grids)
        model(**inputs)
        model(**inputs)
        inputs["input_ids"] = inputs["input_ids"].roll(1, dims=1)
        with pytest.raises(ValueError) as caught:
            model(**inputs)
        return str(caught.value)

    found = InProcessWorld(case.size).run(body)
    assert all("plan of images has 16 tokens in other places than" in each for each in found)


def empty_plan(rank: int, inputs: dict[str, Any]) -> None:
    inputs["route_plan"] = {}


def test_a_plan_needs_a_routed_bridge():
    case = uniform(FAN_IN, bridge="gather", change=empty_plan)
    with pytest.raises(ValueError, match=r"route_plan was given, but .* \(bridge='gather'\)"):
        case.run()


def test_local_text_examples():
    outcome = doctest.testmod(local_text)
    assert outcome.attempted >= 2
    assert outcome.failed == 0
    nothing = TokenRuns.from_mask(np.ones((2, 8), dtype=bool))
    text = LocalText.find(nothing, [nothing], (1, 2), None)
    assert text.index.size == text.place.size == 0


def test_no_full_sequence_is_allocated(monkeypatch):
    """The largest tensor of width H on a rank has the rows of its part, not of the sequence."""
    largest: dict[int, int] = {}

    def recorded(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def record(self: torch.Tensor, *size: Any, **options: Any) -> torch.Tensor:
            made = make(self, *size, **options)
            if made.dim() == 2 and made.size(1) == HIDDEN:
                rank = dist.get_rank()
                largest[rank] = max(largest.get(rank, 0), made.size(0))
            return made

        return record

    for name in ("new_zeros", "new_empty"):
        monkeypatch.setattr(torch.Tensor, name, recorded(getattr(torch.Tensor, name)))
    uniform(FAN_IN, sequence_parallel=True).run()
    assert largest == dict.fromkeys(range(8), 4 * LENGTH // 4)


class OwnAdapter:
    """A user's partition adapter: notes what it is given and marks what it returns."""

    def __init__(self, inner: Any, seq_parallel: bool) -> None:
        self.inner, self.cfg = inner, SimpleNamespace(seq_parallel=seq_parallel)
        self.given: list[dict[str, Any]] = []

    def shard(self, **given: Any) -> Any:
        self.given.append(given)
        cut = tuple(given.values())
        embeddings, labels, mask, packed = self.inner.shard(*cut) if self.inner else cut
        return embeddings, labels + 1, mask * 2, packed


@dataclass
class OwnCase(Case):
    """A case whose model has such an adapter on every rank."""

    def build(self) -> tuple[MimoModel, dict[str, HyperCommGrid]]:
        model, grids = super().build()
        own = OwnAdapter(model.partition_adapter, self.sequence_parallel)
        model.partition_adapter = own
        forward = model.forward

        def checked(**inputs: Any) -> Any:
            output, mask = forward(**inputs)
            (given,) = own.given
            assert list(given) == ["embeddings", "labels", "loss_mask", "packed_seq_params"]
            assert given["embeddings"].shape[:2] == inputs["input_ids"].T.shape
            assert torch.equal(mask, inputs["loss_mask"] * 2)
            return output, mask

        model.forward = checked
        return model, grids


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["tp_copies", "sp"])
def test_a_users_partition_adapter_gets_the_whole_sequence_and_what_it_returns_is_used(
    sequence_parallel: bool,
) -> None:
    layout = (1, 4), (2, 1, 2), [2] * 4, [2] * 4
    case = OwnCase(*layout, sequence_parallel=sequence_parallel)
    plain = Case(*layout, sequence_parallel=sequence_parallel).run()
    own, gathered = case.run(), replace(case, bridge="gather").run()
    assert_equal(case, own, gathered)
    assert all(torch.equal(a.fused, b.fused) for a, b in zip(own, plain, strict=True))
    assert all(torch.equal(a.labels, b.labels + 1) for a, b in zip(own, plain, strict=True))


def test_a_users_partition_adapter_is_refused_where_routes_cut_for_cp() -> None:
    case = OwnCase((2, 2), (1, 2, 2), [2] * 4, [4, 4])
    with pytest.raises(ValueError, match=r"OwnAdapter with a shard .* CP 2 .* bridge='gather'"):
        case.run()
