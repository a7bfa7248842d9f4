# SPDX-License-Identifier: Apache-2.0
"""The rows of one exchange group: who holds them, who owns them. No torch, no process group.

What all ranks of a group have to check and to know alike is read from runs (images, replicas).
Single rows are looked at only for the replicas that a rank asks about, so what it costs does not
grow with a group that spans many replicas, as with pipeline stages that are outermost in the grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from megatron.core.models.mimo.comm.plan.routed_layout import ExchangeGroup
from megatron.core.models.mimo.comm.plan.token_runs import Runs, TokenRuns, expand
from megatron.core.models.mimo.partition.position_owners import position_owners
from megatron.core.models.mimo.partition.sequence_order import dense_spans, packed_spans


@dataclass(frozen=True, eq=False)
class SortedRows:
    """Some rows of a group, sorted by (holder, owner, number); all int64 ``(n,)``.

    Attributes:
        src: holder of each: encoder replica, its CP rank.
        at: place in what that holder brings.
        owner: see :meth:`.ExchangeGroup.owner`.
        place: in the owner's flattened local batch.
        in_cell: number among the rows of the same holder and owner.
        cell_size: how many those are.
    """

    src: np.ndarray
    at: np.ndarray
    owner: np.ndarray
    place: np.ndarray
    in_cell: np.ndarray
    cell_size: np.ndarray


class GroupRows:
    """All rows of an exchange group, by runs.

    Args:
        group: the ranks.
        tokens: the token places of each language replica.
        held: the runs of rows of each holder (encoder replica, its CP rank); as many rows as
            tokens.

    Raises:
        ValueError: the same on every rank: rows that are held twice or not at all; a sequence
            that cannot be cut.
    """

    def __init__(
        self, group: ExchangeGroup, tokens: Sequence[TokenRuns], held: Sequence[Runs]
    ) -> None:
        self.group, self.tokens, self.held = group, tokens, held
        # Of each language replica; the last entry is the end of the last one's.
        self._first = np.cumsum([0, *(each.count for each in tokens)])
        self.total = int(self._first[-1])
        self._sort_runs()
        for each in tokens:
            self._cut(np.empty(0, dtype=np.int64), each)

    def of(self, src: int, dest: int, owner: int) -> SortedRows:
        """Return the rows that a holder has and those that an owner owns; -1 owns none.

        They are whole cells, so turns within a cell are those that all ranks count.

        Args:
            src: the holder.
            dest: the language replica of the owner.
            owner: its number.
        """
        rows = expand(self.held[src])
        if owner >= 0:
            owned = self._owned_by(dest, owner) + self._first[dest]
            rows = np.concatenate([rows, owned[self._holders(owned)[0] != src]])
        rows = np.sort(rows)
        holder, at = self._holders(rows)
        owners, place = self._owners_of(rows)
        cell = holder * self.group.owner_ranks.shape[0] + owners
        order = np.argsort(cell, kind="stable")
        cell = cell[order]
        first = np.flatnonzero(np.diff(cell, prepend=-1))
        sizes = np.diff(first, append=rows.size)
        return SortedRows(
            src=holder[order],
            at=at[order],
            owner=owners[order],
            place=place[order],
            in_cell=np.arange(rows.size) - np.repeat(first, sizes),
            cell_size=np.repeat(sizes, sizes),
        )

    @cached_property
    def moves(self) -> tuple[bool, bool]:
        """Whether any rank of the group sends rows, and whether any sends gradients."""
        group, parts = self.group, self.group.owner_ranks.shape[0] // len(self.tokens)
        src, dest = self._pairs()
        owner = dest[:, None] * parts + np.arange(parts)
        receivers, holders = group.owner_ranks[owner], group.src_ranks[src]
        away = (group.src_of[receivers] != src[:, None, None]).any(axis=-1)
        back = (group.owner_of[holders][:, None] != owner[:, :, None]).any(axis=-1)
        return self._any(away, src, dest), self._any(back, src, dest)

    def _any(self, moving: np.ndarray, src: np.ndarray, dest: np.ndarray) -> bool:
        """Whether a row of some pair of replicas has one of the owners that are marked.

        ``moving`` is bool ``(pairs, owners of a language replica)``. Rows are looked at only where
        a pair has owners of both kinds.
        """
        if moving.all(axis=1).any():
            return True
        for pair in np.flatnonzero(moving.any(axis=1)).tolist():
            rows = np.sort(expand(self.held[int(src[pair])]))
            low, high = np.searchsorted(rows, self._first[dest[pair] : dest[pair] + 2])
            owners = self._owners_of(rows[low:high])[0] % moving.shape[1]
            if moving[pair, owners].any():
                return True
        return False

    def _pairs(self) -> tuple[np.ndarray, np.ndarray]:
        """(holder, language replica) that have rows in common."""
        low = np.searchsorted(self._first, self._start, side="right") - 1
        high = np.searchsorted(self._first, self._start + self._length - 1, side="right") - 1
        dest = expand(np.stack([low, high - low + 1], axis=1))
        src = np.repeat(self._src, high - low + 1)
        # A run may pass over replicas without tokens.
        some = self._first[dest] < self._first[dest + 1]
        pairs = np.unique(src[some] * len(self.tokens) + dest[some])
        return np.divmod(pairs, len(self.tokens))

    def _holders(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Holder of rows, and their places in what it brings."""
        run = np.searchsorted(self._start, rows, side="right") - 1
        return self._src[run], self._at[run] + rows - self._start[run]

    def _owners_of(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Owner and place of ascending rows."""
        cuts = np.searchsorted(rows, self._first)
        parts = [
            self._owners_at(dest, rows[low:high] - self._first[dest])
            for dest, (low, high) in enumerate(zip(cuts[:-1], cuts[1:], strict=True))
            if low < high
        ]
        none = np.empty(0, dtype=np.int64)
        owners, places = zip(*parts, strict=True) if parts else ([none], [none])
        return np.concatenate(owners), np.concatenate(places)

    def _owned_by(self, dest: int, owner: int) -> np.ndarray:
        """Rows of a language replica that one of its owners owns, ascending."""
        tokens, (cp_size, tp_size) = self.tokens[dest], self.group.sequence_parts
        cp = owner // tp_size % cp_size
        if cp_size == 1:
            spans = np.array([[0, tokens.batch * tokens.seq_len]])
        elif tokens.cu_seqlens is None:
            spans = np.array(dense_spans(tokens.seq_len, cp, cp_size))
            starts = np.arange(tokens.batch)[:, None, None] * tokens.seq_len
            spans = (starts + spans).reshape(-1, 2)
        else:
            spans = np.array(packed_spans(tokens.cu_seqlens, cp, cp_size)).reshape(-1, 2)
        # Of runs that lie beside what the CP rank has, no row is looked at.
        start, length = tokens.runs.T
        span = np.searchsorted(spans[:, 1], start, side="right")
        begins = np.append(spans[:, 0], np.iinfo(np.int64).max)[span]
        meets = begins < start + length
        first = np.cumsum(length) - length
        rows = expand(np.stack([first[meets], length[meets]], axis=1))
        return rows[self._owners_at(dest, rows)[0] == owner]

    def _owners_at(self, dest: int, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Owners of some rows of a language replica, and their places in the local batches."""
        tokens = self.tokens[dest]
        start, length = tokens.runs.T
        first = np.cumsum(length) - length
        run = np.searchsorted(first, rows, side="right") - 1
        positions = start[run] + rows - first[run]
        sample, position = np.divmod(positions, max(tokens.seq_len, 1))
        cp, tp, local = self._cut(position, tokens)
        place = local * tokens.batch + sample
        return self.group.owner(dest, cp, tp), place

    def _cut(
        self, position: np.ndarray, tokens: TokenRuns
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        parts = self.group.sequence_parts
        return position_owners(position, tokens.seq_len, *parts, tokens.cu_seqlens)

    # -- construction ----------------------------------------------------------------------

    def _sort_runs(self) -> None:
        """All runs by their first row: start, length, holder, place there."""
        counts = [len(runs) for runs in self.held]
        start, length = np.concatenate(self.held).T
        src = np.repeat(np.arange(len(counts), dtype=np.int64), counts)
        at = np.concatenate([np.cumsum(runs[:, 1]) - runs[:, 1] for runs in self.held])
        outside = np.flatnonzero((length > 0) & ((start < 0) | (start + length > self.total)))
        if outside.size:
            holder = int(src[outside[0]])
            rows = expand(self.held[holder])
            replica, cp = divmod(holder, self.group.layout.src_cp_size)
            at = f", CP rank {cp}," if self.group.layout.src_cp_size > 1 else ""
            raise ValueError(
                f"Encoder replica {self.group.src_dps[replica]}{at} holds rows {rows.min()} to "
                f"{rows.max()}, but the exchange group's rows are 0 to {self.total - 1}"
            )
        order = np.argsort(start, kind="stable")
        order = order[length[order] > 0]
        self._start, self._length = start[order], length[order]
        self._src, self._at = src[order], at[order]
        # As many places as rows: a row that is held twice leaves another one out.
        reach = np.maximum.accumulate(np.append(0, self._start + self._length))
        missing = np.flatnonzero(np.append(self._start, self.total) > reach)
        if missing.size:
            raise ValueError(
                f"Row {reach[missing[0]]} of {self.total} is held by no encoder replica and "
                "another one is held twice; assign each row to exactly one replica"
            )
