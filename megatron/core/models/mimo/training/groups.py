# SPDX-License-Identifier: Apache-2.0
"""Process groups of one module, from its grid, as stock Megatron-Core asks for them.

``create_process_groups`` makes them in one fixed order, so every rank of the world takes part in
every creation at the same point: groups made in different orders on different ranks hang.
"""

from __future__ import annotations

import torch.distributed as dist

from megatron.core import parallel_state
from megatron.core.hyper_comm_grid import HyperCommGrid
from megatron.core.process_groups_config import ProcessGroupCollection

GRID_DIMS = ["tp", "cp", "dp", "pp"]

# Field of ProcessGroupCollection -> dims of the grid. The order is the order of creation.
_FIELDS: dict[str, list[str]] = {
    "tp": ["tp"],
    "cp": ["cp"],
    "pp": ["pp"],
    "dp": ["dp"],
    "dp_cp": ["cp", "dp"],
    "mp": ["tp", "pp"],
    "tp_cp": ["tp", "cp"],
    "tp_dp_cp": ["tp", "cp", "dp"],
    "intra_dist_opt": ["tp", "cp", "dp", "pp"],
}

EXPERT_VIEW = "expert"


def make_grid(
    *,
    tp: int = 1,
    cp: int = 1,
    dp: int = 1,
    pp: int = 1,
    rank_offset: int = 0,
    backend: str | None = None,
) -> HyperCommGrid:
    """Grid of one module in Megatron-Core's default rank order, TP fastest and PP slowest.

    Raises:
        ValueError, RuntimeError: as ``HyperCommGrid``.
    """
    return HyperCommGrid(
        [tp, cp, dp, pp], list(GRID_DIMS), rank_offset=rank_offset, backend=backend
    )


def create_process_groups(grid: HyperCommGrid) -> ProcessGroupCollection:
    """Create, or reuse, every group that models, DDP, optimizer and schedules ask for.

    Every rank of the world must call it, in the same order for several grids, also for grids
    that the rank is not part of. Dims that the grid lacks count as size 1.

    Args:
        grid: the module's grid. Its base view has ``tp`` and ``dp``; ``cp`` and ``pp`` optional.

    Returns:
        A collection whose fields are all set; without an "expert" view the expert groups are
        the dense ones (EP 1, expert TP = TP).
    """
    ensure_global_memory_buffer()
    lacking = any(d not in grid.dim_names for d in GRID_DIMS)
    singles = _singleton_group(grid) if lacking else None
    groups = {name: _group(grid, dims, singles) for name, dims in _FIELDS.items()}
    collection = ProcessGroupCollection(**groups)
    collection.intra_dp_cp = collection.dp_cp
    collection.hcp = None
    collection.inter_dist_opt = None
    collection.embd, collection.pos_embd = _embedding_groups(grid, collection.pp)
    _set_expert_groups(grid, collection)
    return collection


def ensure_global_memory_buffer() -> None:
    """Megatron's sequence-parallel linear layers read a global scratch buffer; set it once."""
    if parallel_state._GLOBAL_MEMORY_BUFFER is None:
        parallel_state._set_global_memory_buffer()


def _group(
    grid: HyperCommGrid, dims: list[str], single: dist.ProcessGroup | None
) -> dist.ProcessGroup | None:
    present = [d for d in dims if d in grid.dim_names]
    if not present:
        return single
    return get_or_create_pg(grid, present)


def get_or_create_pg(
    grid: HyperCommGrid, dims: list[str], view: str | None = None
) -> dist.ProcessGroup:
    """The grid's group over ``dims``: the one already made, else a new one (a collective)."""
    try:
        return grid.get_pg(dims, view=view)
    except KeyError:
        return grid.create_pg(dims, view=view)


def _singleton_group(grid: HyperCommGrid) -> dist.ProcessGroup | None:
    """Groups of one rank each, for the dims that a grid does not name."""
    ranks = [[r] for r in range(grid.rank_offset, grid.rank_offset + grid.size)]
    return _kept_group(grid, "single", ranks)


def _embedding_groups(
    grid: HyperCommGrid, pp_group: dist.ProcessGroup
) -> tuple[dist.ProcessGroup | None, dist.ProcessGroup | None]:
    """Groups that share word embeddings (first and last stage) and position embeddings (first).

    With one stage both are that stage alone, which the PP group already is.
    """
    if grid.dim_size("pp") == 1:
        return pp_group, pp_group
    stages = grid.get_rank_enum("pp")
    embd = _kept_group(grid, "embd", [[s[0], s[-1]] for s in stages])
    pos_embd = _kept_group(grid, "pos_embd", [[s[0]] for s in stages])
    return embd, pos_embd


def _kept_group(
    grid: HyperCommGrid, name: str, rank_lists: list[list[int]]
) -> dist.ProcessGroup | None:
    """A group that is no box of dims; the grid keeps it, to hand out again and to destroy."""
    key = ("create_process_groups", (name,))
    if key not in grid._pgs:
        group, _ = dist.new_subgroups_by_enumeration(rank_lists, backend=grid.backend)
        grid._pgs[key] = group
    return grid._pgs[key]


def _set_expert_groups(grid: HyperCommGrid, collection: ProcessGroupCollection) -> None:
    if EXPERT_VIEW not in grid._views:
        # EP 1: an expert is sharded over TP like any dense layer and replicated over dp x cp.
        collection.ep = collection.pp if grid.dim_size("pp") == 1 else _singleton_group(grid)
        collection.expt_tp = collection.tp
        collection.tp_ep = collection.tp
        collection.tp_ep_pp = collection.mp
        collection.expt_dp = collection.intra_expt_dp = collection.dp_cp
        return
    collection.ep = get_or_create_pg(grid, ["ep"], EXPERT_VIEW)
    collection.expt_tp = get_or_create_pg(grid, ["expt_tp"], EXPERT_VIEW)
    collection.tp_ep = get_or_create_pg(grid, ["expt_tp", "ep"], EXPERT_VIEW)
    collection.tp_ep_pp = get_or_create_pg(grid, ["expt_tp", "ep", "pp"], EXPERT_VIEW)
    collection.expt_dp = get_or_create_pg(grid, ["expt_dp"], EXPERT_VIEW)
    collection.intra_expt_dp = collection.expt_dp
