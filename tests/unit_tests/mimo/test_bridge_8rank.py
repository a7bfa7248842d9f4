# SPDX-License-Identifier: Apache-2.0
"""The bridge on 8 ranks, for every pair of 8-rank layouts.

The oracle is the global picture: all ranks draw one global batch and one global gradient from the
same seed. A rank feeds its source block and must get its destination block; it feeds back the
gradient masked to its own CP chunks and must get the whole gradient on its source block. Every
comparison is bit for bit: data is only copied, and of the addends of the sum over CP all but one
are zero.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron.core.hyper_comm_grid import HyperCommGrid
from megatron.core.models.mimo.comm import gather_bridge as bridge_module
from megatron.core.models.mimo.comm.gather_bridge import (
    BridgeDirection,
    ColocatedBridgeCommunicator,
    SliceInfo,
)
from mimo_colocated import shared_groups
from tests.unit_tests.mimo.collective_calls import Calls, calls

__all__ = ["calls"]  # a fixture

# Nothing of Megatron-Core's is in them.
pytestmark = [pytest.mark.ranks(8), pytest.mark.once]

WORLD = 8
POWERS = (1, 2, 4, 8)
SOURCES = [(tp, WORLD // tp) for tp in POWERS]
DESTINATIONS = [
    (tp, cp, WORLD // (tp * cp)) for tp in POWERS for cp in POWERS if WORLD % (tp * cp) == 0
]
PAIRS = [
    pytest.param(src, dest, id="tp{}dp{}-tp{}cp{}dp{}".format(*src, *dest))
    for src in SOURCES
    for dest in DESTINATIONS
]
ORDERS = [
    pytest.param(("tp", "dp"), ("tp", "cp", "dp"), id="tp_cp_dp"),
    pytest.param(("tp", "cp", "pp", "dp"), ("cp", "tp", "dp"), id="cp_tp_dp"),
    pytest.param(("pp", "tp", "dp", "cp"), ("tp", "cp", "pp", "dp"), id="tp_cp_pp_dp"),
]
FAN_IN, FAN_OUT = ((2, 4), (2, 2, 2)), ((4, 2), (1, 2, 4))
EQUAL, EQUAL_NO_CP = ((4, 2), (2, 2, 2)), ((4, 2), (4, 1, 2))

BATCH, HIDDEN = 16, 3
ROWS = {"b": 0, "h": 1}
SEQUENCE_FIRST = {"s": 0, "b": 1, "h": 2}


# A group that one rank destroys while another still connects fails there. Taken before any test
# replaces it, so that it is not counted.
all_have_their_groups = dist.barrier


def make_grid(order: tuple[str, ...], **sizes: int) -> HyperCommGrid:
    return HyperCommGrid([sizes.get(name, 1) for name in order], list(order))


@contextlib.contextmanager
def bridge(
    src: tuple[int, int],
    dest: tuple[int, int, int],
    orders: tuple[tuple[str, ...], tuple[str, ...]] = (("tp", "dp"), ("tp", "cp", "dp")),
    **options: Any,
) -> Iterator[ColocatedBridgeCommunicator]:
    """A bridge between two fresh grids; all process groups are gone afterwards."""
    src_grid = make_grid(orders[0], tp=src[0], dp=src[1])
    dest_grid = make_grid(orders[1], tp=dest[0], cp=dest[1], dp=dest[2])
    comm = ColocatedBridgeCommunicator(src_grid, dest_grid, "vision", "language", **options)
    all_have_their_groups()
    try:
        yield comm
    finally:
        comm.destroy()
        src_grid.destroy()
        dest_grid.destroy()


class Picture:
    """The global batch and gradient ``(B, S, H)``, and a rank's parts by its own arithmetic."""

    def __init__(
        self,
        src: tuple[int, int],
        dest: tuple[int, int, int],
        dest_order: tuple[str, ...] = ("tp", "cp", "dp"),
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        generator = torch.Generator().manual_seed(20)
        shape = (BATCH, 4 * dest[1], HIDDEN)
        self.batch = torch.randn(shape, generator=generator, dtype=dtype).to(device)
        self.gradient = torch.randn(shape, generator=generator, dtype=dtype).to(device)
        self.src, self.dest, self.dest_order = src, dest, dest_order

    def src_block(self, whole: torch.Tensor) -> torch.Tensor:
        """What this rank holds of ``whole`` on the source side; TP is always faster than DP."""
        return whole.chunk(self.src[1])[dist.get_rank() // self.src[0]]

    def dest_block(self, whole: torch.Tensor) -> torch.Tensor:
        """What this rank holds of ``whole`` on the destination side; DP is always slowest."""
        return whole.chunk(self.dest[2])[dist.get_rank() // (self.dest[0] * self.dest[1])]

    def masked_to_cp_chunks(self, whole: torch.Tensor) -> torch.Tensor:
        """``whole`` with zeros where the sequence position is another CP rank's (zigzag)."""
        cp = self.dest[1]
        faster = self.dest_order[: self.dest_order.index("cp")]
        stride = math.prod(self.dest[0] for name in faster if name == "tp")
        cp_rank = dist.get_rank() // stride % cp
        chunk = torch.arange(whole.shape[1], device=whole.device) * 2 * cp // whole.shape[1]
        mine = (chunk == cp_rank) | (chunk == 2 * cp - 1 - cp_rank)
        assert mine.sum() == whole.shape[1] // cp
        return whole * mine.to(whole)[None, :, None]


VIEWS: dict[str, tuple[dict[str, int] | None, Callable[[torch.Tensor], torch.Tensor]]] = {
    "batch first": (None, lambda x: x),
    "sequence first": (SEQUENCE_FIRST, lambda x: x.transpose(0, 1)),
    "rows": (ROWS, lambda x: x.reshape(-1, x.shape[-1])),
}


@pytest.mark.parametrize(("src", "dest"), PAIRS)
@pytest.mark.parametrize(("src_order", "dest_order"), ORDERS)
def test_values_and_gradients_are_the_global_picture(
    src: tuple[int, int],
    dest: tuple[int, int, int],
    src_order: tuple[str, ...],
    dest_order: tuple[str, ...],
    rank_device: torch.device,
) -> None:
    picture = Picture(src, dest, dest_order, rank_device)
    with bridge(src, dest, (src_order, dest_order)) as comm:
        for name, (dim_mapping, view) in VIEWS.items():
            comm.dim_mapping = dim_mapping or {"b": 0, "s": 1, "h": 2}
            x = view(picture.src_block(picture.batch)).clone().requires_grad_()
            y = comm.communicate(x)
            assert torch.equal(y, view(picture.dest_block(picture.batch))), name
            assert y.is_contiguous()
            y.backward(view(picture.dest_block(picture.masked_to_cp_chunks(picture.gradient))))
            assert torch.equal(x.grad, view(picture.src_block(picture.gradient))), name


@pytest.mark.parametrize(("src", "dest"), [FAN_IN, FAN_OUT, EQUAL], ids=["in", "out", "equal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_lower_precision_is_exact_too(
    src: tuple[int, int],
    dest: tuple[int, int, int],
    dtype: torch.dtype,
    rank_device: torch.device,
) -> None:
    picture = Picture(src, dest, device=rank_device, dtype=dtype)
    with bridge(src, dest) as comm:
        x = picture.src_block(picture.batch).clone().requires_grad_()
        y = comm.communicate(x)
        y.backward(picture.dest_block(picture.masked_to_cp_chunks(picture.gradient)))
    assert y.dtype is dtype
    assert torch.equal(y, picture.dest_block(picture.batch))
    assert x.grad.dtype is dtype
    assert torch.equal(x.grad, picture.src_block(picture.gradient))


def without_sum(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    return x


def padded_block(x: torch.Tensor, group: dist.ProcessGroup, dim: int) -> torch.Tensor:
    return x.chunk(dist.get_world_size(group), dim)[dist.get_rank(group)]


def block_of_the_neighbour(x: torch.Tensor, group: dist.ProcessGroup, dim: int) -> torch.Tensor:
    return x.chunk(dist.get_world_size(group), dim)[dist.get_rank(group) - 1]


def reversed_blocks(x: torch.Tensor, group: dist.ProcessGroup, dim: int) -> torch.Tensor:
    whole = true_gather(x, group, dim)
    return torch.cat(whole.chunk(dist.get_world_size(group), dim)[::-1], dim)


true_gather = bridge_module.gather_blocks
MUTANTS = [
    pytest.param(*FAN_IN, "sum_gradients", without_sum, id="fan_in-without_sum"),
    pytest.param(*FAN_OUT, "sum_gradients", without_sum, id="fan_out-without_sum"),
    pytest.param(*EQUAL, "sum_gradients", without_sum, id="equal-without_sum"),
    pytest.param(*FAN_IN, "gather_blocks", reversed_blocks, id="fan_in-wrong_order"),
    pytest.param(*FAN_OUT, "take_block", block_of_the_neighbour, id="fan_out-wrong_slot"),
    pytest.param(*FAN_OUT, "take_block", padded_block, id="fan_out-zero_pad"),
]


@pytest.mark.parametrize(("src", "dest", "name", "wrong"), MUTANTS)
def test_the_oracle_sees_a_wrong_bridge(
    src: tuple[int, int],
    dest: tuple[int, int, int],
    name: str,
    wrong: Callable[..., torch.Tensor],
    rank_device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The comparisons above fail, on every rank, for the mistakes a bridge is likely to have."""
    monkeypatch.setattr(bridge_module, name, wrong)
    picture = Picture(src, dest, device=rank_device)
    with bridge(src, dest) as comm:
        x = picture.src_block(picture.batch).clone().requires_grad_()
        y = comm.communicate(x)
        y.backward(picture.dest_block(picture.masked_to_cp_chunks(picture.gradient)))
    right_values = torch.equal(y, picture.dest_block(picture.batch))
    right_gradient = torch.equal(x.grad, picture.src_block(picture.gradient))
    assert not (right_values and right_gradient)


def creation_of(*groups: tuple[int, ...]) -> dict[tuple[str, tuple[int, ...]], int]:
    """Counts for making these groups: on CPU, the members of each then wait for one another."""
    if dist.get_backend() != "gloo":
        return {}
    return dict(Counter(("all_reduce", ranks) for ranks in groups))


def expected_groups(
    src: tuple[int, int], dest: tuple[int, int, int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """This rank's gather and CP group, tp fastest and dp slowest on both sides, by comparison."""
    me = dist.get_rank()
    (src_tp, src_dp), (dest_tp, dest_cp, dest_dp) = src, dest

    def at(rank: int) -> dict[str, int]:
        return {
            "src tp": rank % src_tp,
            "src dp": rank // src_tp,
            "dest tp": rank % dest_tp,
            "dest cp": rank // dest_tp % dest_cp,
            "dest dp": rank // dest_tp // dest_cp,
        }

    def alike(*names: str) -> tuple[int, ...]:
        return tuple(r for r in range(WORLD) if all(at(r)[n] == at(me)[n] for n in names))

    fan_in = src_dp > dest_dp
    gather = alike("dest dp", "src tp") if fan_in else alike("src dp", "dest tp", "dest cp")
    return gather, alike("dest dp", "dest tp")


@pytest.mark.parametrize(("src", "dest"), PAIRS)
def test_kind_and_number_of_collectives(
    src: tuple[int, int],
    dest: tuple[int, int, int],
    calls: Calls,
    rank_device: torch.device,
    own_groups: None,
) -> None:
    gather_ranks, cp_ranks = expected_groups(src, dest)
    gather = {("all_gather_into_tensor", gather_ranks): 1}
    total = {("all_reduce", cp_ranks): 1} if dest[1] > 1 else {}
    forward = gather if src[1] > dest[2] else {}
    backward = total | (gather if dest[2] > src[1] else {})
    picture = Picture(src, dest, device=rank_device)
    x = picture.src_block(picture.batch)
    with bridge(src, dest) as comm:
        # That of the whole world is there.
        created = [gather_ranks] * (comm.scale > 1) + [cp_ranks] * (1 < dest[1] < 8)
        assert calls.taken() == creation_of(*created)

        for _ in range(2):
            y = comm.communicate(x.clone().requires_grad_())
            assert calls.taken() == forward
            y.backward(picture.dest_block(picture.gradient))
            assert calls.taken() == backward

        with torch.no_grad():
            y = comm.communicate(x.clone().requires_grad_())
        assert calls.taken() == forward
        assert y.grad_fn is None

        # A frozen encoder: the language model's own weights still want gradients.
        weight = torch.ones(HIDDEN, dtype=x.dtype, device=rank_device, requires_grad=True)
        y = comm.communicate(x)
        assert calls.taken() == forward
        (y * weight).sum().backward()
        assert calls.taken() == {}
    assert calls.taken() == {}


def test_gradient_that_comes_in_is_never_modified(rank_device: torch.device) -> None:
    for src, dest in (FAN_IN, FAN_OUT, EQUAL, EQUAL_NO_CP):
        picture = Picture(src, dest, device=rank_device)
        with bridge(src, dest) as comm:
            x = picture.src_block(picture.batch).clone().requires_grad_()
            given = picture.dest_block(picture.masked_to_cp_chunks(picture.gradient)).clone()
            kept = given.clone()
            # Twice: the second pass adds into x.grad, which must not share memory with `given`.
            for _ in range(2):
                comm.communicate(x).backward(given)
                assert torch.equal(given, kept)
            assert torch.equal(x.grad, 2 * picture.src_block(picture.gradient))


def test_input_is_not_modified_and_output_of_a_gather_is_its_own(
    rank_device: torch.device,
) -> None:
    for src, dest in (FAN_IN, FAN_OUT):
        picture = Picture(src, dest, device=rank_device)
        with bridge(src, dest) as comm:
            x = picture.src_block(picture.batch).clone()
            y = comm.communicate(x).zero_()
            assert torch.equal(x, picture.src_block(picture.batch))
            assert y.untyped_storage().nbytes() == y.numel() * y.element_size()


def test_non_contiguous_tensors(rank_device: torch.device) -> None:
    for src, dest in (FAN_IN, FAN_OUT, EQUAL, EQUAL_NO_CP):
        picture = Picture(src, dest, device=rank_device)
        with bridge(src, dest) as comm:
            block = picture.src_block(picture.batch)
            x = block.permute(2, 0, 1).contiguous().permute(1, 2, 0)
            assert not x.is_contiguous()
            x = x.detach().requires_grad_()
            y = comm.communicate(x)
            assert y.is_contiguous()
            assert torch.equal(y, picture.dest_block(picture.batch))
            # An expanded gradient: every element is the same memory.
            y.sum().backward()
            assert torch.equal(x.grad, torch.full_like(x, dest[1]))


def test_empty_batch_of_tokens(rank_device: torch.device) -> None:
    """Rows of a text-only batch: nothing to move, and every rank still takes part."""
    for src, dest in (FAN_IN, FAN_OUT, EQUAL):
        with bridge(src, dest, dim_mapping=ROWS) as comm:
            x = torch.zeros(0, HIDDEN, device=rank_device, requires_grad=True)
            y = comm.communicate(x)
            assert y.shape == (0, HIDDEN)
            y.sum().backward()
            assert x.grad.shape == (0, HIDDEN)


def test_public_state_of_the_worked_tables() -> None:
    with bridge(*FAN_IN) as comm:
        assert comm.direction is BridgeDirection.FAN_IN
        assert comm.direction == "fan_in"
        assert (comm.is_fan_in(), comm.is_fan_out(), comm.scale) == (True, False, 2)
        assert (comm.src_tp_size, comm.src_dp_size) == (2, 4)
        assert (comm.dest_tp_size, comm.dest_cp_size, comm.dest_dp_size) == (2, 2, 2)
        assert comm.rank_to_dest_pos == {0: (0, 0), 1: (0, 1), 4: (1, 0), 5: (1, 1)}
        assert comm.gather_group_ranks == [[0, 2], [1, 3], [4, 6], [5, 7]]
        assert comm.get_slice_info(6) == SliceInfo(dist.get_rank() // 2 % 2 * 3, 3)
    with bridge(*FAN_OUT) as comm:
        assert (comm.is_fan_in(), comm.is_fan_out(), comm.scale) == (False, True, 2)
        assert comm.rank_to_dest_pos == {0: (0, 0), 2: (1, 0), 4: (2, 0), 6: (3, 0)}
        assert comm.rank_to_dest_coords == {r: (r // 2, 0, r % 2) for r in range(WORLD)}
        assert comm.rank_to_src_pos == {r: (r // 4, r % 4) for r in range(WORLD)}
        assert comm.gather_group_ranks == [[0, 2], [1, 3], [4, 6], [5, 7]]
        assert comm.get_slice_info(4) == SliceInfo(dist.get_rank() // 2 % 2 * 2, 2)
    with bridge(*EQUAL) as comm:
        assert comm.direction == "equal"
        assert comm.scale == 1
        assert (comm.gather_group_ranks, comm.gather_pg) == ([], None)
        assert comm.get_slice_info(5) == SliceInfo(0, 5)


def test_cp_group_is_the_grids_own(calls: Calls, rank_device: torch.device) -> None:
    src_grid = make_grid(("tp", "dp"), tp=2, dp=4)
    dest_grid = make_grid(("tp", "cp", "dp"), tp=2, cp=2, dp=2)
    mine = dest_grid.create_pg("cp")
    calls.taken()
    first = ColocatedBridgeCommunicator(src_grid, dest_grid)
    assert first.dest_cp_pg is mine
    gather_ranks, _ = expected_groups((2, 4), (2, 2, 2))
    assert calls.taken() == creation_of(gather_ranks), "only the gather groups are new"
    all_have_their_groups()
    first.destroy()
    # Still usable: the bridge has ended only what it made.
    ranks = torch.ones(1, device=rank_device)
    dist.all_reduce(ranks, group=dest_grid.get_pg("cp"))
    assert ranks.item() == 2
    dest_grid.destroy()

    second = ColocatedBridgeCommunicator(src_grid, dest_grid)
    assert second.dest_cp_pg is dest_grid.get_pg("cp")
    all_have_their_groups()
    second.destroy()
    dest_grid.destroy()


def test_no_cp_group_without_cp(calls: Calls) -> None:
    with bridge(*EQUAL_NO_CP) as comm:
        assert comm.dest_cp_pg is None
        assert comm.gather_pg is None
        with pytest.raises(KeyError, match="hasn't been created"):
            comm.dest_grid.get_pg("cp")
    assert calls.taken() == {}


def test_destroy_twice() -> None:
    with bridge(*FAN_IN) as comm:
        assert comm.gather_pg is not None
        comm.destroy()
        assert comm.gather_pg is None
        comm.destroy()
        assert comm.gather_pg is None


def test_groups_take_the_grids_backend(
    monkeypatch: pytest.MonkeyPatch, own_groups: None
) -> None:
    seen: list[str | None] = []
    create = shared_groups.make_groups

    def record(ranks: list[list[int]], backend: str | None = None, **kwargs: Any) -> Any:
        seen.append(backend)
        return create(ranks, backend, **kwargs)

    for module in (shared_groups, bridge_module):
        monkeypatch.setattr(module, "make_groups", record)
    backend = dist.get_backend()
    src_grid = make_grid(("tp", "dp"), tp=2, dp=4)
    for given, used in ((None, None), (backend, backend)):
        dest_grid = HyperCommGrid([2, 2, 2], ["tp", "cp", "dp"], backend=given)
        comm = ColocatedBridgeCommunicator(src_grid, dest_grid)
        all_have_their_groups()
        assert seen == [used, used]
        seen.clear()
        comm.destroy()
        dest_grid.destroy()


def test_ranks_outside_the_grids(rank_device: torch.device) -> None:
    """Half of the world: the others make the groups too, and are refused in ``communicate``."""
    src_grid = HyperCommGrid([1, 4], ["tp", "dp"], rank_offset=4)
    dest_grid = HyperCommGrid([1, 2, 2], ["tp", "cp", "dp"], rank_offset=4)
    comm = ColocatedBridgeCommunicator(src_grid, dest_grid)
    all_have_their_groups()
    rank = dist.get_rank()
    x = torch.full((1, 4, 2), float(rank), device=rank_device, requires_grad=True)
    if rank < 4:
        assert comm.gather_pg is None
        assert comm.dest_cp_pg is None
        with pytest.raises(ValueError, match=f"Rank {rank} is not on the bridge.*4 to 7"):
            comm.communicate(x)
    else:
        y = comm.communicate(x)
        first = rank - rank % 2
        assert y[:, 0, 0].tolist() == [first, first + 1]
        y.sum().backward()
        assert torch.equal(x.grad, torch.full_like(x, 2.0))
    comm.destroy()
    dest_grid.destroy()


@pytest.mark.parametrize("src", [(1, 8), (2, 4), (4, 2), (8, 1)], ids="tp{0[0]}".format)
def test_pipeline_stages_take_the_rows_and_the_first_gives_the_gradient(
    src: tuple[int, int], rank_device: torch.device, calls: Calls
) -> None:
    """CP2, PP2, DP2; what later stages send back is not used, and they sum nothing."""
    rank = dist.get_rank()
    picture = Picture(src, (1, 4, 2), device=rank_device)
    chunk = torch.arange(picture.gradient.shape[1], device=rank_device) // 4
    mine = (chunk == rank % 2) | (chunk == 3 - rank % 2)
    stage = rank // 2 % 2
    grids = make_grid(("tp", "dp"), tp=src[0], dp=src[1]), make_grid(
        ("tp", "cp", "pp", "dp"), cp=2, pp=2, dp=2
    )
    comm = ColocatedBridgeCommunicator(*grids, "vision", "language")
    all_have_their_groups()
    calls.taken()
    x = picture.src_block(picture.batch).clone().requires_grad_()
    y = comm.communicate(x)
    assert torch.equal(y, picture.dest_block(picture.batch))
    gradient = picture.dest_block(picture.gradient)
    y.backward(torch.full_like(gradient, 7.0) if stage else gradient * mine[None, :, None])
    assert torch.equal(x.grad, picture.src_block(picture.gradient))
    assert ("all_reduce" in str(calls.taken())) == (stage == 0)
    comm.destroy()
    for grid in grids:
        grid.destroy()


class TestErrors:
    """Each on all ranks (every rank runs the test), and nothing was communicated."""

    @pytest.mark.parametrize(
        ("src", "dest", "message"),
        [
            ({"tp": 2, "dp": 4}, {"tp": 2, "cp": 1, "dp": 2}, "span same number of ranks"),
            ({"dp": 8}, {"tp": 2, "cp": 2, "dp": 2}, "src grid must have 'tp' dimension"),
            ({"tp": 8}, {"tp": 2, "cp": 2, "dp": 2}, "src grid must have 'dp' dimension"),
            ({"tp": 2, "dp": 4}, {"cp": 4, "dp": 2}, "dest grid must have 'tp' dimension"),
            ({"tp": 2, "dp": 4}, {"tp": 4, "cp": 2}, "dest grid must have 'dp' dimension"),
            ({"tp": 2, "pp": 2, "dp": 2}, {"tp": 2, "cp": 2, "dp": 2}, "src PP must be 1"),
            ({"tp": 2, "dp": 4}, {"tp": 2, "dp": 2, "pp": 2}, "replicas of the grids must nest"),
            ({"tp": 2, "cp": 2, "dp": 2}, {"tp": 2, "cp": 2, "dp": 2}, "src CP must be 1"),
            ({"tp": 2, "dp": 4}, {"tp": 2, "dp": 2, "cp": 2}, "must have 'cp' before 'dp'"),
            ({"tp": 2, "dp": 3}, {"tp": 3, "cp": 1, "dp": 2}, "evenly divisible.*3.*2"),
            ({"tp": 2, "dp": 4}, {"dp": 2, "tp": 4}, "must nest"),
        ],
    )
    def test_grids(
        self, src: dict[str, int], dest: dict[str, int], message: str, calls: Calls
    ) -> None:
        src_grid, dest_grid = make_grid(tuple(src), **src), make_grid(tuple(dest), **dest)
        with pytest.raises(ValueError, match=message):
            ColocatedBridgeCommunicator(src_grid, dest_grid)
        assert calls.taken() == {}

    def test_offsets(self, calls: Calls) -> None:
        grids = [HyperCommGrid([2, 2], ["tp", "dp"], rank_offset=offset) for offset in (0, 4)]
        with pytest.raises(ValueError, match="same rank offset: src=0, dest=4"):
            ColocatedBridgeCommunicator(*grids)
        assert calls.taken() == {}

    def test_backends(self, calls: Calls) -> None:
        grids = [HyperCommGrid([2, 4], ["tp", "dp"], backend=name) for name in ("one", "two")]
        with pytest.raises(ValueError, match="same backend: src='one', dest='two'"):
            ColocatedBridgeCommunicator(*grids)
        assert calls.taken() == {}

    @pytest.mark.parametrize(
        "dim_mapping", [{"s": 0, "h": 1}, {"b": 0, "h": 2}, {"b": 0, "h": 0}, {"b": -2, "h": -1}]
    )
    def test_dim_mapping(self, dim_mapping: dict[str, int], calls: Calls) -> None:
        grids = make_grid(("tp", "dp"), tp=2, dp=4), make_grid(("tp", "dp"), tp=4, dp=2)
        with pytest.raises(ValueError, match="dim_mapping must name the batch dim 'b' and number"):
            ColocatedBridgeCommunicator(*grids, dim_mapping=dim_mapping)
        assert calls.taken() == {}

    @pytest.mark.parametrize(("src", "dest"), [FAN_IN, FAN_OUT, EQUAL], ids=["in", "out", "equal"])
    def test_number_of_tensor_dims(
        self,
        src: tuple[int, int],
        dest: tuple[int, int, int],
        calls: Calls,
        rank_device: torch.device,
    ) -> None:
        with bridge(src, dest) as comm:
            calls.taken()
            with pytest.raises(ValueError, match=r"vision .* language .* 2 dims \(4, 3\).*names 3"):
                comm.communicate(torch.zeros(4, 3, device=rank_device))
            assert calls.taken() == {}

    def test_batch_that_scale_does_not_divide(
        self, calls: Calls, rank_device: torch.device
    ) -> None:
        with bridge(*FAN_OUT) as comm:
            calls.taken()
            with pytest.raises(ValueError, match="3 is not divisible by fan_out scale=2"):
                comm.communicate(torch.zeros(3, 4, 2, device=rank_device))
            with pytest.raises(ValueError, match="not divisible by fan_out"):
                comm.get_slice_info(3)
        with bridge(*FAN_IN) as comm:
            calls.taken()
            with pytest.raises(ValueError, match="5 is not divisible by fan_in scale=2"):
                comm.get_slice_info(5)
        assert calls.taken() == {}

    def test_destroyed(self, calls: Calls, rank_device: torch.device) -> None:
        with bridge(*FAN_IN) as comm:
            comm.destroy()
            calls.taken()
            with pytest.raises(RuntimeError, match=r"vision .* was destroyed"):
                comm.communicate(torch.zeros(2, 4, 2, device=rank_device))
        assert calls.taken() == {}


class TestCheckShapes:
    """The opt-in comparison turns what would hang or abort into an error on every rank."""

    @pytest.mark.parametrize(("src", "dest"), [FAN_IN, FAN_OUT, EQUAL], ids=["in", "out", "equal"])
    def test_agreement_costs_one_small_gather_per_group(
        self,
        src: tuple[int, int],
        dest: tuple[int, int, int],
        calls: Calls,
        rank_device: torch.device,
    ) -> None:
        picture = Picture(src, dest, device=rank_device)
        with bridge(src, dest, check_shapes=True) as comm:
            calls.taken()
            y = comm.communicate(picture.src_block(picture.batch))
            checks = sum(calls.taken().values()) - comm.is_fan_in()
            assert checks == (comm.gather_pg is not None) + 1
            assert torch.equal(y, picture.dest_block(picture.batch))

    def test_batch_differs_between_siblings(self, rank_device: torch.device) -> None:
        with bridge(*FAN_IN, check_shapes=True) as comm:
            slot = comm.layout.slot(dist.get_rank())
            with pytest.raises(
                ValueError,
                match=r"vision .* rank \d: \(2, 4, 3\) torch.float32 .*, rank \d: \(3, 4, 3\)",
            ):
                comm.communicate(torch.zeros(2 + slot, 4, 3, device=rank_device))

    def test_dtype_differs_between_cp_ranks(self, rank_device: torch.device) -> None:
        with bridge(*EQUAL, check_shapes=True) as comm:
            cp_rank = comm.rank_to_dest_coords[dist.get_rank()][2]
            dtype = (torch.float32, torch.bfloat16)[cp_rank]
            with pytest.raises(ValueError, match=r"\) torch.float32 .* rank \d: .* torch.bfloat16"):
                comm.communicate(torch.zeros(2, 4, 3, dtype=dtype, device=rank_device))
