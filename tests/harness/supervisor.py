# SPDX-License-Identifier: Apache-2.0
"""The supervising pytest: one launch per number of ranks, followed test by test.

A launch runs in the background while pytest asks for its tests one after the other; each is
reported as soon as every rank has finished it. When a launch ends early, the test it was in is
reported and the rest goes into a new launch. The largest launch begins at once, beside the tests of
one process: these come first, one after the other, and its ranks get what they leave idle. Where
there are many of them, those below the folders of ``beside`` run in a second process meanwhile,
which is a launch too, of no rank.
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
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness import records
from tests.harness.fork_server import Forked
from tests.harness.gpus import VISIBLE, show_to_ranks
from tests.harness.plugin import ranks_of, timeout_of
from tests.harness.programs import first_failed, start
from tests.harness.records import RankLog
from tests.harness.reports import RankFailure, alone, error, merge

_POLL = 0.05
# Seconds beyond every other deadline before a launch is stopped from here.
_MARGIN = 30.0
# Of ranks beside the tests of one process. Eight of them weigh as much as one process then; as they
# were they took all cores first, and those tests went on alone, on one core.
_NICE = 10
# What torchrun sets: a launch started from inside another must not inherit it.
_LAUNCH_VARIABLES = re.compile(
    r"(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|LOCAL_WORLD_SIZE|ROLE_NAME|MASTER_(ADDR|PORT)"
    r"|TORCHELASTIC_.*|TORCH_NCCL_ASYNC_ERROR_HANDLING|PYTEST_CURRENT_TEST"
)


class Launch:
    """``size`` ranks that run pytest on a list of tests."""

    def __init__(self, config: pytest.Config, size: int, items: list[pytest.Item]) -> None:
        self.items = items
        self.directory = Path(tempfile.mkdtemp(prefix=f"ranks{size}-"))
        self.logs = [RankLog(self.directory, rank) for rank in range(max(size, 1))]
        self.stopped = ""
        self.started_at = self.progress_at = time.monotonic()
        records.write_plan(self.directory, [i.nodeid for i in items])
        self.process = self.start_ranks(config, size)

    def start_ranks(self, config: pytest.Config, size: int) -> subprocess.Popen | Forked:
        """Fork the ranks from the server, or start torchrun where each has a GPU."""
        environment, log = self.environment(size), self.directory / "agent.log"
        # The server has what suits ranks (nothing is compiled there), not what this process has.
        forked = size and config.getini("ranks_start") == "fork"
        return start(
            self.arguments(config, size),
            config.invocation_params.dir,
            environment,
            log,
            log,
            fresh=environment.get(VISIBLE) != "" or not forked,
            ranks=size,
            logs=self.directory / "logs" if size else None,
        )

    def arguments(self, config: pytest.Config, size: int) -> list[str]:
        """What a rank runs."""
        arguments = ["-m", "pytest", "-q", "-p", "no:cacheprovider"]
        # tee-sys: what a rank prints is in its log already when it dies.
        arguments += ["--capture=tee-sys"] if size else []
        arguments += [f"--rootdir={config.rootpath}"]
        if config.inipath is not None:
            arguments += ["-c", str(config.inipath)]
        for override in config.getoption("override_ini") or ():
            arguments += ["-o", override]
        return arguments + list(dict.fromkeys(str(i.path) for i in self.items))

    def give_way(self) -> None:
        """Let what else runs go first."""
        with contextlib.suppress(ProcessLookupError):
            os.setpriority(os.PRIO_PGRP, self.process.pid, _NICE)

    def environment(self, size: int) -> dict[str, str]:
        """The environment of the ranks; of no rank, as it is here."""
        env = {k: v for k, v in os.environ.items() if not _LAUNCH_VARIABLES.fullmatch(k)}
        env[records.DIRECTORY_VARIABLE] = str(self.directory)
        env[records.SUPERVISOR_VARIABLE] = str(os.getpid())
        if not size:
            return env
        env["PYTHONUNBUFFERED"] = "1"
        env.setdefault("OMP_NUM_THREADS", "1")
        if not show_to_ranks(env, size):
            # Megatron-Core compiles its fused functions while it is imported: seconds per rank,
            # for nothing, since they run uncompiled without a GPU.
            env.setdefault("TORCHDYNAMO_DISABLE", "1")
        if sys.platform == "linux":
            # All ranks are here, and a host name need not resolve to a usable interface.
            env.setdefault("GLOO_SOCKET_IFNAME", "lo")
        return env

    def read(self) -> None:
        """Take in what the ranks recorded since the last call."""
        news = [log.read() for log in self.logs]
        if any(news):
            self.progress_at = time.monotonic()

    def running(self) -> bool:
        """True while some rank has not exited."""
        return self.process.poll() is None

    def check_deadlines(self, startup: float, per_test: float) -> None:
        """Stop the launch when it takes longer than its ranks' own deadlines explain."""
        now = time.monotonic()
        begun = any(log.started for log in self.logs)
        limit = per_test + _MARGIN if begun else startup
        overall = startup + per_test + 20.0 * len(self.items)
        if now - self.progress_at > limit:
            what = "no rank made progress" if begun else "no rank reached its first test"
            self.stop(f"{what} for {limit:g} s")
        elif now - self.started_at > overall:
            self.stop(f"the launch took more than {overall:g} s for {len(self.items)} tests")

    def stop(self, reason: str) -> None:
        """End all ranks; they leave their stacks on SIGTERM."""
        self.stopped = self.stopped or reason
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGTERM)
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            # torchrun puts the ranks in sessions of their own, so each is ended by its id.
            for pid in [log.pid for log in self.logs if log.pid]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.process.wait()
        self.read()

    def why(self) -> str:
        """Return why the launch ended: our own deadline, a rank's deadline, or dead ranks."""
        if self.stopped:
            return self.stopped
        stacks = [log.stacks() for log in self.logs]
        late = [r for r, text in enumerate(stacks) if text.startswith("Timeout (")]
        if late:
            limit = stacks[late[0]].splitlines()[0]
            return f"rank {late[0]} ran into the deadline of the test: {limit}"
        gave_up = [log for log in self.logs if log.gave_up]
        if gave_up:
            return f"the other ranks did not finish after rank {gave_up[0].rank} failed"
        return self._why_dead()

    def _why_dead(self) -> str:
        agent = self.directory / "agent.log"
        first, code = first_failed(self.process, agent)
        # Without a first one: ranks that were stopped have left a stack, one that died has not.
        silent = [log for log in self.logs if not log.stacks() and not log.ended]
        log = (silent or self.logs)[0] if first is None else self.logs[first]
        ended = (
            f"the launch exited {self.process.returncode}" if code is None else f"exit code {code}"
        )
        output = log.output_tail() or agent.read_text(errors="replace")[-2000:]
        return f"rank {log.rank} died ({ended}); its last output:\n{output}"

    def close(self) -> None:
        """Stop what still runs and remove the launch's files."""
        if self.running():
            self.stop("the test session ended")
        shutil.rmtree(self.directory, ignore_errors=True)


class RankedTests:
    """All tests of one number of ranks and their outcome, over as many launches as it takes."""

    def __init__(self, config: pytest.Config, size: int, items: list[pytest.Item]) -> None:
        self.config = config
        self.size = size
        self.waiting = {i.nodeid: i for i in items}
        self.done: dict[str, list[pytest.TestReport]] = {}
        self.launch: Launch | None = None
        self._settled_in_launch = 0

    def reports(self, nodeid: str) -> list[pytest.TestReport]:
        """Return a test's reports, running launches until there are some."""
        while nodeid not in self.done:
            if self.launch is None:
                self.start()
            running = self.launch.running()
            self.launch.read()
            self._settle_finished()
            if not running and nodeid not in self.done:
                self._settle_early_end()
            elif nodeid not in self.done:
                longest = max(timeout_of(i) for i in self.waiting.values())
                self.launch.check_deadlines(float(self.config.getini("ranks_startup")), longest)
                time.sleep(_POLL)
        if not self.waiting:
            self.close()
        return self.done.pop(nodeid)

    def start(self) -> None:
        """Begin a launch of all tests that are left."""
        reporter = self.config.pluginmanager.get_plugin("terminalreporter")
        if reporter is not None:
            if self.config.get_terminal_writer().width_of_current_line:
                reporter.line("")
            tests = f"{len(self.waiting)} tests"
            what = f"{self.size} ranks: one launch" if self.size else "beside: one process"
            reporter.write_line(f"{what} for {tests} ...")
            reporter.flush()
        self._settled_in_launch = 0
        self.launch = Launch(self.config, self.size, list(self.waiting.values()))

    def _settle(self, item: pytest.Item, reports: list[pytest.TestReport]) -> None:
        del self.waiting[item.nodeid]
        self.done[item.nodeid] = reports
        self._settled_in_launch += 1

    def _settle_finished(self) -> None:
        for item in list(self.waiting.values()):
            if not all(item.nodeid in log.finished for log in self.launch.logs):
                return
            whose = merge if self.size else alone
            self._settle(item, whose(self.config, item, self.launch.logs))

    def _settle_early_end(self) -> None:
        """The launch is over and tests are left: report the one it was in, drop the launch."""
        launch, why = self.launch, self.launch.why()
        current = next(iter(self.waiting.values()))
        reached = any(current.nodeid in log.started for log in launch.logs)
        if reached:
            self._settle(current, merge(self.config, current, launch.logs, died=why))
        elif not self._settled_in_launch:
            # Nothing came of this launch, so a new one would end the same way.
            failure = RankFailure(f"the launch of {self.size} ranks ended before this test: {why}")
            for item in list(self.waiting.values()):
                self._settle(item, [error(item, failure)])
        self.close()

    def close(self) -> None:
        """End the launch, if one is under way."""
        if self.launch is not None:
            self.launch.close()
            self.launch = None


class SupervisorPlugin:
    """Hooks of the supervising pytest."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.groups: dict[int, RankedTests] = {}
        self._beside: set[str] = set()

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """One-process tests first, then one block per number of ranks: cheapest first."""
        folders = [self.config.rootpath / name for name in self.config.getini("beside")]

        def order(item: pytest.Item) -> tuple[int, bool]:
            return ranks_of(item) or 0, any(item.path.is_relative_to(f) for f in folders)

        items.sort(key=order)
        beside = [item for item in items if order(item) == (0, True)]
        if len(beside) >= int(self.config.getini("beside_from")) and not self._is_watched():
            self._beside = {item.nodeid for item in beside}

    def _is_watched(self) -> bool:
        """Whether somebody sees tests run, stops at one, or has set what is not passed on."""
        names = ("usepdb", "trace", "maxfail", "runxfail", "hypothesis_seed")
        option = self.config.getoption
        return option("capture") == "no" or any(option(name, None) for name in names)

    def pytest_runtestloop(self, session: pytest.Session) -> None:
        """Plan the launches for what is left after every deselection."""
        for item in session.items:
            size = self._size(item)
            if size is not None:
                self.groups.setdefault(size, RankedTests(self.config, size, []))
                self.groups[size].waiting[item.nodeid] = item
        if self.groups and not session.config.option.collectonly:
            for size in {0, max(self.groups)} & set(self.groups):
                self.groups[size].start()
            if max(self.groups) and any(ranks_of(item) is None for item in session.items):
                self.groups[max(self.groups)].launch.give_way()

    def _size(self, item: pytest.Item) -> int | None:
        """Return the number of ranks of a test's launch, None for one that runs here."""
        size = ranks_of(item)
        return 0 if size is None and item.nodeid in self._beside else size

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> bool | None:
        """Report a multi-rank test from its launch instead of running it here."""
        size = self._size(item)
        if size is None:
            return None
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        for report in self._reports(size, item.nodeid):
            item.ihook.pytest_runtest_logreport(report=report)
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        return True

    def _reports(self, size: int, nodeid: str) -> Iterator[pytest.TestReport]:
        yield from self.groups[size].reports(nodeid)

    def pytest_sessionfinish(self) -> None:
        """End launches that an interrupt or ``-x`` left behind."""
        for group in self.groups.values():
            group.close()
