# SPDX-License-Identifier: Apache-2.0
"""The played ranks: they do what real ones do, and notice what real ones hang on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.harness.backend import own_device
from tests.unit_tests.mimo.in_process_ranks import InProcessWorld

pytestmark = pytest.mark.once

HALVES = [[6, 0, 2, 4], [1, 3, 5, 7]]


def subgroup(enumeration: list[list[int]] = HALVES) -> Any:
    return dist.new_subgroups_by_enumeration(enumeration)[0]


def all_collectives(device: str | torch.device = "cpu") -> list[torch.Tensor]:
    """Of one rank of eight: its place, and the result of each collective in its half of them."""
    rank = dist.get_rank()
    group = subgroup()
    x = torch.tensor([[rank + 1.0, 10.0 * rank, 0.0, -rank]], device=device)
    gathered, scattered = x.new_empty(4, 4), x.new_empty(1, 1)
    dist.all_gather_into_tensor(gathered, x, group=group)
    total = x.clone()
    dist.all_reduce(total, group=group)
    dist.reduce_scatter_tensor(scattered, x.view(4, 1).clone(), group=group)
    sizes = dist.get_world_size(group), dist.get_world_size()
    place = torch.tensor([dist.get_rank(group), *sizes], device=device)
    ranks = torch.tensor(dist.get_process_group_ranks(group), device=device)
    dist.destroy_process_group(group)
    return [x.cpu() for x in (place, ranks, gathered, total, scattered)]


def uneven_exchange(device: str | torch.device = "cpu") -> torch.Tensor:
    """In the half of eight ranks that this one is in, everybody sends the j-th rank j rows."""
    rank = dist.get_rank()
    own = dist.new_group(sorted(HALVES[rank % 2]), use_local_synchronization=True)
    place = dist.get_rank(own)
    sent = torch.full((6, 1), float(rank), device=device)
    received = sent.new_empty(4 * place, 1)
    splits = [place] * 4, [0, 1, 2, 3]
    dist.all_to_all_single(received, sent, *splits, group=own, async_op=True).wait()
    return received.cpu()


@pytest.mark.parametrize("seed", range(5))
def test_results(seed: int) -> None:
    world = InProcessWorld(8, seed)
    results = world.run(lambda rank: [*all_collectives(), uneven_exchange()])
    place, ranks, gathered, total, scattered, exchanged = results[2]
    assert place.tolist() == [1, 4, 8]
    assert ranks.tolist() == [0, 2, 4, 6]
    assert gathered.tolist() == [[r + 1, 10 * r, 0, -r] for r in (0, 2, 4, 6)]
    assert total.tolist() == [[16, 120, 0, -12]]
    assert scattered.tolist() == [[120]]
    assert exchanged.tolist() == [[0], [2], [4], [6]]
    names = ("all_gather", "all_reduce", "reduce_scatter", "all_to_all")
    assert world.counts(3) == {(name, (1, 3, 5, 7)): 1 for name in names}


@pytest.mark.ranks(8)
def test_results_are_those_of_real_ranks(rank_device: torch.device) -> None:
    real = [*all_collectives(rank_device), uneven_exchange(rank_device)]
    dist.barrier()
    world = InProcessWorld(8)
    played = world.run(lambda rank: [*all_collectives(), uneven_exchange()])[dist.get_rank()]
    for mine, theirs in zip(played, real, strict=True):
        assert torch.equal(mine, theirs)


def test_torch_is_itself_again_afterwards() -> None:
    before = dict(vars(dist))
    InProcessWorld(8).run(lambda rank: all_collectives())
    with pytest.raises(KeyError):
        InProcessWorld(1).run(lambda rank: {}[rank])
    assert dict(vars(dist)) == before


def reduce_unless(absent: int, rank: int) -> None:
    group = subgroup()
    if rank != absent:
        dist.all_reduce(torch.zeros(1, device=own_device()), group=group)


def test_a_rank_that_stays_away_is_a_failure_not_a_hang() -> None:
    message = r"wait forever: rank 2 in all_reduce over \(0, 2, 4, 6\), rank 4"
    with pytest.raises(AssertionError, match=message):
        InProcessWorld(8).run(lambda rank: reduce_unless(0, rank))


def test_the_error_of_a_rank_is_told_not_that_its_peers_wait() -> None:
    def body(rank: int) -> None:
        group = subgroup()
        if rank == 3:
            raise ValueError("the reason")
        dist.all_reduce(torch.zeros(1, device=own_device()), group=group)

    with pytest.raises(ValueError, match="the reason"):
        InProcessWorld(8).run(body)


def different_shapes(rank: int) -> None:
    dist.all_reduce(torch.zeros(1 + rank, device=own_device()), group=subgroup([[0, 1]]))


def different_functions(rank: int) -> None:
    group, x = subgroup([[0, 1]]), torch.zeros(2, device=own_device())
    if rank:
        dist.all_reduce(x, group=group)
    else:
        dist.all_gather_into_tensor(x, x[:1].clone(), group=group)


def different_groups(rank: int) -> None:
    subgroup([[0, 1]] if rank else [[0], [1]])


def groups_on_one_rank_only(rank: int) -> None:
    if rank:
        subgroup([[0, 1]])


def rows_nobody_waits_for(rank: int) -> None:
    group = dist.new_group([0, 1], use_local_synchronization=True)
    x = torch.zeros(2, 1, device=own_device())
    dist.all_to_all_single(x.clone(), x, [1, 1], [2 - rank, rank], group=group)


def strided(rank: int) -> None:
    dist.all_reduce(torch.zeros(2, 2, device=own_device()).t(), group=subgroup([[0, 1]]))


def after_the_end(rank: int) -> None:
    group = subgroup([[0, 1]])
    dist.destroy_process_group(group)
    dist.all_reduce(torch.zeros(1, device=own_device()), group=group)


def not_played(rank: int) -> None:
    dist.barrier()


def whole_world(rank: int) -> None:
    dist.all_reduce(torch.zeros(1, device=own_device()))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (different_shapes, r"do not fit together.*\(1,\).*\(2,\)"),
        (different_functions, "do not fit together.*all_gather.*all_reduce"),
        (different_groups, r"rank \d makes .* another rank made"),
        (groups_on_one_rank_only, "different numbers of groups"),
        (rows_nobody_waits_for, r"rank 0 waits for \[1, 1\] rows and is sent \[2, 1\]"),
        (strided, "strided tensor"),
        (after_the_end, "destroyed"),
        (not_played, "torch.distributed.barrier is not played"),
        (whole_world, "without a group"),
    ],
)
def test_what_real_ranks_would_hang_on_or_get_wrong(body: Any, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        InProcessWorld(2).run(body)
