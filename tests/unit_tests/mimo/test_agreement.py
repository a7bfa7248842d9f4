# SPDX-License-Identifier: Apache-2.0
"""What a rank makes of its own failure and of what its peers published. One process."""

from __future__ import annotations

import logging

import pytest
import torch.distributed as dist
from torch.distributed.checkpoint import CheckpointException

from megatron.core.models.mimo.training import agreement
from megatron.core.models.mimo.training.agreement import Failure

pytestmark = pytest.mark.once

WRITERS = logging.getLogger("megatron.core.dist_checkpointing.strategies")


def test_errors_are_overheard_inside_and_logged_outside(caplog: pytest.LogCaptureFixture) -> None:
    for name in ("first", "second"):  # the first one leaves nothing behind
        with agreement._overheard() as heard:
            WRITERS.error("inside %s", name)
        assert heard == [f"inside {name}"]
        WRITERS.error("outside %s", name)
    assert caplog.messages == ["outside first", "outside second"]


def test_a_rank_that_lost_its_peer_is_not_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "get_rank", lambda: 2)
    lost = agreement._failure_of(RuntimeError("Connection closed by peer [127.0.0.1]:1"), [])
    own = agreement._failure_of(OSError("no room"), [])
    assert (lost.distance, own) == (2, Failure(2, "no room"))
    assert agreement._first([lost, own]) is own
    # PyTorch's errors begin with where they came from.
    long = agreement._failure_of(RuntimeError("[Rank 2] in a file:\n  a frame\n\n  no room \n"), [])
    assert long.reason == "RuntimeError: no room"


def test_what_writers_logged_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """What they raise then may be another error, of what comes after."""
    monkeypatch.setattr(dist, "get_rank", lambda: 2)
    heard = ["writer 3 failed, error: OSError: [Errno 28] No space left on device", "later"]
    found = agreement._failure_of(KeyError("bucket"), heard)
    full = "the disk is full (No space left on device); make room there and resume"
    assert found == Failure(2, full)


def test_the_rank_that_failed_is_named_by_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's planner tells ranks of errors of others, or only that there was one."""
    monkeypatch.setattr(dist, "get_rank", lambda: 2)
    cause = ValueError("of another shape")
    planning = RuntimeError("planning failed")
    planning.__cause__ = cause
    told = CheckpointException("read", {5: (planning, None), 7: (OSError("later"), None)})
    assert agreement._failure_of(told, []) == Failure(5, "ValueError: of another shape", 1)
    own = CheckpointException("read", {2: (planning, None)})
    assert agreement._failure_of(own, []) == Failure(2, "ValueError: of another shape", 0)
    unknown = agreement._failure_of(CheckpointException("read", {}), [])
    assert unknown == Failure(2, "another rank failed", 2)
    assert agreement._first([unknown, agreement._failure_of(told, [])]).rank == 5


def test_every_failure_that_was_published_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    store = dist.HashStore()
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: store)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    told = [Failure(1, "closed", distance=2), Failure(0, "disk")]
    assert agreement._told(7) == []
    assert agreement._tell(7, told[1]) == told[1]
    assert agreement._tell(7, told[0]) == told[1]
    assert agreement._told(7) == told[::-1]
