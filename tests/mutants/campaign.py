# SPDX-License-Identifier: Apache-2.0
"""The baseline, then every mutant: one-process tests several at a time, launches one by one."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

from tests.mutants.mutant import Mutant
from tests.mutants.record import Record
from tests.mutants.trial import Finished, Trials, Verdict

# Each test of the baseline may take this long on a busy machine, on top of the first launch.
_BASELINE_S_PER_TEST = 60.0


class BaselineError(RuntimeError):
    """The tests do not pass without any mutant."""


@dataclass(frozen=True)
class Done:
    """A mutant that is settled."""

    mutant: Mutant
    verdict: Verdict


def tests_of(mutants: Sequence[Mutant]) -> list[str]:
    """Every test of the mutants, once."""
    return list(dict.fromkeys(test for mutant in mutants for test in mutant.tests))


def run_baseline(trials: Trials, record: Record, mutants: Sequence[Mutant]) -> Finished | None:
    """Pass every test without a mutant; ``None`` if the record says that they did.

    Raises:
        BaselineError: a test failed, was skipped or was not found.
    """
    tests = tests_of(mutants)
    if record.covers(tests):
        return None
    timeout = trials.tree.timeout + _BASELINE_S_PER_TEST * len(tests)
    finished = trials.baseline(tests, timeout)
    wrong = [f"{test}: {message}" for test, message in finished.failures + finished.errors]
    if finished.code != 0 or finished.skipped or not finished.passed:
        outcome = "no end in time" if finished.code is None else f"exit code {finished.code}"
        raise BaselineError(
            f"the tests have to pass before mutants are tried, but without one there were "
            f"{len(wrong)} failures and {finished.skipped} skipped ({outcome})\n"
            + ("\n".join(wrong) or finished.output)
        )
    known = record.baseline.get("tests", [])
    record.baseline = {
        "tests": sorted({*known, *tests}),
        "passed": finished.passed,
        "seconds": round(finished.seconds, 1),
    }
    return finished


def run_mutants(
    trials: Trials, mutants: Sequence[Mutant], jobs: int = 0
) -> Iterator[Done]:
    """Judge mutants and yield each as it is done; ends everything that runs when it is closed.

    Args:
        trials: runs pytest.
        mutants: what to judge.
        jobs: mutants of one-process tests that run at a time; 0 takes one per core.
    """
    alone = [m for m in mutants if m.ranks == 1]
    launched = [m for m in mutants if m.ranks > 1]
    yield from _run(trials, alone, jobs or os.cpu_count() or 1)
    yield from _run(trials, launched, 1)


def _run(trials: Trials, mutants: Sequence[Mutant], jobs: int) -> Iterator[Done]:
    with ThreadPoolExecutor(jobs) as pool:
        waiting: dict[Future, Mutant] = {pool.submit(trials.judge, m): m for m in mutants}
        try:
            while waiting:
                done, _ = wait(waiting, return_when=FIRST_COMPLETED)
                for future in done:
                    yield Done(waiting.pop(future), future.result())
        except BaseException:  # Ctrl-C, or nobody asks for more
            for future in waiting:
                future.cancel()
            trials.stop()
            raise
