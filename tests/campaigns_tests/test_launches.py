# SPDX-License-Identifier: Apache-2.0
"""A launch with real processes of two ranks, and how it ends when a task brings it down."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from campaigns.launches import Tell, Told, launch, run_tasks
from campaigns.ranks import LaunchFailed

WORK = "tests.campaigns_tests.test_launches:work"


def work(tell: Tell, tasks: list[str], plan: Any) -> None:
    """What a rank does: a task's name says what happens in it."""
    for task in tasks:
        tell.started(task)
        total = torch.ones(1) * plan["value"]
        dist.all_reduce(total)
        if task == "killed" and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if task == "raises" and dist.get_rank() == 1:
            raise ValueError("no such thing")
        if task in ("killed", "raises"):
            dist.barrier()
        if task == "hangs":
            time.sleep(60)
        pids: list[int] = [0] * dist.get_world_size()
        dist.all_gather_object(pids, os.getpid())
        tell.part(task, {"pids": pids})
        tell.finished(task, {"passed": True, "total": total.item()})


def run(tasks: list[str], folder: Path, timeout: float = 120.0) -> tuple[dict, list[str]]:
    notes: list[str] = []
    plan = {"value": 3.0}
    options = {"backend": "gloo", "timeout": timeout, "on_part": lambda task, result: None}
    found = dict(run_tasks(2, tasks, WORK, plan, folder, note=notes.append, **options))
    return found, notes


def test_tasks_after_one_that_crashes_run_in_a_fresh_launch(tmp_path) -> None:
    found, notes = run(["a", "killed", "raises", "b"], tmp_path)
    assert list(found) == ["a", "killed", "raises", "b"]
    assert found["a"] == found["b"] == {"passed": True, "total": 6.0}
    assert found["killed"]["reason"] == "rank 1 ended with SIGKILL"
    assert found["raises"]["reason"].startswith("rank 1: ValueError: no such thing")
    assert [note for note in notes if note.startswith("starting")] == [
        "starting 2 ranks for 4 runs",
        "starting 2 ranks for 2 runs",
        "starting 2 ranks for 1 runs",
    ]


def test_a_hang_is_ended_and_said(tmp_path) -> None:
    found, _ = run(["hangs"], tmp_path, timeout=0.5)
    assert found["hangs"]["reason"] == "no result within 0.5 s; all ranks were ended"
    assert found["hangs"]["passed"] is False


def test_a_launch_that_is_closed_leaves_no_ranks(tmp_path) -> None:
    told = launch(2, ["a", "hangs"], WORK, {"value": 1.0}, tmp_path, backend="gloo")
    events = [next(told) for _ in range(4)]
    assert [event[:2] for event in events] == [
        ("started", "a"), ("part", "a"), ("finished", "a"), ("started", "hangs")
    ]  # fmt: skip
    (pids,) = (event[2]["pids"] for event in events if event[0] == "part")
    assert len(pids) == 2
    assert all(Path(f"/proc/{pid}").exists() for pid in pids)
    told.close()
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_what_a_launch_cannot_start_fails_with_all_its_tasks(tmp_path) -> None:
    def start(*_: Any, **__: Any) -> Any:
        raise LaunchFailed("no ports left")
        yield

    found = dict(run_tasks(2, ["a", "b"], WORK, {}, tmp_path, note=print, start=start))
    assert [result["reason"] for result in found.values()] == ["no ports left"] * 2


def test_half_a_line_is_not_read_and_none_is_read_twice(tmp_path) -> None:
    path = tmp_path / "told.jsonl"
    told = Told(path)
    assert told.new() == []
    Tell(path, 0).started("a")
    Tell(path, 1).started("never heard")
    with path.open("a") as file:
        file.write('["finished", ')
    assert told.new() == [("started", "a", {})]
    assert told.new() == []
    with path.open("a") as file:
        file.write('"a", {}]\n')
    assert told.new() == [("finished", "a", {})]


@pytest.mark.parametrize("name", ["os:getpid", "campaigns.ranks:LaunchFailed"])
def test_functions_are_found_by_name(name) -> None:
    from campaigns.ranks import function_of

    assert callable(function_of(name))
