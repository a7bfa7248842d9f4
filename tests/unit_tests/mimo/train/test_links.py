# SPDX-License-Identifier: Apache-2.0
"""Links of a recipe that lose packets: what its words mean, and what is refused before a rank."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from megatron.core.models.mimo.lossy.loss_models import (
    PRESETS,
    Bernoulli,
    GilbertElliott,
    from_loss_and_burst,
    preset,
)
from megatron.core.models.mimo.lossy.spec import LinkRule, LossySpec
from megatron.core.models.mimo.lossy.statistics import Counts
from mimo_colocated.launch.errors import JobError
from mimo_colocated.train import lossy
from mimo_colocated.train.checks import LINK_PRESETS
from mimo_colocated.train.lossy import SavedLinks, spec_of, speed_of, write_counts
from mimo_colocated.train.recipe import LinkPart, LossyPart, SpeedPart

pytestmark = pytest.mark.once


def test_the_presets_are_those_of_the_room() -> None:
    assert set(LINK_PRESETS) == set(PRESETS)


@pytest.mark.parametrize(
    ("words", "model"),
    [
        ("short_2percent", preset("short_2percent")),
        ({"rate": 0.1}, Bernoulli(0.1)),
        ({"rate": 1, "unit": "message"}, Bernoulli(1, "message")),
        ({"p_gb": 0.1, "p_bg": 0.2, "loss_bad": 0.5}, GilbertElliott(0.1, 0.2, 0.0, 0.5)),
        ({"loss": 0.1, "burst": 4}, from_loss_and_burst(0.1, 4)),
    ],
)
def test_words_are_loss_models(words: Any, model: Any) -> None:
    rules = (LinkRule("*", model), LinkRule("up", model, ("backward",), ("sum",), "stale"))
    parts = [LinkPart(words), LinkPart(words, "up", ["backward"], ["sum"], "stale")]
    assert spec_of(LossyPart(parts, seed=7)) == LossySpec(rules, 7)


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ({"loss": {"rate": 2}}, "rules.1: rate is a probability: from 0 to 1, got 2"),
        ({"loss": {"rate": "x"}}, "rate is a probability: from 0 to 1, got x"),
        ({"loss": {"rat": 1}}, r"preset's name, or have one of rate, p_gb, burst \(\{rate: 0.01\}"),
        ({"loss": {"rate": 0.1, "burst": 3}}, "or have one of rate, p_gb, burst"),
        ({"loss": {"p_gb": 0.1}}, "missing 1 required positional argument: 'p_bg'"),
        ({"loss": {"rate": 0.1, "foo": 1}}, "got an unexpected keyword argument 'foo'"),
        ({"directions": ["up"]}, "directions must be a tuple of some of"),
        ({"collectives": []}, "collectives must be a tuple of some of"),
        ({"side": "both"}, "side must be one of"),
        ({"payload": 0}, "payload must be a whole number of bytes"),
        ({"loss": {"rate": 1}, "replacement": "retransmitted"}, "some must arrive in the end"),
    ],
)
def test_rules_that_cannot_be_are_refused_by_number(rule: dict[str, Any], said: str) -> None:
    parts = [LinkPart("default"), LinkPart(**{"loss": "default", **rule})]
    with pytest.raises(JobError, match=said) as caught:
        spec_of(LossyPart(parts))
    assert str(caught.value).startswith("lossy.rules.1: ")
    assert "\n" not in str(caught.value)


def test_speeds_are_checked_with_the_rules() -> None:
    assert speed_of(LossyPart()).bits_per_second == 10e9
    with pytest.raises(JobError, match=r"lossy\.speed: a link has bits_per_second above 0"):
        spec_of(LossyPart([LinkPart("default")], speed=SpeedPart(round_trip_s=-1.0)))


def test_rules_that_fit_nothing_are_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(_model: Any, _spec: Any) -> Any:
        raise ValueError("rule 0 fits nothing that sends")

    monkeypatch.setattr(lossy, "lossy_links", none)
    with pytest.raises(JobError, match="^lossy: rule 0 fits nothing that sends$"):
        lossy.install(LossyPart([LinkPart("default")]), None)


@pytest.mark.parametrize(
    ("places", "said"),
    [
        ([], "lossy links: none on rank 0, which sends nothing over TP or a bridge"),
        (["up", "down"], "lossy links: 2 places on rank 0, seed 3; lossless evaluation"),
    ],
)
def test_what_loses_packets_is_said(places: list[str], said: str) -> None:
    links: Any = SimpleNamespace(places=places, spec=SimpleNamespace(seed=3))
    assert lossy.sentence(links, "lossless") == said


def test_links_go_on_from_what_was_saved() -> None:
    kept: list[Any] = []
    links: Any = SimpleNamespace(load_state_dict=kept.append)
    saved = SavedLinks(links)
    saved.load_state_dict({"rank": 0, "first_step": 4})
    assert (saved.first_step, kept[0]["rank"]) == (4, 0)


def test_links_that_start_anew_count_from_there(tmp_path: Path) -> None:
    """In another layout, or when nothing was left to count; what is saved says from where."""
    row = {"rank": 0, "direction": "forward", "collective": "sum"}
    row |= Counts(messages=6, packets=60, payload_bytes=6000, lost=3).row()
    links: Any = SimpleNamespace(gathered_statistics=lambda: [row], state_dict=lambda: {"rank": 0})
    saved = SavedLinks(links)
    saved.start_anew(4)
    assert saved.state_dict() == {"rank": 0, "first_step": 4}
    part = LossyPart([LinkPart("default")], speed=SpeedPart(8e3, 0.0, 0))
    with only_process():
        found = write_counts(tmp_path / "links.json", saved, 6, part)
        assert write_counts(tmp_path / "none.json", saved, 4, part)["step_time"] is None
    assert found["counted_steps"] == 2
    assert found["step_time"]["send_s"] == pytest.approx(3.0)
    assert json.loads((tmp_path / "links.json").read_text()) == {**found, "rows": [row]}


@contextlib.contextmanager
def only_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()
