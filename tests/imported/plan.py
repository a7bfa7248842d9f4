# SPDX-License-Identifier: Apache-2.0
"""Which models are compared in which layouts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from mimo_colocated.launch.layouts import Layout
from tests.unit_tests.mimo.huggingface import models
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
                # Learned positions of a packed batch are those of the whole pack.
                if not (name == "gpt2" and case.settings.get("packed")):
                    yield Row(name, layout, case, _text(make))


def _text(make: Callable[[], object]) -> Callable[[], Task]:
    return lambda: text_task(randomise(make(), seed=1), models.VOCABULARY)
