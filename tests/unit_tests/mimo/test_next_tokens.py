# SPDX-License-Identifier: Apache-2.0
"""The next token out of logits that are cut over TP and CP, against whole logits."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper
from transformers.generation import TopKLogitsWarper, TopPLogitsWarper

from megatron.core.models.mimo.job import next_tokens as module
from megatron.core.models.mimo.job.next_tokens import Choice, next_tokens, rows_at
from megatron.core.models.mimo.partition.sequence_order import dense_positions, packed_positions
from tests.unit_tests.mimo.in_process_ranks import InProcessGroup, InProcessWorld

LENGTH, WIDTH, REAL = 16, 1024, 1001
LAYOUTS = [(1, 1), (2, 1), (1, 2), (4, 2), (2, 4)]
PLACES = [(0, 0), (1, 15), (2, 7), (3, 8)]
DRAWS = {
    "plain": {"temperature": 1.0},
    "warm": {"temperature": 2.5, "seed": 3},
    "top-k": {"temperature": 1.3, "top_k": 5},
    "top-k over all": {"temperature": 1.3, "top_k": 5000},
    "top-p": {"temperature": 1.0, "top_p": 0.5},
    # Flat scores: what is kept is more than shards exchange first.
    "flat top-p": {"temperature": 50.0, "top_p": 0.9},
    "both": {"temperature": 2.0, "top_k": 40, "top_p": 0.7, "seed": 1},
}


def scores(seed: int = 0, spread: float = 3.0) -> torch.Tensor:
    """Whole logits; those behind the vocabulary are the best, and must not win."""
    made = torch.randn(4, LENGTH, WIDTH, generator=torch.Generator().manual_seed(seed)) * spread
    made[..., REAL:] = 99.0
    return made


def groups_of(rank: int, tp: int, cp: int) -> Any:
    t, c = rank % tp, rank // tp
    return SimpleNamespace(
        tp=InProcessGroup(f"tp{c}", tuple(c * tp + n for n in range(tp)), rank),
        cp=InProcessGroup(f"cp{t}", tuple(n * tp + t for n in range(cp)), rank),
    )


def found(whole: torch.Tensor, tp: int, cp: int, choice: Choice, names: Any) -> list[int]:
    """The tokens that every rank of a layout finds, which are the same."""

    def body(rank: int) -> list[int]:
        groups = groups_of(rank, tp, cp)
        positions = dense_positions(LENGTH, groups.cp.rank(), cp)
        own = whole[:, positions].chunk(tp, dim=2)[groups.tp.rank()]
        rows, owned = rows_at(own, PLACES, positions)
        return next_tokens(rows, owned, groups, choice, names).tolist()

    first, *others = InProcessWorld(tp * cp).run(body)
    assert all(each == first for each in others)
    return first


def last(whole: torch.Tensor) -> torch.Tensor:
    return torch.stack([whole[row, at, :REAL] for row, at in PLACES])


NAMES = [(number, 5) for number in range(4)]


@pytest.mark.parametrize(("tp", "cp"), LAYOUTS)
def test_the_likeliest_is_that_of_whole_logits(tp: int, cp: int) -> None:
    whole = scores()
    expected = last(whole).argmax(dim=1).tolist()
    assert found(whole, tp, cp, Choice(REAL), NAMES) == expected
    # Of equally good ones the first, in whichever shard; half precision has many.
    tied = whole.clone()
    tied[..., [3, 600, 1000]] = 50.0
    assert found(tied, tp, cp, Choice(REAL), NAMES) == [3] * 4
    half = (whole / 3).round().to(torch.bfloat16)
    assert found(half, tp, cp, Choice(REAL), NAMES) == last(half).argmax(dim=1).tolist()
    # The control: padding that counts is noticed.
    assert found(whole, tp, cp, Choice(WIDTH), NAMES) == [REAL] * 4


@pytest.mark.parametrize("kind", DRAWS)
def test_draws_do_not_depend_on_the_layout(kind: str) -> None:
    whole, fields = scores(spread=1.0), DRAWS[kind]
    drawn = [found(whole, *layout, Choice(REAL, **fields), NAMES) for layout in LAYOUTS]
    assert drawn == [drawn[0]] * len(LAYOUTS)
    # The control: other steps and other seeds draw others.
    for names, seed in (([(n, 6) for n in range(4)], 0), (NAMES, 99)):
        other = Choice(REAL, **{**fields, "seed": fields.get("seed", 0) + seed})
        assert found(whole, 2, 2, other, names) != drawn[0]


def warped(rows: torch.Tensor, choice: Choice) -> torch.Tensor:
    """Probabilities by transformers' own warpers."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(choice.temperature)])
    if choice.top_k:
        warpers.append(TopKLogitsWarper(choice.top_k))
    if choice.top_p < 1:
        warpers.append(TopPLogitsWarper(choice.top_p))
    return warpers(torch.zeros(len(rows), 1, dtype=torch.long), rows.double()).softmax(dim=1)


def misses(choice: Choice, counted: Choice) -> float:
    """Largest distance between how often tokens are drawn and their probability, of all rows."""
    whole, draws = scores(spread=2.0), 400
    expected = warped(last(whole), counted)
    rows = last(whole).repeat(draws, 1)
    alone = groups_of(0, 1, 1)
    names = [(number, 0) for number in range(len(rows))]
    owned = torch.ones(len(rows), dtype=torch.bool)
    tokens = next_tokens(rows.clone(), owned, alone, choice, names).view(draws, 4)
    counts = torch.stack([torch.bincount(each, minlength=REAL) for each in tokens.T])
    return (counts / draws - expected).abs().sum(dim=1).max().item() / 2


@pytest.mark.parametrize("kind", ["top-k", "top-p", "both"])
def test_draws_have_the_probabilities_of_transformers(kind: str) -> None:
    """Few tokens are left, so 400 draws tell; half of the summed distance, 1 for disjoint ones."""
    choice = Choice(REAL, **{**DRAWS[kind], "top_p": 0.2 if kind == "top-p" else 1.0, "top_k": 6})
    assert misses(choice, choice) < 0.1
    hotter = Choice(REAL, temperature=4 * choice.temperature, top_k=6)
    assert misses(hotter, choice) > 0.15


@pytest.mark.parametrize("kind", DRAWS)
@pytest.mark.parametrize("tp", [1, 4])
def test_what_may_be_drawn_is_what_transformers_keep(kind: str, tp: int) -> None:
    choice, whole = Choice(REAL, **DRAWS[kind]), last(scores())
    check_kept(whole, choice, tp)


def test_a_shard_that_has_more_good_scores_than_it_sent_is_asked_again() -> None:
    """The first scores of all shards would do, but better ones of one shard are not among them."""
    whole = torch.full((4, REAL), -30.0)
    whole[:, :256] = -torch.arange(256) / 1000
    whole[:, 300:364] = -0.5
    check_kept(whole, Choice(REAL, temperature=1.0, top_p=0.3), tp=4)


def check_kept(whole: torch.Tensor, choice: Choice, tp: int) -> None:
    expected = warped(whole, choice) > 0
    padded = torch.cat([whole, whole.new_full((4, WIDTH - REAL), -torch.inf)], dim=1).double()

    def body(rank: int) -> torch.Tensor:
        own = padded.chunk(tp, dim=1)[rank] / choice.temperature
        lowest = module.lowest_drawn(own, choice, groups_of(rank, tp, 1).tp)
        return (own >= lowest[:, None]) & own.isfinite()

    kept = torch.cat(InProcessWorld(tp).run(body), dim=1)[:, :REAL]
    # Probabilities are summed in another order, so the last one may fall on either side.
    assert ((kept != expected).sum(dim=1) <= (choice.top_p < 1)).all()
    assert kept.sum(dim=1).min() >= 1


@pytest.mark.parametrize(("tp", "cp"), [(1, 1), (4, 2)])
@pytest.mark.parametrize("draw", [{}, DRAWS["both"]])
def test_what_is_no_number_is_said_on_every_rank(tp: int, cp: int, draw: dict[str, Any]) -> None:
    whole = scores()
    whole[1, 15, 700] = torch.nan
    tokens = found(whole, tp, cp, Choice(REAL, **draw), NAMES)
    assert tokens[1] == -1
    assert all(token >= 0 for token in np.delete(tokens, 1))


def test_places_of_packed_samples() -> None:
    ends, cp = [0, 8, 24], 2
    whole = torch.arange(24.0).view(1, 24, 1)
    places = [(0, 5), (0, 8), (0, 23)]
    rows = torch.zeros(3, 1)
    for rank in range(cp):
        positions = packed_positions(ends, rank, cp)
        own, owned = rows_at(whole[:, positions], places, positions)
        rows[owned] += own[owned]
    assert rows[:, 0].tolist() == [5, 8, 23]
