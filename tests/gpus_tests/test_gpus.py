# SPDX-License-Identifier: Apache-2.0
"""``make gpu-check`` without a GPU: what would run where, how it is judged, what it measures."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from campaigns.command import main
from tests.gpus import measures
from tests.gpus.campaign import END, PAGE, START, Gpus
from tests.gpus.checks import CHECKS
from tests.gpus.measures import FIGURES
from tests.harness import backend, gpus
from tests.unit_tests.mimo.varlen_stand_in import VarlenStandIn

ROOT = Path(__file__).resolve().parents[2]


class Runs:
    """Commands that are not run; what they say is given."""

    def __init__(self, code: int = 0, said: str = "fine") -> None:
        self.commands: list[tuple[list[str], Mapping[str, str]]] = []
        self._ended = code, said

    def __call__(self, command: list[str], environment: Mapping[str, str]) -> tuple[int, str]:
        self.commands.append((command, environment))
        return self._ended


def run(found: int, runs: Runs, out: Path, *more: str) -> tuple[int, dict]:
    code = main(Gpus(found, runs), ["--out", str(out), *more])
    file = out / "summary.json"
    return code, json.loads(file.read_text()) if file.exists() else {}


def test_without_gpus_it_says_what_would_run(tmp_path: Path, capsys) -> None:
    runs = Runs()
    code, summary = run(0, runs, tmp_path)
    assert (code, runs.commands, summary["gpus"]) == (0, [], 0)
    said = capsys.readouterr().out
    assert "no GPU is here" in said
    assert f"NOT RUN: 0 of {len(CHECKS)} checks, {len(CHECKS)} not run" in said
    for name, check in CHECKS.items():
        assert f"{name}: python {' '.join(check.command(check.gpus))}" in said
        assert summary["results"][name]["passed"] is None


@pytest.mark.parametrize("found", [1, 2, 8])
def test_what_fits_the_machine_runs(found: int, tmp_path: Path) -> None:
    runs = Runs()
    code, summary = run(found, runs, tmp_path)
    assert code == 0
    results = summary["results"]
    ran = [name for name in CHECKS if results[name]["passed"]]
    fits = [n for n, check in CHECKS.items() if check.gpus <= found and not check.module]
    assert ran == fits
    assert len(runs.commands) == len(fits) == summary["passed"]
    assert summary["not run"] == [name for name in CHECKS if name not in fits]
    shared = [env.get(gpus.SHARED) for command, env in runs.commands if "pytest" in command]
    assert shared[0] == "1"
    assert not any(shared[1:])
    if found > 1:
        assert any(f"--nproc-per-node={found}" in command for command, _ in runs.commands)
    assert results["Transformer Engine, bf16"]["reason"].startswith("needs transformer_engine")


def test_a_command_that_fails_fails_its_check(tmp_path: Path) -> None:
    code, summary = run(1, Runs(3, "before\nE   rows differ\n"), tmp_path, "--only", "shared")
    assert code == 1
    assert summary["results"]["bridges, shared GPU"]["reason"] == "exit code 3: E   rows differ"


@pytest.mark.parametrize("passed", [True, False])
def test_figures_are_kept_and_judged(tmp_path: Path, passed: bool) -> None:
    said = f"noise\n{FIGURES}{json.dumps({'ratio': 0.2, 'passed': passed})}\n"
    code, summary = run(1, Runs(0, said), tmp_path, "--only", "offload")
    result = summary["results"]["offload"]
    assert (code, result["passed"], result["reason"]) == (int(not passed), passed, "ratio 0.2")


def test_the_page_is_not_written_without_gpus(tmp_path: Path, capsys) -> None:
    assert run(0, Runs(), tmp_path, "--docs")[0] == 2
    assert "--docs writes what was seen" in capsys.readouterr().err
    page = PAGE.read_text()
    assert page.index(START) < page.index(END)


def test_what_is_run_is_there() -> None:
    for check in CHECKS.values():
        for argument in check.arguments:
            assert not argument.startswith("tests/") or (ROOT / argument).is_file(), argument


def test_offloaded_activations_leave_the_device_in_forward() -> None:
    """A control moves nothing."""
    assert measures.offload(rows=512)["passed"]
    assert not measures.offload(rows=512, smallest=1 << 60)["passed"]


SHORT = (9, 1, 0, 16), (16, 8, 8, 16)


def test_packed_attention_is_one_call_with_the_same_numbers() -> None:
    """Over a stand-in for the kernel."""
    with VarlenStandIn().in_place():
        found = measures.varlen(SHORT)
    assert found["passed"]
    assert found["calls"] == 1
    assert found["error"] < 0.05


def test_control_a_kernel_that_aligns_to_the_first_key_or_none() -> None:
    with VarlenStandIn(to_last_key=False).in_place():
        found = measures.varlen(SHORT)
    assert not found["passed"]
    assert found["calls"] == 1
    if not torch.cuda.is_available():
        found = measures.varlen(SHORT)
        assert (found["passed"], found["calls"]) == (False, 0)


@pytest.mark.ranks(2)
def test_memory_of_groups_is_what_came_while_they_were_made() -> None:
    taken = iter([0, 5 << 20, 7 << 20])
    found = measures.groups(lambda: next(taken))
    assert found == {"ranks": 2, "made MiB": 5, "used MiB": 7, "passed": None}


@pytest.mark.parametrize("shared", [False, True])
def test_ranks_share_gpus_where_they_are_told_to(monkeypatch, shared: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    taken: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(gpus, "installed", lambda: 2)
    monkeypatch.delenv(gpus.SHARED, raising=False)
    env = {gpus.VISIBLE: "", gpus.BEFORE: "all"}
    if shared:
        monkeypatch.setenv(gpus.SHARED, "1")
        env[gpus.SHARED] = "1"
    assert backend.choose(2) == ("nccl", "cuda")
    assert backend.choose(8) == ("gloo", "cuda" if shared else "cpu")
    assert gpus.show_to_ranks(env, 8) is shared
    devices = [backend.device_for(rank, 8) for rank in range(8)]
    expected = [torch.device("cuda", rank % 2) for rank in range(8)] if shared else []
    assert taken == expected
    assert devices == (expected or [torch.device("cpu")] * 8)
