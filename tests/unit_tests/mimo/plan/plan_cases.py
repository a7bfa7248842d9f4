# SPDX-License-Identifier: Apache-2.0
"""A model, a step and machines to plan for."""

from __future__ import annotations

from dataclasses import replace

from megatron.core.models.mimo.plan.candidates import Search
from megatron.core.models.mimo.plan.estimates import Plan, plan
from megatron.core.models.mimo.plan.machine import PRESETS, Machine
from megatron.core.models.mimo.plan.shapes import EncoderShape, LanguageShape, Shapes, Stack, Work

H100 = PRESETS["h100"]
LANGUAGE = LanguageShape(Stack.of(32, 4096, 11008, 32, gated=True), 32_000)
ENCODER = EncoderShape(Stack.of(24, 1792, 7168, 16), 1024, 1024, 588, 1792, 4096)
SHAPES = Shapes(LANGUAGE, {"vision": ENCODER})
WORK = Work(65_536, 4, {"vision": 0.75})

SMALL = Shapes(
    LanguageShape(Stack.of(4, 64, 256, 8), 128),
    {"vision": EncoderShape(Stack.of(2, 32, 128, 4), 16, 16, 48, 32, 64)},
)
SMALL_WORK = Work(256, 8, {"vision": 0.5}, itemsize=4)

CUT = Shapes(SMALL.language, {"vision": replace(SMALL.encoders["vision"], cuts_items=True)})
"""Its encoder can cut its items over CP."""


def free_links(machine: Machine) -> Machine:
    """A machine whose links take no time."""
    return replace(
        machine, inside=1e30, between=1e30, inside_latency=0.0, between_latency=0.0
    )


def planned(shapes: Shapes, work: Work, machine: Machine, search: Search) -> Plan:
    """By name, as other functions are called ``plan``, too."""
    return plan(shapes=shapes, work=work, machine=machine, search=search)
