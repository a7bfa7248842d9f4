# SPDX-License-Identifier: Apache-2.0
"""Predicted against counted peaks of steps of the digits model, in one process.

Counted are the bytes of all tensors that live before a step, and the most that are allocated and
not freed yet within it, as PyTorch's profiler tells every allocation. What a kernel takes and gives
back at once is left out, as the workspace of the CPU's products in 16 bits, which differs between
processors: the planner's margin is for it. The language model's peak is
what the step has beyond what the encoder holds then, the encoder's what it holds and what comes
to that while it goes back. A prediction may be too high by :data:`BOUND`, never too low.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist

from examples.mimo.digits.data import (
    DIGITS_PER_SAMPLE,
    SEQUENCE_LENGTH,
    VOCABULARY_SIZE,
    DigitsBatches,
)
from examples.mimo.digits.images import PATCH_SIDE, TOKENS_PER_IMAGE
from megatron.core.models.mimo.memory.policy import EncoderMemory
from megatron.core.models.mimo.plan.candidates import Candidate
from megatron.core.models.mimo.plan.footprint import Peaks, peaks
from megatron.core.models.mimo.plan.machine import PRESETS
from megatron.core.models.mimo.plan.shapes import (
    EncoderShape,
    LanguageShape,
    Shapes,
    Stack,
    Trained,
    Work,
)
from mimo_colocated.launch.layouts import Layout
from tests.harness.garbage import end_threads_of_groups
from tests.models.model import VISION, ModelOptions, ModelSize, build_model
from tests.models.trainer import Trainer, TrainOptions

BOUND = 0.05
_SAMPLES, _SEED = 64, 1234
_SIZE = ModelSize(vision_hidden=64, vision_layers=2, language_hidden=128, language_layers=4)
_CPU = replace(PRESETS["h100"], fused=False, communicator=0.0)
_AGAIN = EncoderMemory("recompute", "recompute", offload_from=1)
_FROZEN = {
    "": {},
    "encoder": {"vision.encoder": Trained(0.0)},
    "language": {"language": Trained(0.0)},
}
COLUMNS = {
    "step": "step",
    "encoder_MiB": "encoder MiB, predicted | counted",
    "language_MiB": "language model MiB",
    "whole_MiB": "whole MiB, with weights, gradients and optimizer",
    "ratios": "predicted over counted",
}


@dataclass(frozen=True)
class Case:
    """A step.

    Attributes:
        name: in the table.
        options: of the model.
        size: of the model.
        microbatches: of the step.
    """

    name: str
    options: ModelOptions = field(default_factory=ModelOptions)
    size: ModelSize = _SIZE
    microbatches: int = 1

    @property
    def shapes(self) -> Shapes:
        """The model as the planner sees it."""
        size = self.size
        eye = Stack.of(
            size.vision_layers, size.vision_hidden, 4 * size.vision_hidden, size.vision_heads
        )
        wide = size.language_hidden
        decoder = Stack.of(size.language_layers, wide, 2 * wide, size.language_heads, gated=True)
        each = TOKENS_PER_IMAGE, TOKENS_PER_IMAGE, PATCH_SIDE**2
        encoder = EncoderShape(eye, *each, size.vision_hidden, wide)
        return Shapes(LanguageShape(decoder, VOCABULARY_SIZE), {"vision": encoder})

    @property
    def work(self) -> Work:
        """The step as the planner sees it."""
        share = DIGITS_PER_SAMPLE * TOKENS_PER_IMAGE / SEQUENCE_LENGTH
        return Work(
            SEQUENCE_LENGTH, _SAMPLES, {"vision": share}, self.options.dtype.itemsize,
            trained=_FROZEN[self.options.freeze],
        )  # fmt: skip

    def predicted(self) -> Peaks:
        """What the planner says."""
        options = self.options
        candidate = Candidate(
            Layout(), {"vision": Layout()}, self.microbatches,
            recompute=options.recompute, memory=options.memory,
        )  # fmt: skip
        return peaks(candidate, self.shapes, self.work, _CPU)


_PLAIN = ModelOptions()
CASES = (
    Case("nothing saved"),
    Case("attention again", replace(_PLAIN, recompute="selective")),
    Case("layers again", replace(_PLAIN, recompute="full")),
    Case("16 bits", replace(_PLAIN, dtype=torch.bfloat16)),
    Case("encoder frozen", replace(_PLAIN, freeze="encoder")),
    Case("language model frozen", replace(_PLAIN, freeze="language")),
    Case("two microbatches", microbatches=2),
    Case("encoder again", replace(_PLAIN, memory=_AGAIN), replace(_SIZE, vision_layers=4)),
    Case("large encoder", size=replace(_SIZE, vision_layers=8, vision_hidden=128,
                                       language_layers=1)),
)  # fmt: skip


def run(quick: bool) -> Iterator[dict[str, Any]]:
    """A cell per case."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for case in CASES[:2] if quick else CASES:
            yield cell(case, counted(case))
    finally:
        dist.destroy_process_group()


def cell(case: Case, found: Peaks) -> dict[str, Any]:
    """Return a case's cell; a module whose pass back nothing shows has no peak."""
    pairs = {
        name: (predicted, value)
        for (name, predicted), value in zip(
            vars(case.predicted()).items(), vars(found).values(), strict=True
        )
    }
    ratios = {name: one / other for name, (one, other) in pairs.items() if other}
    said = {
        f"{name}_MiB": [round(value / 2**20, 2) for value in both] if name in ratios else None
        for name, both in pairs.items()
    }
    return {
        "step": case.name,
        **said,
        "ratios": [round(ratio, 3) for ratio in ratios.values()],
        "passed": all(1 <= ratio <= 1 + BOUND for ratio in ratios.values()),
    }


def counted(case: Case) -> Peaks:
    """Return the peaks of a step, counted; in a process group of one rank."""
    gc.collect()
    # What the process has already is not the step's. It is held: its memory must not be used again.
    others = list(_tensors())
    options = replace(case.options, size=case.size)
    built = build_model(Layout(), Layout(), options)
    trainer = Trainer(built, TrainOptions(100, _SAMPLES, case.microbatches), True)
    data = DigitsBatches(_SEED, "train", _SAMPLES)
    for step in range(2):  # what is allocated once
        trainer.step(data, step)
    gc.collect()
    before, hooks = _bytes_beside(others), list(_marks(trainer.model, options.freeze != "encoder"))
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profiler:
        trainer.step(data, 2)
    for hook in hooks:
        hook.remove()
    found = _peaks(profiler, before)
    built.destroy()
    del built, trainer
    end_threads_of_groups()
    return found


def _tensors() -> Iterator[torch.Tensor]:
    """All tensors that there are."""
    return (each for each in gc.get_objects() if type(each) in (torch.Tensor, torch.nn.Parameter))


def _bytes_beside(others: Iterable[torch.Tensor]) -> int:
    """Bytes of all tensors but ``others``; every storage counts once."""
    found = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _tensors()}
    known = {other.untyped_storage().data_ptr() for other in others}
    return sum(size for pointer, size in found.items() if pointer not in known)


_BEGIN, _END, _BACK = "mark encoder begins", "mark encoder ends", "mark encoder goes back"


def _marks(model: Any, goes_back: bool) -> Iterator[Any]:
    """Hooks that name moments of a step; an encoder that is frozen does not go back."""
    encoder = model.modality_submodules[VISION]
    yield encoder.register_forward_pre_hook(_mark(_BEGIN))

    def ended(_module: Any, _inputs: Any, rows: torch.Tensor) -> None:
        # What an encoder returns is the bridge's.
        _mark(f"{_END} {rows.nbytes}")()
        if goes_back:
            rows.register_hook(_mark(_BACK))

    yield encoder.register_forward_hook(ended)


def _mark(name: str) -> Callable[..., None]:
    def hook(*_: Any) -> None:
        with torch.profiler.record_function(name):
            pass

    return hook


def _peaks(profiler: Any, before: int) -> Peaks:
    events = sorted(profiler.profiler.kineto_results.events(), key=lambda each: each.start_ns())
    now = whole = back = begun = held = at = 0
    goes_back, ends = False, [0]  # of the operations that are under way
    for event, after in zip(events, [*events[1:], None], strict=True):
        name = event.name()
        while len(ends) > 1 and ends[-1] < event.start_ns():
            ends.pop()
        if name == "[memory]":
            now += event.nbytes()
            given_back = after is not None and after.nbytes() == -event.nbytes() < 0
            if given_back and after.start_ns() < ends[-1]:
                continue  # a kernel's workspace
            whole = max(whole, now)
            back = max(back, held + now - at) if goes_back else 0
            continue
        ends.append(event.start_ns() + event.duration_ns())
        if name == _BEGIN:
            begun, goes_back = now, False
        elif name.startswith(_END):
            held = now - begun - int(name.removeprefix(_END))
        elif name == _BACK:
            goes_back, at = True, now
    return Peaks(encoder=back, language=whole - held, whole=before + whole)
