# SPDX-License-Identifier: Apache-2.0
"""``plan(...)``: what every way to run a step is predicted to take, the fastest that fits first."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from megatron.core.models.mimo.memory.policy import KEEP, EncoderMemory
from megatron.core.models.mimo.plan.bridge import Traffic, gathered_traffic, planned_traffic
from megatron.core.models.mimo.plan.candidates import (
    Candidate,
    Search,
    candidates,
    obstacle,
    problem,
)
from megatron.core.models.mimo.plan.encoder_parts import spread
from megatron.core.models.mimo.plan.footprint import RankBytes, rank_bytes
from megatron.core.models.mimo.plan.machine import Machine
from megatron.core.models.mimo.plan.shapes import EncoderShape, Shapes, Work
from megatron.core.models.mimo.plan.step_time import StepSeconds, step_seconds


@dataclass(frozen=True)
class Estimate:
    """What one candidate is predicted to take.

    Attributes:
        candidate: layouts and policies.
        seconds: of a step, by part.
        memory: bytes of the fullest rank, by part.
        capacity: bytes of an accelerator.
    """

    candidate: Candidate
    seconds: StepSeconds
    memory: RankBytes
    capacity: float

    @property
    def fits(self) -> bool:
        """Whether the fullest rank has room, the margin included."""
        return self.memory.total <= self.capacity

    def to_dict(self) -> dict[str, Any]:
        """Return plain values: seconds, bytes and what the command line takes."""
        return {
            "layout": str(self.candidate),
            "homogeneous": self.candidate.homogeneous,
            "microbatches": self.candidate.microbatches,
            "fits": self.fits,
            "seconds": {"total": self.seconds.total, **vars(self.seconds)},
            "bytes": {"total": self.memory.total, **vars(self.memory)},
        }


@dataclass(frozen=True)
class Plan:
    """Estimates of a search.

    Attributes:
        colocated, homogeneous: those that fit, the fastest first.
        rejected: those that fit with no policy, the smallest first.
    """

    colocated: list[Estimate]
    homogeneous: list[Estimate]
    rejected: list[Estimate]

    @property
    def gain(self) -> float | None:
        """How much faster the best colocated one is than the best homogeneous one; 0.5 is 50 %."""
        if not self.colocated or not self.homogeneous:
            return None
        return self.homogeneous[0].seconds.total / self.colocated[0].seconds.total - 1


def estimate(candidate: Candidate, shapes: Shapes, work: Work, machine: Machine) -> Estimate:
    """Return what a candidate is predicted to take.

    Args:
        candidate, shapes, work, machine: what runs, on what, and where.

    Raises:
        ValueError: the candidate cannot run, with the reason.
    """
    if why := problem(candidate, shapes, work):
        raise ValueError(f"{candidate} cannot run: {why}")
    return _estimate(candidate, shapes, work, machine)


def _estimate(candidate: Candidate, shapes: Shapes, work: Work, machine: Machine) -> Estimate:
    seconds = step_seconds(candidate, shapes, work, machine)
    memory = rank_bytes(candidate, shapes, work, machine)
    return Estimate(candidate, seconds, memory, machine.memory)


def plan(shapes: Shapes, work: Work, machine: Machine, search: Search) -> Plan:
    """Return estimates of all pairs of layouts.

    A pair keeps all activations if they fit. If not, policies are tried that cost more time and
    less memory, and the fastest that fits stands for the pair.

    Args:
        shapes: the model.
        work: the step.
        machine: where it runs.
        search: what is tried.

    Raises:
        ValueError: no layout of that many ranks can run at all.
    """
    found = [
        fastest_that_fits(each, shapes, work, machine, search)
        for each in candidates(shapes, work, search)
    ]
    if not found:
        why = obstacle(shapes, work, search)
        raise ValueError(
            f"no layout of {search.ranks} ranks can run {work.samples} samples of {work.sequence} "
            "tokens: "
            + (f"{why}, most often" if why else "no size divides them all")
            + "; give other samples, another length or share, or other ranks"
        )
    fitting = sorted((e for e in found if e.fits), key=lambda e: e.seconds.total)
    return Plan(
        colocated=[e for e in fitting if not (e.candidate.homogeneous and shapes.encoders)],
        homogeneous=[e for e in fitting if e.candidate.homogeneous and shapes.encoders],
        rejected=sorted((e for e in found if not e.fits), key=lambda e: e.memory.total),
    )


def fastest_that_fits(
    candidate: Candidate, shapes: Shapes, work: Work, machine: Machine, search: Search
) -> Estimate:
    """Return the estimate with the cheapest policy that fits; if none does, the smallest one.

    Args:
        candidate: without a policy of memory.
        shapes, work, machine: what runs, on what, and where.
        search: which policies are tried.
    """
    kept = _estimate(candidate, shapes, work, machine)
    if kept.fits or _states_alone(kept) > machine.memory:
        return kept
    tried = [_estimate(each, shapes, work, machine) for each in policies(candidate, shapes, search)]
    fitting = [each for each in tried if each.fits]
    if fitting:
        return min(fitting, key=lambda each: each.seconds.total)
    return min([kept, *tried], key=lambda each: each.memory.total)


def _states_alone(each: Estimate) -> float:
    """Bytes that no policy saves."""
    memory = each.memory
    return memory.weights + memory.gradients + memory.optimizer + memory.communicators


def policies(candidate: Candidate, shapes: Shapes, search: Search) -> Iterator[Candidate]:
    """Yield a candidate with every policy that saves memory.

    Args:
        candidate: with none.
        shapes: the model; without encoders there is nothing to do about theirs.
        search: what may become of the encoders'.
    """
    encoders = search.encoder_memory if shapes.encoders else (KEEP,)
    for layers, encoder in itertools.product(("none", "selective", "full"), encoders):
        if (layers, encoder) != ("none", KEEP):
            yield replace(candidate, recompute=layers, memory=EncoderMemory(encoder, encoder))


@dataclass(frozen=True)
class Moved:
    """What a candidate's bridge moves for one encoder in one microbatch.

    Attributes:
        encoder: its name.
        traffic: rows, by the route plan.
        row_bytes: of one row.
        spread: the most items of an encoder replica over their mean.
    """

    encoder: str
    traffic: Traffic
    row_bytes: int
    spread: float


def moved(candidate: Candidate, shapes: Shapes, work: Work) -> list[Moved]:
    """Return what the bridges of a colocated candidate move, exactly.

    Args:
        candidate, shapes, work: what runs.
    """
    samples = work.samples // (candidate.language.dp * candidate.microbatches)

    def traffic(name: str, shape: EncoderShape) -> Traffic:
        items = work.items(name, shape)
        what = candidate.encoder(name), candidate.language, samples, shape, items
        if candidate.bridge == "gather":
            return gathered_traffic(*what)
        return planned_traffic(*what, work)

    row = shapes.width * work.itemsize
    return [
        Moved(name, traffic(name, shape), row, spread(name, candidate, shape, work))
        for name, shape in shapes.encoders.items()
    ]


def find(text: str, estimates: Iterable[Estimate]) -> list[Estimate]:
    """Return the estimates that have all options of a text.

    Args:
        text: such as ``--language tp=2,cp=8,dp=2``.
        estimates: to look in.
    """
    wanted = [f"--{part.strip()} " for part in text.split("--") if part.strip()]
    return [
        each for each in estimates if all(part in f"{each.candidate} " for part in wanted)
    ]
