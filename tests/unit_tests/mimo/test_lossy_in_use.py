# SPDX-License-Identifier: Apache-2.0
"""Lossy links in a loop of one's own: evaluation, checkpoints, statistics, and what is refused.

All ranks are threads of one process.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from megatron.core.models.mimo.lossy.install import lossy_links
from megatron.core.models.mimo.lossy.loss_models import Bernoulli, preset
from megatron.core.models.mimo.lossy.reports import (
    LinkSpeed,
    check_same_over_tp,
    step_time,
)
from megatron.core.models.mimo.lossy.spec import LinkRule, LossySpec
from megatron.core.models.mimo.lossy.statistics import sum_counts
from tests.unit_tests.mimo.in_process_ranks import InProcessWorld
from tests.unit_tests.mimo.lossy_jobs import (
    BATCH,
    LENGTH,
    WIDTH,
    Block,
    Job,
    spec,
    whole_input,
)

# --- in use ----------------------------------------------------------------------------------


def test_lossless_evaluation_and_checkpoints() -> None:
    """Evaluation in between changes nothing; a run that goes on loses what it would have lost."""

    def evaluate(block, links):
        with links.lossless():
            block.clean = block(whole_input(7)).detach()
        assert not any(place.lossless for place in links.places)
        block.saved = links.state_dict()
        block.next = block(whole_input(8)).detach()

    def plain(block, links):
        block.clean = block(whole_input(7)).detach()

    first, without = Job(spec(), around=evaluate).run(), Job(around=plain).run()
    for mine, theirs in zip(first, without, strict=True):
        assert torch.equal(mine.model.clean, theirs.model.clean)
    saved = [each.model.saved for each in first]

    def resume(block, links):
        links.load_state_dict(saved[dist.get_rank()])
        block.next = block(whole_input(8)).detach()

    def anew(block, links):
        block.next = block(whole_input(8)).detach()

    for how, equal in ((resume, True), (anew, False)):
        again = Job(spec(), steps=0, around=how).run()
        for mine, theirs in zip(again, first, strict=True):
            assert torch.equal(mine.model.next, theirs.model.next) == equal

    links = first[0].links
    with pytest.raises(ValueError, match="these links are of rank 9, this run has 0"):
        _on_rank_0(lambda: links.load_state_dict({**saved[0], "rank": 9}))
    with pytest.raises(ValueError, match="these links are of spec other, this run has LossySpec"):
        _on_rank_0(lambda: links.load_state_dict({**saved[0], "spec": "other"}))
    with pytest.raises(ValueError, match="with other peers or names; go on in the same layout"):
        _on_rank_0(lambda: links.load_state_dict({**saved[0], "places": {}}))


def _on_rank_0(body: Callable[[], Any]) -> Any:
    return InProcessWorld(1).run(lambda rank: body())


def test_evaluation_on_one_rank_alone_is_found_out() -> None:
    """Forward has collectives, lossless or not: a rank that evaluates alone would wait."""

    def around(block, links):
        if dist.get_rank() == 0:
            with links.lossless():
                block(whole_input(7))

    with pytest.raises(AssertionError, match="would wait forever: rank 0 in all_reduce"):
        Job(spec(), around=around).run()


def test_statistics_of_all_ranks_add_up_and_give_the_time_of_a_step() -> None:
    def around(block, links):
        block.rows = links.gathered_statistics()

    outcomes = Job(spec(replacement="retransmitted"), tp=2, steps=3, around=around).run()
    rows = outcomes[1].model.rows
    assert rows == outcomes[0].model.rows == json.loads(json.dumps(rows))
    assert rows == [row for each in outcomes for row in each.links.statistics()]
    assert {row["place"] for row in rows} == {"up", "down"}
    message = LENGTH * BATCH * WIDTH * 8
    for row in rows:
        assert (row["messages"], row["payload_bytes"]) == (3, 3 * message)
        assert row["packets"] == 3 * 22  # 64 elements, three in each
    (whole,) = sum_counts(rows, ())
    assert whole["lost"] == sum(row["lost"] for row in rows)
    speed = LinkSpeed(bits_per_second=8e6, round_trip_s=0.5, header_bytes=2)
    times = step_time(rows, 3, speed)
    mine = [row for row in rows if row["rank"] == times["rank"]]
    assert times["send_s"] == pytest.approx(2 * (message + 22 * 2) / 1e6)
    resent = sum(row["resent"] for row in mine)
    assert times["resend_s"] == pytest.approx(resent * (message / 22 + 2) / 1e6 / 3)
    assert times["wait_s"] == pytest.approx(sum(row["rounds"] for row in mine) * 0.5 / 3)
    assert times["total_s"] == pytest.approx(
        times["send_s"] + times["resend_s"] + times["wait_s"]
    )
    with pytest.raises(ValueError, match="steps must be 1 or more, got 0"):
        step_time(rows, 0, speed)
    with pytest.raises(ValueError, match="no rows: no place of these links sends"):
        step_time([], 1, speed)
    with pytest.raises(ValueError, match="bits_per_second above 0"):
        LinkSpeed(0, 0.0, 0)


def test_samples_that_differ_over_tp_are_found() -> None:
    def check(rank_of_change: int | None) -> Callable[[int], None]:
        def body(rank: int) -> None:
            ids = torch.arange(6) + (rank == rank_of_change)
            check_same_over_tp(ids, world.everyone(), "input_ids")

        return body

    world = InProcessWorld(2)
    world.run(check(None))
    with pytest.raises(ValueError, match=r"input_ids differs over the TP ranks \[0, 1\].*\[1\]"):
        world.run(check(1))


# --- what is refused -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"directions": ()}, r"directions must be a tuple of some of \('forward', 'backward'\)"),
        ({"directions": "forward"}, "directions must be a tuple"),
        ({"collectives": ("all",)}, "collectives must be a tuple of some of"),
        ({"side": "both"}, r"side must be one of \('sender', 'receiver'\), got 'both'"),
        ({"payload": 0}, "payload must be a whole number of bytes"),
        ({"replacement": "none"}, "replacement must be one of"),
    ],
)
def test_rules_that_cannot_be_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        spec(**changes)


def test_rules_are_tried_in_their_order() -> None:
    first = LinkRule("*.3.*", preset("one"))
    second = LinkRule("*", Bernoulli(0.1), directions=("forward",))
    both = LossySpec((first, second), 1)
    assert both.rule("a.3.b", "backward", "sum") is first
    assert both.rule("a.4.b", "forward", "sum") is second
    assert both.rule("a.4.b", "backward", "sum") is None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda rank: spec(layers="up.*"), r"rule 0 fits nothing that sends.*\['down', 'up'\]"),
        (lambda rank: spec(collectives=("exchange",)), "rule 0 fits nothing that sends"),
        (lambda rank: LossySpec(spec().rules, rank), "ranks have different specs of lossy links"),
    ],
)
def test_specs_that_do_not_fit_are_refused_on_all_ranks(make: Any, message: str) -> None:
    world, refused = InProcessWorld(2), []

    def body(rank: int) -> None:
        block = Block(world.everyone(), False, torch.float64)
        with pytest.raises(ValueError, match=message):
            lossy_links(block, make(rank))
        assert not vars(block.up).keys() & {"_forward_impl"}
        refused.append(rank)

    world.run(body)
    assert sorted(refused) == [0, 1]


def test_links_are_installed_once() -> None:
    def around(block, links):
        with pytest.raises(ValueError, match=r"on rank 0 up has lossy links already.*remove\(\)"):
            lossy_links(block, spec())
        links.remove()
        block.up.config.defer_embedding_wgrad_compute = True
        with pytest.raises(ValueError, match="up defers its weight's gradients"):
            lossy_links(block, spec())
        lossy_links(block, spec(layers="down")).remove()

    Job(spec(), around=around).run()


class OfEngine(nn.Module):
    """What links see of a layer of Transformer Engine, which is not installed here."""

    __module__ = "transformer_engine.pytorch.module.linear"

    def __init__(self, tp_size: int, parallel_mode: str | None) -> None:
        super().__init__()
        self.tp_size, self.parallel_mode = tp_size, parallel_mode


def test_layers_of_transformer_engine_are_refused_by_name() -> None:
    """If they send; a rule that leaves them out is taken."""

    def body(rank: int) -> None:
        block = Block(world.everyone(), False, torch.float64)
        alone, copy = OfEngine(1, "row"), OfEngine(2, None)
        with lossy_links(nn.ModuleDict({"a": block, "b": alone, "c": copy}), spec()):
            pass
        model = nn.ModuleDict({"a": block, "fc2": OfEngine(2, "row")})
        with pytest.raises(ValueError, match="on rank 0 fc2 is a layer of Transformer Engine, who"):
            lossy_links(model, spec())
        lossy_links(model, spec(layers="a.*")).remove()

    world = InProcessWorld(2)
    world.run(body)


def test_a_layer_in_two_places_is_changed_once() -> None:
    def body(rank: int) -> None:
        block = Block(world.everyone(), False, torch.float64)
        twice = nn.ModuleDict({"a": block, "b": block})
        with lossy_links(twice, spec()) as links:
            assert [place.name for place in links.places] == ["a.up", "a.down"]

    world = InProcessWorld(2)
    world.run(body)
