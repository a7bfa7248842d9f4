# SPDX-License-Identifier: Apache-2.0
"""The command's options, files and exit codes, with launches that are scripted. One process."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

from benchmarks import report
from benchmarks.campaign import Benchmarks
from benchmarks.whole_step import SECTIONS
from campaigns.command import main
from campaigns.ranks import LaunchFailed

CELLS = {
    "bytes": {"layout": "a/b", "tokens": "uniform", "gather": [4.0, 8.0], "passed": True},
    "wall": {"layout": "a/b", "rows": 1024, "ratio": 0.5, "bound": 0.6, "passed": True},
    "step": {
        "layout": "a/b",
        "encoder": "as it is",
        "variant": "routed",
        "ratio": 0.9,
        "sections_ms": [1.0] * len(SECTIONS),
        "passed": None,
    },
}


class Script:
    """A launch with one scripted cell per kind; ``crash`` ends it when that kind starts."""

    def __init__(self, crash: str | None = None, **changes: dict[str, Any]) -> None:
        self.crash, self.changes = crash, changes
        self.world = 0
        self.kinds: list[str] = []
        self.plan: dict[str, Any] = {}

    def __call__(
        self, world: int, kinds: list[str], _work: str, plan: Any, *_: Any, **__: Any
    ) -> Iterator[tuple[str, str, Any]]:
        self.world, self.plan = world, plan
        self.kinds += kinds
        return self.records(kinds)

    def records(self, kinds: list[str]) -> Iterator[tuple[str, str, Any]]:
        for kind in kinds:
            yield "started", kind, {}
            if kind == self.crash:
                raise LaunchFailed("rank 3 was killed")
            yield "part", kind, CELLS[kind] | self.changes.get(kind, {})
            yield "finished", kind, {}


@pytest.fixture
def bench(tmp_path, capsys, monkeypatch):
    """``bench(script, *arguments)`` -> (exit code, stdout, stderr)."""

    def run(script: Script, *arguments: str) -> tuple[int, str, str]:
        argv = ["--out", str(tmp_path), *arguments]
        monkeypatch.setattr("sys.argv", ["benchmarks", *argv])
        code = main(Benchmarks(script), argv)
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


def test_every_kind_leaves_a_file_and_the_command_says_pass(bench, tmp_path):
    script = Script()
    code, out, _ = bench(script, "--only", "bytes,wall,step", "--quick")
    assert code == 0
    assert script.world == 8
    assert script.kinds == ["bytes", "step", "wall"]
    assert script.plan["quick"]
    assert "2 of 2 bounds kept\nPASS: 3 of 3 kinds" in out
    written = json.loads((tmp_path / "bytes.json").read_text())
    assert written["cells"] == [CELLS["bytes"]]
    assert written["command"].endswith("--only bytes,wall,step --quick")
    assert (tmp_path / "step.png").stat().st_size > 10_000


def test_a_missed_bound_fails_and_is_in_the_file(bench, tmp_path):
    slow = {"ratio": 0.7, "passed": False}
    code, out, _ = bench(Script(wall=slow), "--only", "bytes,wall")
    assert code == 1
    assert "1 of 2 bounds kept\nFAIL: 1 of 2 kinds" in out
    assert json.loads((tmp_path / "wall.json").read_text())["failed"] == 1


def test_kinds_that_ended_before_a_crash_are_kept(bench, tmp_path):
    code, out, _ = bench(Script(crash="wall"), "--only", "bytes,wall")
    assert code == 1
    assert "FAIL  wall  0  rank 3 was killed" in out
    assert (tmp_path / "bytes.json").exists()
    assert not (tmp_path / "wall.json").exists()


def test_given_layouts_decide_the_number_of_ranks(bench):
    script = Script()
    bench(script, "--only", "bytes", "--layout", "tp=1,dp=2/cp=2", "--layout", "tp=2,dp=1/dp=2")
    assert script.world == 2
    assert script.plan["layouts"] == ["tp=1,dp=2/tp=1,cp=2,dp=1", "tp=2,dp=1/tp=1,dp=2"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--only", "bites"], "--only 'bites' is not measured; there are bytes, memory"),
        (["--layout", "tp=2"], "--layout 'tp=2': give the encoder's layout, a slash"),
        (["--layout", "dp=4/dp=2"], "must span same number of ranks"),
        (["--layout", "dp=16/tp=16,dp=1"], "8 samples of the batch cannot be shared evenly by 16"),
        (["--layout", "dp=2/dp=2", "--layout", "dp=4/dp=4"], r"same number of ranks, got \[2, 4\]"),
        (["--quik"], "unrecognized arguments: --quik; --help"),
    ],
)
def test_wrong_options_are_one_sentence(bench, arguments, sentence):
    code, _, err = bench(Script(), *arguments)
    assert code == 2
    assert err.count("\n") == 1
    assert re.search(sentence, err)


def test_fields_of_a_table():
    assert report.text([49152.0, 0.5]) == "49,152 | 0.5"
    assert report.text(None) == "-"


def test_tables_in_a_document_are_replaced(bench, tmp_path):
    path = tmp_path / "bridge.md"
    empty = "<!-- bench: step -->\n<!-- end -->"
    path.write_text(f"a\n<!-- bench: wall -->\nold\n<!-- end -->\nb\n{empty}")
    bench(Script(), "--only", "wall", "--docs", str(path))
    written = path.read_text()
    assert written.startswith("a\n<!-- bench: wall -->\n| layout (encoder/language) | rows |")
    assert "| a/b | 1,024 | - | - | - | - | 0.5 | 0.6 | - | - | PASS |\n\n`python -m" in written
    assert written.endswith(f"<!-- end -->\nb\n{empty}")
    assert "old" not in written


def test_a_missing_document_is_one_sentence(bench, tmp_path):
    code, _, err = bench(Script(), "--only", "wall", "--docs", str(tmp_path / "no.md"))
    assert code == 2
    assert "no.md cannot be read: No such file" in err
