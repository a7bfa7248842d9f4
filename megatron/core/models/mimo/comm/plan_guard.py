# SPDX-License-Identifier: Apache-2.0
"""What the ranks of an exchange group tell each other on the host before any row moves.

A rank that exchanges by another plan, or brings rows of another width or dtype, or needs no
gradient where others do, would leave its peers waiting or with garbage. So each rank states what
it brings, in one fixed-size message over a host-side group, and all of them compare all messages:
what differs is one error, the same on every rank.

Cost: one all-gather of :data:`MESSAGE` integers (512 bytes) per rank, on the host. It does not
touch the device; what the device is still computing goes on. Token places that do not fit the
message (more than about 20 stretches of tokens per replica) cost a second all-gather.

A :class:`Comparison` is started, and its result is asked for later: what is known before the
encoders run is compared while they run.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron.core.models.mimo.comm.plan.routed_layout import ExchangeGroup, brief
from megatron.core.models.mimo.comm.plan.routes import PlanDigest
from megatron.core.models.mimo.comm.plan.token_runs import TokenRuns

MESSAGE = 64
_HEADER = (
    "problem",
    "plan given",
    "layout",
    "tokens",
    "held",
    "dtype",
    "width",
    "requires_grad",
    "rows",
    "planned rows",
    "batch",
    "seq_len",
    "cu_seqlens",
    "runs",
)
_INLINE = MESSAGE - len(_HEADER)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# What communication says when another rank is gone or does not answer.
LOST_PEER = re.compile(r"gloo|NCCL|[Tt]imed out|Connection (closed|reset|refused)|Broken pipe")
_AT = {name: column for column, name in enumerate(_HEADER)}


@dataclass(frozen=True)
class _Field:
    """A column that must be equal in the whole group: its name in words, and what to do."""

    column: str
    words: str
    advice: str
    show: Callable[[int], str] = str


def _number(value: int) -> str:
    return f"{value & 0xFFFF_FFFF_FFFF_FFFF:016x}"


_FIELDS = (
    _Field(
        "plan given",
        "whether a route plan was made ahead",
        "Give one on every rank of the group or on none, for all modalities or for the same.",
        lambda value: ("no", "yes", "yes, and announced")[value],
    ),
    _Field(
        "dtype",
        "the rows' dtype",
        "Cast the encoder output to one dtype.",
        lambda value: str(_DTYPES[value]) if value >= 0 else "another dtype",
    ),
    _Field("width", "the rows' width", "Project to the language model's hidden size everywhere."),
    _Field(
        "requires_grad",
        "whether the rows need a gradient",
        "Freeze or train the encoder on all ranks alike; a rank without rows brings an empty "
        "tensor that is tied to the encoder's parameters.",
        lambda value: str(bool(value)),
    ),
    _Field(
        "layout",
        "the plan's layout",
        "Make the bridge from the same grids on every rank.",
        _number,
    ),
    _Field(
        "tokens",
        "the plan's token positions",
        "Plan from the same global batch on every rank of the group.",
        _number,
    ),
    _Field(
        "held",
        "the plan's rows per encoder replica",
        "Assign the rows to the encoder replicas by the same rule on every rank.",
        _number,
    ),
)


@dataclass(frozen=True)
class Statement:
    """What one rank brings to an exchange.

    Attributes:
        rows: the encoder output ``(n, H)``.
        tokens: where the tokens of its language replica stand.
        digest: of the plan that it was given; ``None`` if it has none.
        planned_rows: rows that this plan expects of it.
        problem: why this rank cannot go on, in one sentence.
    """

    announced = False
    rows: torch.Tensor
    tokens: TokenRuns
    digest: PlanDigest | None = None
    planned_rows: int = 0
    problem: str | None = None

    def header(self) -> list[int]:
        """Return the fixed part of the message."""
        digest, tokens = self.digest or PlanDigest(0, 0, 0), self.tokens
        dtype = self.rows.dtype
        return [
            self.problem is not None,
            0 if self.digest is None else 2 if self.announced else 1,
            digest.layout,
            digest.tokens,
            digest.held,
            _DTYPES.index(dtype) if dtype in _DTYPES else -1,
            self.rows.size(-1),
            self.rows.requires_grad,
            self.planned_rows if self.announced else self.rows.size(0),
            self.planned_rows,
            tokens.batch,
            tokens.seq_len,
            -1 if tokens.cu_seqlens is None else len(tokens.cu_seqlens),
            len(tokens.runs),
        ]

    def places(self) -> np.ndarray:
        """Return the token places, cumulative lengths, then runs; none beside a plan."""
        if self.digest is not None:
            return np.empty(0, dtype=np.int64)
        packed = np.array(self.tokens.cu_seqlens or (), dtype=np.int64)
        return np.concatenate([packed, self.tokens.runs.reshape(-1)])


class Announcement(Statement):
    """What one rank is going to bring, before its encoder runs: as many rows as planned."""

    announced = True


@dataclass(frozen=True)
class Agreed:
    """What the group found: equal headers, and everybody's rows and token places.

    Attributes:
        rows: rows of each encoder replica of the group; with CP of each of its CP ranks.
        tokens: token places of each language replica.
        key: all of it as bytes, to recognise a batch like an earlier one.

    All of them are empty if a plan was given.
    """

    rows: list[int]
    tokens: list[TokenRuns]
    key: bytes


class Comparison:
    """What the ranks of an exchange group bring, on its way to all of them.

    Every rank of the group starts it, and then asks for its :meth:`result`, in one order with all
    that the group does over ``control``.

    Args:
        name: of the bridge, for messages.
        group: the exchange group.
        control: a process group over its ranks that takes host tensors; ``None`` if this rank is
            alone in it.
        mine: this rank's statement.
        so_far: what is true of the rows if a rank has a problem, for messages.
    """

    def __init__(
        self,
        name: str,
        group: ExchangeGroup,
        control: dist.ProcessGroup | None,
        mine: Statement,
        so_far: str,
    ) -> None:
        self._where = f"Bridge {name}, exchange group of ranks {brief(group.ranks)}"
        self._group, self._control, self._mine = group, control, mine
        self._so_far = so_far
        self._places = mine.places()
        message = np.zeros(MESSAGE, dtype=np.int64)
        message[: len(_HEADER)] = mine.header()
        message[len(_HEADER) :][: self._places.size] = self._places[:_INLINE]
        self._gathered = _start_all_gather(message, control)

    def wait(self) -> None:
        """Wait for what all ranks say, which :meth:`result` does as well."""
        self._gathered()

    def result(self) -> Agreed:
        """Wait for all ranks and compare; every rank of the group calls it.

        Raises:
            ValueError: the same on every rank: a rank has a problem, or two statements differ.
        """
        where, group, places = self._where, self._group, self._places
        table = self._gathered()
        header, inline = table[:, : len(_HEADER)], table[:, len(_HEADER) :]
        if self._mine.digest is not None and _nothing_differs(header):
            return Agreed([], [], b"")
        self._refuse_problems(header)
        for field in _FIELDS:
            _refuse_differences(where, group, header[:, _AT[field.column]], field)
        given = self._mine.digest is not None
        if given:
            _refuse_other_rows(where, group, header)
        rows = _per_replica(where, group.src_of, group, header[:, [_AT["rows"]]], "rows")
        if given:
            return Agreed([], [], b"")
        lengths = np.maximum(header[:, _AT["cu_seqlens"]], 0) + 2 * header[:, _AT["runs"]]
        if lengths.max() > _INLINE:
            padded = np.zeros(lengths.max(), dtype=np.int64)
            padded[: places.size] = places
            inline = _start_all_gather(padded, self._control)()
        first = _AT["batch"]
        stated = np.concatenate([header[:, first:], inline], axis=1)
        stated = _per_replica(where, group.dest_of, group, stated, "token positions")
        tokens = [
            _tokens(each[: len(_HEADER) - first], each[len(_HEADER) - first :]) for each in stated
        ]
        return Agreed(rows[:, 0].tolist(), tokens, rows.tobytes() + stated.tobytes())

    def _refuse_problems(self, header: np.ndarray) -> None:
        if not header[:, _AT["problem"]].any():
            return
        problems = [self._mine.problem] * self._group.size
        if self._control is not None:
            dist.all_gather_object(problems, self._mine.problem, group=self._control)
        told = zip(self._group.ranks.tolist(), problems, strict=True)
        said = words_of({rank: text for rank, text in told if text is not None})
        raise ValueError(f"{self._where}: {self._so_far}. {said}")


def items_of_replicas(
    name: str, group: ExchangeGroup, control: dist.ProcessGroup | None, items: Sequence[int]
) -> list[list[int]]:
    """Return the whole items of every encoder replica of the group; every rank of it calls this.

    Args:
        name, group, control: as for :class:`Comparison`, whose result has been heard.
        items: rows of each item that this rank's replica encodes.

    Raises:
        ValueError: the same on every rank: ranks of one replica encode other items.
    """
    mine = [int(rows) for rows in items]
    told = [mine] * group.size
    if control is not None:
        dist.all_gather_object(told, mine, group=control)
    replica = group.src_of // group.layout.src_cp_size
    _, first = np.unique(replica, return_index=True)
    for place, one in enumerate(first[replica].tolist()):
        if told[place] != told[one]:
            raise ValueError(
                f"Bridge {name}: ranks {group.ranks[one]} and {group.ranks[place]} are of one "
                f"encoder replica, but encode items of {_some(told[one])} and {_some(told[place])} "
                "rows. Give these ranks the same batch."
            )
    return [told[place] for place in first.tolist()]


def _some(items: Sequence[int]) -> str:
    return f"{len(items)} items" if len(items) > 8 else str(list(items))


def problem_of(error: BaseException, what: str) -> str | None:
    """Return the sentence that tells other ranks of an error of this one's.

    ``None`` for a lost peer: the others lose it too, and waiting for them would only add to it.

    >>> problem_of(KeyError("pixels"), "the encoder of images")
    "the encoder of images raised KeyError: 'pixels'"
    """
    text = str(error).strip()
    if isinstance(error, RuntimeError) and LOST_PEER.search(text):
        return None
    return f"{what} raised {type(error).__name__}" + (f": {text}" if text else "")


def hear(
    group: ExchangeGroup,
    control: dist.ProcessGroup | None,
    problems: Mapping[int, str],
    count: int,
) -> dict[int, str]:
    """Return everybody's problems before anything is encoded; every rank of the group calls this.

    One all-gather of two integers, and the words only if there are any.

    Args:
        group, control: as for :class:`Comparison`.
        problems: rank -> why it cannot go on, as far as this rank knows.
        count: of the microbatches that this rank is about to encode.

    Returns:
        rank -> its problem; the same on every rank. Another number of microbatches than most
        ranks have is a problem too.
    """
    table = _start_all_gather(np.array([bool(problems), count], dtype=np.int64), control)()
    told: list[Mapping[int, str]] = [{}] * group.size
    if table[:, 0].any():
        told = [problems] * group.size
        if control is not None:
            dist.all_gather_object(told, dict(problems), group=control)
    return merge_problems(group.ranks.tolist(), told, table[:, 1].tolist())


def merge_problems(
    ranks: Sequence[int], told: Sequence[Mapping[int, str]], counts: Sequence[int]
) -> dict[int, str]:
    """Return what ranks told each other before they encode, as :func:`hear` returns it.

    >>> merge_problems([4, 5, 6], [{}] * 3, [2, 2, 1])
    {6: 'it encodes 1 microbatches, others 2; give all ranks as many'}
    """
    problems = {rank: text for each in told for rank, text in each.items()}
    if problems:
        return problems
    usual = max(set(counts), key=counts.count)
    return {
        rank: f"it encodes {count} microbatches, others {usual}; give all ranks as many"
        for rank, count in zip(ranks, counts, strict=True)
        if count != usual
    }


def words_of(problems: Mapping[int, str]) -> str:
    """Return problems by rank as one sentence; ranks with the same one are named together.

    >>> words_of({3: "out of images", 2: "out of images", 5: "no labels"})
    'ranks 2-3: out of images; rank 5: no labels'
    """
    ranks: dict[str, list[int]] = {}
    for rank, text in sorted(problems.items()):
        ranks.setdefault(text, []).append(rank)
    return "; ".join(f"{_ranks(np.array(found))}: {text}" for text, found in ranks.items())


def _nothing_differs(header: np.ndarray) -> bool:
    """Whether ranks with plans are at one, in a few microseconds; if not, in what is looked for.

    Equal plans have the same rows for the copies of a replica.
    """
    equal = header[:, : _AT["rows"]]  # the problem, and all that must be equal
    return bool(
        (equal == equal[0]).all()
        and not equal[0, 0]
        and (header[:, _AT["rows"]] == header[:, _AT["planned rows"]]).all()
    )


def _start_all_gather(
    message: np.ndarray, control: dist.ProcessGroup | None
) -> Callable[[], np.ndarray]:
    """Start gathering everybody's integers; what comes back waits: ``(n,)`` -> ``(ranks, n)``."""
    if control is None:
        return lambda: message[None]
    mine = torch.from_numpy(message)
    table = torch.empty((dist.get_world_size(control), mine.numel()), dtype=mine.dtype)
    work: Any = dist.all_gather_into_tensor(table.view(-1), mine, group=control, async_op=True)
    # What a running collective reads lives until it was waited for.
    running = work, mine

    def wait() -> np.ndarray:
        running[0].wait()
        return table.numpy()

    return wait


def _tokens(header: np.ndarray, places: np.ndarray) -> TokenRuns:
    batch, seq_len, packed, runs = header.tolist()
    used = max(packed, 0)
    lengths = None if packed < 0 else tuple(places[:used].tolist())
    return TokenRuns(batch, seq_len, places[used : used + 2 * runs].reshape(-1, 2).copy(), lengths)


def _refuse_differences(
    where: str, group: ExchangeGroup, column: np.ndarray, field: _Field
) -> None:
    if (column == column[0]).all():
        return
    # The most frequent value first: the odd ones out are what one looks for.
    values, counts = np.unique(column, return_counts=True)
    said = "; ".join(
        f"{field.show(int(value))} on {_ranks(group.ranks[column == value])}"
        for value in values[np.argsort(-counts, kind="stable")]
    )
    raise ValueError(f"{where}: {field.words} must be the same on all of them, got {said}. "
                     f"{field.advice}")  # fmt: skip


def _refuse_other_rows(where: str, group: ExchangeGroup, header: np.ndarray) -> None:
    rows, planned = header[:, _AT["rows"]], header[:, _AT["planned rows"]]
    wrong = np.flatnonzero(rows != planned)
    if wrong.size:
        said = "; ".join(
            f"rank {group.ranks[i]} brings {rows[i]}, the plan expects {planned[i]}" for i in wrong
        )
        raise ValueError(
            f"{where}: rows of the encoders do not match the plan: {said}. Give modality_inputs "
            "of the same batch that the plan was made from."
        )


def _per_replica(
    where: str, replica: np.ndarray, group: ExchangeGroup, values: np.ndarray, words: str
) -> np.ndarray:
    """One row of ``values`` per replica, which all its ranks must state alike."""
    _, first = np.unique(replica, return_index=True)
    other = np.flatnonzero((values != values[first[replica]]).any(axis=1))
    if other.size:
        one = int(other[0])
        same = group.ranks[replica == replica[one]]
        reference = group.ranks[first[replica[one]]]
        raise ValueError(
            f"{where}: {_ranks(same)} are copies of one replica and must have the same {words}, "
            f"but those of {_ranks(group.ranks[other])} differ from those of rank {reference}"
            + (
                f" ({values[one, 0]} and {values[first[replica[one]], 0]})"
                if words == "rows"
                else ""
            )
            + ". Give these ranks the same batch."
        )
    return values[first]


def _ranks(ranks: np.ndarray | Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {brief(np.asarray(ranks))}"
