# SPDX-License-Identifier: Apache-2.0
"""Steps of the digits job's trainer with an audio encoder, on two ranks. Its losses and gradients
are compared with one process by the parity table; here is what a step must *not* do.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist

from examples.mimo.digits.data import (
    DIGITS_PER_SAMPLE,
    SEQUENCE_LENGTH,
    Batch,
    DigitsBatches,
    Kind,
)
from examples.mimo.digits.images import TOKENS_PER_IMAGE
from examples.mimo.digits.job import DigitsLoop
from examples.mimo.digits.memory_plan import items_of_a_microbatch, planned, print_memory_plan
from examples.mimo.digits.options import FREEZABLE, Options, parse_options
from examples.mimo.digits.sounds import BANDS, FRAMES
from megatron.core.hyper_comm_grid import GridShape
from megatron.core.models.mimo.comm.plan.routed_layout import RouteLayout
from megatron.core.models.mimo.job.memory_plan import step_of
from megatron.core.models.mimo.job.route_plans import RoutePlans
from megatron.core.models.mimo.memory.kept import part_bytes
from megatron.core.models.mimo.memory.plan import transformer_bytes
from megatron.core.utils import unwrap_model
from mimo_colocated.launch.errors import JobError
from mimo_colocated.launch.layouts import Layout
from tests.models.memory import encoder_shape
from tests.models.model import ModelOptions, ModelSize, build_model
from tests.models.trainer import Trainer, TrainOptions

pytestmark = pytest.mark.once

SIZE = ModelSize(
    vision_hidden=32, vision_layers=2, audio_hidden=32, audio_layers=2,
    language_hidden=32, language_layers=1,
)  # fmt: skip
# What "modality_submodules.<modality>.<part>" a name freezes; "lower-encoder" only some of.
FREEZES = {
    "encoder": {"images.encoders", "audio.encoders"},
    "projector": {"images.input_projections", "audio.input_projections"},
    "vision-encoder": {"images.encoders"},
    "audio-encoder": {"audio.encoders"},
    "audio-projector+vision-projector": {"images.input_projections", "audio.input_projections"},
}


class Shown(DigitsBatches):
    """Batches whose samples show what they are told to."""

    def __init__(self, *kinds: Kind) -> None:
        super().__init__(3, "train", len(kinds), audio=True)
        self._given = kinds

    def _kinds(self, step: int) -> object:
        return torch.tensor(self._given)[:, None].expand(-1, 4).numpy().astype(int)


@contextlib.contextmanager
def trainer(samples: int, **options: object) -> Iterator[Trainer]:
    """Images on DP2, sounds on TP2, language model on DP2."""
    size = {"size": SIZE, "distributed_optimizer": False, **options}
    built = build_model(Layout(dp=2), Layout(dp=2), ModelOptions(**size), audio=Layout(tp=2))
    try:
        yield Trainer(built, TrainOptions(steps=9, global_batch_size=samples), False)
    finally:
        dist.barrier()
        built.destroy()


def gradient_norms(run: Trainer) -> dict[str, float]:
    """Of each module."""
    return {
        name: sum(float(p.main_grad.norm()) for p in module.parameters())
        for name, module in {
            **run.model.modality_submodules,
            "language": run.model.language_model,
        }.items()
    }


@pytest.mark.ranks(2)
@pytest.mark.parametrize("overlap", [False, True], ids=["plain", "overlap"])
def test_steps_without_sounds_or_images_leave_their_encoder_alone(overlap: bool) -> None:
    """On one rank, on both, and in turn: nobody waits, and who saw nothing gets zeros."""
    image, sound, text = Kind.IMAGE, Kind.SOUND, Kind.TEXT
    cases = {
        (image, sound): {"images", "audio"},
        (image, image): {"images"},
        (text, sound): {"audio"},
        (text, text): set(),
        (sound, image): {"images", "audio"},
    }
    with trainer(2, overlap_grad_reduce=overlap) as run:
        for kinds, moved in cases.items():
            loss, tokens = run.gradients(Shown(*kinds), 0)
            norms = gradient_norms(run)
            assert {name for name, norm in norms.items() if norm > 0} == moved | {"language"}
            assert loss > 0
            assert tokens == 8


@pytest.mark.ranks(2)
def test_parts_of_either_modality_freeze() -> None:
    for freeze, wanted in FREEZES.items():
        with trainer(2, freeze=freeze) as run:
            names = {
                f"{modality}.{name.removeprefix('module.').partition('.')[0]}"
                for modality, submodule in run.model.modality_submodules.items()
                for name, parameter in submodule.named_parameters()
                if not parameter.requires_grad
            }
            assert names == wanted, freeze
            assert run.step(Shown(Kind.IMAGE, Kind.SOUND), 0).success
    with trainer(2, freeze="lower-encoder") as run:
        for submodule in run.model.modality_submodules.values():
            trained = [n for n, p in submodule.named_parameters() if p.requires_grad]
            assert not any("embedding" in name or "layers.0" in name for name in trained)
            assert any("layers.1" in name for name in trained)


@pytest.mark.ranks(2)
def test_reading_takes_sounds_and_images() -> None:
    """An answer depends on what the sample shows: other sounds give other logits."""
    with trainer(8) as run, torch.no_grad():
        run.model.eval()
        batches = Shown(*[Kind.SOUND] * 4, *[Kind.IMAGE] * 4)
        batch: Batch = run.local_batch(batches, 0, 0, 1)
        other = replace(batch, clips=replace(batch.clips, stream=(9, 9)))
        changed = (run.logits(batch) - run.logits(other)).abs().amax(dim=(1, 2))
        heard = (batch.kinds == Kind.SOUND).any(dim=1)
        assert torch.equal(changed > 0, heard)
        answers = run.read(batches, 0)
        assert answers.shape == (8, 4)


@pytest.mark.ranks(2)
@pytest.mark.parametrize("changes", [{}, {"dropout": 0.25}], ids=["plain", "dropout"])
def test_the_memory_plan_counts_what_the_audio_encoder_keeps(changes: dict) -> None:
    with trainer(2, **changes) as run:
        spectra = torch.rand(24, FRAMES, BANDS, device=run.device)
        module = unwrap_model(run.model.train().modality_submodules["audio"])
        counted = part_bytes(module, {"digits": {"spectra": spectra}})
        accelerated = run.device.type != torch.empty(0).device.type
    shape = encoder_shape(2, ModelOptions(size=SIZE, **changes), accelerated, "audio")
    expected = transformer_bytes(shape, 24)
    assert (counted.inputs, counted.rows) == (expected.inputs, expected.rows)
    # Random numbers' seeds, a few bytes.
    assert abs(counted.projector - expected.projector) <= 64
    assert abs(counted.encoder - expected.encoder) <= 64 * SIZE.audio_layers


def test_the_memory_plan_has_a_table_for_each_encoder(capsys: pytest.CaptureFixture[str]) -> None:
    options = parse_options(["--audio", "tp=1,dp=8", "--freeze", "audio-encoder+vision-projector"])
    print_memory_plan(options, accelerated=False)
    text = capsys.readouterr().out
    assert text.index("vision encoder:") < text.index("audio encoder:")
    steps = [step_of(options, side, FREEZABLE.each(options.freeze)) for side in ("vision", "audio")]
    assert [(step.encoder_trains, step.projector_trains) for step in steps] == [
        (True, False),
        (False, True),
    ]
    assert [items_of_a_microbatch(options, side) for side in ("vision", "audio")] == [32, 16]


@pytest.mark.parametrize("more", [[], ["--audio", "tp=1,dp=8"]], ids=["images", "and sounds"])
def test_the_planner_is_told_of_every_digit_once(more: list[str]) -> None:
    options = parse_options(more)
    shapes, work = planned(options)
    assert list(work.shares) == list(shapes.encoders) == list(options.encoders)
    rows = sum(work.shares.values()) * SEQUENCE_LENGTH
    assert rows == pytest.approx(DIGITS_PER_SAMPLE * TOKENS_PER_IMAGE)


def test_a_plan_serves_as_long_as_tokens_stand_in_the_same_places(monkeypatch) -> None:
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    grids = GridShape((1, 2), ("tp", "dp")), GridShape((1, 1, 2), ("tp", "cp", "dp"))
    bridge = SimpleNamespace(layout=RouteLayout.from_grids(*grids))
    routes = RoutePlans(SimpleNamespace(), 1)
    routes.bridges = {"images": bridge, "audio": bridge}
    mask = np.zeros((4, 8), dtype=bool)
    mask[2, 3] = True
    other = np.roll(mask, 1, axis=1)
    plans = [routes.plan("audio", each, None) for each in (mask, mask.copy(), other)]
    assert plans[0] is plans[1]
    assert [plan.tokens.positions().tolist() for plan in plans[1:]] == [[3], [4]]
    assert routes.plan("images", mask, None).tokens.count == 1
    assert routes.plan("audio", other, None) is plans[2]
    lengths = np.full(4, 8), np.full(4, 5)
    packed = [routes.plan("audio", other, each) for each in lengths]
    assert [plan.tokens.positions().tolist() for plan in packed] == [[4], [4]]
    assert [plan.tokens.cu_seqlens for plan in packed] == [(0, 8, 16), (0, 5, 10)]


@pytest.mark.parametrize(
    ("before", "now", "sentence"),
    [
        (None, "--audio tp=1,dp=8", r"holds a run with no sounds; leave out --audio to resume it"),
        ("tp=2,dp=4", "", r"with sounds; give --audio tp=2,dp=4 \(or another layout\) to resume"),
    ],
)
def test_sounds_cannot_come_or_go_in_mid_run(before: str | None, now: str, sentence: str) -> None:
    options = parse_options(now.split())
    with pytest.raises(JobError, match=sentence):
        check_options({**options.as_dict(), "audio": before}, options)


def test_a_run_with_sounds_resumes_in_another_layout() -> None:
    before = parse_options(["--audio", "tp=1,dp=8"]).as_dict()
    now = parse_options(["--audio", "tp=4,dp=2"])
    check_options(before, now)
    with pytest.raises(JobError, match=r"a run with --seed 1, this one has 1234; give --seed"):
        check_options({**before, "seed": 1}, now)


def check_options(before: dict[str, object], now: Options) -> None:
    loop = object.__new__(DigitsLoop)
    loop.options = now
    loop.check_options(before, now.as_dict())


def test_an_audio_encoder_needs_a_vision_encoder_with_a_layout_of_its_own() -> None:
    with pytest.raises(ValueError, match=r"^An audio encoder \(tp=2,dp=1\) needs a vision encoder"):
        build_model(None, Layout(tp=2), ModelOptions(), audio=Layout(tp=2))
