# SPDX-License-Identifier: Apache-2.0
"""Fixtures of several test modules."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import pytest

if TYPE_CHECKING:
    from tests.unit_tests.mimo.digits_runs import Run


@pytest.fixture(scope="module")
def trained() -> Iterator[Run]:
    """A run of images and language after one step, with the distributed optimizer."""
    from tests.unit_tests.mimo.digits_runs import FAN_IN, run

    with run(FAN_IN) as one:
        one.train(0, 1)
        yield one


@pytest.fixture
def one_rank() -> Iterator[None]:
    """A world of this process alone."""
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def own_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Grids of this test make all their groups, also those that another test has left."""
    from mimo_colocated import shared_groups

    monkeypatch.setattr(shared_groups, "_of_world", WeakKeyDictionary())
