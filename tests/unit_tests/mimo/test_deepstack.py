# SPDX-License-Identifier: Apache-2.0
"""Levels of rows that are added after layers, all ranks as threads of one process.

Stages are stand-ins whose layers forget their input, so that what comes out of a layer is what was
added after it, to the last bit. The oracle is one rank with the whole batch. Real layers and
schedules run in ``test_deepstack_8rank``.
"""

from __future__ import annotations

import doctest
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from megatron.core.hyper_comm_grid import box_of
from megatron.core.models.mimo import MimoModel
from megatron.core.models.mimo.comm.plan.balance import EncoderBalance
from megatron.core.models.mimo.comm.plan.routed_layout import RouteLayout
from megatron.core.models.mimo.comm.plan.routes import plan_routes
from megatron.core.models.mimo.comm.plan.token_runs import TokenRuns
from megatron.core.models.mimo.config.role import ModuleLayout
from megatron.core.models.mimo.model import deepstack
from megatron.core.models.mimo.model.deepstack import (
    DeepStack,
    LevelRows,
    LevelSeats,
    check_levels_move,
    check_stage,
    stage_of_layers,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from tests.unit_tests.mimo.model_stubs import (
    HIDDEN,
    IMAGE,
    language_config,
    mimo_config,
    modality_spec,
)
from tests.unit_tests.mimo.test_stage_side import LENGTH, Case, StubStage, gradient_of

LAYERS = 8
IMAGES = ([0, 0, 0, 0], [2, 0, 1, 3], [1, 1, 0, 0])
SOUNDS = ([0, 2, 0, 1], [0, 0, 0, 0], [1, 0, 0, 0])
# As many images and sounds for each replica of either side.
EVEN_IMAGES = ([0, 0, 0, 0], [2, 2, 2, 2], [1, 3, 4, 0])
EVEN_SOUNDS = ([0, 2, 1, 1], [0, 0, 0, 0], [2, 0, 2, 0])


class ForgetfulLayer(nn.Module):
    """Zeros, as a layer of Megatron returns them."""

    def __init__(self, layer_number: int) -> None:
        super().__init__()
        self.layer_number = layer_number

    def forward(self, hidden_states: torch.Tensor, **further: Any) -> tuple[torch.Tensor, Any]:
        return hidden_states * 0, further.get("context")


class LayeredStage(StubStage):
    """Some layers; keeps what came out of each of them."""

    def __init__(self, numbers: list[int], **params: Any) -> None:
        super().__init__(**params)
        self.decoder = nn.Module()
        self.decoder.layers = nn.ModuleList(ForgetfulLayer(1 + number) for number in numbers)
        self.after: dict[int, torch.Tensor] = {}

    def forward(self, **inputs: Any) -> torch.Tensor:
        further = inputs.pop("extra_block_kwargs", {})
        self.called_with = inputs
        hidden = inputs["decoder_input"]
        hidden = self.received if hidden is None else hidden
        self.after = {-1: hidden} if self.pre_process else {}
        for layer in self.decoder.layers:
            hidden, _ = layer(hidden_states=hidden, **further)
            self.after[layer.layer_number - 1] = hidden
        return hidden


@dataclass
class Levels(Case):
    """A case whose images have three levels and whose sounds have two, or none."""

    levels: dict[str, tuple[int, ...]] = field(
        default_factory=lambda: {"images": (0, 3, 6), "sounds": (3, 5)}
    )
    virtual: int = 1
    images: tuple[list[int], ...] = IMAGES
    sounds: tuple[list[int], ...] = SOUNDS

    def __post_init__(self) -> None:
        own = {n: v for n, v in self.levels.items() if n == "images" or self.hears}
        self.options = {"deepstack_layers": own, **self.options}
        if self.virtual > 1:
            sizes = {"virtual_pipeline_model_parallel_size": self.virtual}
            self.config = {**self.config, **sizes, "overlap_p2p_comm": True}

    def modality(self, name: str) -> ModuleSpec:
        spec = modality_spec()
        (projection,) = spec.submodules["input_projections"]
        projection.params["out_features"] = HIDDEN * (1 + len(self.levels.get(name, ())))
        return spec

    def stages(self, stage: int, params: dict[str, Any]) -> dict[str, Any]:
        pp = self.dest[2]
        each = LAYERS // (pp * self.virtual)
        specs = []
        for part in range(self.virtual):
            first = (part * pp + stage) * each
            own = {
                **params,
                "numbers": list(range(first, first + each)),
                "pre_process": params["pre_process"] and part == 0,
                "post_process": params["post_process"] and part == self.virtual - 1,
            }
            specs.append(ModuleSpec(module=LayeredStage, params=own))
        return {"language_model_spec": specs[0], "virtual_stage_specs": specs[1:]}

    def local_length(self) -> int:
        return LENGTH // (self.dest[1] * (self.dest[0] if self.sequence_parallel else 1))


@dataclass
class Result:
    """What came out of each layer (-1: the fused sequence) and the encoders' gradients."""

    after: list[dict[int, torch.Tensor]]
    gradients: dict[str, torch.Tensor | None]


def step(case: Levels, rank: int, model: MimoModel) -> Result:
    """Encode all microbatches, give every layer's output a gradient, take these back."""
    batches = [case.inputs(rank, number) for number in range(len(case.images))]
    return step_of(case, rank, model, batches)


def step_of(case: Levels, rank: int, model: MimoModel, batches: list[dict[str, Any]]) -> Result:
    encoded = model.encode_microbatches(batches)
    found: list[dict[int, torch.Tensor]] = []
    for number, (batch, each) in enumerate(zip(batches, encoded.microbatches, strict=True)):
        del batch["modality_inputs"]
        found.append({})
        for stage in model.language_stages():
            received = torch.zeros(case.local_length(), len(batch["input_ids"]), HIDDEN)
            stage.set_input_tensor(received.requires_grad_())
            model.forward_stage(stage, each, **batch)
            found[-1] |= backward(case, rank, number, stage)
    encoded.backward()
    return result_of(model, found)


def whole_step(case: Levels, rank: int, model: MimoModel) -> Result:
    """The same without stages, by ``forward``."""
    found = []
    for number in range(len(case.images)):
        model(**case.inputs(rank, number))
        found.append(backward(case, rank, number, model.language_model))
    return result_of(model, found)


def backward(
    case: Levels, rank: int, number: int, stage: LayeredStage
) -> dict[int, torch.Tensor]:
    """Give each layer's output a gradient of its own."""
    gradients = [case.part(rank, gradient_of(100 * number + layer + 1)) for layer in stage.after]
    torch.autograd.backward(list(stage.after.values()), gradients)
    return {layer: hidden.detach() for layer, hidden in stage.after.items()}


def result_of(model: MimoModel, found: list[dict[int, torch.Tensor]]) -> Result:
    encoders = model.modality_submodules
    return Result(found, {name: p.grad for name, p in encoders.named_parameters()})


BALANCE = {
    "images": EncoderBalance(
        threshold=1,
        cost=lambda tokens: tokens,
        tokens_per_item=lambda inputs: [2] * len(inputs["linear"]["x"]),
    )
}


@dataclass
class Lopsided(Levels):
    """All images are read by one replica; the others are given some by cost."""

    def share(
        self, rank: int, layout: tuple[int, int], count: int, top: float
    ) -> torch.Tensor:
        whole = super().share(0, (1, 1), count, top)
        return whole if layout[1] == 1 or rank < layout[0] else whole[:0]


DP_LAST = {"dims": ("tp", "cp", "pp", "dp"), "options": {"bridge": "gather"}}
EVEN = {"images": EVEN_IMAGES, "sounds": EVEN_SOUNDS}
MIXED = {**DP_LAST, "options": {"bridge": {"images": "gather", "sounds": "routed"}}}
STAGES = {
    "stages_cp": Levels((1, 8), (1, 2, 2, 2)),
    "stages_sp": Levels((2, 4), (2, 2, 2, 1), sequence_parallel=True, hears=(1, 8)),
    "stages_tp_copies": Levels((2, 4), (2, 2, 2, 1)),
    "four_stages": Levels((1, 8), (1, 2, 4, 1), hears=(2, 4)),
    "fan_out": Levels((4, 2), (1, 1, 2, 4)),
    "virtual": Levels((1, 8), (1, 2, 2, 2), hears=(2, 4), virtual=2),
    "one_modality_without": Levels((1, 8), (1, 2, 2, 2), hears=(2, 4), levels={"images": (6,)}),
    "balanced": Lopsided((2, 4), (2, 2, 2, 1), options={"encoder_balance": BALANCE}),
    "frozen": Levels((1, 8), (1, 2, 2, 2), frozen=True),
    "gather_fan_in": Levels((1, 4), (1, 2, 2, 1), **DP_LAST, **EVEN),
    "gather_fan_out": Levels((8, 1), (1, 2, 2, 2), **DP_LAST, **EVEN),
    "gather_virtual": Levels((1, 4), (1, 2, 2, 1), **DP_LAST, **EVEN, virtual=2, hears=(1, 4)),
    "mixed": Levels((1, 8), (1, 2, 2, 2), hears=(2, 4), **MIXED, **EVEN),
    "mixed_sp": Levels((8, 1), (2, 2, 2, 1), hears=(2, 4), sequence_parallel=True, **MIXED),
}
WHOLE = {
    "cp_sp": Levels((2, 4), (2, 2, 1, 2), sequence_parallel=True, hears=(2, 4), **EVEN),
    "tp_copies": Levels((1, 8), (2, 2, 1, 2), **EVEN),
    "fan_out": Levels((2, 2), (1, 1, 1, 4), hears=(2, 2), **EVEN),
    "gather": Levels((1, 8), (2, 2, 1, 2), hears=(2, 4), sequence_parallel=True, **EVEN,
                     options={"bridge": "gather"}),
    "mixed": Levels((1, 8), (1, 4, 1, 2), hears=(2, 4), **MIXED, **EVEN),
}  # fmt: skip


def check(case: Levels, results: list[Result], whole: Result) -> None:
    for rank, result in enumerate(results):
        for after, expected in zip(result.after, whole.after, strict=True):
            assert after
            for layer, hidden in after.items():
                assert torch.equal(hidden, case.part(rank, expected[layer])), (rank, layer)
    for key, expected in whole.gradients.items():
        if case.frozen:
            assert all(result.gradients[key] is None for result in results)
            continue
        total = torch.stack([result.gradients[key] for result in results]).sum(dim=0)
        copies = (case.src if key.startswith("images") else case.hears)[0]
        torch.testing.assert_close(total / copies, expected, rtol=1e-5, atol=1e-5)
        assert expected.norm() > 0.5


def alone(case: Levels) -> Levels:
    hears = (1, 1) if case.hears else None
    options = {"deepstack_layers": case.options["deepstack_layers"]}
    return replace(
        case, src=(1, 1), dest=(1, 1, 1, 1), hears=hears, virtual=1, sequence_parallel=False,
        config={}, options=options, dims=Case.dims,
    )  # fmt: skip


@pytest.mark.parametrize("name", list(STAGES))
def test_levels_and_gradients_in_stages_against_one_rank(name: str) -> None:
    case = STAGES[name]
    (whole,) = alone(case).run(step)
    check(case, case.run(step), whole)


@pytest.mark.parametrize("name", list(WHOLE))
def test_levels_and_gradients_against_one_rank(name: str) -> None:
    case = WHOLE[name]
    (whole,) = alone(case).run(step)
    check(case, case.run(whole_step), whole)


def test_a_language_replica_without_samples_takes_part() -> None:
    """Padding runs there; the images of the other replica's samples are encoded by all ranks."""
    case = Levels((1, 4), (1, 2, 1, 2), images=([2, 2, 0, 0],), options={"bridge": "routed"})

    def one_empty(case: Levels, rank: int, model: MimoModel) -> dict[str, torch.Tensor | None]:
        batch = case.inputs(rank, 0)
        if (empty := case.coordinate(rank, "dp") == 1):
            names = ("input_ids", "position_ids", "labels", "loss_mask")
            batch |= {name: batch[name][:0] for name in names}
            batch["modality_inputs"] = None
        elif rank == 0:
            batch["modality_inputs"] = {"images": {"linear": {"x": case.share(0, (1, 1), 4, 1)}}}
        else:
            batch["modality_inputs"] = None
        output, _ = model(**batch)
        after = model.language_model.after
        if empty:
            assert output.numel() == 0
            assert not any(after[layer].any() for layer in case.levels["images"])
            sum(hidden.sum() for hidden in after.values()).backward()
            return result_of(model, []).gradients
        return backward(case, rank, 0, model.language_model), result_of(model, []).gradients

    def whole(case: Levels, rank: int, model: MimoModel) -> Any:
        model(**case.inputs(rank, 0))
        return backward(case, rank, 0, model.language_model), result_of(model, []).gradients

    ((expected, gradients),) = alone(case).run(whole)
    found = case.run(one_empty)
    for rank in (0, 1):
        for layer, hidden in found[rank][0].items():
            assert torch.equal(hidden, case.part(rank, expected[layer]))
    for key, gradient in gradients.items():
        torch.testing.assert_close(found[0][1][key], gradient, rtol=1e-5, atol=1e-5)


def test_one_rank_adds_each_level_after_its_layer_and_nowhere_else() -> None:
    """The oracle itself, by hand: columns of the encoder's rows at the places of their tokens."""
    case = alone(STAGES["stages_cp"])

    def one(case: Levels, rank: int, model: MimoModel) -> None:
        batch = case.inputs(rank, 1)
        images = batch["modality_inputs"]["images"]
        rows = model.modality_submodules["images"](encoder_inputs=images)
        model(**batch)
        after = model.language_model.after
        places = (batch["input_ids"] == IMAGE).transpose(0, 1)
        order = torch.argsort(torch.nonzero(batch["input_ids"].T == IMAGE)[:, 1], stable=True)
        for block, layer in enumerate((-1, *case.levels["images"])):
            found = after[layer][places][order]
            assert torch.equal(found, rows[:, block * HIDDEN : (block + 1) * HIDDEN])
            assert found.norm() > 1
        for layer in range(LAYERS):
            outside = after[layer][~places] if layer in case.levels["images"] else after[layer]
            assert not outside.any()

    case.run(one)


def test_plans_made_ahead_have_routes_to_later_stages() -> None:
    case = Levels((1, 4), (1, 2, 2, 1))

    def ahead(case: Levels, rank: int, model: MimoModel) -> tuple[str, torch.Tensor]:
        batch = case.inputs(rank, 1)
        mask = batch["input_ids"].numpy() == IMAGE
        counts = [2 * len(s) for s in torch.arange(mask.sum() // 2).tensor_split(case.src[1])]
        assert model.colocated_comms["images", "language"].layout.later_stages == (1,)
        grids = model.mimo_config.module_to_grid_map
        ends = box_of(grids["images"]), box_of(grids["language"])
        layout = RouteLayout.from_grids(*ends, "images", "language", later_stages=(1,))
        other = RouteLayout.from_grids(*ends, "images", "language")
        told = ""
        for each in (other, layout):
            plan = plan_routes(each, rank, [TokenRuns.from_mask(mask)], counts)
            given = {**batch, "route_plan": {"images": plan}}
            try:
                encoded = model.encode_microbatches([given])
            except ValueError as refused:
                told = str(refused)
        (microbatch,) = encoded.microbatches
        return told, microbatch.rows.rows["images"].arrive()

    def unplanned(case: Levels, rank: int, model: MimoModel) -> torch.Tensor:
        (microbatch,) = model.encode_microbatches([case.inputs(rank, 1)]).microbatches
        return microbatch.rows.rows["images"].arrive()

    found = case.run(ahead)
    for told, _ in found:
        assert "has routes to 0 later pipeline stages, levels of its rows are added on 1" in told
    for (_, rows), expected in zip(found, case.run(unplanned), strict=True):
        assert torch.equal(rows, expected)
    # The first stage gets what stands among the text and two levels, the second one level.
    widths = {np.sign(len(rows)) * rows.size(1) for _, rows in found}
    assert widths == {3 * HIDDEN, HIDDEN}


def test_rows_of_another_width_are_told_on_all_ranks() -> None:
    def one_narrow(case: Levels, rank: int, model: MimoModel) -> str:
        if rank == 1:
            projection = model.modality_submodules["images"].input_projections[0]
            projection.weight = nn.Parameter(projection.weight[: 2 * HIDDEN])
            projection.bias = nn.Parameter(projection.bias[: 2 * HIDDEN])
        with pytest.raises(ValueError) as refused:
            model.encode_microbatches([case.inputs(rank, 1)])
        return str(refused.value)

    (told,) = set(Levels((1, 4), (1, 2, 2, 1)).run(one_narrow))
    assert "nothing was moved. rank 1: rows of images are 16 wide, but with 3 levels" in told
    assert "(deepstack_layers (0, 3, 6)) they must be (1 + 3) * 8 = 32; give" in told


@pytest.mark.parametrize("bridge", ["routed", "gather"])
def test_levels_that_were_not_declared_are_told(bridge: str) -> None:
    def undeclared(case: Levels, rank: int, model: MimoModel) -> None:
        model(**case.inputs(rank, 1))

    case = replace(Levels((1, 2), (1, 2, 1, 1)), images=EVEN_IMAGES)
    case.options = {"bridge": bridge}
    with pytest.raises(ValueError, match=r"are 32 wide, but with 0 levels .* \* 8 = 8; give deeps"):
        case.run(undeclared)


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ({"pictures": (0,)}, r"names \['pictures'\], but the model's modalities are \['images'\]"),
        ({"images": ()}, r"must be layer numbers, one per level, got \(\); leave the modality out"),
        ({"images": (0, 1.5)}, r"must be layer numbers, one per level, got \(0, 1.5\)"),
        ({"images": 3}, "must be layer numbers, one per level, got 3"),
        ({"images": (2, 1)}, r"must be ascending and name each layer once, got \(2, 1\)"),
        ({"images": (1, 1)}, r"must be ascending and name each layer once, got \(1, 1\)"),
        ({"images": (0, 8)}, r"is \(0, 8\), but the language model has 8 layers, 0 to 7; name"),
        ({"images": (-1, 2)}, r"is \(-1, 2\), but the language model has 8 layers, 0 to 7; name"),
    ],
)
def test_layers_that_cannot_be(layers: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        MimoModel(mimo_config(language_config(num_layers=8), deepstack_layers=layers))


def test_language_models_that_cannot_add_levels() -> None:
    with pytest.raises(ValueError, match="decoder.layers that have a layer_number, as GPTModel; S"):
        MimoModel(mimo_config(language_config(num_layers=8), deepstack_layers={"images": (1,)}))
    stage = LayeredStage([4, 5], config=language_config())
    levels = DeepStack(HIDDEN, {"images": (1, 4)}, stage_of=(0,) * 4 + (1,) * 4)
    check_stage(levels, 1, [LevelSeats(stage, {1, 4})])
    with pytest.raises(ValueError, match=r"stage 0 has the layers \[1\] .* was built with \[4\]"):
        check_stage(levels, 0, [LevelSeats(stage, {1, 4})])
    stage.decoder.layers[1].cross_attention = nn.Linear(1, 1)
    with pytest.raises(ValueError, match="names layer 5, which has cross-attention"):
        LevelSeats(stage, {5})


def test_levels_that_nobody_would_bring() -> None:
    levels = DeepStack(HIDDEN, {"images": (0,)}, stage_of=(0,))
    with pytest.raises(ValueError, match="are on ranks of their own, and stock's bridge brings"):
        check_levels_move(levels, ModuleLayout.NON_COLOCATED, object())
    with pytest.raises(ValueError, match="rows go by object, which has no method levels"):
        check_levels_move(levels, ModuleLayout.COLOCATED, object())
    check_levels_move(DeepStack(HIDDEN, {}), ModuleLayout.NON_COLOCATED, object())


def test_layers_that_run_without_their_hooks_are_an_error() -> None:
    """As captured graphs do: the level would be left out in silence."""

    def captured(case: Levels, rank: int, model: MimoModel) -> None:
        layers = model.language_model.decoder.layers
        layers[3].forward, layers[3]._forward_hooks = layers[3].forward, {}
        model(**case.inputs(rank, 1))

    words = r"due after the layers \[0, 3, 6\], but were added after \[0, 6\] only: the layers"
    with pytest.raises(RuntimeError, match=words):
        alone(STAGES["stages_cp"]).run(captured)


def test_hidden_states_elsewhere_stay_and_what_comes_out_is_no_view() -> None:
    hidden = torch.randn(4, 2, HIDDEN, requires_grad=True)
    level, place = torch.randn(3, HIDDEN, dtype=torch.float64), torch.tensor([6, 0, 3])
    for value, where in ((level, place), (torch.randn(8, HIDDEN), None)):
        out = deepstack._add(hidden, value, where)
        assert out._base is None
        assert out.dtype == hidden.dtype
        expected = hidden.detach().clone().view(8, HIDDEN)
        expected[slice(None) if where is None else where] += value.float()
        assert torch.equal(out.detach().view(8, HIDDEN), expected)


def test_levels_of_several_modalities_become_one() -> None:
    rows = [torch.randn(n, 2 * HIDDEN) for n in (2, 3, 8)]
    placed = [LevelRows(rows[0], torch.tensor([1, 4])), LevelRows(rows[1], torch.tensor([0, 2, 7]))]
    assert LevelRows.joined([]) is None
    assert LevelRows.joined(placed[:1]) is placed[0]
    both = LevelRows.joined(placed)
    assert torch.equal(both.rows, torch.cat(rows[:2]))
    assert both.place.tolist() == [1, 4, 0, 2, 7]
    total = LevelRows.joined([placed[0], LevelRows(rows[2], None), placed[1]])
    expected = rows[2].clone()
    expected[[1, 4]] += rows[0]
    expected[[0, 2, 7]] += rows[1]
    assert total.place is None
    assert torch.equal(total.rows, expected)


def test_layers_are_dealt_out_as_stock_does() -> None:
    def stages(**sizes: Any) -> tuple[int, ...]:
        return stage_of_layers(language_config(pipeline_dtype=torch.float32, **sizes))

    two = {"num_layers": 8, "pipeline_model_parallel_size": 2}
    assert stages(num_layers=3) == (0, 0, 0)
    assert stages(**two) == (0,) * 4 + (1,) * 4
    virtual = {"virtual_pipeline_model_parallel_size": 2, "overlap_p2p_comm": True}
    assert stages(**two, **virtual) == (0, 0, 1, 1, 0, 0, 1, 1)
    assert stages(**two, num_layers_in_first_pipeline_stage=3) == (0,) * 3 + (1,) * 5
    layout = [["embedding", "decoder"], ["decoder"] * 7 + ["loss"]]
    assert stages(**two, pipeline_model_parallel_layout=layout) == (0,) + (1,) * 7


def test_words_of_the_module() -> None:
    outcome = doctest.testmod(deepstack)
    assert outcome.attempted >= 3
    assert outcome.failed == 0
