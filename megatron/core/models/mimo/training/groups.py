# SPDX-License-Identifier: Apache-2.0
"""Process groups of one module, from its grid, as stock Megatron-Core asks for them.

``create_process_groups`` makes them in one fixed order, so every rank of the world takes part in
every creation at the same point: groups made in different orders on different ranks hang.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from megatron.core import parallel_state
from megatron.core.hyper_comm_grid import HyperCommGrid
from megatron.core.process_groups_config import ProcessGroupCollection
from mimo_colocated.communicators import EXPERT_FIELDS, FIELDS, ON_DEMAND

GRID_DIMS = ["tp", "cp", "dp", "pp"]

EXPERT_VIEW = "expert"
EXPERT_DIMS = ["expt_tp", "ep", "expt_dp", "pp"]
# Under which the grid keeps groups that are no box of its dims.
_OWN = "create_process_groups"


def make_grid(
    *,
    tp: int = 1,
    cp: int = 1,
    dp: int = 1,
    pp: int = 1,
    ep: int | None = None,
    expt_tp: int | None = None,
    rank_offset: int = 0,
    backend: str | None = None,
    dp_last: bool = False,
) -> HyperCommGrid:
    """Make one module's grid in Megatron-Core's default rank order, TP fastest and PP slowest.

    Args:
        tp, cp, dp, pp: sizes of the module's axes.
        ep: ranks that share out a layer's experts. With it or ``expt_tp`` the grid gets the view
            ``"expert"``: the ranks of a pipeline stage as expert TP x EP x expert DP, expert TP
            fastest. Expert DP is what is left.
        expt_tp: ranks that share one expert; ``tp`` if not given.
        rank_offset, backend: as of ``HyperCommGrid``.
        dp_last: DP is slowest, after PP: the ranks of a replica follow each other, stages and
            all. The gather bridge beside stages needs that. Without experts only.

    Raises:
        ValueError: ``dp_last`` with experts; ``expt_tp * ep`` does not divide the ranks of a
            stage; as ``HyperCommGrid``.
        RuntimeError: as ``HyperCommGrid``.
    """
    if dp_last and (ep is not None or expt_tp is not None):
        raise ValueError("dp_last=True is for grids without ep and expt_tp; leave it out")
    sizes = {"tp": tp, "cp": cp, "dp": dp, "pp": pp}
    dims = ["tp", "cp", "pp", "dp"] if dp_last else list(GRID_DIMS)
    grid = HyperCommGrid(
        [sizes[dim] for dim in dims], dims, rank_offset=rank_offset, backend=backend
    )
    if ep is not None or expt_tp is not None:
        _register_expert_view(grid, 1 if ep is None else ep, tp if expt_tp is None else expt_tp)
    return grid


def _register_expert_view(grid: HyperCommGrid, ep: int, expt_tp: int) -> None:
    pp = grid.dim_size("pp")
    stage = grid.size // pp
    if min(ep, expt_tp) < 1 or stage % (expt_tp * ep):
        sizes = [n for n in range(1, stage + 1) if expt_tp > 0 and stage % (n * expt_tp) == 0]
        raise ValueError(
            f"ep={ep} with expt_tp={expt_tp} does not fit: expt_tp * ep must divide the {stage} "
            f"ranks of a pipeline stage (tp * cp * dp); "
            + (f"with expt_tp={expt_tp}, ep can be {sizes}" if sizes else "choose another expt_tp")
        )
    shape = [expt_tp, ep, stage // (expt_tp * ep), pp]
    grid.register_view(EXPERT_VIEW, shape, list(EXPERT_DIMS), shared_dims=["pp"])


def create_process_groups(grid: HyperCommGrid) -> ProcessGroupCollection:
    """Create, or reuse, every group that models, DDP, optimizer and schedules ask for.

    Every rank of the world must call it, in the same order for several grids, also for grids
    that the rank is not part of. Dims that the grid lacks count as size 1. Which groups are one,
    over several grids too, says ``mimo_colocated/communicators.py``.

    Args:
        grid: the module's grid. Its base view has ``tp`` and ``dp``; ``cp`` and ``pp`` optional.

    Returns:
        A collection whose fields are all set; without an "expert" view the expert groups are
        the dense ones (EP 1, expert TP = TP).
    """
    ensure_global_memory_buffer()
    lacking = any(d not in grid.dim_names for d in GRID_DIMS)
    singles = _singleton_group(grid) if lacking else None
    groups = {name: _group(grid, name, singles) for name in FIELDS}
    collection: Any = ProcessGroupCollection(**groups)
    collection.intra_dp_cp = collection.dp_cp
    collection.hcp = None
    collection.inter_dist_opt = None
    collection.embd, collection.pos_embd = _embedding_groups(grid, collection.pp)
    _set_expert_groups(grid, collection)
    return collection


def ensure_global_memory_buffer() -> None:
    """Set, once, the global scratch buffer that sequence-parallel linear layers read."""
    if parallel_state._GLOBAL_MEMORY_BUFFER is None:
        parallel_state._set_global_memory_buffer()


def _group(
    grid: HyperCommGrid, field: str, single: dist.ProcessGroup | None
) -> dist.ProcessGroup | None:
    present = [d for d in FIELDS[field] if d in grid.dim_names]
    if not present:
        return single
    return grid.get_or_create_pg(present, connect=field not in ON_DEMAND)


def _singleton_group(grid: HyperCommGrid) -> dist.ProcessGroup | None:
    """Groups of one rank each, for the dims that a grid does not name."""
    ranks = [[r] for r in range(grid.rank_offset, grid.rank_offset + grid.size)]
    return grid.keep_pg((_OWN, ("single",)), ranks)


def _embedding_groups(
    grid: HyperCommGrid, pp_group: dist.ProcessGroup
) -> tuple[dist.ProcessGroup | None, dist.ProcessGroup | None]:
    """Groups that share word embeddings (first and last stage) and position embeddings (first).

    With one stage both are that stage alone, which the PP group already is.
    """
    if grid.dim_size("pp") == 1:
        return pp_group, pp_group
    stages = grid.get_rank_enum("pp")
    embd = grid.keep_pg((_OWN, ("embd",)), [[s[0], s[-1]] for s in stages])
    pos_embd = grid.keep_pg((_OWN, ("pos_embd",)), [[s[0]] for s in stages])
    return embd, pos_embd


def _set_expert_groups(grid: HyperCommGrid, collection: Any) -> None:
    if EXPERT_VIEW not in grid._views:
        # EP 1: an expert is sharded over TP like any dense layer and replicated over dp x cp.
        collection.ep = collection.pp if grid.dim_size("pp") == 1 else _singleton_group(grid)
        collection.expt_tp = collection.tp
        collection.tp_ep = collection.tp
        collection.tp_ep_pp = collection.mp
        collection.expt_dp = collection.intra_expt_dp = collection.dp_cp
        return
    for field, dims in EXPERT_FIELDS.items():
        setattr(collection, field, grid.get_or_create_pg(list(dims), view=EXPERT_VIEW))
    collection.intra_expt_dp = collection.expt_dp
