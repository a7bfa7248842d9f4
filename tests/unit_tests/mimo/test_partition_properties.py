# SPDX-License-Identifier: Apache-2.0
"""What holds for every cut of a sequence: CP 1 to 8, with and without SP, dense and packed.

All ranks run in this process (``in_process_ranks``), with the groups of a real grid and stock's
scatter over TP. The oracle numbers the chunks of each sequence and asks for each position who
owns its chunk. Numbers are whole, so all comparisons are exact.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron.core.hyper_comm_grid import HyperCommGrid
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.models.mimo.partition.utils import PartitionAdapter, PartitionConfig
from megatron.core.packed_seq_params import PackedSeqParams
from tests.unit_tests.mimo.attention_oracle import cumulative
from tests.unit_tests.mimo.bridge_cases import (
    DEVICE,
    DIRECTIONS,
    EACH_DIRECTION,
    BridgeCase,
    Dims,
    bridge_cases,
    coordinates,
    grid,
)
from tests.unit_tests.mimo.in_process_ranks import InProcessWorld


@dataclass(frozen=True)
class CutCase:
    """A language grid and one batch.

    Attributes:
        dims: (name, size) of tp, cp and dp, fastest first.
        lengths: tokens of each packed sequence, padding included; one sequence if not packed.
        batch: rows; 1 when packed.
        seed: of values and of the order in which ranks take turns.
    """

    dims: Dims
    lengths: tuple[int, ...]
    packed: bool
    sequence_parallel: bool
    batch: int = 1
    hidden: int = 2
    seed: int = 0

    @property
    def tp(self) -> int:
        return dict(self.dims)["tp"]

    @property
    def cp(self) -> int:
        return dict(self.dims)["cp"]

    @property
    def ranks(self) -> int:
        return self.tp * self.cp * dict(self.dims)["dp"]

    def drawn(self, *salts: int) -> torch.Tensor:
        """Global ``(S, B, H)`` of whole numbers, float64."""
        seed = sum(salt * 100**i for i, salt in enumerate((self.seed, *salts)))
        generator = torch.Generator().manual_seed(seed)
        shape = (sum(self.lengths), self.batch, self.hidden)
        return torch.randint(-9, 10, shape, generator=generator).double().to(DEVICE)

    def owned(self, at: dict[str, int]) -> list[int]:
        """Positions a CP rank owns, one by one: its chunk or the mirrored one."""
        positions = []
        for start, length in zip(cumulative(self.lengths), self.lengths, strict=False):
            for p in range(length):
                chunk = p * 2 * self.cp // length
                if self.cp == 1 or at["cp"] in (chunk, 2 * self.cp - 1 - chunk):
                    positions.append(start + p)
        return positions

    def scattered(self, at: dict[str, int]) -> list[int]:
        """Positions of a rank's embeddings: with SP, its contiguous part of the owned ones."""
        owned = self.owned(at)
        if not self.sequence_parallel:
            return owned
        share = len(owned) // self.tp
        return owned[at["tp"] * share : (at["tp"] + 1) * share]

    def packed_params(self) -> PackedSeqParams | None:
        if not self.packed:
            return None
        cu_seqlens = torch.tensor(cumulative(self.lengths), dtype=torch.int32, device=DEVICE)
        return PackedSeqParams(qkv_format="thd", cu_seqlens_q=cu_seqlens, cu_seqlens_kv=cu_seqlens)


@st.composite
def cut_cases(draw: Callable[..., Any]) -> CutCase:
    """Any cut that is allowed, at most 64 ranks, with lengths that just divide."""
    cp, tp = draw(st.integers(1, 8)), draw(st.sampled_from([1, 2, 3, 4]))
    dp = draw(st.integers(1, 2))
    order = draw(st.permutations([("tp", tp), ("cp", cp)]))
    packed = draw(st.booleans())
    sequence_parallel = tp > 1 and draw(st.booleans())
    piece = (2 * cp if cp > 1 else 1) * (tp if sequence_parallel else 1)
    # Packed sequences divide by 2 * cp only; all of them together also by tp.
    unit = piece // tp if packed and sequence_parallel else piece
    counts = draw(st.lists(st.integers(0, 3), min_size=1, max_size=4 if packed else 1))
    if sum(counts) % (piece // unit):
        counts.append(piece // unit - sum(counts) % (piece // unit))
    return CutCase(
        dims=(*order, ("dp", dp)),
        lengths=tuple(count * unit for count in counts),
        packed=packed,
        sequence_parallel=sequence_parallel,
        batch=1 if packed else draw(st.integers(1, 3)),
        hidden=draw(st.integers(1, 3)),
        seed=draw(st.integers(0, 99)),
    )


def adapter_on(language: HyperCommGrid, sequence_parallel: bool) -> PartitionAdapter | None:
    """The adapter of this rank, with the grid's own groups; ``None`` for a rank outside."""
    config = ModelParallelConfig(
        tensor_model_parallel_size=language.dim_size("tp"),
        context_parallel_size=language.dim_size("cp"),
        sequence_parallel=sequence_parallel,
    )
    groups = {}
    for name in ("cp", "tp"):
        try:
            groups[f"{name}_group"] = language.get_pg(name)
        except KeyError:
            groups[f"{name}_group"] = language.create_pg(name)
    if not language.is_current_rank_in_grid():
        return None
    return PartitionAdapter(PartitionConfig.from_mp_config(config, max_seq_len=1, **groups))


@dataclass(frozen=True)
class Cut:
    """One rank: its coordinates, and what went into and came out of ``shard``."""

    at: dict[str, int]
    x: torch.Tensor
    y: torch.Tensor
    y_grad: torch.Tensor
    x_grad: torch.Tensor


def cut_everywhere(case: CutCase, gradient: Callable[[dict[str, int]], torch.Tensor]) -> list[Cut]:
    """Every rank shards its replica's batch and sends ``gradient(coordinates)`` back."""

    def body(rank: int) -> Cut:
        adapter = adapter_on(grid(case.dims), case.sequence_parallel)
        at = coordinates(case.dims, rank)
        x = case.drawn(1, at["dp"]).requires_grad_()
        y = adapter.shard(x, None, None, case.packed_params())[0]
        y_grad = gradient(at)
        # The adapter may hand the input on as it is, whose gradient is then ours.
        (x_grad,) = torch.autograd.grad(y, x, y_grad)
        return Cut(at, x.detach(), y.detach(), y_grad, x_grad)

    return InProcessWorld(case.ranks, case.seed).run(body)


def check_positions(case: CutCase) -> None:
    """Each rank gets the positions it owns, and every tensor is cut alike."""

    def body(rank: int) -> None:
        adapter = adapter_on(grid(case.dims), case.sequence_parallel)
        at = coordinates(case.dims, rank)
        x = case.drawn(1, at["dp"])
        labels = torch.arange(x[..., 0].numel(), device=DEVICE).view(case.batch, -1)
        cut = adapter.shard(x, labels, labels * 0.5, case.packed_params())
        assert torch.equal(cut[0], x[case.scattered(at)]), at
        assert torch.equal(cut[1], labels[:, case.owned(at)]), at
        assert torch.equal(cut[2], labels[:, case.owned(at)] * 0.5), at

    InProcessWorld(case.ranks, case.seed).run(body)


def check_adjoint(case: CutCase) -> None:
    """``<A x, g> == <x, A^T g>`` over unique copies, per language replica.

    ``A`` cuts one sequence that all ranks of a replica hold. Its outputs differ over CP and, with
    SP, over TP; without SP the TP ranks hold copies with equal gradients, of which one counts.
    A rank's input gradient is whole over TP and partial over CP, so on the way back the CP ranks
    add up and one TP rank counts, which is what the bridge's sum over CP does with it.

    Checked with it, since the bridge relies on it: the gradient is equal on all TP ranks, and
    zero at the positions of other CP ranks.
    """
    cuts = cut_everywhere(
        case,
        lambda at: case.drawn(2, at["dp"], at["cp"], at["tp"] if case.sequence_parallel else 0)[
            case.scattered(at)
        ],
    )
    for replica in range(dict(case.dims)["dp"]):
        own = [cut for cut in cuts if cut.at["dp"] == replica]
        counted = [cut for cut in own if case.sequence_parallel or cut.at["tp"] == 0]
        there = sum((cut.y * cut.y_grad).sum() for cut in counted)
        back = sum((cut.x * cut.x_grad).sum() for cut in own if cut.at["tp"] == 0)
        assert there == back
    for cut in cuts:
        first = next(c for c in cuts if c.at == {**cut.at, "tp": 0})
        assert torch.equal(cut.x_grad, first.x_grad), cut.at
        others = torch.ones(len(cut.x), dtype=torch.bool, device=DEVICE)
        others[case.owned(cut.at)] = False
        assert not cut.x_grad[others].any(), cut.at


def check_round_trip(case: CutCase) -> None:
    """The outputs, sent back as gradients and summed over CP, are the sequence again."""
    cuts = cut_everywhere(case, lambda at: case.drawn(1, at["dp"])[case.scattered(at)])
    for cut in cuts:
        peers = [c for c in cuts if {**c.at, "cp": 0} == {**cut.at, "cp": 0}]
        assert torch.equal(sum(c.x_grad for c in peers), cut.x), cut.at


PROPERTIES = [check_positions, check_adjoint, check_round_trip]


@pytest.mark.parametrize("check", PROPERTIES, ids=lambda check: check.__name__)
@given(case=cut_cases())
def test_every_cut(check: Callable[[CutCase], None], case: CutCase) -> None:
    check(case)


def check_bridge_and_cut(case: BridgeCase, sequence_parallel: bool) -> None:
    """Through the bridge and the cut, and back: values, and the gradient of the whole.

    The gradient that enters the bridge is the one the real cut makes, not one masked by a test.
    """
    batch, gradient = case.drawn(1), case.drawn(2)
    tp, cp = case.size("dest", "tp"), case.size("dest", "cp")

    def body(rank: int) -> None:
        bridge = case.bridge()
        adapter = adapter_on(bridge.dest_grid, sequence_parallel)
        if adapter is None:
            return
        at = {name: case.places[rank][f"dest {name}"] for name in ("tp", "cp", "dp")}
        dims = (("tp", tp), ("cp", cp), ("dp", 1))
        places = CutCase(dims, (batch.shape[1],), False, sequence_parallel).scattered(at)
        x = case.block("src", rank, batch).clone().requires_grad_()
        y = adapter.shard(bridge.communicate(x), None, None)[0]
        assert torch.equal(y, case.block("dest", rank, batch)[places]), rank
        y.backward(case.block("dest", rank, gradient)[places])
        assert torch.equal(x.grad, case.block("src", rank, gradient)), rank

    InProcessWorld(case.world_size, case.seed).run(body)


@st.composite
def bridge_and_cut_cases(draw: Callable[..., Any], direction: str) -> tuple[BridgeCase, bool]:
    """Sequence-first bridges; with SP, chunks long enough for each TP rank to have a part."""
    case = draw(bridge_cases(direction))
    tp = case.size("dest", "tp")
    sequence_parallel = tp > 1 and draw(st.booleans())
    tokens = case.tokens * (tp if sequence_parallel else 1)
    case = replace(case, view="sequence first", samples=max(case.samples, 1), tokens=tokens)
    return case, sequence_parallel


@pytest.mark.parametrize("direction", DIRECTIONS)
@EACH_DIRECTION
@given(data=st.data())
def test_bridge_and_cut_together(direction: str, data: st.DataObject) -> None:
    check_bridge_and_cut(*data.draw(bridge_and_cut_cases(direction), label="case, SP"))
