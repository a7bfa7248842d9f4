# SPDX-License-Identifier: Apache-2.0
"""What a calibration makes of the time that calls take, on a clock that is played."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron.core.models.mimo.job import calibration
from megatron.core.models.mimo.job.calibration import Probe, calibrate
from megatron.core.models.mimo.job.probed_layers import encoder_stack, language_stack
from megatron.core.models.mimo.plan.flops import attention_flops, layer_flops, seen_pairs
from megatron.core.models.mimo.plan.machine import Machine, machine_from, to_json
from mimo_colocated.cli import calibrating
from mimo_colocated.cli.main import main
from mimo_colocated.cli.options import read

TOKENS, WIDTH, ENCODER, HEADS, ITEM = 16, 16, 12, 4, 2


@pytest.fixture
def alone() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def probe(seconds: float) -> Probe:
    """Every call of the clock is a second later: so long takes whatever is between two."""
    ticks = itertools.count()
    return Probe(
        torch.device("cpu"), torch.float32, TOKENS, WIDTH, ENCODER, HEADS, ITEM, seconds,
        ranks_of_node=8, clock=lambda: float(next(ticks)),
    )  # fmt: skip


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("seconds", [0.5, 4.0])
def test_rates_are_work_over_time(seconds: float) -> None:
    """Calls are repeated as often as the time allows, at least once."""
    found = calibrate(probe(seconds), "mine")
    repeats = max(1, int(seconds))
    scores = 4 * seen_pairs([TOKENS], causal=True) * WIDTH
    assert found.attention == 3.5 * scores * repeats
    # On this clock few tokens take as long as many: half of it is what the layer takes to start,
    # and of the few tokens' time what their own part of the rest is not.
    few = TOKENS // 8
    causal = language_stack(WIDTH, HEADS)
    many_flops, few_flops = (3 * layer_flops(causal, count) for count in (TOKENS, few))
    rate = (many_flops - few_flops) * 2 / (1 / repeats / 2)
    assert found.matmul == pytest.approx(rate)
    known = 4 * seen_pairs([few], causal=True) * WIDTH * 3.5 / found.attention
    assert found.layer_start == pytest.approx((1 / repeats - known - few_flops / rate) / 3)
    whole = encoder_stack(ENCODER, HEADS)
    item = 3 * layer_flops(whole, ITEM)
    item += 3.5 * attention_flops(whole, seen_pairs([ITEM], causal=False))
    assert found.encoder == pytest.approx((TOKENS - few) / ITEM * item * 2 * repeats)
    copied = 2 * 4 * TOKENS * 4 * WIDTH * repeats
    assert found.memory_rate == found.host == found.inside == found.between == copied
    assert (found.node, found.communicator, found.inside_latency) == (1, 0.0, 0.0)
    assert (found.hop_latency, found.hidden) == (0.0, 0.0)
    assert machine_from(json.loads(to_json(found))) == found


@pytest.mark.usefixtures("alone")
def test_nodes_are_as_launchers_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert calibration.ranks_of_node() == 1
    # They share the host's memory.
    cpu = torch.device("cpu")
    assert calibration._memory(cpu, 4) == calibration._memory(cpu, 1) / 4
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert calibration.ranks_of_node() == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--heads", "3"], "--heads 3 must divide --width 1024"),
        (["--encoder-width", "12"], "--heads 8 must divide --encoder-width 12"),
        (["--ranks", "0"], "must be a whole number from 1"),
        (["--seconds", "0"], "must be a number above 0"),
    ],
)
def test_wrong_options(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = str(tmp_path / "mine.json")
    assert main(["calibrate", target, "--backend", "gloo", *options]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_folder_is_no_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["calibrate"], ["plan", "--calibrate"]):
        assert main([*command, str(tmp_path), "--backend", "gloo"]) == 2
        assert "is a folder; give the name of a file" in capsys.readouterr().err


@pytest.mark.usefixtures("alone")
def test_what_was_measured_is_told_and_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every number in the unit that stands behind it."""
    measured = Machine(
        "mine", node=8, memory=7e10, matmul=8.12e10, attention=1.71e10, encoder=4.25e10,
        memory_rate=2e9, inside=1.25e9, between=7.5e8, inside_latency=1e-6, between_latency=2e-6,
        hop_latency=3e-6, layer_start=3.2e-4, hidden=0.4, host=5e9, communicator=1e6, fused=False,
    )  # fmt: skip
    monkeypatch.setattr(calibration, "calibrate", lambda _probe, _name: measured)
    target = tmp_path / "mine.json"
    calibrating.work(read("calibrate", [str(target)]))
    assert capsys.readouterr().out == (
        "mine: products 81.2, of encoders 42.5, attention 17.1 GFLOP/s; 1.25 GB/s inside a node, "
        "0.75 between, 40 % of it beside products; a layer starts in 320 us; "
        f"plan with --gpu {target}\n"
    )
    assert machine_from(json.loads(target.read_text())) == measured


def test_as_many_ranks_as_asked_for() -> None:
    options = read("calibrate", ["mine.json", "--ranks", "3", "--dtype", "bfloat16"])
    assert options.world_size == 3
    assert options.more == {
        "tokens": 1024, "width": 1024, "encoder_width": 512, "heads": 8, "item_tokens": 256,
        "seconds": 3.0,
    }  # fmt: skip
