# SPDX-License-Identifier: Apache-2.0
"""Which models are compared in which layouts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from mimo_colocated.launch.layouts import Layout
from tests.unit_tests.mimo.huggingface import llava_models, models, qwen_vl_models, sounds
from tests.unit_tests.mimo.huggingface.harness import Case, Task, randomise, text_task

BF16 = {"dtype": torch.bfloat16}
SP = {"sequence_parallel": True}
DENSE = {
    "one process": Case(Layout()),
    "TP2 CP2 DP2, SP": Case(Layout(tp=2, cp=2, dp=2), settings=SP),
    "PP2 CP2 DP2": Case(Layout(pp=2, cp=2, dp=2)),
    "TP4 DP2": Case(Layout(tp=4, dp=2)),
    "TP2 CP2 DP2, SP, bf16": Case(Layout(tp=2, cp=2, dp=2), settings={**SP, **BF16}),
    "TP2 CP2 DP2, SP, packed": Case(Layout(tp=2, cp=2, dp=2), settings={**SP, "packed": True}),
}
SPARSE = {
    "one process": Case(Layout()),
    "TP2 CP2 DP2 EP2, expert TP2, SP": Case(Layout(tp=2, cp=2, dp=2, ep=2, etp=2), settings=SP),
    "CP2 DP4 EP4, bf16": Case(Layout(cp=2, dp=4, ep=4, etp=1), settings=BF16),
    "CP2 DP4 EP4": Case(Layout(cp=2, dp=4, ep=4, etp=1)),
    "PP2 DP4 EP2, expert TP2": Case(Layout(pp=2, dp=4, ep=2, etp=2)),
    "TP2 CP2 DP2 EP2, expert TP2, SP, packed": Case(
        Layout(tp=2, cp=2, dp=2, ep=2, etp=2), settings={**SP, "packed": True}
    ),
}
LLAVA = {
    "one process": Case(Layout(), {"images": Layout()}),
    "fan-in: images TP2 DP4, language TP2 CP2 DP2, SP": Case(
        Layout(tp=2, cp=2, dp=2), {"images": Layout(tp=2, dp=4)}, SP
    ),
    "fan-in: images DP8, language TP2 CP2 DP2, SP, packed": Case(
        Layout(tp=2, cp=2, dp=2), {"images": Layout(dp=8)}, {**SP, "packed": True}
    ),
    "fan-out: images TP4 DP2, SP, language DP8": Case(
        Layout(dp=8), {"images": Layout(tp=4, dp=2)}, SP
    ),
    "equal: images and language TP2 DP4": Case(Layout(tp=2, dp=4), {"images": Layout(tp=2, dp=4)}),
    "stages: images TP2 DP4, language PP2 CP2 DP2": Case(
        Layout(pp=2, cp=2, dp=2), {"images": Layout(tp=2, dp=4)}
    ),
    "fan-in: images TP2 DP4, language TP2 CP2 DP2, SP, bf16": Case(
        Layout(tp=2, cp=2, dp=2), {"images": Layout(tp=2, dp=4)}, {**SP, **BF16}
    ),
}
QWEN_VL = {
    "one process": Case(Layout(), {"images": Layout()}),
    "fan-in: images TP2 DP4, language TP2 CP2 DP2, SP": Case(
        Layout(tp=2, cp=2, dp=2), {"images": Layout(tp=2, dp=4)}, SP
    ),
    "fan-in: images TP2 DP4, language TP2 CP2 DP2, SP, packed": Case(
        Layout(tp=2, cp=2, dp=2), {"images": Layout(tp=2, dp=4)}, {**SP, "packed": True}
    ),
    "fan-out: images TP4 DP2, language CP2 DP4": Case(
        Layout(cp=2, dp=4), {"images": Layout(tp=4, dp=2)}
    ),
    "equal: images and language TP2 DP4": Case(Layout(tp=2, dp=4), {"images": Layout(tp=2, dp=4)}),
    "stages: images TP4 DP2, SP, language PP2 CP2 DP2": Case(
        Layout(pp=2, cp=2, dp=2), {"images": Layout(tp=4, dp=2)}, SP
    ),
    "fan-in: images TP2 DP4, language TP2 CP2 DP2, SP, bf16": Case(
        Layout(tp=2, cp=2, dp=2), {"images": Layout(tp=2, dp=4)}, {**SP, **BF16}
    ),
}
SOUNDS = {
    **sounds.CASES,
    "fan-in: TP2 DP4, TP2 CP2 DP2, SP, bf16": Case(
        Layout(tp=2, cp=2, dp=2), {"audio": Layout(tp=2, dp=4)}, {**SP, **BF16}
    ),
}


@dataclass(frozen=True)
class Row:
    """A model in a layout.

    Attributes:
        model: its name.
        layout: in words.
        case: of the harness.
        task: makes the model and its batch.
    """

    model: str
    layout: str
    case: Case
    task: Callable[[], Task]

    @property
    def world(self) -> int:
        """Ranks."""
        return self.case.language.size

    def __str__(self) -> str:
        return f"{self.model}: {self.layout}"


def rows() -> Iterator[Row]:
    """Yield every row."""
    for kinds, cases in ((models.DENSE, DENSE), (models.SPARSE, SPARSE)):
        for name, make in kinds.items():
            for layout, case in cases.items():
                yield Row(name, layout, case, _text(make))
    for name in llava_models.MODELS:
        for layout, case in LLAVA.items():
            yield Row(f"llava {name}", layout, case, _llava(name))
    for name, make in qwen_vl_models.MODELS.items():
        for layout, case in QWEN_VL.items():
            yield Row(name, layout, case, _qwen_vl(make))
    for layout, case in SOUNDS.items():
        yield Row("qwen2_audio", layout, case, sounds.task)


def _qwen_vl(make: Callable[[], object]) -> Callable[[], Task]:
    return lambda: qwen_vl_models.task(make())


def _llava(name: str) -> Callable[[], Task]:
    return lambda: llava_models.llava_task(llava_models.llava(name))


def _text(make: Callable[[], object]) -> Callable[[], Task]:
    return lambda: text_task(randomise(make(), seed=1), models.VOCABULARY)
