# SPDX-License-Identifier: Apache-2.0
"""What every campaign does alike: resuming, the summary, exit codes. A campaign of three cases."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from campaigns import record
from campaigns.command import Campaign, CampaignError, Console, main
from campaigns.pages import replace_between, write_whole
from campaigns.record import Record, Result, fingerprint


class Three(Campaign):
    """Three cases with outcomes that a test gives."""

    module, title, columns = "three", "Three", ("case", "")
    code = ()

    def __init__(self, **outcomes: Any) -> None:
        self.outcomes = {"a": True, "b": True, "c": None, **outcomes}
        self.ran: list[str] = []

    def choose(self, _given: Any) -> Sequence[str]:
        return list(self.outcomes)

    def run(self, left: Sequence[str], console: Console) -> Iterator[tuple[str, Result]]:
        for name in left:
            outcome = self.outcomes[name]
            if isinstance(outcome, BaseException):
                raise outcome
            self.ran.append(name)
            yield name, {"passed": outcome}

    def row(self, name: str, result: Result | None) -> tuple[str, ...]:
        return name, "" if result is None else str(result["passed"])


def run(three: Three, out: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    code = main(three, ["--out", str(out), *arguments])
    file = out / "summary.json"
    return code, json.loads(file.read_text()) if file.exists() else {}


def test_passed_cases_are_kept_and_all_others_run_again(tmp_path, capsys) -> None:
    code, summary = run(Three(b=False), tmp_path)
    assert (code, summary["passed"], summary["failed"]) == (1, 2, ["b"])
    again = Three()
    assert run(again, tmp_path)[0] == 0
    assert again.ran == ["b", "c"]  # without a bound nothing was passed
    fresh = Three()
    assert run(fresh, tmp_path, "--fresh")[0] == 0
    assert fresh.ran == ["a", "b", "c"]
    assert "PASS: 3 of 3 cases" in capsys.readouterr().out


def test_a_stopped_command_keeps_what_has_ended_and_says_how_to_go_on(tmp_path, capsys) -> None:
    code, summary = run(Three(b=KeyboardInterrupt()), tmp_path)
    assert (code, summary["missing"]) == (130, ["b", "c"])
    assert "run it again to go on" in capsys.readouterr().err
    again = Three()
    run(again, tmp_path)
    assert again.ran == ["b", "c"]


def test_what_cannot_be_tried_is_one_sentence_and_changes_nothing(tmp_path, capsys) -> None:
    out = tmp_path / "new"
    assert run(Three(a=CampaignError("no tests")), out) == (2, {})
    assert not out.exists()
    assert main(Three(), ["--fersh"]) == 2
    error = capsys.readouterr().err
    unknown = "unrecognized arguments: --fersh; --help lists all options"
    assert error == f"error: no tests\nerror: {unknown}\n"
    run(Three(), out)
    before = (out / "summary.json").read_text()
    assert run(Three(a=CampaignError("no tests")), out, "--fresh")[0] == 2
    assert (out / "summary.json").read_text() == before


def test_the_list_runs_nothing(tmp_path, capsys) -> None:
    three = Three()
    assert run(three, tmp_path, "--list") == (0, {})
    assert (three.ran, capsys.readouterr().out) == ([], "a\nb\nc\n")


def test_results_are_kept_for_the_same_code_only(tmp_path) -> None:
    Record(tmp_path, "mark", None).add("key", {"passed": True})
    assert Record(tmp_path, "mark", lambda *_: True).results == {"key": {"passed": True}}
    assert Record(tmp_path, "other", lambda *_: True).results == {}
    assert Record(tmp_path, "mark", None).results == {}


def test_a_line_cut_short_is_no_result_and_spoils_no_other(tmp_path) -> None:
    Record(tmp_path, "mark", None).add("a", {"passed": True})
    with (tmp_path / "results.jsonl").open("a") as file:
        file.write('{"b": {"pas')
    second = Record(tmp_path, "mark", lambda *_: True)
    assert set(second.results) == {"a"}
    second.add("c", {"passed": True})
    assert set(Record(tmp_path, "mark", lambda *_: True).results) == {"a", "c"}


def test_the_fingerprint_follows_code_and_settings(tmp_path, monkeypatch) -> None:
    file = tmp_path / "a.py"
    file.write_text("1")
    before = fingerprint([file], {"x": 1}, tmp_path)
    assert fingerprint([file], {"x": 1}, tmp_path) == before
    assert fingerprint([file], {"x": 2}, tmp_path) != before
    monkeypatch.setattr(record, "versions", lambda: {"torch": "other"})
    assert fingerprint([file], {"x": 1}, tmp_path) != before
    monkeypatch.undo()
    file.write_text("2")
    assert fingerprint([file], {"x": 1}, tmp_path) != before


def test_parts_of_a_page_are_replaced_whole(tmp_path) -> None:
    page = tmp_path / "page.md"
    write_whole(page, "before\n<!-- s -->\nold\n<!-- e -->\nafter\n")
    replace_between(page, "<!-- s -->", "<!-- e -->", "new")
    assert page.read_text() == "before\n<!-- s -->\n\nnew\n\n<!-- e -->\nafter\n"
    with pytest.raises(ValueError, match="must hold '<!-- x -->' and '<!-- e -->', once each"):
        replace_between(page, "<!-- x -->", "<!-- e -->", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["page.md"]
