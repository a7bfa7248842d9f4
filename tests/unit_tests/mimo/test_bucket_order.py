# SPDX-License-Identifier: Apache-2.0
"""The order of reductions on stand-ins for stock's bucket groups; one process."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from megatron.core.models.mimo.gradients.bucket_order import reduce_in_one_order


class Group:
    """Notes when its reduction starts."""

    def __init__(self, name: str, told: list[str]) -> None:
        self.name, self.told, self.is_last_microbatch = name, told, True

    def start_grad_sync(self) -> None:
        """Note it."""
        self.told.append(self.name)

    def register_grad_ready(self, parameter: object) -> None:
        """Take any parameter's."""

    def reset(self) -> None:
        """Begin a step."""


@pytest.mark.parametrize("kind", ["bucket_groups", "expert_parallel_bucket_groups"])
def test_buckets_of_either_kind_wait_for_those_before_them(kind: str) -> None:
    told: list[str] = []
    groups = [Group(name, told) for name in "abc"]
    others = {"bucket_groups": [], "expert_parallel_bucket_groups": []}
    config = SimpleNamespace(overlap_grad_reduce=True)
    wrapped = SimpleNamespace(ddp_config=config, named_parameters=list, **others)
    setattr(wrapped, kind, groups)
    reduce_in_one_order(wrapped)
    for order in ("cab", "abc", "bca"):
        told.clear()
        for group in groups:
            group.reset()
        for name in order:
            groups["abc".index(name)].start_grad_sync()
        assert told == ["a", "b", "c"]
    for group in groups:  # a step that is given up after one bucket
        group.reset()
    groups[0].start_grad_sync()
    groups[2].start_grad_sync()
    for group in groups:
        group.reset()
    told.clear()
    groups[1].start_grad_sync()
    assert told == []
    groups[0].start_grad_sync()
    assert told == ["a", "b"]
