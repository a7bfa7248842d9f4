# SPDX-License-Identifier: Apache-2.0
"""The next token of every sample, out of logits that are cut over TP and CP; no gradient.

A rank of CP owns some of the positions that are asked for, a rank of TP has a shard of the
vocabulary. Each rank finds the best of what it has, and ranks exchange one pair (score, token) per
sample, ``16 b`` bytes. To draw a token instead, all ranks add the same Gumbel noise to the scores
and take the best again, which draws with the probabilities of a softmax. What top-k and top-p leave
out is below one score, which the ranks of TP find with the best scores of their shards.

The noise is a function of the seed and of what a sample is called, so a draw does not depend on the
layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron.core.models.mimo.job.logits import gather
from megatron.core.process_groups_config import ProcessGroupCollection

_FIRST = 64  # best scores of a shard that are exchanged first to find what top-p keeps


@dataclass(frozen=True)
class Choice:
    """How a token is chosen.

    Attributes:
        vocabulary: tokens that there are; logits behind them are padding.
        temperature: that scores are divided by before one is drawn; 0 takes the likeliest token.
        top_k: draw among so many of the likeliest; 0 for all.
        top_p: draw among the likeliest that together have this probability.
        seed: of the draws.
    """

    vocabulary: int
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0


def rows_at(
    logits: Tensor, places: Sequence[tuple[int, int]], positions: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Return the logits at some places, and which of them this rank has: ``(n, V/tp)``, ``(n,)``.

    Args:
        logits: of this rank, ``(b, S/cp, V/tp)``.
        places: row of the batch and position in the whole sequence, of each.
        positions: in the whole sequence, that this rank has.
    """
    local = {position: at for at, position in enumerate(positions)}
    at = [local.get(position, -1) for _, position in places]
    return logits[[row for row, _ in places], at], torch.tensor(at, device=logits.device) >= 0


def next_tokens(
    rows: Tensor,
    owned: Tensor,
    groups: ProcessGroupCollection,
    choice: Choice,
    names: Sequence[Sequence[int]],
) -> Tensor:
    """Return the tokens that follow, int64 ``(n,)``, the same on all ranks of TP and CP.

    Args:
        rows: logits of this rank's shard of the vocabulary, ``(n, V/tp)``.
        owned: bool ``(n,)``: the logits are those that are asked for; of each place on one CP rank.
        groups: the language model's.
        choice: how.
        names: of each draw: whole numbers from 0, such as a sample's number and the step.

    Returns:
        Of equally good tokens the first; -1 where a logit is not a number.
    """
    width = rows.shape[1]
    first = groups.tp.rank() * width
    scores = rows.double()
    scores[:, max(choice.vocabulary - first, 0) :] = -torch.inf
    broken = scores.isnan().any(dim=1)
    if choice.temperature:
        scores /= choice.temperature
        lowest = lowest_drawn(scores, choice, groups.tp)
        left_out = scores < lowest[:, None]
        scores += _noise(names, choice, first, width).to(scores.device)
        scores[left_out] = -torch.inf
    best, token = scores.max(dim=1)
    best[broken] = torch.nan  # which is the largest of all for argmax
    best[~owned] = -torch.inf
    own = torch.stack([best, (token + first).double()])
    everywhere = gather(gather(own[None], groups.tp, dim=0), groups.cp, dim=0)
    winner = everywhere[:, 0].argmax(dim=0, keepdim=True)
    best, token = (everywhere[:, part].gather(0, winner)[0] for part in (0, 1))
    return torch.where(best.isnan(), -1, token.long())


def lowest_drawn(scores: Tensor, choice: Choice, tp: dist.ProcessGroup) -> Tensor:
    """Return the lowest score that may be drawn, ``(n,)``; -inf where all may.

    Args:
        scores: of this rank's shard of the vocabulary, ``(n, V/tp)``.
        choice: with top-k, which comes first, and top-p.
        tp: ranks that have the shards.
    """
    lowest = scores.new_full((len(scores),), -torch.inf)
    width = scores.shape[1]
    if choice.top_k:
        best = gather(scores.topk(min(choice.top_k, width)).values, tp, dim=1)
        lowest = best.topk(min(choice.top_k, best.shape[1])).values[:, -1]
    if choice.top_p >= 1:
        return lowest
    scores = scores.masked_fill(scores < lowest[:, None], -torch.inf)
    whole = gather(scores.logsumexp(dim=1, keepdim=True), tp, dim=1).logsumexp(dim=1, keepdim=True)
    count = min(_FIRST, width)
    while True:
        best = gather(scores.topk(count).values[:, None], tp, dim=1)
        # Above the last one of every shard nothing is missing.
        missing = best[..., -1].amax(dim=1)
        best = best.flatten(1).sort(descending=True).values
        last = ((best - whole).exp().cumsum(dim=1) < choice.top_p).sum(dim=1, keepdim=True)
        too_few = last[:, 0] == best.shape[1]
        found = best.gather(1, last.clamp(max=best.shape[1] - 1))[:, 0]
        if count == width or not (too_few | (found < missing)).any():
            return torch.maximum(lowest, found)
        count = min(4 * count, width)


def _noise(
    names: Sequence[Sequence[int]], choice: Choice, first: int, width: int
) -> Tensor:
    """Gumbel noise of a shard of the vocabulary, drawn for all of it: float64 ``(n, V/tp)``."""
    whole = np.zeros((len(names), max(choice.vocabulary, first + width)))
    for row, name in zip(whole, names, strict=True):
        generator = np.random.default_rng([choice.seed, *name])
        row[: choice.vocabulary] = generator.gumbel(size=choice.vocabulary)
    return torch.from_numpy(whole[:, first : first + width].copy())
