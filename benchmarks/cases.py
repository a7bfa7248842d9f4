# SPDX-License-Identifier: Apache-2.0
"""Pairs of layouts, and batches of tokens on them. Pure integers: no torch, no process group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from megatron.core.hyper_comm_grid import GridShape
from megatron.core.models.mimo.comm.plan.gather_layout import BridgeDirection, BridgeLayout
from megatron.core.models.mimo.comm.plan.routed_layout import RouteLayout
from megatron.core.models.mimo.comm.plan.token_runs import TokenRuns
from megatron.core.models.mimo.partition.sequence_order import dense_positions
from mimo_colocated.launch.errors import JobError
from mimo_colocated.launch.layouts import Layout

# Samples of a language replica; at least one for every encoder replica of up to 8 ranks.
SAMPLES = 8


@dataclass(frozen=True)
class Pair:
    """Encoder's and language model's layout over the same ranks.

    >>> pair = Pair.parse("tp=1,dp=8/tp=1,cp=4,dp=2")
    >>> pair.world_size, pair.direction.value, pair.scale, pair.language.cp
    (8, 'fan_in', 4, 4)
    """

    vision: Layout
    language: Layout

    @classmethod
    def parse(cls, text: str) -> Pair:
        """Read ``"tp=1,dp=8/tp=1,cp=4,dp=2"``: encoder, a slash, language model.

        Raises:
            JobError: what is wrong, and an example.
        """
        vision, slash, language = text.partition("/")
        if not slash:
            raise JobError(
                f"--layout {text!r}: give the encoder's layout, a slash and the language model's, "
                "as in tp=2,dp=4/tp=2,cp=2,dp=2"
            )
        pair = cls(Layout.parse(vision, "vision"), Layout.parse(language, "language"))
        try:
            pair.route_layout() if pair.language.pp > 1 else pair.bridge_layout()
        except ValueError as error:
            raise JobError(f"--layout {text!r}: {error}") from error
        if SAMPLES * pair.language.dp % pair.vision.dp:
            raise JobError(
                f"--layout {text!r}: the {SAMPLES * pair.language.dp} samples of the batch cannot "
                f"be shared evenly by {pair.vision.dp} encoder replicas; use a power of two"
            )
        return pair

    def __str__(self) -> str:
        return f"{self.vision}/{self.language}"

    @property
    def world_size(self) -> int:
        """Ranks."""
        return self.language.size

    @cached_property
    def shapes(self) -> tuple[GridShape, GridShape]:
        """The grids, without process groups, with the dims of ``make_grid``."""
        vision, language = self.vision, self.language
        names = ("tp", "cp", "dp", "pp")
        return (
            GridShape((vision.tp, 1, vision.dp, 1), names),
            GridShape((language.tp, language.cp, language.dp, language.pp), names),
        )

    def bridge_layout(self) -> BridgeLayout:
        """What the gather bridge executes."""
        return BridgeLayout.from_grids(*self.shapes, "images", "language")

    def route_layout(self) -> RouteLayout:
        """What routes are planned on."""
        return RouteLayout.from_grids(*self.shapes, "images", "language")

    @property
    def direction(self) -> BridgeDirection:
        """Which side has more replicas."""
        return self.bridge_layout().direction

    @property
    def scale(self) -> int:
        """Finer DP size over coarser DP size."""
        return self.bridge_layout().scale


FAN_IN_4_4 = Pair(Layout(tp=1, dp=8), Layout(tp=1, cp=4, dp=2))
FAN_IN_2_2 = Pair(Layout(tp=2, dp=4), Layout(tp=2, cp=2, dp=2))
FAN_IN_8_8 = Pair(Layout(tp=1, dp=8), Layout(tp=1, cp=8, dp=1))
FAN_IN_2_1 = Pair(Layout(tp=1, dp=8), Layout(tp=2, dp=4))
EQUAL_2 = Pair(Layout(tp=2, dp=4), Layout(tp=1, cp=2, dp=4))
EQUAL_4 = Pair(Layout(tp=4, dp=2), Layout(tp=1, cp=4, dp=2))
EQUAL_1 = Pair(Layout(tp=2, dp=4), Layout(tp=2, dp=4))
FAN_OUT_2_2 = Pair(Layout(tp=4, dp=2), Layout(tp=1, cp=2, dp=4))
FAN_OUT_2_1 = Pair(Layout(tp=4, dp=2), Layout(tp=2, dp=4))
PAIRS = (
    FAN_IN_4_4,
    FAN_IN_2_2,
    FAN_IN_8_8,
    FAN_IN_2_1,
    EQUAL_4,
    EQUAL_2,
    EQUAL_1,
    FAN_OUT_2_2,
    FAN_OUT_2_1,
)


@dataclass(frozen=True, eq=False)
class TokenBatch:
    """The modality's tokens of every language replica, and the rows of every encoder replica.

    Attributes:
        tokens: by language DP; all with the same batch size and sequence length.
        held: number of rows by encoder DP; consecutive, in DP order.
    """

    tokens: tuple[TokenRuns, ...]
    held: tuple[int, ...]

    @classmethod
    def uniform(cls, pair: Pair, rows: int, text_share: int = 0) -> TokenBatch:
        """Every sample alike, ``rows`` per language replica, spread evenly over the sequence.

        Args:
            pair: the layouts.
            rows: a multiple of 8 samples times ``2 * cp`` chunks.
            text_share: text tokens per four tokens; 0 for none.

        Raises:
            ValueError: rows that cannot be spread evenly; another ``text_share``.
        """
        if not 0 <= text_share < 4:
            raise ValueError(f"text_share must be 0 to 3 of four tokens, got {text_share}")
        per_sample, rest = divmod(rows, SAMPLES)
        length, uneven = divmod(4 * per_sample, 4 - text_share)
        if rest or uneven or length % (8 * pair.language.cp):
            raise ValueError(
                f"{rows} rows cannot be spread evenly over {SAMPLES} samples and the chunks of "
                f"cp={pair.language.cp} with {text_share} of 4 tokens being text"
            )
        mask = np.broadcast_to(np.arange(length) % 4 >= text_share, (SAMPLES, length))
        tokens = (TokenRuns.from_mask(mask),) * pair.language.dp
        total = rows * pair.language.dp
        return cls(tokens, (total // pair.vision.dp,) * pair.vision.dp)

    @classmethod
    def uneven(cls, pair: Pair, length: int, seed: int) -> TokenBatch:
        """Another number of images per sample and of tokens per image; some samples have none.

        Samples go to encoder replicas whole, so replicas hold different numbers of rows.
        """
        rng = np.random.default_rng(seed)
        masks = np.zeros((pair.language.dp * SAMPLES, length), dtype=bool)
        for sample in np.flatnonzero(rng.random(len(masks)) < 0.8):
            for _ in range(rng.integers(1, 5)):
                start = rng.integers(length)
                masks[sample, start : start + rng.integers(1, length // 3)] = True
        parts = np.split(masks, pair.language.dp)
        held = masks.reshape(pair.vision.dp, -1).sum(axis=1)
        return cls(tuple(TokenRuns.from_mask(part) for part in parts), tuple(held.tolist()))

    @property
    def rows(self) -> int:
        """Rows of one language replica, on average."""
        return sum(each.count for each in self.tokens) // len(self.tokens)

    def of_group(self, pair: Pair, rank: int) -> tuple[Sequence[TokenRuns], Sequence[int]]:
        """(tokens, held) of the replicas in a rank's exchange group, for ``plan_routes``."""
        group = pair.route_layout().group_of(rank)
        return [self.tokens[dp] for dp in group.dest_dps], [self.held[dp] for dp in group.src_dps]

    def held_rows(self, pair: Pair, rank: int) -> np.ndarray:
        """Which rows of the global batch a rank's encoder brings."""
        dp = pair.shapes[0].coords(rank)["dp"]
        return sum(self.held[:dp]) + np.arange(self.held[dp])

    def owned_rows(self, pair: Pair, rank: int) -> np.ndarray:
        """Which rows of the global batch have their tokens in a rank's part of the sequence.

        None on later pipeline stages: the first one builds the sequence.
        """
        at = pair.shapes[1].coords(rank)
        if at["pp"] > 0:
            return np.empty(0, dtype=np.int64)
        tokens = self.tokens[at["dp"]]
        row = np.full(tokens.batch * tokens.seq_len, -1)
        row[tokens.positions()] = np.arange(tokens.count)
        part = dense_positions(tokens.seq_len, at["cp"], pair.language.cp)
        mine = row.reshape(tokens.batch, -1)[:, part]
        return sum(each.count for each in self.tokens[: at["dp"]]) + np.sort(mine[mine >= 0])
