# SPDX-License-Identifier: Apache-2.0
"""From an encoder's rows to this rank's part of the fused sequence, by either bridge.

Both give the same tensor ``(S/cp, B, H)`` and send back the same gradient. They consist of what the
model itself calls; what a data loader can prepare (positions, routes) is prepared.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist

from benchmarks.cases import Pair, TokenBatch
from megatron.core.models.mimo.comm.exchange import to_device
from megatron.core.models.mimo.comm.gather_bridge import ColocatedBridgeCommunicator
from megatron.core.models.mimo.comm.plan.routes import plan_routes
from megatron.core.models.mimo.comm.routed_bridge import RoutedBridge
from megatron.core.models.mimo.model.local_text import LocalText
from megatron.core.models.mimo.model.token_positions import TEXT, TokenPositions, fill_places
from megatron.core.models.mimo.partition.utils import PartitionAdapter, PartitionConfig
from megatron.core.models.mimo.training.groups import make_grid

# Places ``(T,)`` in the flattened ``(B * S)`` batch -> text rows ``(T, H)``.
Embed = Callable[[torch.Tensor], torch.Tensor]
_MODALITY = "images"


def rank_device() -> torch.device:
    """Where this rank's tensors live."""
    if not torch.accelerator.is_available():
        return torch.empty(0).device
    return torch.device(
        torch.accelerator.current_accelerator().type, torch.accelerator.current_device_index()
    )


def synchronize() -> None:
    """Wait for the device, where there is one to wait for."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


class Bridges:
    """Both bridges between the grids of a pair; made by :func:`bridges`."""

    def __init__(self, pair: Pair) -> None:
        vision, language = pair.vision, pair.language
        self.pair = pair
        self.grids = (
            make_grid(tp=vision.tp, dp=vision.dp),
            make_grid(tp=language.tp, cp=language.cp, dp=language.dp),
        )
        ends = (*self.grids, _MODALITY, "language")
        self.gather = ColocatedBridgeCommunicator(*ends, dim_mapping={"b": 0, "h": 1})
        self.routed = RoutedBridge(*ends)


@contextlib.contextmanager
def bridges(pair: Pair) -> Iterator[Bridges]:
    """Make both bridges on all ranks, and release their groups afterwards."""
    from tests.harness.garbage import end_threads_of_groups

    made = Bridges(pair)
    dist.barrier()
    yield made
    # No rank may leave a group that another one still connects.
    dist.barrier()
    made.gather.destroy()
    made.routed.destroy()
    for grid in made.grids:
        grid.destroy()
    del made
    end_threads_of_groups()


class GatherPath:
    """All rows of the replica to every rank; the whole sequence is fused, then cut."""

    def __init__(self, made: Bridges, batch: TokenBatch) -> None:
        self.bridge = made.gather
        grid, at = made.grids[1], made.grids[1].coords(dist.get_rank())
        tokens = batch.tokens[at["dp"]]
        self.device = rank_device()
        mask = torch.zeros(tokens.batch * tokens.seq_len, dtype=torch.bool)
        mask[torch.from_numpy(tokens.positions())] = True
        mask = mask.to(self.device)
        places = {_MODALITY: mask.nonzero().view(-1), TEXT: (~mask).nonzero().view(-1)}
        self.rows = TokenPositions(tokens.batch, tokens.seq_len, places)
        self.adapter = None
        if made.pair.language.cp > 1:
            config = PartitionConfig(
                seq_parallel=False,
                use_cp=True,
                tp_comm_overlap=False,
                max_seq_len=tokens.seq_len,
                cp_group=grid.get_or_create_pg("cp"),
            )
            self.adapter = PartitionAdapter(config)

    def __call__(self, rows: torch.Tensor, embed: Embed) -> torch.Tensor:
        """``(held, H)`` -> ``(S/cp, B, H)``."""
        moved = {_MODALITY: self.bridge.communicate(rows)}
        if self.rows.count(TEXT):
            moved[TEXT] = embed(self.rows.positions[TEXT])
        fused = self.rows.place(moved)
        return fused if self.adapter is None else self.adapter.shard(fused, None, None)[0]


class RoutedPath:
    """Each row to the ranks that own its place; only this rank's part is built.

    Args:
        made: the bridges.
        batch: the tokens.
        overlap: embed text while the rows are on their way; if not, afterwards.
    """

    def __init__(self, made: Bridges, batch: TokenBatch, overlap: bool = True) -> None:
        self.bridge, self.overlap, self.device = made.routed, overlap, rank_device()
        pair, rank = made.pair, dist.get_rank()
        self.plan = plan_routes(made.routed.layout, rank, *batch.of_group(pair, rank))
        tokens = self.plan.tokens
        cp = made.grids[1].coords(rank)["cp"], pair.language.cp
        text = LocalText.find(tokens, [tokens], cp, None)
        self.text, self.text_place = to_device([text.index, text.place], self.device)
        self.shape = (self.plan.local_length, tokens.batch, -1)

    def __call__(self, rows: torch.Tensor, embed: Embed) -> torch.Tensor:
        """``(held, H)`` -> ``(S/cp, B, H)``."""
        flight = self.bridge.issue(self.bridge.confirm(self.plan, rows), self.plan)
        arrived = None if self.overlap else flight.arrive()
        moved, places = {}, {}
        if self.text.numel():
            moved[TEXT], places[TEXT] = embed(self.text), self.text_place
        moved[_MODALITY] = flight.arrive() if arrived is None else arrived
        places[_MODALITY] = flight.plan.place
        length, samples, _ = self.shape
        return fill_places(moved, places, length * samples).view(self.shape)

    def announce(self, rows: torch.Tensor) -> None:
        """What the model does before its encoders run, which give it the time to arrive."""
        comparison = self.bridge.announce(self.plan, rows[:0])
        assert comparison is not None, "the bridge has no guard"
        comparison.wait()

    def settle(self) -> None:
        """What it does when its language model has run."""
        self.bridge.settle()


def no_text(_places: torch.Tensor) -> torch.Tensor:
    """For batches without text."""
    raise AssertionError("the batch has no text tokens")


def random_rows(pair: Pair, batch: TokenBatch, width: int, dtype: torch.dtype) -> torch.Tensor:
    """This rank's encoder output ``(held, H)``, equal on the TP copies of its replica."""
    dp = pair.shapes[0].coords(dist.get_rank())["dp"]
    generator = torch.Generator().manual_seed(dp)
    rows = torch.randn(batch.held[dp], width, generator=generator, dtype=torch.float32)
    return rows.to(rank_device(), dtype).requires_grad_()
