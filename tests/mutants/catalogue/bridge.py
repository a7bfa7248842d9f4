# SPDX-License-Identifier: Apache-2.0
"""Mistakes in grids, groups, the bridge, its layout and its collectives."""

from tests.mutants.catalogue.places import CORE, MIMO, UNIT
from tests.mutants.mutant import Mutant

_GRID = CORE + "hyper_comm_grid.py"
_SHAPE = "mimo_colocated/grid_shape.py"
_LAYOUT = MIMO + "comm/plan/gather_layout.py"
_COMM = MIMO + "comm/gather_bridge.py"
_COLLECTIVES = MIMO + "comm/collectives.py"
_GRID_TESTS = UNIT + "test_hyper_comm_grid.py::"
_PAIRS = UNIT + "test_bridge_layout.py::test_every_pair_against_a_direct_computation"
_GRID_ERRORS = UNIT + "test_bridge_layout.py::TestErrors::test_grids"
# All ranks in one process, over random layouts; the 8-rank tests notice these as well.
_EVERY_BRIDGE = UNIT + "test_bridge_properties.py::test_every_bridge"

GRIDS = (
    Mutant(
        name="last-dim-fastest",
        file=_SHAPE,
        old="math.prod(self.shape[:axis])",
        new="math.prod(self.shape[axis + 1 :])",
        tests=(_GRID_TESTS + "test_coords_invert_the_rank_formula",),
        why="TP groups span nodes and DP groups hold TP shards: averages of unlike weights",
    ),
    Mutant(
        name="group-members-in-the-callers-order",
        file=_GRID,
        old="ordered = sorted(wanted, key=lambda dim: -dim_names.index(dim))",
        new="ordered = wanted",
        tests=(_GRID_TESTS + "test_rank_enum_is_the_brute_force_one_for_any_order_of_dims",),
        why="the same group has other member orders, and keys, depending on who asks first",
    ),
    Mutant(
        name="groups-without-the-rank-offset",
        file=_SHAPE,
        old="[self.rank_offset + first + step for step in members]",
        new="[first + step for step in members]",
        tests=(_GRID_TESTS + "test_rank_enum_is_the_brute_force_one_for_any_order_of_dims",),
        why="modules on their own ranks communicate with another module's",
    ),
)

BRIDGE = (
    Mutant(
        name="no-cp-sum",
        file=_COMM,
        old="output = sum_gradients(output, self.dest_cp_pg)",
        new="pass",
        tests=(_EVERY_BRIDGE,),
        why="the encoder trains on 1/cp of its gradient, and nothing crashes",
    ),
    Mutant(
        name="later-stages-keep-their-own-gradient",
        file=_COMM,
        old="output = first_gradient(output, self.dest_pp_pg)",
        new="pass",
        tests=(_EVERY_BRIDGE,),
        why="encoders of ranks on later pipeline stages get zeros",
    ),
    Mutant(
        name="cp-sum-over-dp-cp",
        file=_COMM,
        old='("cp") if self.dest_cp_size > 1',
        new='(["cp", "dp"]) if self.dest_cp_size > 1',
        tests=(_EVERY_BRIDGE,),
        why="an image's gradient gets those of other replicas' images added",
    ),
    Mutant(
        name="cp-mean-instead-of-sum",
        file=_COLLECTIVES,
        old="dist.all_reduce(total, group=ctx.group)",
        new="dist.all_reduce(total, group=ctx.group)\n        total /= ctx.group.size()",
        tests=(_EVERY_BRIDGE,),
        why="encoder gradients are too small by cp, which Adam and clipping hide",
    ),
    Mutant(
        name="gradient-mutated-in-place",
        file=_COLLECTIVES,
        old="total = dy.clone(memory_format=torch.contiguous_format)",
        new="total = dy.contiguous()",
        tests=(_EVERY_BRIDGE,),
        why="autograd may still hand that gradient to someone else, who sees it summed",
    ),
    Mutant(
        name="zero-pad-instead-of-gather",
        file=_COLLECTIVES,
        old="return _all_gather(dy, ctx.group, ctx.dim), None, None",
        new=(
            "n, i = dist.get_world_size(ctx.group), dist.get_rank(ctx.group)\n"
            "        parts = [dy if j == i else torch.zeros_like(dy) for j in range(n)]\n"
            "        return torch.cat(parts, dim=ctx.dim), None, None"
        ),
        tests=(_EVERY_BRIDGE,),
        why="fan-out: an encoder replica loses the gradient of what its siblings consumed",
    ),
    Mutant(
        name="fan-in-backward-takes-the-first-block",
        file=_COLLECTIVES,
        old="_own_block(dy, ctx.index, ctx.count, ctx.dim, _gradients), None, None",
        new="_own_block(dy, 0, ctx.count, ctx.dim, _gradients), None, None",
        tests=(_EVERY_BRIDGE,),
        why="every encoder replica trains on the gradient of the first one's images",
    ),
    Mutant(
        name="own-gradient-is-a-view",
        file=_COLLECTIVES,
        old="return memory.empty_like(block).copy_(block)",
        new="return block.contiguous()",
        tests=(
            UNIT + "test_gradient_memory.py::"
            "test_gradients_that_are_summed_do_not_write_into_one_another",
        ),
        why="as in stock: two leaves add to the same memory, in the second microbatch",
    ),
    Mutant(
        name="memory-lent-twice",
        file=_COLLECTIVES,
        old=" or self._lease() is not None:",
        new=":",
        tests=(
            UNIT + "test_gradient_memory.py::test_memory_that_nobody_has_any_more_is_used_again",
        ),
        why="a gather's gradient is written over one that somebody still has",
    ),
    Mutant(
        name="pooled-fan-out-groups",
        file=_LAYOUT,
        old="members.setdefault((dp // scale, *copy), []).append(rank)",
        new="members.setdefault((dp // scale, copy[0]), []).append(rank)",
        tests=(_PAIRS,),
        why="CP ranks of a slot share one gather group: gradients of the wrong length, or a hang",
    ),
    Mutant(
        name="reversed-slot-order",
        file=_LAYOUT,
        old="for rank in sorted(fine, key=lambda rank: fine[rank][0]):",
        new="for rank in sorted(fine, key=lambda rank: -fine[rank][0]):",
        tests=(_PAIRS,),
        why="siblings' blocks come back in the wrong order: rows of other samples",
    ),
    Mutant(
        name="fan-out-slice-from-the-cp-0-table",
        file=_LAYOUT,
        old="return fine[rank][0] % self.scale",
        new=(
            "return (fine if fan_in else self.rank_to_dest_pos).get(rank, (0, 0))[0] % self.scale"
        ),
        tests=(_PAIRS,),
        why="CP ranks other than 0 are not in that table and take another slot's samples",
    ),
    Mutant(
        name="slot-counts-coarse-replicas",
        file=_LAYOUT,
        old="return fine[rank][0] % self.scale",
        new="return fine[rank][0] // self.scale",
        tests=(_PAIRS,),
        why="a rank takes the part of another sibling",
    ),
    Mutant(
        name="dp-before-cp-accepted",
        file=_LAYOUT,
        old='names.index("dp") < names.index("cp")',
        new='names.index("dp") < 0',
        tests=(_GRID_ERRORS,),
        why="dp indices are silently wrong where cp is named after dp",
    ),
    Mutant(
        name="replicas-that-do-not-nest-accepted",
        file=_LAYOUT,
        old="if src_index * coarse_dp // src_dp == dest_index * coarse_dp // dest_dp:",
        new="if src_index >= 0:",
        tests=(_GRID_ERRORS,),
        why="ranks train on another replica's samples where the grids order their ranks otherwise",
    ),
)
