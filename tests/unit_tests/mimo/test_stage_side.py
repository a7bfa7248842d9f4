# SPDX-License-Identifier: Apache-2.0
"""Encoders ahead of a language model in stages, all ranks as threads of one process.

Language models are stand-ins, so the first stage's input and its gradient are in the test's hands:
the pipeline between them is played by feeding a gradient. The oracle is one rank with the whole
batch. Megatron-Core's schedules run in ``test_pipeline_step_8rank``.
"""

from __future__ import annotations

import doctest
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from megatron.core.hyper_comm_grid import HyperCommGrid
from megatron.core.models.mimo import MimoModel
from megatron.core.models.mimo.comm import plan_guard
from megatron.core.models.mimo.comm.plan.routes import plan_routes
from megatron.core.models.mimo.comm.plan.token_runs import TokenRuns
from megatron.core.models.mimo.config.role import ModuleStageInfo
from megatron.core.models.mimo.partition.sequence_order import dense_positions
from megatron.core.models.mimo.pipeline.step import forward_backward_pipelined
from megatron.core.transformer.spec_utils import ModuleSpec
from tests.unit_tests.mimo.in_process_ranks import InProcessWorld
from tests.unit_tests.mimo.model_stubs import (
    HIDDEN,
    IMAGE,
    SOUND,
    StubGroup,
    StubLanguageModel,
    language_config,
    mimo_config,
    modality_spec,
)

LENGTH = 16
# Images of every sample of a step's microbatches, two tokens each: none in the first, in the middle
# and in the last one.
IMAGES = ([0, 0, 0, 0], [2, 0, 1, 3], [0, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0])
# Sounds of the same samples, two tokens each, in models that hear.
SOUNDS = ([0, 2, 0, 1], [0, 0, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0], [0, 0, 3, 0])


class StubStage(StubLanguageModel):
    """Says which stage it is, as Megatron's models do."""

    def __init__(self, pre_process: bool = True, post_process: bool = True, **params: Any) -> None:
        super().__init__(embedding=pre_process, **params)
        self.pre_process, self.post_process = pre_process, post_process


@dataclass
class Result:
    """What a rank leaves: the first stage's input of each microbatch, the encoder's gradients."""

    fused: list[torch.Tensor]
    gradients: dict[str, torch.Tensor | None]


@dataclass
class Case:
    """(tp, dp) of the encoder, (tp, cp, pp, dp) of the language model, and what is done to it.

    ``hears``: (tp, dp) of an encoder of sounds. ``images``, ``sounds``: of every sample, by
    microbatch.
    """

    src: tuple[int, int] = (1, 4)
    dest: tuple[int, int, int, int] = (1, 1, 2, 2)
    sequence_parallel: bool = False
    frozen: bool = False
    hears: tuple[int, int] | None = None
    flags: Callable[[int, int], dict[str, bool]] | None = None
    dims: tuple[str, ...] = ("tp", "cp", "dp", "pp")
    config: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    images: tuple[list[int], ...] = IMAGES
    sounds: tuple[list[int], ...] = SOUNDS

    @property
    def size(self) -> int:
        return self.src[0] * self.src[1]

    def run(self, body: Callable[[Case, int, MimoModel], Any]) -> list[Any]:
        def on_rank(rank: int) -> Any:
            model, grids = self.build(rank)
            try:
                return body(self, rank, model)
            finally:
                model.destroy()
                for grid in grids.values():
                    grid.destroy()

        return InProcessWorld(self.size).run(on_rank)

    def build(self, rank: int) -> tuple[MimoModel, dict[str, HyperCommGrid]]:
        tp, cp, pp, dp = self.dest
        grids = {
            "images": HyperCommGrid(list(self.src), ["tp", "dp"]),
            "language": HyperCommGrid(
                [{"tp": tp, "cp": cp, "dp": dp, "pp": pp}[dim] for dim in self.dims], self.dims
            ),
        }
        if self.hears:
            grids["sounds"] = HyperCommGrid(list(self.hears), ["tp", "dp"])
        for dim in ("tp", "cp"):
            grids["language"].create_pg(dim)
        sizes = {
            "tensor_model_parallel_size": tp,
            "context_parallel_size": cp,
            "pipeline_model_parallel_size": pp,
            "pipeline_dtype": torch.float32,
            "sequence_parallel": self.sequence_parallel,
            "num_layers": 8,
        }
        stage = grids["language"].coords(rank)["pp"]
        flags = {"pre_process": stage == 0, "post_process": stage == pp - 1}
        if self.flags is not None:
            flags = self.flags(stage, pp)
        params = {"config": language_config(**{**sizes, **self.config}), **flags}
        torch.manual_seed(3)
        config = mimo_config(
            modalities={name: self.modality(name) for name in grids if name != "language"},
            module_to_grid_map=grids,
            **self.stages(stage, params),
            **{"bridge": "routed", **self.options},
        )
        model = MimoModel(config)
        model.modality_submodules["images"].requires_grad_(not self.frozen)
        return model, grids

    def modality(self, name: str) -> ModuleSpec:
        return modality_spec()

    def stages(self, stage: int, params: dict[str, Any]) -> dict[str, Any]:
        return {"language_model_spec": ModuleSpec(module=StubStage, params=params)}

    def inputs(self, rank: int, microbatch: int) -> dict[str, Any]:
        """The rank's language samples, and its encoder replica's run of all images."""
        images = self.images[microbatch]
        ids = torch.arange(len(images) * LENGTH).view(len(images), LENGTH) % 40
        for sample, count in enumerate(images):
            ids[sample, 1 : 1 + 2 * count] = IMAGE
        given = {"images": self.share(rank, self.src, sum(images), 1 + microbatch)}
        if self.hears:
            sounds = self.sounds[microbatch]
            for sample, count in enumerate(sounds):
                ids[sample, LENGTH - 2 * count :] = SOUND
            given["sounds"] = self.share(rank, self.hears, sum(sounds), 3 + microbatch)
        part = ids.chunk(self.dest[3])[self.coordinate(rank, "dp")]
        return {
            "input_ids": part,
            "position_ids": torch.arange(LENGTH).expand_as(part),
            "labels": part,
            "loss_mask": torch.ones(part.shape),
            "modality_inputs": {
                name: {"linear": {"x": x}} if len(x) else None for name, x in given.items()
            },
        }

    def share(
        self, rank: int, layout: tuple[int, int], count: int, top: float
    ) -> torch.Tensor:
        """An encoder replica's run of all items ``(n, 2, 4)``, every value another one."""
        items = torch.linspace(-1, top, count * 8).view(-1, 2, 4)
        return items.tensor_split(layout[1])[rank // layout[0]]

    def coordinate(self, rank: int, dim: str) -> int:
        sizes = dict(zip(("tp", "cp", "pp", "dp"), self.dest, strict=True))
        for before in self.dims[: self.dims.index(dim)]:
            rank //= sizes[before]
        return rank % sizes[dim]

    def part(self, rank: int, whole: torch.Tensor) -> torch.Tensor:
        """A rank's part of ``(S, B, H)`` over the global microbatch."""
        tp = (self.coordinate(rank, "tp"), self.dest[0]) if self.sequence_parallel else (0, 1)
        kept = dense_positions(LENGTH, self.coordinate(rank, "cp"), self.dest[1], *tp)
        return whole.chunk(self.dest[3], dim=1)[self.coordinate(rank, "dp")][kept]


def gradient_of(microbatch: int) -> torch.Tensor:
    """What the language model sends back, ``(S, B, H)``: nothing at two places alike."""
    generator = torch.Generator().manual_seed(microbatch)
    return torch.randn(LENGTH, len(IMAGES[0]), HIDDEN, generator=generator)


def step(case: Case, rank: int, model: MimoModel) -> Result:
    """Encode all microbatches, play the pipeline, take the gradients back."""
    batches = [case.inputs(rank, microbatch) for microbatch in range(len(case.images))]
    encoded = model.encode_microbatches(batches)
    fused = []
    for number, (batch, each) in enumerate(zip(batches, encoded.microbatches, strict=True)):
        del batch["modality_inputs"]
        if case.coordinate(rank, "pp") > 0:
            model.language_model.set_input_tensor(torch.zeros(1, HIDDEN))
        model.forward_stage(model.language_model, each, **batch)
        given = model.language_model.called_with["decoder_input"]
        if given is not None:
            given.backward(case.part(rank, gradient_of(number)))
            fused.append(given.detach())
    encoded.backward()
    encoders = model.modality_submodules
    return Result(fused, {name: p.grad for name, p in encoders.named_parameters()})


DP_LAST = {"dims": ("tp", "cp", "pp", "dp"), "options": {"bridge": "gather"}}
# As many images for each replica of either side, in samples that differ.
EVEN = {"images": ([0, 0, 0, 0], [2, 0, 1, 1], [0, 0, 0, 0], [1, 3, 4, 0], [0, 0, 0, 0])}
# The same by eight, and as many sounds in each half of the samples.
BY_EIGHT = {
    "images": ([0, 0, 0, 0], [2, 2, 2, 2], [0, 0, 0, 0], [1, 3, 4, 0], [0, 0, 0, 0]),
    "sounds": ([0, 2, 1, 1], [0, 0, 0, 0], [1, 1, 0, 2], [0, 0, 0, 0], [2, 0, 2, 0]),
}
# The images' rows go to all ranks of a language replica, the sounds' to the owners of their places.
MIXED = {**DP_LAST, "options": {"bridge": {"images": "gather", "sounds": "routed"}}}
LAYOUTS = {
    "stages": Case(),
    "stages_cp": Case((1, 8), (1, 2, 2, 2)),
    "stages_tp_copies": Case((2, 4), (2, 2, 2, 1)),
    "stages_sp": Case((2, 4), (2, 2, 2, 1), sequence_parallel=True),
    "four_stages": Case((1, 8), (1, 2, 4, 1)),
    "eight_stages": Case((2, 4), (1, 1, 8, 1)),
    "fan_out": Case((4, 2), (1, 1, 2, 4)),
    "one_stage": Case((1, 4), (1, 4, 1, 1)),
    "two_encoders": Case((1, 8), (1, 2, 2, 2), hears=(2, 4)),
    "frozen": Case((1, 8), (1, 2, 2, 2), frozen=True),
    "gather_fan_in": Case((1, 4), (1, 2, 2, 1), **DP_LAST, **EVEN),
    "gather_fan_out": Case((8, 1), (1, 2, 2, 2), **DP_LAST, **EVEN),
    "mixed": Case((1, 8), (1, 2, 2, 2), hears=(2, 4), **MIXED, **BY_EIGHT),
    "mixed_sp": Case((8, 1), (2, 2, 2, 1), sequence_parallel=True, hears=(2, 4), **MIXED),
}


@pytest.mark.parametrize("name", list(LAYOUTS))
def test_rows_and_gradients_against_one_rank(name):
    case = LAYOUTS[name]
    hears = (1, 1) if case.hears else None
    alone = Case((1, 1), (1, 1, 1, 1), hears=hears, images=case.images, sounds=case.sounds)
    (whole,) = alone.run(step)
    results = case.run(step)
    for rank, result in enumerate(results):
        if case.coordinate(rank, "pp") > 0:
            assert result.fused == []  # hidden states come from the stage before
            continue
        for part, expected in zip(result.fused, whole.fused, strict=True):
            assert torch.equal(part, case.part(rank, expected))
    for key, expected in whole.gradients.items():
        if case.frozen:
            assert all(result.gradients[key] is None for result in results)
            continue
        # Encoder replicas have a part of the items each; their TP ranks have copies.
        total = torch.stack([result.gradients[key] for result in results]).sum(dim=0)
        copies = (case.src if key.startswith("images") else case.hears)[0]
        torch.testing.assert_close(total / copies, expected, rtol=1e-5, atol=1e-6)
        assert expected.norm() > 0.5


@pytest.mark.parametrize("guard", ["first", "off"])
def test_bridges_have_the_guard_of_the_config(guard):
    def guards(_case: Case, _rank: int, model: MimoModel) -> set[str]:
        return {bridge.guard for bridge in model.colocated_comms.values()}

    assert Case((1, 2), (1, 1, 2, 1), options={"bridge_guard": guard}).run(guards) == [{guard}] * 2


def test_a_plan_made_ahead_for_one_of_two_modalities():
    """The other one's tokens are looked for all the same."""
    case = Case((1, 4), (1, 4, 1, 1), hears=(1, 4))
    both = next(i for i, pair in enumerate(zip(case.images, case.sounds, strict=True))
                if all(map(sum, pair)))  # fmt: skip

    def check(_case: Case, rank: int, model: MimoModel) -> None:
        batch = case.inputs(rank, both)
        ids = batch["input_ids"].numpy()  # all samples: one language replica
        shares = torch.arange((ids == IMAGE).sum() // 2).tensor_split(case.src[1])
        layout = model.colocated_comms["images", "language"].layout
        places = [TokenRuns.from_mask(ids == IMAGE)]
        plan = plan_routes(layout, rank, places, [2 * len(each) for each in shares])
        batch["route_plan"] = {"images": plan}
        (encoded,) = model.encode_microbatches([batch]).microbatches
        for name, token in (("images", IMAGE), ("sounds", SOUND)):
            found = encoded.rows.tokens[name].positions()
            assert np.array_equal(found, np.flatnonzero(ids == token))
            assert found.size

    case.run(check)


def test_what_nobody_reads_is_refused_in_stages_as_in_a_forward():
    """A plan where rows are gathered, before one is encoded; a mask where the sequence is cut."""

    def plan(case: Case, rank: int, model: MimoModel) -> None:
        batch = case.inputs(rank, 1) | {"route_plan": {"images": object()}}
        with pytest.raises(ValueError, match="route_plan was given, but this model has no routed"):
            model.encode_microbatches([batch])

    def mask(case: Case, rank: int, model: MimoModel) -> None:
        batch = case.inputs(rank, 1)
        (encoded,) = model.encode_microbatches([batch]).microbatches
        del batch["modality_inputs"]
        batch["attention_mask"] = torch.zeros(1, 1, LENGTH, LENGTH, dtype=torch.bool)
        with pytest.raises(ValueError, match="context parallelism requires attention_mask=None"):
            model.forward_stage(model.language_model, encoded, **batch)

    gathered = Case((1, 4), (1, 2, 2, 1), **DP_LAST, **EVEN)
    gathered.run(plan)
    for case in (Case((1, 4), (1, 2, 2, 1)), gathered):
        case.run(mask)


def test_every_rank_knows_its_stage():
    def roles(_case: Case, _rank: int, model: MimoModel) -> tuple[ModuleStageInfo, bool]:
        return model.role.modules["language"], model.is_pipelined

    found = Case((1, 8), (1, 1, 4, 2)).run(roles)
    first, middle, last = (
        ModuleStageInfo(*flags) for flags in ((True, False), (False, False), (False, True))
    )
    assert found == [(stage, True) for stage in (first, middle, middle, last) for _ in range(2)]
    assert Case((1, 4), (1, 1, 1, 4)).run(roles) == [(ModuleStageInfo(True, True), False)] * 4


def build_only(_case: Case, _rank: int, _model: MimoModel) -> None:
    pass


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (
            Case(flags=lambda stage, _: {"pre_process": True, "post_process": stage == 1}),
            "virtual stage 0 was built with pre_process=True, but by its grid this rank is on the "
            "last stage; build it with pre_process=False",
        ),
        (
            Case(flags=lambda stage, _: {"pre_process": stage == 0, "post_process": True}),
            "built with post_process=True, but by its grid this rank is on the first stage",
        ),
        (
            Case(config={"pipeline_model_parallel_size": 4}),
            "language grid has pp size 2, the language config has pipeline_model_parallel_size 4",
        ),
        (
            Case(config={"virtual_pipeline_model_parallel_size": 2}),
            "virtual_pipeline_model_parallel_size 2, but 1 stages are given",
        ),
        (Case(options={"bridge": "gather"}), "DP replicas of the grids must nest: .*dp_last=True"),
    ],
    ids=["embeds", "has_a_head", "other_size", "virtual", "gather"],
)
def test_models_that_do_not_fit_the_grid_are_refused_on_every_rank_they_are_on(case, message):
    with pytest.raises(ValueError, match=message):
        case.run(build_only)


@pytest.mark.parametrize(
    "case",
    [Case(), Case((1, 4), (1, 2, 2, 1), **DP_LAST), Case((4, 1), (1, 1, 2, 2), **DP_LAST)],
    ids=["routed", "gather_fan_in", "gather_fan_out"],
)
def test_a_rank_with_a_problem_stops_all(case):
    def problem_on_rank_1(case: Case, rank: int, model: MimoModel) -> str:
        batches = [case.inputs(rank, microbatch) for microbatch in range(2)]
        with pytest.raises(ValueError, match="rank 1: out of images") as refused:
            model.encode_microbatches(batches, "out of images" if rank == 1 else None)
        return re.sub(r"\s+", " ", str(refused.value))

    assert len(set(case.run(problem_on_rank_1))) == 1


def test_other_numbers_of_microbatches_stop_all():
    def fewer_on_rank_2(case: Case, rank: int, model: MimoModel) -> str:
        batches = [case.inputs(rank, microbatch) for microbatch in range(1 if rank == 2 else 2)]
        with pytest.raises(ValueError, match="rank 2: it encodes 1 microbatches, others 2") as told:
            model.encode_microbatches(batches)
        return str(told.value)

    assert len(set(Case().run(fewer_on_rank_2))) == 1


def test_a_problem_is_told_in_the_exchange_groups_of_every_encoder():
    """Images go in one group of all ranks here, sounds in two of four."""

    def problem_on_rank_5(case: Case, rank: int, model: MimoModel) -> str:
        with pytest.raises(ValueError) as refused:
            model.encode_microbatches([case.inputs(rank, 1)], "no disk" if rank == 5 else None)
        return str(refused.value)

    case = Case((8, 1), (1, 2, 1, 4), hears=(2, 4))
    assert set(case.run(problem_on_rank_5)) == {"Nothing was encoded. rank 5: no disk"}


@pytest.mark.parametrize("one_stage", [False, True], ids=["stages", "forward"])
def test_an_encoder_that_fails_stops_all(one_stage):
    """Its TP ranks fail together; the ranks that wait for its rows hear why."""

    def wrong_images_on_rank_1(case: Case, rank: int, model: MimoModel) -> tuple[str, str]:
        batch = case.inputs(rank, 1)
        if rank == 1:
            batch["modality_inputs"] = {"images": {"linear": {"x": torch.ones(3, 2, 5)}}}
        with pytest.raises(ValueError, match="rank 1: an encoder raised RuntimeError: ") as told:
            model(**batch) if one_stage else model.encode_microbatches([batch])
        return str(told.value), type(told.value.__cause__).__name__

    case = Case((1, 4), (1, 4, 1, 1)) if one_stage else Case()
    found = case.run(wrong_images_on_rank_1)
    assert len({message for message, _ in found}) == 1
    assert [cause for _, cause in found] == ["NoneType", "RuntimeError", "NoneType", "NoneType"]


def test_sentences_of_problems():
    outcome = doctest.testmod(plan_guard)
    assert outcome.attempted >= 2
    assert outcome.failed == 0
    lost = RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed by peer")
    assert plan_guard.problem_of(lost, "an encoder") is None
    assert plan_guard.problem_of(RuntimeError(), "it") == "it raised RuntimeError"
    # Of others' data, not of a lost peer: the others must hear of it.
    late = ValueError("the image server timed out")
    assert plan_guard.problem_of(late, "it") == "it raised ValueError: the image server timed out"
    odd_first = plan_guard.merge_problems([4, 5, 6], [{}] * 3, [1, 2, 2])
    assert odd_first == {4: "it encodes 1 microbatches, others 2; give all ranks as many"}


def test_an_encoder_whose_peer_is_lost_raises_at_once():
    """The others lose the peer too; waiting for them would only add to it."""

    class Lost(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("Connection closed by peer")

    def lost(case: Case, rank: int, model: MimoModel) -> None:
        model.modality_submodules["images"].encoders["linear"] = Lost()
        with pytest.raises(RuntimeError, match="^Connection closed by peer$"):
            model.encode_microbatches([case.inputs(rank, 1)])

    Case((1, 1), (1, 1, 1, 1)).run(lost)


def test_finalisation_is_told_what_the_step_is():
    """All groups of one rank: the schedule without stages; counts of both dtypes are added."""

    def steps(case: Case, rank: int, model: MimoModel) -> list[tuple[float, bool]]:
        told: list[tuple[float, bool]] = []
        weights = iter([1, 1, 1, 0.25])  # of each microbatch's tokens: the last are fractions

        def forward_step(data: Any, model: Any) -> Any:
            output, mask = model(**next(data))
            weight = next(weights)
            tokens = mask.sum() * weight
            return output, lambda output: (
                output.sum(), tokens.int() if weight == 1 else tokens, {}
            )  # fmt: skip

        def finalize(_model: Any, tokens: Any = None, **options: Any) -> None:
            told.append((float(tokens), options["force_all_reduce"]))

        model.config.finalize_model_grads_func = finalize
        model.config.calculate_per_token_loss = True
        names = ("pp", "tp", "cp", "dp_cp", "embd", "pos_embd")
        groups = SimpleNamespace(**{name: StubGroup() for name in names})
        for force in (False, True):
            forward_backward_pipelined(
                forward_step_func=forward_step,
                data_iterator=iter([case.inputs(rank, number) for number in range(2)]),
                model=model,
                num_microbatches=2,
                pg_collection=groups,
                force_all_reduce=force,
            )
        return told

    tokens = len(IMAGES[0]) * LENGTH
    expected = [(2 * tokens, False), (1.25 * tokens, True)]
    assert Case((1, 1), (1, 1, 1, 1)).run(steps) == [expected]


def test_forward_needs_a_whole_language_model():
    def forward(case: Case, rank: int, model: MimoModel) -> None:
        with pytest.raises(ValueError, match="forward runs a whole language model, this rank has"):
            model(**case.inputs(rank, 1))

    Case().run(forward)
