# SPDX-License-Identifier: Apache-2.0
"""What holds for *every* bridge: random layouts of up to 64 ranks, all ranks in this process.

The project's grids, communicator and collectives run on every rank; see ``in_process_ranks``.
Numbers are whole, so all comparisons are exact.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from megatron.core.models.mimo.comm import gather_bridge as bridge_module
from tests.unit_tests.mimo.bridge_cases import (
    DIRECTIONS,
    EACH_DIRECTION,
    BridgeCase,
    bridge_cases,
)
from tests.unit_tests.mimo.in_process_ranks import InProcessWorld

pytestmark = pytest.mark.once

Counts = dict[tuple[str, tuple[int, ...]], int]


@dataclass(frozen=True)
class Passed:
    """One rank's tensors of a forward and a backward pass; what each of them communicated."""

    x: torch.Tensor
    y: torch.Tensor
    y_grad: torch.Tensor
    x_grad: torch.Tensor
    forward: Counts
    backward: Counts


def pass_through(
    case: BridgeCase, batch: torch.Tensor, gradient: Callable[[int], torch.Tensor]
) -> dict[int, Passed]:
    """Every rank of the bridge sends its block of ``batch`` and gets ``gradient(rank)`` back.

    ``gradient`` is global ``(B, S, H)``, the rank takes its destination block.
    """
    world = InProcessWorld(case.world_size, case.seed)

    def body(rank: int) -> Passed | None:
        bridge = case.bridge()
        if rank not in case.ranks:
            return None
        x = case.block("src", rank, batch).clone().requires_grad_()
        y = bridge.communicate(x)
        forward = world.counts(rank)
        y_grad = case.block("dest", rank, gradient(rank))
        y.backward(y_grad)
        total = world.counts(rank)
        backward = {call: n - forward.get(call, 0) for call, n in total.items()}
        backward = {call: n for call, n in backward.items() if n}
        return Passed(x.detach(), y.detach(), y_grad, x.grad, forward, backward)

    results = world.run(body)
    return {rank: results[rank] for rank in case.ranks}


def check_forward(case: BridgeCase) -> None:
    """A rank's output is its destination block of the batch, in memory of its own."""
    batch = case.drawn(1)
    for rank, passed in pass_through(case, batch, lambda rank: torch.zeros_like(batch)).items():
        assert torch.equal(passed.y, case.block("dest", rank, batch)), rank
        assert passed.y.is_contiguous()


def check_adjoint(case: BridgeCase) -> None:
    """``<A x, g> == <x, A^T g>`` with each scalar product taken over unique copies.

    ``A`` is not a map between the ranks' tensors as they lie in memory: copies would be counted
    as often as they occur, and the adjoint of a copy is a sum over copies. It is the map between
    what the copies stand for. So on the source side one rank of each TP group counts, with the
    whole gradient. On the destination side one rank of each TP group of the *first* pipeline stage
    counts, with *every* CP rank: the CP ranks hold the same values ``y`` and each a part of their
    gradient, and later stages do not use them,

        <A x, g> = sum over dest dp, cp of <y, g(dp, cp)>,     <x, A^T g> = sum over src dp.

    Preconditions: ``x`` is equal on the copies of a source block, ``g`` on the TP ranks of a
    (dest dp, cp). Nothing else is asked of ``g``: a language model's gradient is zero outside a
    CP rank's own chunks, which makes the sum over CP exact in any dtype; the identity is linear
    and holds for gradients that overlap too. They do here, so that a sum that takes one
    contribution for another cannot hide behind zeros.

    The identity looks at one copy of the input gradient; that all copies agree is checked too.
    """
    batch = case.drawn(1)
    of_cp_rank = [case.drawn(10 + cp) for cp in range(case.size("dest", "cp"))]
    at = case.places
    passed = pass_through(case, batch, lambda rank: of_cp_rank[at[rank]["dest cp"]])
    used = [r for r in passed if at[r]["dest tp"] == at[r]["dest pp"] == 0]
    there = [(passed[r].y * passed[r].y_grad).sum() for r in used]
    back = [(p.x * p.x_grad).sum() for r, p in passed.items() if at[r]["src tp"] == 0]
    assert sum(there) == sum(back)
    for rank, p in passed.items():
        assert torch.equal(p.x_grad, passed[case.alike(rank, "src dp")[0]].x_grad), rank


def check_round_trip(case: BridgeCase) -> None:
    """Each rank's own chunks of the output, sent back as gradient, are the input again."""
    batch = case.drawn(1)
    passed = pass_through(case, batch, lambda rank: case.own_chunks(rank, batch))
    for rank, p in passed.items():
        assert torch.equal(p.x_grad, p.x), rank


def check_way_back(case: BridgeCase) -> None:
    """The bridge of the opposite direction undoes the bridge, and so do the gradients."""
    batch, gradient = case.drawn(1), case.drawn(2)
    world = InProcessWorld(case.world_size, case.seed)

    def body(rank: int) -> None:
        there, back = case.bridge(), case.bridge(reverse=True)
        if rank in case.ranks:
            x = case.block("src", rank, batch).clone().requires_grad_()
            z = back.communicate(there.communicate(x))
            z_grad = case.block("src", rank, gradient)
            z.backward(z_grad)
            assert torch.equal(z, x), rank
            assert torch.equal(x.grad, z_grad), rank

    world.run(body)


def check_collectives(case: BridgeCase) -> None:
    """One gather on the side that is coarser; in backward one sum over CP on the first stage, which
    the others are told; and nothing else."""
    src_dp, dest_dp = case.size("src", "dp"), case.size("dest", "dp")
    batch = case.drawn(1)
    for rank, passed in pass_through(case, batch, lambda rank: batch).items():
        fan_in = ("dest dp", "src tp")
        fan_out = ("src dp", "dest tp", "dest cp", "dest pp")
        copies = fan_in if src_dp > dest_dp else fan_out
        gather = {("all_gather", case.alike(rank, *copies)): 1}
        assert passed.forward == (gather if src_dp > dest_dp else {})
        backward: Counts = {}
        if case.size("dest", "cp") > 1 and case.places[rank]["dest pp"] == 0:
            summed = case.alike(rank, "dest dp", "dest tp", "dest pp")
            backward["all_reduce", summed] = 1
        if case.size("dest", "pp") > 1:
            backward["broadcast", case.alike(rank, "dest dp", "dest tp", "dest cp")] = 1
        assert passed.backward == (backward | gather if dest_dp > src_dp else backward)


PROPERTIES = [check_forward, check_adjoint, check_round_trip, check_collectives]


@pytest.mark.parametrize("check", PROPERTIES, ids=lambda check: check.__name__)
@pytest.mark.parametrize("direction", DIRECTIONS)
@EACH_DIRECTION
@given(data=st.data())
def test_every_bridge(
    check: Callable[[BridgeCase], None], direction: str, data: st.DataObject
) -> None:
    check(data.draw(bridge_cases(direction), label="case"))


def without_sum(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    return x


def mean_instead_of_sum(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    y = true_sum(x, group)
    y.register_hook(lambda grad: grad / dist.get_world_size(group))
    return y


def reversed_slots(x: torch.Tensor, group: dist.ProcessGroup, dim: int) -> torch.Tensor:
    """Wrong in forward and in backward alike: its own adjoint identity holds."""
    whole = true_gather(x, group, dim)
    return torch.cat(whole.chunk(dist.get_world_size(group), dim)[::-1], dim)


def zero_pad(x: torch.Tensor, group: dist.ProcessGroup, dim: int) -> torch.Tensor:
    return x.chunk(dist.get_world_size(group), dim)[dist.get_rank(group)].contiguous()


def slice_of_slot_0(x: torch.Tensor, group: dist.ProcessGroup, dim: int) -> torch.Tensor:
    y = true_take(x, group, dim)
    return y + (x.chunk(dist.get_world_size(group), dim)[0] - y).detach()


true_gather, true_take = bridge_module.gather_blocks, bridge_module.take_block
true_sum = bridge_module.sum_gradients
FAN_IN = BridgeCase((("tp", 2), ("dp", 6)), (("tp", 2), ("cp", 3), ("dp", 2)))
FAN_OUT = BridgeCase((("tp", 12), ("dp", 1)), (("cp", 2), ("tp", 2), ("dp", 3)), offset=1)
STAGES = BridgeCase((("tp", 2), ("dp", 6)), (("tp", 1), ("cp", 2), ("pp", 3), ("dp", 2)))


@pytest.mark.parametrize(
    ("case", "name", "wrong", "seen_by"),
    [
        (FAN_IN, "sum_gradients", without_sum, {"adjoint", "round_trip", "collectives"}),
        (FAN_IN, "sum_gradients", mean_instead_of_sum, {"adjoint", "round_trip"}),
        (STAGES, "sum_gradients", without_sum, {"adjoint", "round_trip", "collectives"}),
        (STAGES, "first_gradient", without_sum, {"adjoint", "round_trip", "collectives"}),
        (STAGES, "first_gradient", true_sum, {"adjoint", "round_trip", "collectives"}),
        (FAN_IN, "gather_blocks", reversed_slots, {"forward", "round_trip"}),
        (FAN_OUT, "sum_gradients", without_sum, {"adjoint", "round_trip", "collectives"}),
        (FAN_OUT, "take_block", zero_pad, {"adjoint", "round_trip", "collectives"}),
        (FAN_OUT, "take_block", slice_of_slot_0, {"forward", "adjoint"}),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_which_properties_see_a_wrong_bridge(
    case: BridgeCase,
    name: str,
    wrong: Callable[..., torch.Tensor],
    seen_by: set[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bridge_module, name, wrong)
    failed = set()
    for check in PROPERTIES:
        try:
            check(case)
        except AssertionError:
            failed.add(check.__name__.removeprefix("check_"))
    assert failed == seen_by


@pytest.mark.parametrize("direction", DIRECTIONS)
@EACH_DIRECTION
@given(data=st.data())
def test_there_and_back(direction: str, data: st.DataObject) -> None:
    check_way_back(data.draw(bridge_cases(direction, use_cp=False), label="case"))
