# SPDX-License-Identifier: Apache-2.0
"""The GPT-2-shaped classifier is Hugging Face's; over links without loss it trains bit for bit."""

from __future__ import annotations

import pytest
import torch

from megatron.core.models.mimo.lossy.loss_models import Bernoulli
from megatron.core.models.mimo.lossy.spec import LinkRule, LossySpec
from studies.lossy import gpt2
from studies.lossy.classifier import Size, groups_of, reference, train
from studies.lossy.digits import load
from tests.harness.backend import own_device

pytestmark = [pytest.mark.ranks(8), pytest.mark.once]

SIZE = Size(width=32, layers=2, heads=8)
# Of float32 sums in another order, over logits of order 0.1 to 1: what the issue asks for.
BOUND = 1e-4


def furthest_from_hugging_face(tp: int) -> float:
    whole = reference(SIZE, 3).to(own_device())
    with torch.no_grad():
        for parameter in whole.parameters():  # far from zero, biases and norms too
            count = torch.arange(parameter.numel(), device=parameter.device)
            parameter.add_(0.1 * torch.sin(count).view_as(parameter))
    ids = load()[1].ids[:6].to(own_device())
    with groups_of(tp) as groups, torch.no_grad():
        ours = gpt2.classifier(whole, groups).to(own_device())(ids)
    with torch.no_grad():
        theirs = whole(input_ids=ids).logits
    assert ours.shape == (6, 10)
    assert theirs.std() > 0.1
    return (ours - theirs).abs().max().item()


@pytest.mark.parametrize("tp", [1, 2, 8])
def test_scores_are_those_of_hugging_face(tp: int) -> None:
    assert furthest_from_hugging_face(tp) <= BOUND


def test_heads_in_another_order_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = gpt2.whole_weights

    def as_they_lie(whole: torch.nn.Module) -> dict[str, torch.Tensor]:
        found = weights(whole)
        name = "decoder.layers.0.self_attention.linear_qkv.weight"
        found[name] = whole.state_dict()["transformer.h.0.attn.c_attn.weight"].t()
        return found

    monkeypatch.setattr(gpt2, "whole_weights", as_they_lie)
    assert furthest_from_hugging_face(2) > 10 * BOUND


def test_sizes_that_tp_does_not_divide_are_refused() -> None:
    with groups_of(8) as groups, pytest.raises(ValueError, match="TP 8 must divide 4 heads"):
        gpt2.classifier(reference(Size(width=32, layers=1, heads=4), 0), groups)


def test_links_without_loss_leave_the_run_as_it_is() -> None:
    def run(loss: Bernoulli | None):
        rules = None if loss is None else LossySpec((LinkRule("*", loss, payload=64),), 1)
        return train(2, rules, steps=3, every=2, seed=1, size=SIZE)

    plain, none, lossy = run(None), run(Bernoulli(0.0)), run(Bernoulli(0.3))
    assert none.losses == plain.losses
    assert (none.curve, none.accuracy) == (plain.curve, plain.accuracy)
    assert none.held_out_loss == plain.held_out_loss
    assert none.accuracy_lossy == plain.accuracy
    assert list(plain.curve) == [2]
    assert plain.rows == []
    assert sum(row["packets"] for row in none.rows) > 0
    assert lossy.losses != plain.losses
