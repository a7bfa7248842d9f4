# SPDX-License-Identifier: Apache-2.0
"""The comparison notices every kind of error, and names the tensor. One process."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from megatron.core.models.mimo.training.initial_weights import tp_shard
from tests.parity.compare import (
    Measurement,
    compare,
    missing,
    names,
    relative_error,
    tolerances,
    worst_by_kind,
)
from tests.parity.tensors import join_shards

pytestmark = pytest.mark.once

THRESH = 1e-4
QKV = "language_model.decoder.layers.0.self_attention.linear_qkv.weight"
NORM = "language_model.decoder.final_layernorm.weight"


def measurement() -> Measurement:
    generator = torch.Generator().manual_seed(5)

    def tensors(scale: float) -> dict[str, torch.Tensor]:
        return {
            QKV: scale * torch.randn(12, 4, generator=generator),
            NORM: scale * torch.randn(4, generator=generator),
        }

    return Measurement(
        initial=tensors(0.1),
        logits=torch.randn(4, 8, 16, generator=generator),
        logits_start=0,
        loss=4.0,
        tokens=16,
        gradients=tensors(1.0),
        grad_norm=2.5,
        change=tensors(1e-3),
        curve=[4.0, 3.5, 3.0],
    )


def failed(run: Measurement, dtype: str = "float32") -> list[tuple[str, str]]:
    checks = compare(run, measurement(), tolerances(dtype, THRESH))
    return [(check.kind, check.where) for check in checks if not check.passed]


def test_equal_runs_pass() -> None:
    assert failed(measurement()) == []
    assert missing(names(measurement()), measurement()) == []


def _set(field: str, name: str, factor: float):
    def change(run: Measurement) -> None:
        getattr(run, field)[name] = getattr(run, field)[name] * factor

    return change


def _scale(field: str, factor: float):
    return lambda run: setattr(run, field, getattr(run, field) * factor)


def _one_ulp(run: Measurement) -> None:
    weight = run.initial[NORM]
    weight[1] = torch.nextafter(weight[1], torch.tensor(math.inf))


@pytest.mark.parametrize(
    "change, expected",
    [
        (_set("gradients", QKV, 2.0), ("gradients", QKV)),
        (_set("gradients", NORM, 1 + 2e-5), ("gradients", NORM)),
        (_set("gradients", NORM, -1.0), ("gradients", NORM)),
        (_set("gradients", NORM, math.nan), ("gradients", NORM)),
        (_set("change", QKV, 1.001), ("change of weights", QKV)),
        (_one_ulp, ("initial weights", NORM)),
        (_scale("logits", 1.001), ("logits", "logits")),
        (_scale("loss", 1.001), ("loss", "loss")),
        (_scale("grad_norm", 1.0001), ("grad norm", "grad norm")),
        (lambda run: setattr(run, "tokens", 17), ("tokens", "counted tokens")),
        (lambda run: run.curve.__setitem__(1, 3.501), ("curve", "loss of step 1")),
        (lambda run: run.curve.pop(), ("curve", "2 steps instead of 3")),
        (
            lambda run: run.gradients.__setitem__("other", torch.ones(1)),
            ("gradients", "other (not in the reference)"),
        ),
    ],
    ids=lambda value: "-".join(value).replace(" ", "_") if isinstance(value, tuple) else "",
)
def test_one_wrong_thing_is_named_and_nothing_else(change, expected) -> None:
    run = measurement()
    change(run)
    assert failed(run)[0] == expected
    assert {kind for kind, _ in failed(run)} - {"loss falls"} == {expected[0]}


def test_a_loss_that_does_not_fall_fails_even_if_the_reference_has_it_too() -> None:
    flat = measurement()
    flat.curve = [4.0, 4.0, 4.0]
    checks = compare(flat, copy.deepcopy(flat), tolerances("float32", THRESH))
    assert [c.kind for c in checks if not c.passed] == ["loss falls"]


def test_steps_without_a_counted_token_do_not_count_as_a_fall() -> None:
    run = measurement()
    run.curve = [0.0, 3.0, 3.5]
    checks = compare(run, copy.deepcopy(run), tolerances("float32", THRESH))
    assert [c.kind for c in checks if not c.passed] == ["loss falls"]


def test_a_share_of_the_logits_is_held_against_its_own_samples() -> None:
    run = measurement()
    run.logits, run.logits_start = run.logits[2:], 2
    assert failed(run) == []
    run.logits_start = 0
    assert failed(run) == [("logits", "logits")]


def test_a_tensor_that_no_rank_has_is_named() -> None:
    run = measurement()
    del run.gradients[QKV]
    checks = missing(names(run), measurement())
    assert [(c.kind, c.where, c.passed) for c in checks] == [
        ("gradients", f"{QKV} (missing)", False)
    ]


def test_bf16_allows_rounding_and_no_lost_contribution() -> None:
    run = measurement()
    run.gradients[QKV] *= 1.01
    assert failed(run, "bfloat16") == []
    # What one of eight ranks, the smallest contribution in the table, would have added.
    run.gradients[QKV] = measurement().gradients[QKV] * 7 / 8
    assert failed(run, "bfloat16") == [("gradients", QKV)]


def test_the_worst_check_comes_first() -> None:
    run = measurement()
    run.gradients[NORM] *= 1.5
    run.gradients[QKV] *= 2.0
    worst = worst_by_kind(compare(run, measurement(), tolerances("float32", THRESH)))
    assert (worst[0].kind, worst[0].where) == ("gradients", QKV)
    assert worst[0].error == pytest.approx(1.0)
    assert len({check.kind for check in worst}) == len(worst)


@pytest.mark.parametrize(
    "actual, expected, error",
    [
        ([0.0, 0.0], [0.0, 0.0], 0.0),
        ([1e-30, 0.0], [0.0, 0.0], math.inf),
        ([math.nan, 0.0], [1.0, 0.0], math.inf),
        ([math.inf, 0.0], [1.0, 0.0], math.inf),
        ([1.0], [1.0, 1.0], math.inf),
        ([3.0, 5.0], [3.0, 4.0], 0.2),
    ],
)
def test_relative_error(actual, expected, error) -> None:
    found = relative_error(torch.tensor(actual), torch.tensor(expected))
    assert found == pytest.approx(error)


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_shards_join_to_the_tensor_they_were_cut_from(size, dim, blocks) -> None:
    whole = torch.arange(16 * 8).view(16, 8)
    parts = [tp_shard(whole, rank=r, size=size, dim=dim, blocks=blocks) for r in range(size)]
    assert torch.equal(join_shards(parts, dim, blocks), whole)
