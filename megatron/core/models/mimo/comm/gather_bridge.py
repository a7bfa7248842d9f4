# SPDX-License-Identifier: Apache-2.0
"""The bridge between an encoder and a language model that live on the same ranks.

``ColocatedBridgeCommunicator`` executes a ``BridgeLayout`` with the pairs of ``collectives``::

              forward                          backward
    fan-in    gather_blocks over siblings      sum over dest CP, then take own block
    fan-out   take_block of own slot           sum over dest CP, then gather siblings' blocks
    equal     nothing                          sum over dest CP

A forward is ``sum_gradients(<gather_blocks | take_block | identity>(x))``; autograd walks it from
the end, hence the sum over CP comes first in backward. Without CP there is no sum.

With pipeline stages of the destination all of them take the rows and the first one uses them. Its
ranks sum over CP, the other stages get the sum from them, and go on as it does.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from megatron.core.hyper_comm_grid import HyperCommGrid, box_of
from megatron.core.models.mimo.comm.collectives import (
    check_same_shape,
    first_gradient,
    gather_blocks,
    sum_gradients,
    take_block,
)
from megatron.core.models.mimo.comm.plan.gather_layout import (
    BridgeDirection,
    BridgeLayout,
    SliceInfo,
)
from megatron.core.models.mimo.comm.plan_guard import merge_problems
from mimo_colocated.process_groups import make_groups, release_group

__all__ = ["BridgeDirection", "ColocatedBridgeCommunicator", "SliceInfo"]

logger = logging.getLogger(__name__)

_BATCH_FIRST = {"b": 0, "s": 1, "h": 2}


class ColocatedBridgeCommunicator:
    """Turns encoder output in the source's layout into language-model input, and gradients back.

    Every rank of the world makes the same bridges in the same order (process groups are made).
    Preconditions: the input is equal on all TP ranks of a source replica; the gradient is equal
    on all TP ranks of a destination replica; ranks of one gather group bring the same shape.

    Shapes: ``(b, s, h)`` by default; ``(s, b, h)`` with ``{"s": 0, "b": 1, "h": 2}``; rows
    ``(N, h)`` of whole samples, sample-major and the same number each, with ``{"b": 0, "h": 1}``.

    Args:
        src_grid: the encoder's grid: tp and dp, any other dim of size 1.
        dest_grid: the language model's grid: tp, cp before dp; rows are for its first pp stage.
        src_module_name, dest_module_name: for messages.
        dim_mapping: which tensor dim is the batch ("b"), and the names of the others.
        check_shapes: compare shapes over the groups before each ``communicate``. Costs a small
            all-gather per group and a wait for it, and turns a hang into an error on every rank;
            off by default, may be switched at any time (on all ranks together).
        later_stages: pipeline stages after the first that use a part of each row; the stages'
            gradients are summed.

    Attributes:
        layout: the ``BridgeLayout`` that is executed; the other public attributes repeat it.
        gather_pg: this rank's gather group; ``None`` for equal DP and after ``destroy``.
        dest_cp_pg: the destination grid's own ``cp`` group; ``None`` if its CP is 1.
        dest_pp_pg: its ``pp`` group; ``None`` with one stage.

    Raises:
        ValueError: before anything is communicated: as ``BridgeLayout.from_grids``; the grids'
            backends differ; ``dim_mapping`` does not number the dims 0, 1, ... with a "b".
    """

    def __init__(
        self,
        src_grid: HyperCommGrid,
        dest_grid: HyperCommGrid,
        src_module_name: str = "src",
        dest_module_name: str = "dest",
        dim_mapping: dict[str, int] | None = None,
        *,
        check_shapes: bool = False,
        later_stages: tuple[int, ...] = (),
    ) -> None:
        self.src_grid, self.dest_grid = src_grid, dest_grid
        self.src_module_name, self.dest_module_name = src_module_name, dest_module_name
        self._validate_grids()
        self.dim_mapping = dict(dim_mapping or _BATCH_FIRST)
        _check_dim_mapping(self.dim_mapping)
        backend = common_backend(src_grid, dest_grid)
        self.check_shapes, self.later_stages = check_shapes, later_stages
        self._extract_parallelism_info()
        self._build_rank_mappings()
        self.current_rank = dist.get_rank()
        self._destroyed = False
        self.dest_cp_pg = dest_grid.get_or_create_pg("cp") if self.dest_cp_size > 1 else None
        self.dest_pp_pg = dest_grid.get_or_create_pg("pp") if self.dest_pp_size > 1 else None
        self._replica_pg = self._coarser_replica() if self.dest_pp_size > 1 else None
        self.gather_pg: Any = self._make_gather_pg(backend)
        logger.debug("Bridge %s on rank %d", self._describe(), self.current_rank)

    def is_fan_in(self) -> bool:
        """Return whether the source has more DP replicas: forward gathers."""
        return self.direction is BridgeDirection.FAN_IN

    def is_fan_out(self) -> bool:
        """Return whether the destination has more DP replicas: forward takes a part."""
        return self.direction is BridgeDirection.FAN_OUT

    def get_slice_info(self, batch_size: int) -> SliceInfo:
        """Return this rank's own part of a coarser replica's batch dim of ``batch_size``.

        On fan-out it is what forward keeps, on fan-in what backward keeps, for equal DP all.

        Raises:
            ValueError: ``scale`` does not divide ``batch_size``; this rank is not on the bridge.
        """
        return self.layout.slot_slice(self.current_rank, batch_size)

    def communicate(self, tensor: torch.Tensor) -> torch.Tensor:
        """Move a tensor from the source's layout to the destination's; differentiable.

        The batch dim comes out ``scale`` times longer on fan-in, shorter on fan-out.

        Args:
            tensor: this rank's encoder output, dims as ``dim_mapping`` says.

        Raises:
            ValueError: before anything is communicated: the tensor's number of dims is not
                ``dim_mapping``'s; fan-out and ``scale`` does not divide the batch dim; this rank
                is not on the bridge; with ``check_shapes``, the shapes differ.
            RuntimeError: the bridge was destroyed.
        """
        self._check_input(tensor)
        if self.check_shapes:
            self._check_agreement(tensor)
        batch_dim = self.dim_mapping["b"]
        if self.is_fan_in():
            output = gather_blocks(tensor, self.gather_pg, batch_dim)
        elif self.is_fan_out():
            output = take_block(tensor, self.gather_pg, batch_dim)
        else:
            output = tensor.contiguous()
        if self.dest_pp_pg is not None and self.later_stages:
            output = sum_gradients(output, self.dest_pp_pg)
        elif self.dest_pp_pg is not None:
            output = first_gradient(output, self.dest_pp_pg)
        on_first = self.layout.rank_to_dest_stage[self.current_rank] == 0
        if self.dest_cp_pg is not None and (on_first or self.later_stages):
            output = sum_gradients(output, self.dest_cp_pg)
        return output

    def hear(self, problems: Mapping[int, str], count: int) -> dict[int, str]:
        """Return everybody's problems before encoders run, see :meth:`.RoutedBridge.hear`.

        All ranks of a coarser replica call it, which are those that one bridge joins. Without
        pipeline stages nothing is told.
        """
        if self._replica_pg is None:
            return dict(problems)
        told: list = [None] * dist.get_world_size(self._replica_pg)
        dist.all_gather_object(told, (dict(problems), count), group=self._replica_pg)
        ranks = dist.get_process_group_ranks(self._replica_pg)
        return merge_problems(ranks, [each for each, _ in told], [count for _, count in told])

    def destroy(self) -> None:
        """Release the gather group; idempotent. CP and PP groups stay: they are the dest grid's."""
        self._destroyed = True
        group, self.gather_pg = self.gather_pg, None
        release_group(group)

    def _validate_grids(self) -> None:
        """Lay the bridge between the grids; see ``BridgeLayout.from_grids`` for what is refused."""
        grids = box_of(self.src_grid), box_of(self.dest_grid)
        self.layout = BridgeLayout.from_grids(*grids, self.src_module_name, self.dest_module_name)

    def _extract_parallelism_info(self) -> None:
        """The sizes of the layout, as attributes."""
        layout = self.layout
        self.direction, self.scale = layout.direction, layout.scale
        self.src_tp_size, self.src_dp_size = layout.src_tp_size, layout.src_dp_size
        self.dest_tp_size, self.dest_dp_size = layout.dest_tp_size, layout.dest_dp_size
        self.dest_cp_size, self.dest_pp_size = layout.dest_cp_size, layout.dest_pp_size

    def _build_rank_mappings(self) -> None:
        """Who is where in the layout, as attributes."""
        layout = self.layout
        self.rank_to_src_pos = layout.rank_to_src_pos
        self.rank_to_dest_pos = layout.rank_to_dest_pos
        self.rank_to_dest_coords = layout.rank_to_dest_coords
        self.gather_group_ranks = [list(ranks) for ranks in layout.gather_groups]

    def _check_divisible(self, batch_size: int) -> None:
        """Refuse a batch dim that cannot be shared, see ``BridgeLayout.check_divisible``."""
        self.layout.check_divisible(batch_size)

    def _make_gather_pg(self, backend: str | None) -> dist.ProcessGroup | None:
        if self.scale == 1:
            return None
        group = make_groups(self.gather_group_ranks, backend, group_desc=self._describe())
        if self.current_rank in self.layout.ranks:
            # torch numbers a group's members by global rank; our blocks lie in slot order.
            assert dist.get_rank(group) == self.layout.slot(self.current_rank)
        return group

    def _coarser_replica(self) -> dist.ProcessGroup:
        """The grid's own group of all ranks of the coarser side's replica."""
        grid = self.src_grid if self.is_fan_out() else self.dest_grid
        return grid.get_or_create_pg([dim for dim in grid.dim_names if dim != "dp"])

    def _check_input(self, tensor: torch.Tensor) -> None:
        if self._destroyed:
            raise RuntimeError(f"Bridge {self._describe()} was destroyed; make a new one.")
        if tensor.ndim != len(self.dim_mapping):
            raise ValueError(
                f"Bridge {self._describe()}: the tensor has {tensor.ndim} dims "
                f"{tuple(tensor.shape)}, but dim_mapping {self.dim_mapping} names "
                f"{len(self.dim_mapping)}. Flattened rows (N, h) need {{'b': 0, 'h': 1}}."
            )
        self.layout.check_rank(self.current_rank)
        if self.is_fan_out():
            self._check_divisible(tensor.shape[self.dim_mapping["b"]])

    def _check_agreement(self, tensor: torch.Tensor) -> None:
        what = f"Input of bridge {self._describe()}"
        for group in (self.gather_pg, self.dest_cp_pg, self.dest_pp_pg):
            if group is not None:
                check_same_shape(tensor, group, what)

    def _describe(self) -> str:
        return (
            f"{self.src_module_name} (TP{self.src_tp_size} DP{self.src_dp_size}) -> "
            f"{self.dest_module_name} (TP{self.dest_tp_size} CP{self.dest_cp_size} "
            f"{f'PP{self.dest_pp_size} ' if self.dest_pp_size > 1 else ''}DP{self.dest_dp_size}, "
            f"{self.direction.value} by {self.scale})"
        )


def common_backend(src_grid: HyperCommGrid, dest_grid: HyperCommGrid) -> str | None:
    """Return the backend of both grids, ``None`` for the default one.

    Raises:
        ValueError: the grids name different ones.
    """
    # What is only like a grid need not say one.
    src, dest = (getattr(grid, "backend", None) for grid in (src_grid, dest_grid))
    if src and dest and src != dest:
        raise ValueError(
            f"Grids must have the same backend: src={src!r}, dest={dest!r}. Pass one backend to "
            "both, or None for the default one."
        )
    return src or dest


def _check_dim_mapping(dim_mapping: dict[str, int]) -> None:
    if "b" in dim_mapping and sorted(dim_mapping.values()) == list(range(len(dim_mapping))):
        return
    raise ValueError(
        f"dim_mapping must name the batch dim 'b' and number all dims 0, 1, ... once, got "
        f"{dim_mapping}. Valid are e.g. {_BATCH_FIRST}, {{'s': 0, 'b': 1, 'h': 2}} and "
        "{'b': 0, 'h': 1}."
    )
