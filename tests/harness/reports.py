# SPDX-License-Identifier: Apache-2.0
"""Turns what the ranks recorded about one test into the reports the outer pytest shows."""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import pytest

from tests.harness.records import RankLog


class RankFailure:
    """A failure's text in a terminal: the rank that failed first, then the others.

    Attributes:
        reprcrash: what pytest reads for the line of its short summary.
    """

    def __init__(self, headline: str, original: Any = None, notes: Iterable[str] = ()) -> None:
        self.headline = headline
        self.original = original
        self.notes = [n for n in notes if n]
        crash = getattr(original, "reprcrash", None)
        message = f"{headline}: {crash.message}" if crash is not None else headline
        self.reprcrash = SimpleNamespace(message=message)

    def toterminal(self, tw: Any) -> None:
        """Write headline, original traceback with its colours, and notes."""
        tw.line(self.headline, red=True, bold=True)
        if hasattr(self.original, "toterminal"):
            self.original.toterminal(tw)
        elif self.original is not None:
            tw.line(str(self.original))
        for note in self.notes:
            tw.line("")
            tw.line(note)

    def __str__(self) -> str:
        original = [] if self.original is None else [str(self.original)]
        return "\n".join([self.headline, *original, *self.notes])


def _first_line(text: str, limit: int = 200) -> str:
    """Return the line of a traceback that says what went wrong."""
    errors = [line[1:].strip() for line in text.splitlines() if line.startswith("E ")]
    lines = errors or [line for line in text.splitlines() if line.strip()]
    return lines[0][:limit] if lines else ""


def _load(config: pytest.Config, log: RankLog, nodeid: str) -> list[pytest.TestReport]:
    hook = config.hook.pytest_report_from_serializable
    reports = [hook(config=config, data=data) for data in log.reports.get(nodeid, [])]
    for report in reports:
        # Of a skipped test: (file, line, reason), which JSON has made a list.
        if isinstance(report.longrepr, list):
            report.longrepr = tuple(report.longrepr)
    return reports


def _how(reports: list[pytest.TestReport]) -> str:
    """Return one word for a test's whole outcome on a rank."""
    if any(r.failed for r in reports):
        return "failed"
    if any(hasattr(r, "wasxfail") for r in reports):
        return "xfailed" if any(r.skipped for r in reports) else "xpassed"
    return "skipped" if any(r.skipped for r in reports) else "passed"


def alone(config: pytest.Config, item: pytest.Item, logs: list[RankLog]) -> list[pytest.TestReport]:
    """Return the reports of a test that one process ran, as they are."""
    return _load(config, logs[0], item.nodeid)


def merge(
    config: pytest.Config, item: pytest.Item, logs: list[RankLog], died: str = ""
) -> list[pytest.TestReport]:
    """Return the reports of a test that was started.

    Args:
        logs: one per rank.
        died: why the launch ended while the test ran; empty when it did not.
    """
    nodeid = item.nodeid
    failed = [log for log in logs if nodeid in log.failed_at]
    failed.sort(key=lambda log: log.failed_at[nodeid])
    if failed:
        return _failed(config, nodeid, logs, failed, died)
    if died:
        return [error(item, RankFailure(died, notes=_unfinished(logs, nodeid)), when="call")]
    by_rank = [_load(config, log, nodeid) for log in logs]
    outcomes = [_how(reports) for reports in by_rank]
    if len(set(outcomes)) > 1:
        what = ", ".join(f"rank {rank} {how}" for rank, how in enumerate(outcomes))
        return [error(item, RankFailure(f"the ranks disagree about the outcome: {what}"), "call")]
    return by_rank[0]


def _failed(
    config: pytest.Config, nodeid: str, logs: list[RankLog], failed: list[RankLog], died: str
) -> list[pytest.TestReport]:
    first = failed[0]
    reports = _load(config, first, nodeid)
    notes = [_other_failure(config, log, nodeid) for log in failed[1:]]
    if died:
        notes += [died, *_unfinished(logs, nodeid)]
    for report in reports:
        if report.failed:
            headline = f"rank {first.rank} of {len(logs)} failed"
            report.longrepr = RankFailure(headline, report.longrepr, notes)
            notes = []
    return reports


def _other_failure(config: pytest.Config, log: RankLog, nodeid: str) -> str:
    text = next(r.longreprtext for r in _load(config, log, nodeid) if r.failed)
    return f"rank {log.rank} failed too: {_first_line(text)}"


def _unfinished(logs: list[RankLog], nodeid: str) -> list[str]:
    """Return where each rank that had not finished the test was when it was stopped."""
    notes = []
    for log in logs:
        if nodeid not in log.finished:
            state = "was in this test" if nodeid in log.started else "had not reached this test"
            stacks = log.stacks() or "left no stack; its last output:\n" + log.output_tail()
            notes.append(f"rank {log.rank} {state}\n{stacks}")
    return notes


def error(item: pytest.Item, failure: RankFailure, when: str = "setup") -> pytest.TestReport:
    """Return a failed report; pytest shows one of ``setup`` as an error, of ``call`` as failed."""
    return pytest.TestReport(
        nodeid=item.nodeid,
        location=item.location,
        keywords=dict.fromkeys(item.keywords, 1),
        outcome="failed",
        longrepr=failure,
        when=when,
    )
