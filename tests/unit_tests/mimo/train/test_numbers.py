# SPDX-License-Identifier: Apache-2.0
"""The work of a step as it is told, against PyTorch's counter around the step itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megatron.core.models.mimo.data.loader import RankBatch
from megatron.core.models.mimo.data.stream import GlobalBatch
from megatron.core.models.mimo.plan.peak import peak_flops
from megatron.core.models.mimo.plan.shapes import EncoderShape, LanguageShape, Shapes, Stack
from megatron.core.models.mimo.plan.step_flops import Frozen, homogeneous_runs, step_flops
from mimo_colocated.launch.layouts import Layout
from mimo_colocated.train import numbers
from mimo_colocated.train.numbers import StepNumbers, said
from tests.unit_tests.mimo.huggingface import harness, llava_models, models, qwen_vl_models, sounds

pytestmark = pytest.mark.once

# Both count products of matrices. Ours leave out rotary frequencies, PyTorch's the input gradients
# of the first layer where nothing before it trains.
BOUND = 0.01
STACK = Stack.of(2, 64, 256, 8)
SHAPES = Shapes(LanguageShape(STACK, 100), {"images": EncoderShape(STACK, 17, 16, 48, 64, 32)})


def batch_of(lengths: Sequence[int], rows: Sequence[int]) -> RankBatch:
    places = np.arange(len(lengths))
    batch = GlobalBatch(0, len(lengths), places, places, np.array(lengths))
    return RankBatch(batch, (), len(rows), sum(lengths), np.array(rows, dtype=np.int64), {})


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def freezing(names: Sequence[str]) -> Callable[[Any], None]:
    def freeze(model: Any) -> None:
        if not names:
            return
        images = model.modality_submodules["images"]
        parts = {
            "language": [model.language_model],
            "images": [images],
            "images.encoder": list(images.encoders.values()),
            "images.projector": list(images.input_projections),
        }
        for module in [each for name in names for each in parts[name]]:
            module.requires_grad_(False)

    return freeze


def counted(
    task: harness.Task, place: Path, freeze: Sequence[str] = ()
) -> tuple[int, Callable[..., float]]:
    """PyTorch's count of one packed step, and ours of a batch with a choice of what is frozen."""
    task.model.save_pretrained(place / "model")
    one = Layout()
    images = dict.fromkeys(task.items, one)
    settings = {"packed": True, "freeze": freezing(freeze)}
    built = harness.built_case(place / "model", harness.Case(one, images, settings))
    trainer = harness.trainer_of(built, task)
    trainer.model.train()
    # The one whose products are visible; samples stay apart in it, the causal half does not.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        trainer.gradients(task, 0)
    built.destroy()

    def ours(batch: RankBatch, freeze: Sequence[str] = freeze) -> float:
        count = StepNumbers.of_model(built.composite, one, freeze, "float32", ())
        flops = count.flops(batch, causal=False)
        assert count.flops(batch)["language"] < flops["language"]
        return sum(flops.values())

    return counter.get_total_flops(), ours


def of_llava(name: str) -> tuple[harness.Task, list[int]]:
    """A task and the rows of its ten images."""
    model = llava_models.llava(name)
    rows = [llava_models.rows_per_image(model.config)] * sum(llava_models.IMAGES)
    if name == "siglip2-llama":
        rows = [height * width for height, width in llava_models.SHAPES]
    return llava_models.llava_task(model), rows


def of_qwen_vl(name: str) -> tuple[harness.Task, list[int]]:
    """Images of four sizes, windows that do not divide them."""
    task = qwen_vl_models.task(qwen_vl_models.MODELS[name]())
    return task, [qwen_vl_models.tokens_of(g) for own in qwen_vl_models.GRIDS for g in own]


def of_text(name: str) -> tuple[harness.Task, list[int]]:
    model = {**models.DENSE, **models.SPARSE}[name]()
    return harness.text_task(model, models.VOCABULARY), []


def of_sounds(_name: str) -> tuple[harness.Task, list[int]]:
    """Sounds of several lengths, none with a last frame that becomes no row: rows do not tell it.

    Of a real sound it is one of hundreds.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sounds, "LENGTHS", [40, 16, 24, 4, 32, 20, 8, 36])
        return sounds.task(), [steps // 4 for steps in sounds.LENGTHS]


FAMILIES = {
    "clip-llama": of_llava,
    "clip-qwen3": of_llava,  # its projector reads four hidden states
    "siglip2-llama": of_llava,
    **dict.fromkeys(qwen_vl_models.MODELS, of_qwen_vl),
    "qwen2-audio": of_sounds,
    **dict.fromkeys([*models.DENSE, *models.SPARSE], of_text),
}


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("name", FAMILIES)
def test_flops_are_those_that_pytorch_counts(name: str, tmp_path: Path) -> None:
    """Packed samples of several lengths, forward and backward."""
    task, rows = FAMILIES[name](name)
    theirs, ours = counted(task, tmp_path)
    assert ours(batch_of(task.lengths, rows)) == pytest.approx(theirs, rel=BOUND)
    # Padding counted as tokens, as a batch in rows would compute it; two images too many.
    longest = [max(task.lengths) + 2] * len(task.lengths)
    assert ours(batch_of(longest, rows)) != pytest.approx(theirs, rel=BOUND)
    if rows:
        assert ours(batch_of(task.lengths, [*rows, *rows[:2]])) > theirs * (1 + BOUND)


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize(
    "freeze", [("images",), ("language", "images.encoder"), ("language", "images.projector")]
)
def test_what_does_not_train_has_no_gradients(freeze: tuple[str, ...], tmp_path: Path) -> None:
    task, rows = of_llava("clip-llama")
    theirs, ours = counted(task, tmp_path, freeze)
    batch = batch_of(task.lengths, rows)
    assert ours(batch) == pytest.approx(theirs, rel=BOUND)
    assert ours(batch, ()) > theirs * 1.1  # counted as if all of it trained


def test_an_item_of_another_size_is_counted_by_its_rows() -> None:
    """Four patches become one row."""
    shapes = Shapes(SHAPES.language, {"images": EncoderShape(STACK, 64, 16, 48, 256, 32)})

    def flops(*rows: int) -> dict[str, float]:
        return step_flops(shapes, [5], {"images": rows}, Frozen.of((), shapes), causal=True)

    assert flops(16, 32, 16)["language"] == flops()["language"]
    assert flops()["images"] == 0
    assert flops(16, 32, 16)["images"] == 2 * flops(16)["images"] + flops(32)["images"]
    larger = Shapes(shapes.language, {"images": EncoderShape(STACK, 128, 32, 48, 256, 32)})
    whole = step_flops(larger, [5], {"images": [32]}, Frozen.of((), larger), causal=True)
    assert flops(32) == whole
    # Each of twice the tokens sees all others.
    assert flops(32)["images"] > 2.05 * flops(16)["images"]


def test_a_sound_without_rows_is_embedded_as_any_other() -> None:
    """By two convolutions, of which the second one's inputs have gradients."""
    audio = EncoderShape(STACK, 20, 10, 60, 64, 0, embedded=20, inner=24)
    shapes = Shapes(SHAPES.language, {"audio": audio})

    def flops(*rows: int, freeze: Sequence[str] = ()) -> float:
        frozen = Frozen.of(freeze, shapes)
        return step_flops(shapes, [5], {"audio": rows}, frozen, causal=True)["audio"]

    forward = 2 * 20 * 60 * 64
    assert flops(0) == forward * (2 + 24 / 60)
    assert flops(0, freeze=["audio.encoder"]) == forward
    assert flops(0, 5) - 2 * flops(0) == pytest.approx((flops(0, 10) - 2 * flops(0)) / 2, rel=0.1)


def test_adapters_want_gradients_through_frozen_weights() -> None:
    """As a language model that is frozen before encoders that train; none of its weights."""

    def language(names: Sequence[str], adapted: Sequence[str] = ()) -> float:
        frozen = Frozen.of(names, SHAPES, adapted)
        rows = {"images": [16]}
        return step_flops(SHAPES, [9, 30], rows, frozen, causal=True)["language"]

    everything = ["language", "images"]
    assert language(everything) < language(everything, ["language"]) < language([])
    assert language(everything, ["language"]) == language(["language"])
    assert language(everything, ["images"]) == language(["language"])
    batch = batch_of([9, 30], [16])
    count = StepNumbers(SHAPES, Layout(), Frozen.of(everything, SHAPES, ["images"]), peak=None)
    alone = StepNumbers(SHAPES, Layout(), Frozen.of(everything, SHAPES), peak=None)
    assert count.flops(batch)["images"] > alone.flops(batch)["images"]


def test_names_of_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'vision' is none of language, images, images\.encoder"):
        Frozen.of(["vision"], SHAPES)


def test_what_is_told_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numbers, "peak_memory", lambda: 7)
    layout, frozen = Layout(tp=2, cp=4, dp=2), Frozen.of((), SHAPES)
    count = StepNumbers(SHAPES, layout, frozen, peak=None)
    batch = batch_of([9, 30], [16, 16, 16])
    flops = count.flops(batch)
    found = count.of(batch, 2.0)
    assert found["tflop"] == {name: value / 1e12 for name, value in flops.items()}
    # Each of the four CP ranks would run every image, TP ranks one together.
    assert found["tflop_repeated"] == pytest.approx(3 * flops["images"] / 1e12)
    assert found["tflops_per_rank"] == pytest.approx(sum(flops.values()) / 2.0 / 16 / 1e12)
    assert found["peak_memory"] == 7
    assert "mfu" not in found
    assert "MFU" not in said(found)
    share = 3 * flops["images"] / sum(flops.values())
    rate = f"{found['tflops_per_rank'] * 1e3:.3g} GFLOP/s per rank"
    assert said(found) == f"{rate} (homogeneous: +{share:.0%} work)"
    known = StepNumbers(SHAPES, Layout(), frozen, peak=1e9).of(batch, 2.0)
    assert known["mfu"] == pytest.approx(sum(flops.values()) / 2.0 / 1e9)
    assert said(known).endswith(f", {known['mfu']:.1%} MFU")
    assert known["tflop_repeated"] == 0


def test_each_part_has_its_own_rate() -> None:
    """In its own time, shared by all encoders; a language model alone has no other."""
    frozen, tflop = Frozen.of((), SHAPES), {"images": 3.0, "sounds": 1.0, "language": 12.0}
    times = {"encoder": 0.5, "language": 2.0, "other": 3.0}
    known = StepNumbers(SHAPES, Layout(dp=2), frozen, peak=8e12).by_part(tflop, times)
    assert known["tflops_per_rank_of"] == {"encoder": 4.0, "language": 3.0}
    assert known["mfu_of"] == {"encoder": 0.5, "language": 0.375}
    alone = StepNumbers(SHAPES, Layout(), frozen, peak=None).by_part({"language": 2.0}, times)
    assert alone == {"tflops_per_rank_of": {"language": 1.0}}


def test_the_homogeneous_way_repeats_items_over_cp_alone() -> None:
    assert homogeneous_runs(Layout(tp=2, cp=2, dp=2)) == 2
    assert homogeneous_runs(Layout(tp=8, dp=4, pp=2)) == 1


@pytest.mark.parametrize(
    ("device", "dtype", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", "bfloat16", 312),
        ("NVIDIA A100 80GB PCIe", "float16", 312),
        ("NVIDIA H200", "bfloat16", 989.5),
        ("NVIDIA B200", "bfloat16", 2250),
        ("NVIDIA H100 80GB HBM3", "float32", None),
        ("NVIDIA H100 NVL", "bfloat16", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bfloat16", None),
        ("NVIDIA GeForce RTX 4090", "bfloat16", None),
    ],
)
def test_peaks_are_those_of_known_accelerators(
    device: str, dtype: str, tflops: float | None
) -> None:
    assert peak_flops(device, dtype) == (None if tflops is None else tflops * 1e12)


def test_memory_is_that_of_this_process() -> None:
    assert (numbers.peak_memory() > 1e6) or torch.cuda.is_available()
