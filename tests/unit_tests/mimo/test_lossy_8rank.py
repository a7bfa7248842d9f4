# SPDX-License-Identifier: Apache-2.0
"""Lossy links in training steps of a whole model on 8 ranks.

Encoder TP2 DP4, language model TP2 CP2 DP2 with sequence parallelism, or in pipeline stages; the
optimizer is sharded. Every comparison is of bits: the same operations on the same numbers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron.core.models.mimo.gradients.finalize import iter_modules
from megatron.core.models.mimo.lossy.install import lossy_links
from megatron.core.models.mimo.lossy.loss_models import Bernoulli, preset
from megatron.core.models.mimo.lossy.reports import divergence
from megatron.core.models.mimo.lossy.spec import LinkRule, LossySpec
from megatron.core.models.mimo.lossy.statistics import sum_counts
from megatron.core.models.mimo.memory.policy import EncoderMemory
from tests.parity.tasks import MixedBatches
from tests.parity.tensors import local_gradients
from tests.unit_tests.mimo.digits_runs import BATCH, FAN_IN, SIZE, run, train_options

pytestmark = [pytest.mark.ranks(8), pytest.mark.once]

STAGES = ("tp=2,dp=4", "tp=2,cp=1,pp=2,dp=2")
LOSSY = LossySpec((LinkRule("*", preset("default"), payload=64),), 3)
RECOMPUTED = {"memory": EncoderMemory("recompute", "recompute"), "recompute": "full"}


@dataclass
class Found:
    """What a run leaves on one rank."""

    losses: list[Any]
    gradients: dict[str, torch.Tensor]
    rows: list[dict[str, Any]]
    parted: dict[str, float]
    states: list[Any]


def train(
    spec: LossySpec | None,
    pair: tuple[str, str] = FAN_IN,
    steps: tuple[int, int] = (0, 2),
    state: Any = None,
    optimize: int = 2,
    **options: Any,
) -> Found:
    """Steps of two microbatches without the optimizer, then so many with it.

    Adam's first step is a sign, which gradients that differ have in common: two tell more.
    """
    batches = MixedBatches(BATCH, "mixed", uneven_loss_mask=True)
    found = Found([], {}, [], {}, [])
    with run(pair, dropout=0.25, **options) as one:
        trainer = one.trainer
        trainer.options = train_options(2)
        trainer.model.train()
        links = None if spec is None else lossy_links(trainer.model, spec)
        if state is not None:
            one.built.randomness.set_states(state[1])
            links.load_state_dict(state[0])
        for step in range(*steps):
            found.losses.append(trainer.gradients(batches, step))
            gradients = local_gradients(one.built.model)
            found.gradients |= {f"{step} {n}": g.clone() for n, g in gradients.items()}
            if links is not None:
                found.states.append((links.state_dict(), one.built.randomness.get_states()))
        if optimize:
            found.losses += one.train(2, 2 + optimize)
        found.gradients |= {f"weight {n}": weight for n, weight in one.weights().items()}
        if links is not None:
            found.rows = links.gathered_statistics()
            links.remove()
        for name, module in iter_modules(trainer.model):
            parted = divergence(module, one.built.collections[name].tp)
            found.parted |= {f"{name} {weight}": value for weight, value in parted.items()}
    return found


def equal_everywhere(one: Found, other: Found) -> bool:
    """Whether losses and tensors have the same bits on all ranks."""
    assert one.gradients.keys() == other.gradients.keys()
    mine = one.losses == other.losses and all(
        torch.equal(value, other.gradients[name]) for name, value in one.gradients.items()
    )
    answers = [False] * dist.get_world_size()
    dist.all_gather_object(answers, mine)
    return all(answers)


@pytest.fixture(scope="module")
def lossy() -> Found:
    return train(LOSSY, sequence_parallel=True)


def test_a_run_without_loss_is_the_plain_one(lossy: Found) -> None:
    """Of loss 0, of links that were removed, and of a model that never had any."""
    plain = train(None, sequence_parallel=True)
    rule = replace(LOSSY.rules[0], loss=Bernoulli(0.0))
    none = train(LossySpec((rule,), 3), sequence_parallel=True)
    assert equal_everywhere(plain, none)
    assert all(row["lost"] == 0 for row in none.rows)
    assert not equal_everywhere(plain, lossy)


def test_every_kind_of_place_loses_its_share(lossy: Found) -> None:
    kinds = sum_counts(lossy.rows, ("direction", "collective"))
    assert {(row["direction"], row["collective"]) for row in kinds} == {
        ("forward", "gather"),
        ("forward", "reduce_scatter"),
        ("forward", "sum"),
        ("forward", "exchange"),
        ("backward", "gather"),
        ("backward", "reduce_scatter"),
        ("backward", "sum"),
        ("backward", "exchange"),
    }
    assert all(0.03 < row["loss_rate"] < 0.3 for row in kinds)
    # Of links whose losses are independent: holders of the same rows lose the same.
    (whole,) = sum_counts((row for row in lossy.rows if row["collective"] != "exchange"), ())
    # 4 σ, with the preset's correlation of neighbours of one half.
    assert abs(whole["loss_rate"] - 0.1) <= 4 * (0.09 * 3 / whole["packets"]) ** 0.5
    # What TP ranks hold alike stays alike: they all miss the same.
    assert set(lossy.parted.values()) == {0.0}


def test_recomputed_layers_lose_the_same_packets(lossy: Found) -> None:
    again = train(LOSSY, sequence_parallel=True, **RECOMPUTED)
    assert equal_everywhere(lossy, again)
    assert sum(row["repeated"] for row in again.rows) > 0
    assert [{**row, "repeated": 0} for row in again.rows] == lossy.rows


def test_pipeline_stages_and_recomputed_layers() -> None:
    size = replace(SIZE, language_layers=2)
    kept = train(LOSSY, STAGES, size=size)
    again = train(LOSSY, STAGES, size=size, **RECOMPUTED)
    assert equal_everywhere(kept, again)
    assert set(kept.parted.values()) == {0.0}
    layers = {row["place"] for row in kept.rows if row["lost"]}
    for stage in (0, 1):  # layers are counted over stages
        assert any(f"language_model.decoder.layers.{stage}." in name for name in layers)


def test_a_new_run_goes_on_where_the_links_were(lossy: Found) -> None:
    """The second step alone, from the state that was saved after the first.

    The control, a run that starts anew, is in ``test_lossy_in_use.py``.
    """
    saved = lossy.states[0]
    resumed = train(LOSSY, steps=(1, 2), state=saved, optimize=0, sequence_parallel=True)
    of_step = {name: g for name, g in resumed.gradients.items() if name.startswith("1 ")}
    assert of_step
    assert all(torch.equal(g, lossy.gradients[name]) for name, g in of_step.items())


def test_at_the_receiver_replicas_part() -> None:
    rule = replace(LOSSY.rules[0], side="receiver")
    parted = train(LossySpec((rule,), 3), steps=(0, 0)).parted
    assert max(parted.values()) > 0
