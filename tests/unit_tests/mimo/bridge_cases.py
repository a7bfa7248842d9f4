# SPDX-License-Identifier: Apache-2.0
"""Random bridges of up to 64 ranks, and the global picture that says what they must do.

Nothing here asks the package who holds what: coordinates come from dividing the rank by the sizes
of the dims, blocks and chunks from ``chunk``. Tensors hold whole numbers as float64, so sums are
exact in any order and every comparison is ``==``.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import settings
from hypothesis import strategies as st

from megatron.core.hyper_comm_grid import HyperCommGrid
from megatron.core.models.mimo.comm.gather_bridge import ColocatedBridgeCommunicator
from tests.harness.backend import choose

MAX_RANKS = 64
DIRECTIONS = ("in", "out", "equal")
# One test per direction, else few examples would leave one out; they share the profile's number.
EACH_DIRECTION = settings(max_examples=-(-settings().max_examples // len(DIRECTIONS)))
DEVICE = torch.device(choose(1)[1])
Dims = tuple[tuple[str, int], ...]

# How the global (B, S, H) lies in a tensor, and what the bridge calls the dims.
VIEWS: dict[str, tuple[dict[str, int], Callable[[torch.Tensor], torch.Tensor]]] = {
    "batch first": ({"b": 0, "s": 1, "h": 2}, lambda x: x),
    "sequence first": ({"s": 0, "b": 1, "h": 2}, lambda x: x.transpose(0, 1)),
    "rows": ({"b": 0, "h": 1}, lambda x: x.flatten(0, 1)),
}


@dataclass(frozen=True)
class BridgeCase:
    """One bridge and one global batch.

    Attributes:
        src, dest: (name, size) of each dim, fastest first.
        offset, spare: ranks of the world before and after the grids.
        samples: of a block of the finer side; may be 0.
        tokens: of one of the ``2 * cp`` chunks of a sequence.
        hidden: size of the last dim.
        view: a key of ``VIEWS``.
        seed: of values and of the order in which ranks take turns.
    """

    src: Dims
    dest: Dims
    offset: int = 0
    spare: int = 0
    samples: int = 2
    tokens: int = 1
    hidden: int = 2
    view: str = "batch first"
    seed: int = 0

    @property
    def ranks(self) -> range:
        return range(self.offset, self.offset + math.prod(size for _, size in self.src))

    @property
    def world_size(self) -> int:
        return self.ranks.stop + self.spare

    def size(self, side: str, name: str) -> int:
        return dict(getattr(self, side)).get(name, 1)

    @functools.cached_property
    def places(self) -> dict[int, dict[str, int]]:
        """Rank -> its coordinates, as ``"src dp"``, ``"dest cp"`` …; 0 along dims not named."""
        places = {}
        for rank in self.ranks:
            names = ("src tp", "src dp", "dest tp", "dest cp", "dest dp", "dest pp")
            place = dict.fromkeys(names, 0)
            for side, dims in (("src", self.src), ("dest", self.dest)):
                at = coordinates(dims, rank - self.offset)
                place.update({f"{side} {name}": coord for name, coord in at.items()})
            places[rank] = place
        return places

    def alike(self, rank: int, *names: str) -> tuple[int, ...]:
        """Ranks with the same coordinates; names are like ``"src dp"``."""
        own = self.places[rank]
        return tuple(r for r, at in self.places.items() if all(at[n] == own[n] for n in names))

    def drawn(self, salt: int) -> torch.Tensor:
        """A global ``(B, S, H)`` of whole numbers, float64."""
        blocks = max(self.size("src", "dp"), self.size("dest", "dp"))
        shape = (blocks * self.samples, 2 * self.size("dest", "cp") * self.tokens, self.hidden)
        generator = torch.Generator().manual_seed(1000 * self.seed + salt)
        return torch.randint(-9, 10, shape, generator=generator).double().to(DEVICE)

    def block(self, side: str, rank: int, whole: torch.Tensor) -> torch.Tensor:
        """What a rank holds of ``whole`` on one side, in this case's view."""
        count = self.size(side, "dp")
        size = whole.shape[0] // count
        start = self.places[rank][f"{side} dp"] * size
        return VIEWS[self.view][1](whole[start : start + size])

    def own_chunks(self, rank: int, whole: torch.Tensor) -> torch.Tensor:
        """``whole`` with zeros at the positions that other CP ranks own (zigzag)."""
        cp, at = self.size("dest", "cp"), self.places[rank]["dest cp"]
        chunk = torch.arange(whole.shape[1]) // self.tokens
        mine = (chunk == at) | (chunk == 2 * cp - 1 - at)
        return whole * mine.to(whole)[None, :, None]

    def bridge(self, reverse: bool = False) -> ColocatedBridgeCommunicator:
        """The bridge between two fresh grids; ``reverse`` needs a dest without CP."""
        src, dest = (self.dest, self.src) if reverse else (self.src, self.dest)
        if reverse:
            dest = tuple(dim for dim in dest if dim[0] != "cp")
        return ColocatedBridgeCommunicator(
            grid(src, self.offset), grid(dest, self.offset), dim_mapping=VIEWS[self.view][0]
        )


def grid(dims: Dims, offset: int = 0) -> HyperCommGrid:
    return HyperCommGrid([size for _, size in dims], [name for name, _ in dims], offset)


def coordinates(dims: Dims, place: int) -> dict[str, int]:
    """The first dim is the fastest: divide by its size, the remainder is its coordinate."""
    at = {}
    for name, size in dims:
        place, at[name] = divmod(place, size)
    return at


@functools.cache
def allowed_pairs(ranks: int) -> dict[str, list[tuple[Dims, Dims]]]:
    """All (source, destination) over so many ranks whose replicas nest, in every allowed order.

    By direction and use of CP: ``"in"``, ``"in with cp"``, ``"out"`` …
    """
    sources = [
        order for dims in factorised(ranks, ("tp", "dp")) for order in itertools.permutations(dims)
    ]
    destinations = [
        order
        for dims in factorised(ranks, ("tp", "cp", "dp"))
        for order in itertools.permutations(dims)
        if order.index(dims[1]) < order.index(dims[2])
    ]
    kinds: dict[str, list[tuple[Dims, Dims]]] = {}
    for src, dest in itertools.product(sources, destinations):
        if nests(src, dest, ranks):
            src_dp, dest_dp = dict(src)["dp"], dict(dest)["dp"]
            direction = "in" if src_dp > dest_dp else "out" if src_dp < dest_dp else "equal"
            cp = " with cp" if dict(dest)["cp"] > 1 else ""
            kinds.setdefault(direction + cp, []).append((src, dest))
    return kinds


def factorised(number: int, names: Sequence[str]) -> list[Dims]:
    """Every way to write ``number`` as one size per name."""
    if len(names) == 1:
        return [((names[0], number),)]
    return [
        ((names[0], size), *rest)
        for size in range(1, number + 1)
        if number % size == 0
        for rest in factorised(number // size, names[1:])
    ]


def nests(src: Dims, dest: Dims, ranks: int) -> bool:
    """Whether each rank's block on the finer side lies inside its block on the coarser side."""
    coarse, fine = sorted((src, dest), key=lambda dims: dict(dims)["dp"])
    scale, rest = divmod(dict(fine)["dp"], dict(coarse)["dp"])
    return rest == 0 and all(
        coordinates(fine, rank)["dp"] // scale == coordinates(coarse, rank)["dp"]
        for rank in range(ranks)
    )


def _with_unused(draw: Callable[..., Any], dims: Dims, names: Sequence[str]) -> Dims:
    """Dims of size 1 somewhere in between: they move no rank."""
    for name in names:
        if draw(st.booleans()):
            place = draw(st.integers(0, len(dims)))
            dims = (*dims[:place], (name, 1), *dims[place:])
    return dims


def _with_stages(draw: Callable[..., Any], dest: Dims) -> Dims:
    """Some of the CP ranks become pipeline stages, beside CP on either side of it.

    Who is in which DP replica stays, so replicas nest as before.
    """
    cp = dict(dest)["cp"]
    stages = draw(st.sampled_from([n for n in range(1, cp + 1) if cp % n == 0]))
    if stages == 1:
        return dest
    split = draw(st.permutations([("cp", cp // stages), ("pp", stages)]))
    place = [name for name, _ in dest].index("cp")
    return (*dest[:place], *split, *dest[place + 1 :])


@st.composite
def bridge_cases(
    draw: Callable[..., Any], direction: str, use_cp: bool | None = None
) -> BridgeCase:
    """Any bridge of a direction. Numbers of ranks with many divisors come more often."""
    rich = st.sampled_from([4, 6, 8, 12, 16, 24, 36, 48, 60, 64])
    kinds = allowed_pairs(draw(rich | st.integers(1 if direction == "equal" else 2, MAX_RANKS)))
    with_cp = f"{direction} with cp"
    wanted = draw(st.booleans()) if use_cp is None else use_cp
    src, dest = draw(st.sampled_from(kinds[with_cp if wanted and with_cp in kinds else direction]))
    dest = _with_stages(draw, dest)
    return BridgeCase(
        src=_with_unused(draw, src, ("pp", "cp")),
        dest=dest if "pp" in dict(dest) else _with_unused(draw, dest, ("pp",)),
        offset=draw(st.integers(0, 3)),
        spare=draw(st.integers(0, 2)),
        samples=draw(st.integers(0, 3)),
        tokens=draw(st.integers(1, 3)),
        hidden=draw(st.integers(1, 3)),
        view=draw(st.sampled_from(sorted(VIEWS))),
        seed=draw(st.integers(0, 999)),
    )
