# SPDX-License-Identifier: Apache-2.0
"""Parameters by name: which do not train, which have a learning rate and decay of their own."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron.core.models.mimo.huggingface.build import BuildOptions, ImportedModel, from_folder
from megatron.core.models.mimo.job.trainer import Trainer, TrainOptions
from megatron.core.models.mimo.training.parameter_names import (
    Named,
    ParameterNameError,
    adapted_modules,
    frozen_parts,
    named_parameters,
    select,
)
from mimo_colocated.launch.layouts import Layout
from mimo_colocated.launch.parameter_groups import ParameterGroup
from tests.unit_tests.mimo.huggingface.llava_models import llava
from tests.unit_tests.mimo.in_process_ranks import InProcessWorld

ONE = Layout()
LR, MIN_LR, DECAY, STEPS, WARMUP = 1e-2, 1e-3, 0.1, 40, 8
GATE = "language_model.model.layers.0.mlp.gate_proj.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("model")
    llava("clip-llama").save_pretrained(place)
    return place


@pytest.fixture(autouse=True)
def _one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def built(folder: Path, freeze: Sequence[str] = (), **more: Any) -> ImportedModel:
    options = BuildOptions(freeze_names=freeze, **more)
    return from_folder(folder, {"images": ONE, "language": ONE}, options)


def of(model: ImportedModel, *, trains: bool) -> set[str]:
    """Names of what trains, or of what does not."""
    return {
        each.name for each in model.named_parameters() if each.parameter.requires_grad is trains
    }


@pytest.mark.parametrize(
    ("pattern", "frozen"),
    [
        ("images.projector", "images.input_projections.0."),
        ("images.encoder.transformer", "images.encoders.vision.transformer."),
        ("language.decoder.layers.1", "language.decoder.layers.1."),
        ("multi_modal_projector", "images.input_projections.0."),
    ],
)
def test_a_name_is_a_modules_a_parameters_or_a_tensors(
    folder: Path, pattern: str, frozen: str
) -> None:
    model = built(folder, [pattern])
    names = of(model, trains=True) | of(model, trains=False)
    expected = {name for name in names if name.startswith(frozen)}
    assert expected
    assert of(model, trains=False) == expected
    parts = frozen_parts(model.named_parameters())
    assert parts == ({"images.projector"} if "projector" in pattern else set())
    model.destroy()


def test_patterns_mean_what_they_mean_in_file_names(folder: Path) -> None:
    model = built(folder, ["*.layers.0.mlp.*_proj.weight", "*norm*", "language.embedding.*"])
    frozen = of(model, trains=False)
    assert {each for each in frozen if ".mlp." in each} == {
        "language.decoder.layers.0.mlp.linear_fc1.weight",
        "language.decoder.layers.0.mlp.linear_fc2.weight",
    }
    assert "language.decoder.final_layernorm.weight" in frozen
    assert "language.embedding.word_embeddings.weight" in frozen
    assert "language.output_layer.weight" not in frozen
    model.destroy()


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("images.encodr", r"'images.encodr' names no parameter .* mean 'images.encoder'\?"),
        ("language.decodr.*.bias", r"names no parameter of the model; did you mean '"),
        ("langage", r"did you mean 'language'\?"),
        (GATE, rf"means {GATE} and not the rest of {GATE}, .*up_proj.weight, which are one weight"),
        ("*", r"\['\*'\] leave nothing to train; take one out"),
    ],
)
def test_names_that_cannot_be_meant_are_refused(folder: Path, pattern: str, said: str) -> None:
    with pytest.raises(ParameterNameError, match=said) as caught:
        built(folder, [pattern])
    assert "\n" not in str(caught.value)


def test_a_name_of_one_rank_is_known_on_all() -> None:
    """Pipeline stages hold other layers; a name of none is one error on all of them."""

    def stage(rank: int) -> tuple[list[int], str]:
        parameter = torch.nn.Parameter(torch.zeros(1))
        named = [Named(f"language.layers.{rank}.weight", parameter, (f"model.{rank}",))]
        found = [len(each) for each in select(["language.layers.1", "language"], named)]
        with pytest.raises(ParameterNameError) as caught:
            select(["language.layers.1", "langauge.layers.*"], named)
        return found, str(caught.value)

    told = InProcessWorld(3).run(stage)
    assert [found for found, _ in told] == [[0, 1], [1, 1], [0, 1]]
    wrong, right = "'langauge.layers.*'", "'language.layers.*'"
    sentence = f"{wrong} names no parameter of the model; did you mean {right}?"
    assert {said for _, said in told} == {sentence}


def test_a_module_is_frozen_if_all_its_stages_are() -> None:
    def stage(rank: int) -> tuple[set[str], set[str]]:
        weight, a = (torch.nn.Parameter(torch.zeros(1), requires_grad=rank == 1) for _ in "wa")
        path = f"language.decoder.layers.{rank}.mlp.linear_fc2"
        named = [
            Named(f"{path}.weight", weight),
            Named(f"{path}.lora.down_proj.A", a),
            Named("images.input_projections.0.weight", torch.nn.Parameter(a, requires_grad=False)),
        ]
        return frozen_parts(named), adapted_modules(named)

    assert InProcessWorld(2).run(stage) == [({"images", "images.projector"}, {"language"})] * 2


def test_names_of_a_modules_parameters() -> None:
    layer = torch.nn.Linear(2, 3)
    named = named_parameters([("language", layer)], tensors=lambda *names: (".".join(names) + "s",))
    assert [(each.name, each.tensors) for each in named] == [
        ("language.weight", ("language.weights",)),
        ("language.bias", ("language.biass",)),
    ]


PROJECTOR = ParameterGroup(["images.projector"], lr=5e-2, weight_decay=0.5)
GROUPS = (
    ParameterGroup(["images"], weight_decay=0.0, min_lr=0.0),
    ParameterGroup(["language.decoder.layers.1", "*.linear_fc1.*"], lr=2e-2),
    ParameterGroup(["images.projector"], lr=3e-2, min_lr=3e-2, weight_decay=0.5),
)
# What of a parameter counts: the last group that names it.
EXPECTED = {
    "language.decoder.layers.0.mlp.linear_fc2.weight": (LR, MIN_LR, DECAY),
    "language.decoder.layers.1.mlp.linear_fc2.weight": (2e-2, 2e-3, DECAY),
    "language.decoder.layers.0.mlp.linear_fc1.weight": (2e-2, 2e-3, DECAY),
    "images.encoders.vision.transformer.blocks.0.layers.0.mlp.linear_fc2.weight": (LR, 0.0, 0.0),
    "images.input_projections.0.encoder.linear_fc1.weight": (3e-2, 3e-2, 0.5),
}


def trainer(model: ImportedModel, groups: Sequence[ParameterGroup], **more: Any) -> Trainer:
    options = TrainOptions(
        steps=STEPS,
        global_batch_size=1,
        lr=LR,
        min_lr=MIN_LR,
        weight_decay=DECAY,
        groups=groups,
        **more,
    )
    return Trainer(model, options, distributed_optimizer=True)


def shrunk(model: ImportedModel, made: Trainer) -> dict[str, float]:
    """By what a step without gradients multiplies each matrix: 1 - rate * decay."""
    before = {each.name: each.parameter.detach().clone() for each in model.named_parameters()}
    model.model.zero_grad_buffer()
    made.optimizer.step()
    model.model.start_param_sync(force_sync=True)
    after = {each.name: each.parameter.detach() for each in model.named_parameters()}
    return {name: (after[name].norm() / before[name].norm()).item() for name in before}


@pytest.mark.parametrize("groups", [(), GROUPS[1:], (*GROUPS[:2], PROJECTOR), GROUPS])
def test_every_group_has_its_rate_and_its_decay(
    folder: Path, groups: Sequence[ParameterGroup]
) -> None:
    """A step whose gradients are zero moves a weight by rate times decay alone; vectors by none."""
    model = built(folder)
    found = shrunk(model, trainer(model, groups, warmup_steps=0))
    wrong = {
        name
        for name, (lr, _, decay) in EXPECTED.items()
        if found[name] != pytest.approx(1 - lr * decay, abs=1e-6)
    }
    assert (not wrong) is (groups == GROUPS), wrong  # the others are controls
    assert all(v == 1 for n, v in found.items() if n.endswith("bias"))
    model.destroy()


def rate(step: int, peak: float, last: float) -> float:
    if step <= WARMUP:
        return peak * step / WARMUP
    share = (step - WARMUP) / (STEPS - WARMUP)
    return last + (peak - last) * 0.5 * (1 + math.cos(math.pi * share))


def test_every_group_follows_the_schedule_between_its_own_rates(folder: Path) -> None:
    model = built(folder, ["images.encoder"])
    groups = (PROJECTOR, GROUPS[1])
    made = trainer(model, groups, warmup_steps=WARMUP)
    # Of images only what the first group names trains, so its rate is the module's.
    ends = {
        "language": (LR, MIN_LR),
        "language.groups.1": (2e-2, 2e-3),
        "images.groups.0": (5e-2, 5e-3),
        "images.groups.1": (2e-2, 2e-3),
    }
    for step in range(STEPS + 1):
        made.resume_schedule(step)
        expected = {name: rate(step, *each) for name, each in ends.items()}
        assert made.optimizer.learning_rates() == pytest.approx(expected), step
    model.destroy()
    alone = built(folder, ["images.encoder", "language"])
    one = trainer(alone, [PROJECTOR], warmup_steps=0)
    assert one.optimizer.learning_rates() == {"images": 5e-2}
    alone.destroy()


@pytest.mark.parametrize(
    ("groups", "said"),
    [
        ([ParameterGroup([], lr=1.0)], "groups.0: parameters names none; give a list"),
        ([ParameterGroup("images", lr=1.0)], "groups.0: parameters names none; give a list"),  # type: ignore[arg-type]
        ([ParameterGroup(["images"])], r"groups.0: nothing is set for \['images'\]; set lr"),
        ([ParameterGroup(["images"], lr=-1.0)], "groups.0: lr=-1.0; it must be a finite number"),
        ([ParameterGroup(["images"], min_lr=1.0)], "min_lr=1.0 is above lr=0.01; set it to at"),
        ([PROJECTOR, ParameterGroup(["imags"], lr=1.0)], "groups.1: 'imags' names no parameter"),
        (
            [ParameterGroup(["images.encoder"], lr=1.0)],
            r"groups.0: no parameter that \['images.encoder'\] names has its settings; all are",
        ),
        ([PROJECTOR, ParameterGroup(["images"], lr=1.0)], "groups.0: .* named again by a later"),
    ],
)
def test_groups_without_effect_are_refused(
    folder: Path, groups: list[ParameterGroup], said: str
) -> None:
    model = built(folder, ["images.encoder"])
    with pytest.raises(ParameterNameError, match=said):
        trainer(model, groups)
    model.destroy()


def test_a_torch_native_modules_parameters_are_named_alike(folder: Path) -> None:
    """Its optimizer steps other tensors, which share its memory."""
    model = built(folder, ["images"], torch_native=["language"])
    group = ParameterGroup(["language_model.model.layers.1"], lr=2e-2, weight_decay=0.5)
    found = shrunk(model, trainer(model, [group], warmup_steps=0))
    expected = {"0": 1 - LR * DECAY, "1": 1 - 2e-2 * 0.5}
    for layer, value in expected.items():
        (name,) = (n for n in found if f"layers.{layer}.mlp.down_proj" in n)
        assert found[name] == pytest.approx(value, abs=1e-6)
    model.destroy()
