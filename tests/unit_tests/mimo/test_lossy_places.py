# SPDX-License-Identifier: Apache-2.0
"""Lossy links in Megatron's layers and in the bridges, all ranks as threads of one process.

The oracle of losses is written out: the same layers without tensor parallelism on the same
messages, with the masks that the links' numbers give, summed in float64. Without loss results are
those of the untouched layers, bit for bit.
"""

from __future__ import annotations

import ast
from typing import Any

import numpy as np
import pytest
import torch

from megatron.core.models.mimo.lossy.draws import Draws, stream_key
from megatron.core.models.mimo.lossy.loss_models import Bernoulli, GilbertElliott
from megatron.core.models.mimo.lossy.reports import (
    divergence,
)
from tests.unit_tests.mimo.lossy_jobs import (
    BATCH,
    EXACT,
    HALF,
    LENGTH,
    PAYLOAD,
    ROOT,
    SEED,
    WIDTH,
    Job,
    gradient,
    same,
    spec,
    weight,
    whole_input,
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
    assert alone[0].calls == {}


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
        tree = ast.parse(path.read_text("utf-8"))
        for_types = [
            each
            for node in ast.walk(tree)
            if _is_for_types(node)
            for each in node.body
        ]
        imported = {
            name
            for node in ast.walk(tree)
            if isinstance(node, ast.Import | ast.ImportFrom)
            for name in (getattr(node, "module", None), *(each.name for each in node.names))
            if node not in for_types
        }
        if path == ROOT / "mimo_colocated" / "train" / "lossy.py":
            continue  # who imports it is below
        if path.parent.name != "lossy":
            assert not any("mimo.lossy" in str(name) for name in imported), path
        elif path.stem in PURE:
            assert not imported & {"torch.distributed", "distributed"}, path


def test_only_functions_that_are_asked_for_loss_import_what_a_run_needs_for_it() -> None:
    """``mimo_colocated.train.lossy``: by no module when it is imported, and where rules are."""
    found = {}
    for path in (ROOT / "mimo_colocated").rglob("*.py"):
        tree = ast.parse(path.read_text("utf-8"))
        for node in ast.walk(tree):
            within = getattr(node, "body", None)
            if not isinstance(within, list) or _is_for_types(node):
                continue
            for each in within:
                if isinstance(each, ast.ImportFrom) and _leads_to_lossy(each):
                    found.setdefault(path.name, []).append(type(node).__name__)
    # The command asks `if ...lossy.rules`; of the job's two functions one returns without rules,
    # the other is given the links.
    assert found == {"command.py": ["If"], "job.py": ["FunctionDef", "FunctionDef"]}


def _is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def _leads_to_lossy(node: ast.ImportFrom) -> bool:
    names = {each.name for each in node.names}
    return node.module == "mimo_colocated.train.lossy" or (
        node.module == "mimo_colocated.train" and "lossy" in names
    )


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
