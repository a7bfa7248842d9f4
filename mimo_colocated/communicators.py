# SPDX-License-Identifier: Apache-2.0
"""Which process groups the modules of a job have, and which of them are one. Pure integers.

A group of several ranks is a communicator: on a GPU some hundred MB as soon as it is connected. So

- groups of one rank are one per process, and never connect unless something is sent over them;
- equal groups are made once, within a grid and over grids, where their collectives cannot run side
  by side (:class:`Lane`);
- those that most models leave alone (:data:`ON_DEMAND`) connect with their first collective, which
  all their members enter.

``create_process_groups`` makes what the tables here list; :func:`communicators` counts it.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from mimo_colocated.grid_shape import GridShape

FIELDS: dict[str, tuple[str, ...]] = {
    "tp": ("tp",),
    "cp": ("cp",),
    "pp": ("pp",),
    "dp_cp": ("cp", "dp"),
    "mp": ("tp", "pp"),
    "intra_dist_opt": ("tp", "cp", "dp", "pp"),
    "dp": ("dp",),
    "tp_cp": ("tp", "cp"),
    "tp_dp_cp": ("tp", "cp", "dp"),
}
"""Field of ``ProcessGroupCollection`` -> dims of the grid, in the order of creation."""

EXPERT_FIELDS: dict[str, tuple[str, ...]] = {
    "ep": ("ep",),
    "expt_tp": ("expt_tp",),
    "tp_ep": ("expt_tp", "ep"),
    "tp_ep_pp": ("expt_tp", "ep", "pp"),
    "expt_dp": ("expt_dp",),
}
"""The same over the dims of the expert view, after the others."""

ON_DEMAND = ("dp", "tp_cp", "tp_dp_cp")
"""Fields whose groups connect with their first collective, unless they equal another one: the
gradients go over ``dp_cp``, ``dp`` is for exports and evaluation, the others for routers."""


class Lane(enum.Enum):
    """Beside what else the collectives of a group may be under way.

    Two groups of the same ranks may be one communicator if all ranks start the collectives of both
    in one order. Those that the computation waits for are in one order: no second one starts before
    the first has ended. What is left running is not: buckets of two modules' gradients are reduced,
    and their weights gathered, when each is ready, which with and without inputs is not the same
    moment, and an exchange of rows is awaited after later collectives began.
    """

    WITHIN = "inside layers, which wait for it: shared by all grids"
    BETWEEN = "between passes, when nothing is under way: any equal group serves"
    BESIDE = "left running beside layers and other modules: never shared with another grid"

    def meets(self, there: Lane) -> bool:
        """Return whether a group of the same grid, made in lane ``there``, serves this one too."""
        return self is Lane.BETWEEN or (self is Lane.BESIDE) is (there is Lane.BESIDE)


def lane_of(dims: Iterable[str]) -> Lane:
    """Return beside what collectives of groups over ``dims`` run.

    Over data-parallel dims gradients and weights travel in buckets, over ``pp`` what stages send.

    >>> lane_of(["cp", "dp"]).name, lane_of(["tp", "cp"]).name, lane_of(["tp", "pp"]).name
    ('BESIDE', 'WITHIN', 'BETWEEN')
    """
    names = set(dims)
    moved = names & {"dp", "expt_dp", "pp"}
    if not moved:
        return Lane.WITHIN
    if names in ({"pp"}, {"expt_dp"}) or ("dp" in names and names <= {"dp", "cp"}):
        return Lane.BESIDE
    return Lane.BETWEEN


@dataclass(frozen=True)
class Communicator:
    """One process group of several ranks.

    Attributes:
        first: its first rank.
        steps: how the others follow, as of :meth:`~.grid_shape.GridShape.steps_along`.
        owner: the module whose grid alone uses it; ``""`` if grids share it.
        connects: at once; else with its first collective.
    """

    first: int
    steps: tuple[tuple[int, int], ...]
    owner: str
    connects: bool

    @property
    def ranks(self) -> tuple[int, ...]:
        """Its members, ascending."""
        ranks = [self.first]
        for stride, count in reversed(self.steps):
            ranks = [rank + stride * place for rank in ranks for place in range(count)]
        return tuple(ranks)


def communicators(
    grids: Mapping[str, GridShape], experts: Mapping[str, GridShape] | None = None
) -> list[Communicator]:
    """Return those that the first rank of each grid is in after ``create_process_groups``.

    The world's comes first. Bridges add one per modality where rows cross ranks.

    >>> vision, text = GridShape((2, 4), ("tp", "dp")), GridShape((2, 2, 2), ("tp", "cp", "dp"))
    >>> [each.ranks for each in communicators({"images": vision, "language": text})]
    ... # doctest: +NORMALIZE_WHITESPACE
    [(0, 1, 2, 3, 4, 5, 6, 7), (0, 1), (0, 2, 4, 6), (0, 2), (0, 2, 4, 6), (0, 4), (0, 1, 2, 3)]

    Args:
        grids: module -> its ranks, in the order in which their groups are made. All begin at the
            same rank, and one of them spans the world.
        experts: module -> the ranks of its expert view, of those that have one.
    """
    world = max(grids.values(), key=lambda grid: grid.size)
    made = [Communicator(world.rank_offset, world.steps_along(world.dim_names), "", connects=True)]
    for module, grid in grids.items():
        for field, dims in FIELDS.items():
            _add(made, module, _along(grid, dims), lane_of(dims), field not in ON_DEMAND)
        ends = [(stride * (n - 1), 2) for stride, n in _along(grid, ["pp"])]
        # The embedding's, of the first and the last stage.
        _add(made, module, tuple(ends), Lane.BETWEEN, connects=True)
        view = (experts or {}).get(module)
        if view is not None:
            for dims in EXPERT_FIELDS.values():
                _add(made, module, _along(view, dims), lane_of(dims), connects=True)
    return made


def _along(box: GridShape, dims: Iterable[str]) -> tuple[tuple[int, int], ...]:
    return box.steps_along(dim for dim in dims if dim in box.dim_names)


def _add(
    made: list[Communicator],
    module: str,
    steps: tuple[tuple[int, int], ...],
    lane: Lane,
    connects: bool,
) -> None:
    """Add a group unless one that is there serves, as grids look for it."""
    owners = {Lane.WITHIN: ("",), Lane.BETWEEN: (module, ""), Lane.BESIDE: (module,)}[lane]
    if steps and not any(g.steps == steps and g.owner in owners for g in made):
        owner = module if lane is Lane.BESIDE else ""
        made.append(Communicator(made[0].first, steps, owner, connects))
