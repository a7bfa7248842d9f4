# SPDX-License-Identifier: Apache-2.0
"""Lossy links in Megatron's layers and in the bridges, all ranks as threads of one process.

The oracle of losses is written out: the same layers without tensor parallelism on the same
messages, with the masks that the links' numbers give, summed in float64. Without loss results are
those of the untouched layers, bit for bit.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from megatron.core.models.mimo.lossy.draws import Draws, stream_key
from megatron.core.models.mimo.lossy.install import LossyLinks, lossy_links
from megatron.core.models.mimo.lossy.loss_models import Bernoulli, GilbertElliott, preset
from megatron.core.models.mimo.lossy.reports import (
    LinkSpeed,
    check_same_over_tp,
    divergence,
    step_time,
)
from megatron.core.models.mimo.lossy.spec import LinkRule, LossySpec
from megatron.core.models.mimo.lossy.statistics import sum_counts
from megatron.core.models.mimo.training.groups import ensure_global_memory_buffer
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from tests.unit_tests.mimo.in_process_ranks import InProcessWorld
from tests.unit_tests.mimo.model_stubs import language_config
from tests.unit_tests.mimo.test_routed_model import EQUAL, FAN_IN, FAN_OUT, Case

ROOT = Path(__file__).resolve().parents[3]
WIDTH, INNER, LENGTH, BATCH, SEED = 8, 12, 4, 2, 5
# Small packets, so that a message has many: 3 elements of fp64, 13 of 16 bit.
PAYLOAD = 26
HALF = GilbertElliott(0.3, 0.3, 0.1, 0.9)
# fp64 sums of at most 8 terms of order 1, in another order.
EXACT = {"rtol": 1e-12, "atol": 1e-12}


class Block(nn.Module):
    """Column-parallel, a square, row-parallel with its bias; and a bias that all ranks hold."""

    def __init__(self, group: Any, sequence_parallel: bool, dtype: torch.dtype) -> None:
        super().__init__()
        size = group.size()
        config = language_config(
            hidden_size=WIDTH,
            num_attention_heads=4,
            tensor_model_parallel_size=size,
            sequence_parallel=sequence_parallel and size > 1,
            params_dtype=dtype,
            perform_initialization=False,
        )
        common = {"config": config, "init_method": None, "tp_group": group, "bias": True}
        self.up = ColumnParallelLinear(WIDTH, INNER, **common)
        self.down = RowParallelLinear(
            INNER, WIDTH, input_is_parallel=True, skip_bias_add=False, **common
        )
        for name, parameter in self.named_parameters():
            whole = weight(name).to(dtype)
            dim = {"up.weight": 0, "up.bias": 0, "down.weight": 1}.get(name)
            part = whole if dim is None else whole.chunk(size, dim)[group.rank()]
            parameter.data.copy_(part)
            parameter.tensor_model_parallel = dim is not None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x)[0].square())[0]


def weight(name: str) -> torch.Tensor:
    shape = {"up.weight": (INNER, WIDTH), "up.bias": (INNER,), "down.weight": (WIDTH, INNER)}
    generator = torch.Generator().manual_seed(len(name))
    return torch.randn(shape.get(name, (WIDTH,)), generator=generator, dtype=torch.float64)


def whole_input(step: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randn(LENGTH, BATCH, WIDTH, generator=generator, dtype=torch.float64)


def gradient(step: int = 0) -> torch.Tensor:
    return whole_input(1000 + step)


@dataclass
class Outcome:
    """What one rank has after some steps."""

    outputs: list[torch.Tensor]
    inputs: list[torch.Tensor]
    weights: dict[str, torch.Tensor]
    calls: dict[str, int]
    links: LossyLinks | None = None
    model: Any = None


@dataclass
class Job:
    """Steps of a block on some ranks."""

    spec: LossySpec | None = None
    tp: int = 2
    sequence_parallel: bool = False
    dtype: torch.dtype = torch.float64
    steps: int = 2
    around: Callable[[Any, LossyLinks | None], Any] = lambda model, links: None

    def run(self) -> list[Outcome]:
        ensure_global_memory_buffer()
        world = InProcessWorld(self.tp)
        outcomes = world.run(lambda rank: self._on_rank(world, rank))
        for rank, outcome in enumerate(outcomes):
            outcome.calls = {name: n for (name, _), n in world.counts(rank).items()}
        return outcomes

    def _on_rank(self, world: InProcessWorld, rank: int) -> Outcome:
        block = Block(world.everyone(), self.sequence_parallel, self.dtype)
        links = None if self.spec is None else lossy_links(block, self.spec)
        outcome = Outcome([], [], {}, {}, links, block)
        for step in range(self.steps):
            x, dy = (
                self.own(whole.to(self.dtype), rank).clone()
                for whole in (whole_input(step), gradient(step))
            )
            kept, kept_dy = x.clone(), dy.clone()
            x.requires_grad_()
            y = block(x)
            y.backward(dy)
            assert torch.equal(x.detach(), kept)
            assert torch.equal(dy, kept_dy)
            assert (y.dtype, y.device) == (x.dtype, x.device)
            outcome.outputs.append(y.detach())
            outcome.inputs.append(x.grad)
        self.around(block, links)
        outcome.weights = {name: p.grad for name, p in block.named_parameters()}
        return outcome

    def own(self, x: torch.Tensor, rank: int) -> torch.Tensor:
        return x.chunk(self.tp)[rank] if self.sequence_parallel and self.tp > 1 else x


def spec(**changes: Any) -> LossySpec:
    rule = {"layers": "*", "loss": HALF, "payload": PAYLOAD, **changes}
    return LossySpec((LinkRule(**rule),), SEED)


def same(one: list[Outcome], other: list[Outcome]) -> bool:
    return all(
        torch.equal(a, b)
        for mine, theirs in zip(one, other, strict=True)
        for a, b in zip(
            [*mine.outputs, *mine.inputs, *mine.weights.values()],
            [*theirs.outputs, *theirs.inputs, *theirs.weights.values()],
            strict=True,
        )
    )


# --- no loss, and off ----------------------------------------------------------------------


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("side", ["sender", "receiver"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_loss_bits_are_those_of_megatron(sequence_parallel, side, dtype) -> None:
    plain = Job(tp=4, sequence_parallel=sequence_parallel, dtype=dtype)
    for loss in (Bernoulli(0.0), GilbertElliott(0.0, 0.4)):
        lossless = spec(loss=loss, side=side)
        links = Job(lossless, 4, sequence_parallel, dtype)
        assert same(plain.run(), links.run())
    # The control: what is lost shows.
    assert not same(plain.run(), Job(spec(side=side), 4, sequence_parallel, dtype).run())


def test_one_rank_sends_nothing() -> None:
    plain, alone = Job(tp=1).run(), Job(spec(loss=Bernoulli(1.0)), tp=1).run()
    assert same(plain, alone)
    assert alone[0].links.places == []
    assert alone[0].calls == {"all_gather_object": 2}


def test_the_layers_are_as_they_were_afterwards() -> None:
    def around(block, links):
        for layer in (block.up, block.down):
            assert {"forward", "_forward_impl"} & vars(layer).keys()
        with links:
            pass
        links.remove()
        for layer in (block.up, block.down):
            assert not {"forward", "_forward_impl"} & vars(layer).keys()
        x = torch.ones(LENGTH, BATCH, WIDTH, dtype=torch.float64, requires_grad=True)
        block.after = block(x).detach()

    def plain(block, links):
        block.after = block(torch.ones(LENGTH, BATCH, WIDTH, dtype=torch.float64)).detach()

    with_links, without = Job(spec(), around=around).run(), Job(around=plain).run()
    for mine, theirs in zip(with_links, without, strict=True):
        assert torch.equal(mine.model.after, theirs.model.after)


PURE = ("packets", "draws", "loss_models", "replacements", "statistics", "link")


def test_nothing_imports_lossy_links_and_their_pure_parts_no_process_groups() -> None:
    """Off by default means that the room is not even read: no import leads to it."""
    folder = ROOT / "megatron" / "core" / "models" / "mimo"
    for path in [*folder.rglob("*.py"), *(ROOT / "mimo_colocated").rglob("*.py")]:
        imported = {
            name
            for node in ast.walk(ast.parse(path.read_text("utf-8")))
            if isinstance(node, ast.Import | ast.ImportFrom)
            for name in (getattr(node, "module", None), *(each.name for each in node.names))
        }
        if path.parent.name != "lossy":
            assert not any("mimo.lossy" in str(name) for name in imported), path
        elif path.stem in PURE:
            assert not imported & {"torch.distributed", "distributed"}, path


# --- what is lost --------------------------------------------------------------------------


class Replay:
    """The masks of a link, drawn here from the link's numbers."""

    def __init__(self, stream: str, sender: Any, loss: Any = HALF) -> None:
        self.key, self.loss = stream_key(SEED, stream, sender), loss
        self.state, self.message, self.lost = None, 0, 0

    def carry(self, x: torch.Tensor) -> torch.Tensor:
        per_packet = PAYLOAD // x.element_size()
        packets = -(-x.numel() // per_packet)
        draws = Draws(self.key, self.message)
        sent = self.loss.send(packets, self.state or self.loss.start(draws), draws, 0)
        self.state, self.message = sent.after, self.message + 1
        self.lost += int(sent.lost.sum())
        arrived = x.clone().reshape(-1)
        for packet in np.flatnonzero(sent.lost):
            arrived[packet * per_packet : (packet + 1) * per_packet] = 0
        return arrived.reshape(x.shape)


class Oracle:
    """The block on ``tp`` ranks, all computed here, with losses in the places of a rule."""

    def __init__(self, job: Job, lossy: dict[str, str]) -> None:
        """``lossy``: layer -> direction and collective of what loses."""
        self.job, self.tp, self.sp = job, job.tp, job.sequence_parallel
        rule = job.spec.rules[0]
        self.at_receiver = rule.side == "receiver"
        self.links: dict[Any, Replay] = {}
        for layer, where in lossy.items():
            for rank in range(self.tp):
                peers = [p for p in range(self.tp) if p != rank] if self.at_receiver else [None]
                for peer in peers:
                    stream = f"{layer} {where}" + ("" if peer is None else f" from {peer}")
                    self.links[layer, where, rank, peer] = Replay(
                        stream, "all" if rule.common_mode else rank
                    )

    def arrive(self, at: tuple[str, str], sent: list[torch.Tensor]) -> list[list[torch.Tensor]]:
        """What each rank (outer) has of each rank's message (inner)."""
        if not any(key[:2] == at for key in self.links):
            return [sent] * self.tp
        if not self.at_receiver:
            left = [self.links[(*at, rank, None)].carry(x) for rank, x in enumerate(sent)]
            return [left] * self.tp
        return [
            [
                x if peer == rank else self.links[(*at, rank, peer)].carry(x)
                for peer, x in enumerate(sent)
            ]
            for rank in range(self.tp)
        ]

    def total(self, at: tuple[str, str], sent: list[torch.Tensor]) -> list[torch.Tensor]:
        return [torch.stack(each).sum(0) for each in self.arrive(at, sent)]

    def scattered(self, at: tuple[str, str], sent: list[torch.Tensor]) -> list[torch.Tensor]:
        if not self.at_receiver:
            totals = self.total(at, sent)
            return [x.chunk(self.tp)[rank] for rank, x in enumerate(totals)]
        lossy = any(key[:2] == at for key in self.links)
        results = []
        for rank in range(self.tp):
            blocks = [x.chunk(self.tp)[rank] for x in sent]
            results.append(
                sum(
                    self.links[(*at, rank, peer)].carry(x) if lossy and peer != rank else x
                    for peer, x in enumerate(blocks)
                )
            )
        return results

    def gathered(self, at: tuple[str, str], sent: list[torch.Tensor]) -> list[torch.Tensor]:
        return [torch.cat(each) for each in self.arrive(at, sent)]

    def run(self) -> tuple[list[list[torch.Tensor]], list[list[torch.Tensor]]]:
        """Outputs and input gradients: per rank, per step."""
        up = weight("up.weight").chunk(self.tp)
        bias = weight("up.bias").chunk(self.tp)
        down = weight("down.weight").chunk(self.tp, 1)
        outputs: list[list[torch.Tensor]] = [[] for _ in up]
        inputs: list[list[torch.Tensor]] = [[] for _ in up]
        for step in range(self.job.steps):
            x = [self.job.own(whole_input(step), rank) for rank in range(self.tp)]
            dy = [self.job.own(gradient(step), rank) for rank in range(self.tp)]
            if self.sp:
                x = self.gathered(("up", "forward gather"), x)
            inner = [x[r] @ up[r].T + bias[r] for r in range(self.tp)]
            parts = [inner[r].square() @ down[r].T for r in range(self.tp)]
            where = "forward reduce_scatter" if self.sp else "forward sum"
            y = (self.scattered if self.sp else self.total)(("down", where), parts)
            if self.sp:
                dy = self.gathered(("down", "backward gather"), dy)
            dx = [(2 * inner[r] * (dy[r] @ down[r])) @ up[r] for r in range(self.tp)]
            where = "backward reduce_scatter" if self.sp else "backward sum"
            dx = (self.scattered if self.sp else self.total)(("up", where), dx)
            for rank in range(self.tp):
                outputs[rank].append(y[rank] + weight("down.bias"))
                inputs[rank].append(dx[rank])
        return outputs, inputs


PLACES = [
    ("down", "forward", "sum"),
    ("up", "backward", "sum"),
    ("up", "forward", "gather"),
    ("down", "forward", "reduce_scatter"),
    ("down", "backward", "gather"),
    ("up", "backward", "reduce_scatter"),
]


@pytest.mark.parametrize("side", ["sender", "receiver"])
@pytest.mark.parametrize(("layer", "direction", "collective"), PLACES)
def test_each_place_loses_what_its_links_say(layer, direction, collective, side) -> None:
    one = spec(layers=layer, directions=(direction,), collectives=(collective,), side=side)
    job = Job(one, 4, sequence_parallel=collective != "sum")
    outcomes, oracle = job.run(), Oracle(job, {layer: f"{direction} {collective}"})
    outputs, inputs = oracle.run()
    plain = Job(tp=4, sequence_parallel=job.sequence_parallel).run()
    for rank, outcome in enumerate(outcomes):
        for found, expected in zip(
            outcome.outputs + outcome.inputs, outputs[rank] + inputs[rank], strict=True
        ):
            torch.testing.assert_close(found, expected, **EXACT)
        # One direction alone: the other one is bit for bit the lossless one.
        if direction == "backward":
            assert all(map(torch.equal, outcome.outputs, plain[rank].outputs))
        lost = {
            (row["place"], row["peer"]): row["lost"] for row in outcome.links.statistics()
        }
        assert lost == {
            (key[0], key[3]): link.lost for key, link in oracle.links.items() if key[2] == rank
        }
    assert sum(link.lost for link in oracle.links.values()) > 10


def test_at_the_sender_all_ranks_stay_equal_and_at_the_receiver_they_part() -> None:
    """Outputs without SP, input gradients, and the gradient of the bias that all ranks hold."""

    def run(side: str) -> tuple[bool, dict[str, float]]:
        def around(block, links):
            # A gradient that depends on what this rank has computed, as a loss's does.
            y = block(whole_input(9))
            block.zero_grad()
            y.square().sum().backward()
            with torch.no_grad():
                block.down.bias -= block.down.bias.grad
            block.found = divergence(block, block.down.tp_group)

        outcomes = Job(spec(side=side), around=around).run()
        equal = all(map(torch.equal, outcomes[0].outputs, outcomes[1].outputs))
        return equal, outcomes[0].model.found

    equal, found = run("sender")
    assert equal
    assert found == {"down.bias": 0.0}
    equal, found = run("receiver")
    assert not equal
    assert found["down.bias"] > 1e-3


def test_common_mode_loses_the_same_packets_on_all_ranks() -> None:
    def lost(common_mode: bool) -> list[list[int]]:
        job = Job(spec(common_mode=common_mode), tp=4, steps=6)
        return [[row["lost"] for row in each.links.statistics()] for each in job.run()]

    together, apart = lost(True), lost(False)
    assert all(each == together[0] for each in together)
    assert len({tuple(each) for each in apart}) == 4


def test_retransmitted_messages_arrive_whole_and_are_counted() -> None:
    plain, again = Job().run(), Job(spec(replacement="retransmitted")).run()
    assert same(plain, again)
    rows = again[0].links.statistics()
    assert all(row["resent"] >= row["lost"] > 0 for row in rows)
    assert all(row["rounds"] > 0 for row in rows)


def test_what_a_stale_link_keeps_is_not_the_sum() -> None:
    """All of the first message arrives, half of the others is lost; sums are made in place."""
    loss = GilbertElliott(1.0, 0.0, 0.0, 0.5, step="message", start_state="good")
    stale = spec(layers="down", loss=loss, replacement="stale")

    def again(block, links):
        block.again = [block(whole_input(0)).detach() for _ in range(3)]

    for mine, other in zip(
        Job(stale, steps=1, around=again).run(), Job(steps=1).run(), strict=True
    ):
        assert torch.equal(mine.outputs[0], other.outputs[0])
        assert all(torch.equal(each, other.outputs[0]) for each in mine.model.again)
        assert mine.links.statistics()[0]["lost"] > 0


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


def test_a_layer_in_two_places_is_changed_once() -> None:
    def body(rank: int) -> None:
        block = Block(world.everyone(), False, torch.float64)
        twice = nn.ModuleDict({"a": block, "b": block})
        with lossy_links(twice, spec()) as links:
            assert [place.name for place in links.places] == ["a.up", "a.down"]

    world = InProcessWorld(2)
    world.run(body)


# --- bridges -------------------------------------------------------------------------------


def bridged(case: Case, how: LossySpec | None, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A forward and backward pass of a ``MimoModel`` on all ranks, with links or without."""
    build, kept = Case.build, []

    def with_links(self: Case) -> Any:
        model, grids = build(self)
        if how is not None:
            kept.append(lossy_links(model, how))
        return model, grids

    with monkeypatch.context() as patch:
        patch.setattr(Case, "build", with_links)
        results = case.run()
    return SimpleNamespace(results=results, links=kept)


LAYOUTS = {"fan_in": FAN_IN, "fan_out": FAN_OUT, "equal": EQUAL}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bridge", ["routed", "gather"])
def test_bridges_over_links(layout: str, bridge: str, monkeypatch: pytest.MonkeyPatch) -> None:
    src, dest = LAYOUTS[layout]
    case = Case(src, dest, [1] * 8, [8 // src[1]] * src[1], bridge=bridge)
    on_bridge = {"layers": "bridge.images", "collectives": ("exchange",)}
    plain = bridged(case, None, monkeypatch).results
    none = bridged(case, spec(**on_bridge, loss=Bernoulli(0.0)), monkeypatch).results
    lossy = bridged(case, spec(**on_bridge), monkeypatch)
    tp = dest[0]
    changed = 0
    for rank, (before, same_, after) in enumerate(zip(plain, none, lossy.results, strict=True)):
        assert torch.equal(before.fused, same_.fused)
        for name, value in before.gradients.items():
            assert torch.equal(value, same_.gradients[name])
            changed += not torch.equal(value, after.gradients[name])
        # What is lost is 0, the rest as it was; and the TP ranks of a replica see the same,
        # forward and backward.
        difference = before.fused != after.fused
        changed += int(difference.sum())
        assert not after.fused[difference].any()
        first = lossy.results[rank // tp * tp].fused
        assert torch.equal(after.fused, first)
        first = lossy.results[rank // src[0] * src[0]].gradients
        for name, value in after.gradients.items():
            assert not name.startswith("modality") or torch.equal(value, first[name])
    assert changed > 0
    rows = [row for links in lossy.links for row in links.statistics()]
    assert sum(row["lost"] for row in rows) > 0


def test_a_routed_bridge_loses_at_the_receiver_what_came_from_others(monkeypatch) -> None:
    case = Case(*FAN_IN, [1] * 8, [2] * 4)
    everything = spec(
        layers="bridge.*", loss=Bernoulli(1.0), side="receiver", directions=("forward",)
    )
    plain = bridged(case, None, monkeypatch).results
    lossy = bridged(case, everything, monkeypatch)
    gone = kept = 0
    for before, after in zip(plain, lossy.results, strict=True):
        lost = before.fused != after.fused
        assert not after.fused[lost].any()
        gone, kept = gone + int(lost.sum()), kept + int((~lost).sum())
    assert gone > 0 < kept
    backward = spec(
        layers="bridge.*", loss=Bernoulli(1.0), side="receiver", directions=("backward",)
    )
    after = bridged(case, backward, monkeypatch)
    for mine, theirs in zip(plain, after.results, strict=True):
        assert torch.equal(mine.fused, theirs.fused)
    assert any(
        not torch.equal(value, theirs.gradients[name])
        for mine, theirs in zip(plain, after.results, strict=True)
        for name, value in mine.gradients.items()
    )


def test_a_gather_bridge_loses_at_the_sender_only(monkeypatch) -> None:
    case = Case(*FAN_IN, [1] * 8, [2] * 4, bridge="gather")
    with pytest.raises(ValueError, match="bridge.images is a gather bridge.*side='sender'"):
        bridged(case, spec(layers="bridge.*", side="receiver"), monkeypatch)
