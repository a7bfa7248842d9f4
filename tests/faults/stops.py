# SPDX-License-Identifier: Apache-2.0
"""Judges what nobody is lost by: a job that is told to stop, and one that cannot save.

Both must leave whole checkpoints only, and the same command without the fault must go on to the
losses of a run without any, bit by bit.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mimo_colocated.stop_requests import EXIT_CODE
from tests.faults.cases import SAVE_EVERY, STEPS

if TYPE_CHECKING:
    from tests.faults.verdict import Outcome

_SAID = re.compile(
    rf"stopped by SIGTERM (?:before any step; the same command starts again|after step (?P<step>\d)"
    rf" of {STEPS}, which is saved in (?P<folder>\S+); the same command goes on from there)"
)
# A signal is received this long after it is sent, or an agreement begins this long before it ends.
_RACE_S = 0.5
_TRAINED = ("step", "loss", "grad_norm", "counted_tokens", "learning_rate")


def problems_of_a_stop(outcome: Outcome) -> Iterator[str]:
    """What is wrong after SIGTERM to one rank."""
    steps = _steps_to_stop_after(outcome)
    said = _SAID.fullmatch((outcome.output.splitlines() or [""])[-1])
    if outcome.code == 0 and None in steps:  # too late to stop
        yield from _trained(outcome.out, outcome.trained)
        return
    if outcome.code != EXIT_CODE:
        yield f"exit code {outcome.code}, with the errors: {outcome.errors[-300:]}"
    elif outcome.errors:
        yield f"errors: {outcome.errors[-300:]}"
    elif said is None:
        yield f"the last line: {outcome.output[-300:]}"
    else:
        step = int(said["step"] or 0)
        if step not in steps:
            yield f"stopped after step {step}, not after {' or '.join(map(str, steps))}"
        if step and Path(said["folder"]) != outcome.out / "checkpoints" / f"step_{step:08}":
            yield f"the checkpoint is said to be {said['folder']}"
        yield from _whole(outcome, newest=step)
        yield from _goes_on(outcome)


def _steps_to_stop_after(outcome: Outcome) -> list[int | None]:
    """By the journal, the agreements that may have been the first to know; None: none did.

    The first is made before any step, then one before each step and one before the held-out images
    are read.
    """
    events = outcome.journal[outcome.case.rank]
    fault = next(event["at"] for event in events if "fault" in event)
    agreed = [event for event in events if "agreed" in event]
    late = [event["agreed"] for event in agreed if event["at"] >= fault - _RACE_S]
    return [*late[:3], *([None] if not agreed or agreed[-1]["at"] < fault + _RACE_S else [])]


def problems_of_a_failed_save(outcome: Outcome, reason: str) -> Iterator[str]:
    """What is wrong after rank's write failed, which the error says as ``reason``, a regex."""
    rank = outcome.case.rank
    lines = [line for line in outcome.errors.splitlines() if not line.startswith("full traceback:")]
    pattern = rf"error: rank {rank} could not write checkpoint \S+/step_(\d{{8}}): {reason}.*"
    said = re.fullmatch(pattern, lines[0]) if len(lines) == 1 else None
    if outcome.code != 1:
        yield f"exit code {outcome.code}"
    if said is None:
        yield f"the message: {outcome.errors[-500:]}"
    else:
        yield from _whole(outcome, newest=int(said[1]) - SAVE_EVERY)
    yield from _goes_on(outcome)


def problems_of_ranks_apart(outcome: Outcome) -> Iterator[str]:
    """What is wrong after ranks 4-7 had a folder of their own."""
    lines = [line for line in outcome.errors.splitlines() if not line.startswith("full traceback:")]
    apart, root = outcome.out.parent / "apart", outcome.out / "checkpoints"
    if outcome.code != 1:
        yield f"exit code {outcome.code}"
    pattern = (
        rf"error: ranks 4-7 cannot see the folder {root} of rank 0 \(rank 4 looked at {apart} on "
        r"\S+\); all ranks write a checkpoint into one folder.*"
    )
    if len(lines) != 1 or not re.fullmatch(pattern, lines[0]):
        yield f"the message: {outcome.errors[-500:]}"
    if left := [path.name for path in apart.rglob("*")]:
        yield f"left in the other folder: {', '.join(left)}"
    yield from _whole(outcome, newest=0)
    yield from _goes_on(outcome)


def checkpoints(out: Path) -> dict[str, str]:
    """Names in the folder of checkpoints, hidden ones too; what is wrong with each, if anything."""
    folder = out / "checkpoints"
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    return {name: next(_damage(folder / name), "") for name in names}


def _damage(folder: Path) -> Iterator[str]:
    if not (folder / "mimo.json").exists():
        yield "has no manifest"
        return
    for name, saved in json.loads((folder / "mimo.json").read_text())["files"].items():
        found = (folder / name).stat().st_size if (folder / name).exists() else None
        if found != saved["bytes"]:
            yield f"{name} has {found} bytes, {saved['bytes']} were saved"


def _whole(outcome: Outcome, newest: int) -> Iterator[str]:
    """Every checkpoint is as its manifest says, and nothing else was left."""
    for name, damage in outcome.checkpoints.items():
        if damage or not name.startswith("step_"):
            yield f"the checkpoint {name} {damage or 'is no checkpoint'}"
    names = sorted(outcome.checkpoints) or [f"step_{0:08}"]
    if names[-1] != f"step_{newest:08}":
        yield f"the newest checkpoint is {names[-1]}, not that of step {newest}"


def _goes_on(outcome: Outcome) -> Iterator[str]:
    """The same command, without the fault, ended well and lost what a run without it loses."""
    again = outcome.again
    if again is None or again.code != 0:
        yield f"run again: {again and (again.code, again.errors[-300:])}"
    else:
        yield from _trained(outcome.out, outcome.trained)


def _trained(out: Path, wanted: list[tuple[Any, ...]]) -> Iterator[str]:
    found = trained(out)
    if found != wanted:
        yield f"trained {found}, undisturbed {wanted}"


def trained(out: Path) -> list[tuple[Any, ...]]:
    """What each step of a run did."""
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [tuple(line[name] for name in _TRAINED) for line in lines]
