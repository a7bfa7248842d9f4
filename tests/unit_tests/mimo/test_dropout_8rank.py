# SPDX-License-Identifier: Apache-2.0
"""Dropout in both modules of a real model: who draws the same numbers, and what recompute draws.

At every dropout of a step the generator's state is noted. Ranks with the same state draw the same
mask. What the states depend on in general is for ``test_randomness`` to say.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from examples.mimo.digits.data import DigitsBatches
from megatron.core.models.mimo.randomness import capture_states
from megatron.core.models.mimo.transformer import context_parallel_attention
from tests.models import model
from tests.models.encoders import VISION
from tests.models.model import LANGUAGE
from tests.parity.tensors import local_gradients
from tests.unit_tests.mimo.digits_runs import BATCH, ENCODER_CP, FAN_IN, run
from tests.unit_tests.mimo.tiny_modules import on_all_ranks

pytestmark = pytest.mark.ranks(8, timeout=90)

DROPOUT = 0.25
# A TP rank's part of the vocabulary may have no token in the batch.
UNUSED = {"language_model.embedding.word_embeddings.weight"}


class Draws(list):
    """(function, state of the generator) of every dropout, in order."""


@pytest.fixture
def draws(monkeypatch: pytest.MonkeyPatch) -> Draws:
    found = Draws()

    def noting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            before = capture_states()["default"]
            result = function(*args, **kwargs)
            if not torch.equal(before, capture_states()["default"]):  # it drew
                digest = hashlib.blake2b(before.cpu().numpy().tobytes()).hexdigest()
                found.append((name, digest))
            return result

        return call

    functional = torch.nn.functional
    monkeypatch.setattr(functional, "dropout", noting("hidden", functional.dropout))
    # In its caller only: masks ask whether they are given to PyTorch's own function.
    attend = noting("attention", functional.scaled_dot_product_attention)
    names = {**vars(functional), "scaled_dot_product_attention": attend}
    monkeypatch.setattr(context_parallel_attention, "F", SimpleNamespace(**names))
    return found


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["copies", "sp"])
@pytest.mark.parametrize(
    ("bridge", "layouts"),
    [("routed", FAN_IN), ("gather", FAN_IN), ("routed", ENCODER_CP)],
    ids=["routed", "gather", "encoder-cp"],
)
def test_masks_are_the_same_on_copies_and_differ_on_parts(
    bridge: str, layouts: tuple[str, str], sequence_parallel: bool, draws: Draws
) -> None:
    options = {"dropout": DROPOUT, "bridge": bridge, "sequence_parallel": sequence_parallel}
    with run(layouts, **options) as one:
        one.trainer.model.train()
        one.trainer.gradients(DigitsBatches(7, "train", BATCH), 0)
        grids = one.built.grids
        size = one.trainer.model.config.num_layers
        vision_layers = one.built.configs[VISION].num_layers
    found = on_all_ranks(list(draws))
    # Per layer attention (in the language model one of two chunks after the other) and twice the
    # hidden state; the language model's text before them.
    expected = [(VISION, kind) for _ in range(vision_layers) for kind in ("parts", *2 * ["copies"])]
    hidden = "parts" if sequence_parallel else "copies"
    expected += [(LANGUAGE, "copies")]
    expected += [(LANGUAGE, kind) for _ in range(size) for kind in 2 * ["parts"] + 2 * [hidden]]
    assert {len(each) for each in found} == {len(expected)}
    for index, (module, kind) in enumerate(expected):
        states = [each[index] for each in found]
        assert len({name for name, _ in states}) == 1
        for one_rank, other in itertools.combinations(range(8), 2):
            here, there = (grids[module].coords(rank) for rank in (one_rank, other))
            same_data = all(here.get(axis, 0) == there.get(axis, 0) for axis in ("dp", "cp"))
            alike = same_data and kind == "copies"
            assert (states[one_rank] == states[other]) is alike, (index, module, one_rank, other)
    # No number is drawn twice.
    assert all(len({state for _, state in each}) == len(each) for each in found)


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["copies", "sp"])
def test_recomputed_layers_draw_what_they_drew(sequence_parallel: bool) -> None:
    """Bit-equal: the same operations on the same numbers, a second time."""
    known = []
    batches = DigitsBatches(7, "train", BATCH)
    for recompute in ("none", "selective", "full"):
        options = {"dropout": DROPOUT, "recompute": recompute}
        with run(FAN_IN, sequence_parallel=sequence_parallel, **options) as one:
            one.trainer.model.train()
            loss, _ = one.trainer.gradients(batches, 0)
            gradients = {n: g.clone() for n, g in local_gradients(one.built.model).items()}
            # The next forward goes on where this one ended, not where backward did.
            known.append((loss, gradients, one.train(1, 3)))
    assert {name for name, gradient in known[0][1].items() if not gradient.any()} <= UNUSED
    for loss, gradients, losses in known[1:]:
        assert loss == known[0][0]
        assert losses == known[0][2]
        assert all(torch.equal(gradients[name], known[0][1][name]) for name in known[0][1])


@pytest.mark.parametrize("frozen", ["lower-encoder", "encoder+projector"])
def test_layers_above_frozen_embeddings_are_recomputed(
    frozen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A recomputed layer has a backward pass only if its input needs a gradient."""
    freeze = model.freeze

    def freeze_text_too(built: torch.nn.Module, parts: tuple[str, ...]) -> None:
        freeze(built, parts)
        built.language_model.embedding.requires_grad_(False)

    monkeypatch.setattr(model, "freeze", freeze_text_too)
    found = []
    for recompute in ("none", "full"):
        with run(FAN_IN, recompute=recompute, freeze=frozen) as one:
            one.trainer.gradients(DigitsBatches(7, "train", BATCH), 0)
            found.append({n: g.clone() for n, g in local_gradients(one.built.model).items()})
    plain, recomputed = found
    assert not any("word_embeddings" in name for name in plain)
    assert {name for name, gradient in plain.items() if not gradient.any()} <= UNUSED
    assert all(torch.equal(recomputed[name], plain[name]) for name in plain)
