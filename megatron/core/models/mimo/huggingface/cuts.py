# SPDX-License-Identifier: Apache-2.0
"""Which elements of Hugging Face's tensors a rank's Megatron parameter is made of: pure integers.

A :class:`Cut` says, of one kind of parameter, which *runs* of which source tensors follow each
other along one dim of this rank's part. One list of runs serves both ways: an import copies each
run from its source, an export copies it back, so what an import can read an export can write.

    kind          source tensors             this rank's part (TP rank r of n)
    Whole         x                          x
    Along(d)      x                          the r-th of n equal parts along dim d
    Vocabulary    x (V, h)                   the r-th part of x with zero rows added, (P/n, h)
    QKV           q, k, v                    by query group of this rank: its q heads, its k, its v
    FusedQKV      [q; k; v] in one           the same
    QV            q, v                       the same, with zeros for k
    Gated         gate, up                   the r-th part of gate, the r-th part of up

``transposed`` is for layers that store ``(in, out)``, as GPT-2's do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Run:
    """Neighbouring elements along a cut's dim.

    Attributes:
        source: which of the source tensors.
        start: first index in it.
        at: first index in this rank's part.
        size: number of indices.
    """

    source: int
    start: int
    at: int
    size: int


@dataclass(frozen=True)
class Shard:
    """A rank's place among those that share a parameter."""

    rank: int = 0
    size: int = 1

    def part(self, length: int, what: str = "dim") -> tuple[int, int]:
        """Return start and size of this rank's equal part of ``length``.

        Raises:
            ValueError: the ranks do not divide it.
        """
        if length % self.size:
            raise ValueError(f"{what} {length} is not divisible by {self.size} ranks")
        own = length // self.size
        return self.rank * own, own


@dataclass(frozen=True)
class Heads:
    """Attention heads of a whole module, as its TransformerConfig has them.

    Attributes:
        query: query heads.
        groups: key/value heads.
        width: channels of a head.
    """

    query: int
    groups: int
    width: int


@dataclass(frozen=True)
class Cut:
    """How a parameter is cut; see the module's table.

    Attributes:
        dim: of the Megatron parameter, along which the runs follow each other.
        transposed: the sources store the two dims of a matrix the other way round.
    """

    dim: int = 0
    transposed: bool = False

    @property
    def sources(self) -> int:
        """Number of source tensors."""
        return 1

    def runs(self, lengths: Sequence[int], shard: Shard, heads: Heads) -> list[Run]:
        """Return the runs of a rank's part, in its order.

        Args:
            lengths: of the sources, along the dim.
            shard: the rank's place.
            heads: of the module.

        Raises:
            ValueError: the ranks do not divide what is cut.
        """
        raise NotImplementedError

    def length(self, lengths: Sequence[int], shard: Shard, heads: Heads) -> int:
        """Return the length of a rank's part along the dim."""
        return sum(run.size for run in self.runs(lengths, shard, heads))


@dataclass(frozen=True)
class Whole(Cut):
    """Every rank has all of it."""

    def runs(self, lengths: Sequence[int], shard: Shard, heads: Heads) -> list[Run]:  # noqa: D102
        return [Run(0, 0, 0, lengths[0])]


@dataclass(frozen=True)
class Along(Cut):
    """Equal parts along a dim: 0 of a column-parallel layer, 1 of a row-parallel one."""

    def runs(self, lengths: Sequence[int], shard: Shard, heads: Heads) -> list[Run]:  # noqa: D102
        start, size = shard.part(lengths[0])
        return [Run(0, start, 0, size)]


@dataclass(frozen=True)
class Vocabulary(Cut):
    """Equal parts of a vocabulary that is padded to a multiple that no TP size changes."""

    multiple: int = 128

    def padded(self, length: int) -> int:
        """Return the padded size.

        >>> Vocabulary(multiple=128).padded(151_646)
        151680
        """
        return -(-length // self.multiple) * self.multiple

    def runs(self, lengths: Sequence[int], shard: Shard, heads: Heads) -> list[Run]:  # noqa: D102
        start, size = shard.part(self.padded(lengths[0]), "padded vocabulary")
        real = max(0, min(size, lengths[0] - start))
        return [Run(0, start, 0, real)] if real else []

    def length(self, lengths: Sequence[int], shard: Shard, heads: Heads) -> int:
        """Return the rows of a rank's part, padding included."""
        return shard.part(self.padded(lengths[0]), "padded vocabulary")[1]


@dataclass(frozen=True)
class QKV(Cut):
    """Query, key and value projections, joined group by group as Megatron has them."""

    @property
    def sources(self) -> int:  # noqa: D102
        return 3

    def runs(self, lengths: Sequence[int], shard: Shard, heads: Heads) -> list[Run]:  # noqa: D102
        first, own = shard.part(heads.groups, "number of key/value heads")
        queries = heads.query // heads.groups * heads.width
        runs, at = [], 0
        for group in range(first, first + own):
            for source, size in enumerate((queries, heads.width, heads.width)):
                runs.append(Run(source, group * size, at, size))
                at += size
        return runs


@dataclass(frozen=True)
class FusedQKV(QKV):
    """The same out of one tensor ``[all q; all k; all v]``."""

    @property
    def sources(self) -> int:  # noqa: D102
        return 1

    def runs(self, lengths: Sequence[int], shard: Shard, heads: Heads) -> list[Run]:  # noqa: D102
        offsets = (0, heads.query * heads.width, (heads.query + heads.groups) * heads.width)
        return [
            Run(0, offsets[run.source] + run.start, run.at, run.size)
            for run in super().runs(lengths, shard, heads)
        ]


@dataclass(frozen=True)
class QV(QKV):
    """A joined bias whose keys have none: theirs is zero here and in no folder."""

    @property
    def sources(self) -> int:  # noqa: D102
        return 2

    def runs(self, lengths: Sequence[int], shard: Shard, heads: Heads) -> list[Run]:  # noqa: D102
        joined = super().runs(lengths, shard, heads)
        return [replace(run, source=run.source // 2) for run in joined if run.source != 1]

    def length(self, lengths: Sequence[int], shard: Shard, heads: Heads) -> int:
        """Return the length of a rank's part, keys included."""
        return sum(run.size for run in super().runs(lengths, shard, heads))


@dataclass(frozen=True)
class Gated(Cut):
    """Gate and up projection of a gated MLP: each rank has its part of both."""

    @property
    def sources(self) -> int:  # noqa: D102
        return 2

    def runs(self, lengths: Sequence[int], shard: Shard, heads: Heads) -> list[Run]:  # noqa: D102
        start, size = shard.part(lengths[0], "width of the MLP")
        return [Run(0, start, 0, size), Run(1, start, size, size)]
