# SPDX-License-Identifier: Apache-2.0
"""pytest on a copy of the tree, and what its outcome says about a mutant.

Only a test that ran and failed kills a mutant, or a deadline that it ran into. A tree that cannot
be imported, a fixture that fails, a name that does not exist: those say that the mutant is badly
written, not that a test has understood something.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.harness.fork_server import ADDRESS_VARIABLE, Forked, ForkServer, Start
from tests.mutants.mutant import Mutant

KILLED, TIMED_OUT, SURVIVED, BROKEN = "killed", "killed by a deadline", "SURVIVED", "BROKEN"
KILLS = (KILLED, TIMED_OUT)

# How long pytest gets to end its ranks after it was interrupted.
_GRACE_S = 20.0
_BAD_MUTANT = re.compile(
    r"(?:^|: )((?:Name|Syntax|Indentation|Import|ModuleNotFound|UnboundLocal)Error\b.*)"
)
# What the rank harness says of a test whose ranks wait for one another in vain.
_DEADLINE = re.compile(r"ran into the deadline of the test|no rank made progress")
_LAUNCH_VARIABLES = re.compile(
    r"(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|MASTER_.*|TORCHELASTIC.*|MIMO_TEST.*|PYTEST_.*"
)


@dataclass(frozen=True)
class Tree:
    """What is copied, and how pytest is called on it.

    Attributes:
        root: the checkout; it is only read.
        parts: files and folders below it that the tests need.
        options: further pytest options.
        timeout: seconds after which a mutant's pytest is ended.
        libraries: fork every process from one that has imported these; with none of them every
            process starts by itself.
    """

    root: Path
    parts: tuple[str, ...]
    options: tuple[str, ...] = ()
    timeout: float = 300.0
    libraries: tuple[str, ...] = ()

    def files(self) -> Iterator[Path]:
        """Every file that is copied, in a fixed order."""
        for part in self.parts:
            path = self.root / part
            found = sorted(path.rglob("*")) if path.is_dir() else [path]
            yield from (f for f in found if f.is_file() and "__pycache__" not in f.parts)

    @contextlib.contextmanager
    def copied(self) -> Iterator[Path]:
        """A fresh copy, gone afterwards."""
        folder = Path(tempfile.mkdtemp(prefix="mutant-"))
        try:
            for file in self.files():
                target = folder / file.relative_to(self.root)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, target)
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True)
class Finished:
    """How a pytest ended.

    Attributes:
        code: its exit code; ``None`` if it ran into the timeout.
        seconds: how long it took.
        passed, skipped: numbers of tests.
        failures: (test, message) of tests that ran and failed.
        errors: the same of what failed around tests: collection, set-up, tear-down.
        output: what it printed, the end of it.
    """

    code: int | None
    seconds: float
    passed: int
    skipped: int
    failures: list[tuple[str, str]]
    errors: list[tuple[str, str]]
    output: str


@dataclass(frozen=True)
class Verdict:
    """What became of a mutant: a status, the test that decided it and what it said."""

    status: str
    seconds: float
    test: str = ""
    message: str = ""


class Trials:
    """Runs pytest on copies of a tree; a context manager.

    ``stop`` ends what is running, from any thread.
    """

    def __init__(self, tree: Tree) -> None:
        self.tree = tree
        self._server: ForkServer | None = None
        self._folder = tempfile.TemporaryDirectory(prefix="mutants-")
        self._running: set[subprocess.Popen | Forked] = set()
        self._stopped = False

    def __enter__(self) -> Trials:
        if self.tree.libraries:
            environment = _environment(self.tree.root)
            folder = Path(self._folder.name)
            self._server = ForkServer(folder, environment, self.tree.libraries)
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()
        if self._server is not None:
            self._server.close()
        self._folder.cleanup()

    def baseline(self, tests: Sequence[str], timeout: float) -> Finished:
        """All tests on a copy without any mutant."""
        with self.tree.copied() as folder:
            return self._pytest(folder, tests, timeout)

    def judge(self, mutant: Mutant) -> Verdict:
        """Make the mistake in a copy and see whether its tests notice."""
        with self.tree.copied() as folder:
            mutant.apply(folder)
            return verdict(self._pytest(folder, mutant.tests, self.tree.timeout, "-x"))

    def stop(self) -> None:
        """End every pytest that is running and start no other."""
        self._stopped = True
        for process in list(self._running):
            _end(process)

    def _pytest(
        self, folder: Path, tests: Sequence[str], timeout: float, *options: str
    ) -> Finished:
        if self._stopped:
            raise KeyboardInterrupt
        report, log = folder / "report.xml", folder / "output.log"
        arguments = ["-q", "-p", "no:cacheprovider", *options, f"--junitxml={report}"]
        arguments += [*self.tree.options, *tests]
        started = time.monotonic()
        process = self._start(arguments, folder, log)
        self._running.add(process)
        code = self._wait(process, timeout)
        seconds = time.monotonic() - started
        output = log.read_text(errors="replace") if log.is_file() else ""
        return _read(report, code, seconds, output[-4000:])

    def _start(self, arguments: list[str], folder: Path, log: Path) -> subprocess.Popen | Forked:
        environment = _environment(folder)
        arguments = ["-m", "pytest", *arguments]
        # Empty: no rank is forked either.
        environment[ADDRESS_VARIABLE] = address = self._server.address if self._server else ""
        if address:
            return Forked(address, Start(arguments, str(folder), environment, str(log)))
        with log.open("wb") as output:
            return subprocess.Popen(
                [sys.executable, *arguments],
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _wait(self, process: subprocess.Popen | Forked, timeout: float) -> int | None:
        try:
            return process.wait(timeout)
        except subprocess.TimeoutExpired:
            return None
        finally:
            _end(process)
            self._running.discard(process)


def verdict(finished: Finished) -> Verdict:
    """What a finished pytest says about the mutant that it ran on."""
    seconds = finished.seconds
    if finished.code is None:
        return Verdict(TIMED_OUT, seconds, "", f"not done after {seconds:.0f} s")
    if finished.failures and finished.code == 1:
        test, message = finished.failures[0]
        bad = _BAD_MUTANT.search(message)
        if bad:
            return Verdict(BROKEN, seconds, test, bad[1])
        late = _DEADLINE.search(message)
        return Verdict(TIMED_OUT if late else KILLED, seconds, test, _first_line(message))
    if finished.code == 0 and finished.passed:
        skipped = f", {finished.skipped} skipped" if finished.skipped else ""
        return Verdict(SURVIVED, seconds, "", f"{finished.passed} tests passed{skipped}")
    if finished.errors:
        test, message = finished.errors[0]
        return Verdict(BROKEN, seconds, test, f"no test ran into it: {_first_line(message)}")
    tail = _first_line(finished.output.strip().rpartition("\n")[2])
    return Verdict(BROKEN, seconds, "", f"pytest exited {finished.code}: {tail}")


def _environment(folder: Path) -> dict[str, str]:
    """The copy's modules come first; nothing of a launch that this process may be part of."""
    from tests.harness.backend import choose

    env = {k: v for k, v in os.environ.items() if not _LAUNCH_VARIABLES.fullmatch(k)}
    paths = [str(folder), *filter(None, [env.get("PYTHONPATH")])]
    env["PYTHONPATH"] = os.pathsep.join(paths)
    env["OMP_NUM_THREADS"] = "1"
    if choose(8)[0] == "gloo":
        # Megatron-Core compiles while it is imported: seconds, for nothing without a GPU.
        env.setdefault("TORCHDYNAMO_DISABLE", "1")
    return env


def _end(process: subprocess.Popen | Forked) -> None:
    """Interrupt pytest, which then ends its ranks; kill it if it does not listen."""
    if process.poll() is not None:
        return
    for number, patience in ((signal.SIGINT, _GRACE_S), (signal.SIGKILL, _GRACE_S)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)
            return


def _read(report: Path, code: int | None, seconds: float, output: str) -> Finished:
    """Read pytest's JUnit report, if it got as far as writing one."""
    failures: list[tuple[str, str]] = []
    errors: list[tuple[str, str]] = []
    passed = skipped = 0
    cases = ElementTree.parse(report).iter("testcase") if report.is_file() else ()
    for case in cases:
        name = f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}"
        for kind, found in (("failure", failures), ("error", errors)):
            found += [(name, element.get("message") or "") for element in case.iter(kind)]
        skipped += case.find("skipped") is not None
        passed += len(case) == 0
    return Finished(code, seconds, passed, skipped, failures, errors, output)


def _first_line(text: str, limit: int = 300) -> str:
    """The first line that says something, cut to ``limit`` characters."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0][:limit] if lines else ""
