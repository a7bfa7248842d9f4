# SPDX-License-Identifier: Apache-2.0
"""pytest on one rank of a ``torchrun`` launch.

Ranks run the same tests in the same order and wait for each other after each one, so a test
that fails on one rank cannot push the others into the next test's collectives. A rank whose
test failed gives the others a grace time to finish it, then ends the launch. When all have
finished, the world is rebuilt before the next test.
"""

from __future__ import annotations

import contextlib
import datetime
import faulthandler
import hashlib
import io
import os
import signal
import sys
import tempfile
from collections.abc import Generator
from pathlib import Path
from typing import Any, TextIO

import pytest
import torch
import torch.distributed as dist

from tests.harness import backend
from tests.harness.garbage import end_threads_of_groups
from tests.harness.plugin import keep, ranks_of, timeout_of
from tests.harness.programs import end_with
from tests.harness.records import (
    SUPERVISOR_VARIABLE,
    RecordWriter,
    planned,
    read_plan,
    stacks_path,
)

_EXIT_GAVE_UP = 17
# Tests between two collections of garbage: one after each would cost more than it saves.
_TESTS_PER_COLLECTION = 10
_START_TIMEOUT = datetime.timedelta(seconds=300)


class RankPlugin:
    """Hooks of one rank."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.rank = int(os.environ["RANK"])
        self.world_size = int(os.environ["WORLD_SIZE"])
        self.local_rank = int(os.environ.get("LOCAL_RANK", self.rank))
        self.grace = float(config.getini("ranks_grace"))
        self.directory, self.plan = read_plan()
        self.writer = RecordWriter(self.directory, self.rank) if self.directory else None
        self.stacks = self._open_stacks()
        self._quiet: io.StringIO | None = None
        self._store: dist.Store | None = None
        self._rebuild = False
        self._epoch = 0
        if sys.platform == "linux" and os.environ.get("LOCAL_WORLD_SIZE") == str(self.world_size):
            # All ranks are here, and a host name need not resolve to a usable interface.
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        # Before anything is built: tests of one process come first, and stock builds there.
        self.device = backend.device_for(self.local_rank, self.world_size)
        self._index = 0
        self._failed = False
        self._texts: list[str] = []
        self._elsewhere: list[str] = []
        self._redirect_tmp_path()
        if SUPERVISOR_VARIABLE in os.environ:
            end_with(int(os.environ[SUPERVISOR_VARIABLE]))

    # --- process set-up -------------------------------------------------------------------

    def _open_stacks(self) -> TextIO:
        if self.directory is None:
            # The real stderr: pytest replaces descriptor 2 while a test runs.
            return os.fdopen(os.dup(2), "w")
        return stacks_path(self.directory, self.rank).open("w")

    def _redirect_tmp_path(self) -> None:
        """Give this rank its own ``tmp_path`` base: ranks that share one race for its names."""
        parent = self.config.option.basetemp or self.directory
        if parent is None:
            self.config.option.basetemp = tempfile.mkdtemp(prefix=f"pytest-rank{self.rank}-")
        else:
            self.config.option.basetemp = str(Path(parent) / f"tmp-rank{self.rank}")

    @pytest.hookimpl(trylast=True)
    def pytest_configure(self, config: pytest.Config) -> None:
        """Leave stacks behind when stopped, and keep ranks other than 0 quiet."""
        faulthandler.register(signal.SIGTERM, file=self.stacks, chain=True)
        # Python's stacks do not say what a library's own thread did when it ended the process.
        torch._C._set_print_stack_traces_on_fatal_signal(True)
        if self.writer is not None:
            self.writer.write("pid", pid=os.getpid())
        if self.rank != 0 and self.directory is None:
            self._quiet = io.StringIO()
            manager = config.pluginmanager
            manager.unregister(manager.get_plugin("terminalreporter"))
            reporter = pytest.TerminalReporter(config, self._quiet)
            manager.register(reporter, "terminalreporter")

    # --- collection -----------------------------------------------------------------------

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Keep this launch's tests: the supervisor's plan, else one-process tests and ours."""
        if self.plan is None:
            # Tests of one process have CPU tensors, and stock builds where it sees a GPU.
            sizes = (self.world_size, None) if self.device.type == "cpu" else (self.world_size,)
            kept = [i for i in items if ranks_of(i) in sizes]
        else:
            kept = planned(items, self.plan, f"rank {self.rank}")
        keep(self.config, items, kept)

    # --- running --------------------------------------------------------------------------

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, Any, Any]:
        """Run a multi-rank test under its deadline, then meet the other ranks."""
        if ranks_of(item) is None:
            return (yield)
        self._connect(item.session)
        if self.writer is not None:
            self.writer.write("start", test=item.nodeid)
        self._failed = False
        timeout = timeout_of(item)
        # A C thread: it fires although this one sits in a collective, and exits the process.
        faulthandler.dump_traceback_later(timeout, exit=True, file=self.stacks)
        try:
            result = yield
        finally:
            faulthandler.cancel_dump_traceback_later()
        if self.writer is not None:
            self.writer.write("finish", test=item.nodeid)
        self._meet(item.nodeid, timeout)
        if self._index % _TESTS_PER_COLLECTION == 0:
            end_threads_of_groups()
        return result

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        """Initialise ``torch.distributed`` before any fixture of a multi-rank test."""
        if ranks_of(item) is None:
            return
        if self._rebuild:
            self._destroy_world()
        if not dist.is_initialized():
            self._build_world()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Pass each phase's report on as soon as it is there."""
        if report.failed:
            self._failed = True
            self._texts.append(f"{report.nodeid} ({report.when})\n{report.longreprtext}")
        if self.writer is not None:
            data = self.config.hook.pytest_report_to_serializable(config=self.config, report=report)
            self.writer.write("report", test=report.nodeid, report=data)

    # --- the world ------------------------------------------------------------------------

    def _connect(self, session: pytest.Session) -> None:
        """Reach the launch's key-value store, once, and compare the tests of all ranks."""
        if self._store is not None:
            return
        store, _, _ = next(dist.rendezvous("env://", timeout=_START_TIMEOUT))
        self._store = dist.PrefixStore("mimo-tests", store)
        ids = "\n".join(i.nodeid for i in session.items if ranks_of(i) is not None)
        self._store.set(f"tests/{self.rank}", hashlib.sha256(ids.encode()).digest())
        # No test starts before every rank is here: a rank that cannot start is not a test's fault.
        everyone = [f"tests/{rank}" for rank in range(self.world_size)]
        self._store.wait(everyone, _START_TIMEOUT)
        if self._store.get(f"tests/{self.rank}") != self._store.get("tests/0"):
            raise pytest.UsageError(
                f"rank {self.rank} collected other multi-rank tests than rank 0, or in other order"
            )

    def _build_world(self) -> None:
        name, _ = backend.choose(self.world_size)
        self._epoch += 1
        if name == "gloo":
            backend.share_gloo_device()
        dist.init_process_group(
            name,
            store=dist.PrefixStore(f"world{self._epoch}", self._store),
            rank=self.rank,
            world_size=self.world_size,
            device_id=self.device if self.device.type != "cpu" else None,
        )

    def _destroy_world(self) -> None:
        """Drop every process group; Megatron's global ones too when a test had made them."""
        self._rebuild = False
        parallel_state = sys.modules.get("megatron.core.parallel_state")
        if parallel_state is not None:
            parallel_state.destroy_model_parallel()
        if dist.is_initialized():
            dist.destroy_process_group()

    def shared_path(self, mine: Path) -> Path:
        """Return rank 0's ``mine`` on all ranks."""
        key = f"{self._index}/path"
        if self.rank == 0:
            self._store.set(key, str(mine))
        return Path(self._store.get(key).decode())

    # --- lockstep -------------------------------------------------------------------------

    def _meet(self, nodeid: str, timeout: float) -> None:
        """Wait until all ranks have finished the test; end the launch if one cannot."""
        key = f"{self._index}"
        self._index += 1
        if self._failed:
            self._store.set(f"{key}/failed/{self.rank}", nodeid)
        failures = self._store.add(f"{key}/failures", int(self._failed))
        if self._store.add(f"{key}/finished", 1) == self.world_size:
            self._store.set(f"{key}/all", str(failures))
        # A rank that passed outwaits the others' own deadline; one that failed knows better.
        patience = self.grace if self._failed else timeout + self.grace
        try:
            self._store.wait([f"{key}/all"], datetime.timedelta(seconds=patience))
        except dist.DistStoreError:
            self._give_up(nodeid, patience)
        if int(self._store.get(f"{key}/all")):
            self._rebuild = True
            self._note_failures(key)

    def _note_failures(self, key: str) -> None:
        for rank in range(self.world_size):
            name = f"{key}/failed/{rank}"
            if rank != self.rank and self._store.check([name]):
                self._elsewhere.append(f"rank {rank}: {self._store.get(name).decode()}")

    def _give_up(self, nodeid: str, seconds: float) -> None:
        """End this process, and by that the launch: some rank is stuck in the test."""
        if self.directory is None:
            print(*self._texts, sep="\n", file=self.stacks)
        reason = f"others did not finish {nodeid} within {seconds:g} s, ending the launch"
        print(f"rank {self.rank}: {reason}", file=self.stacks, flush=True)
        if self.writer is not None:
            self.writer.write("gave_up", test=nodeid)
        os._exit(_EXIT_GAVE_UP)

    # --- the end --------------------------------------------------------------------------

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Name the tests that failed on other ranks; their texts are printed there."""
        if self._elsewhere and self.directory is None:
            terminalreporter.section("failed on other ranks")
            for line in self._elsewhere:
                terminalreporter.write_line(line)

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        """A failure on any rank is a failure of the session."""
        if self._elsewhere and exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    @pytest.hookimpl(trylast=True)
    def pytest_unconfigure(self) -> None:
        """Print a failing quiet rank's output, then leave together."""
        if self.writer is not None:
            self.writer.write("end")
        if self._failed or self._elsewhere or self._quiet_failures():
            self._print_quiet()
        if self._store is not None:
            self._leave()
        if dist.is_initialized():
            dist.destroy_process_group()

    def _quiet_failures(self) -> bool:
        reporter = self.config.pluginmanager.get_plugin("terminalreporter")
        return bool(reporter and (reporter.stats.get("failed") or reporter.stats.get("error")))

    def _print_quiet(self) -> None:
        if self._quiet is not None:
            print(f"\n===== rank {self.rank} =====\n{self._quiet.getvalue()}", file=self.stacks)
            self.stacks.flush()
            self._quiet = None

    def _leave(self) -> None:
        """Wait for the others: torchrun kills every rank as soon as one leaves with an error."""
        if self._store.add("left", 1) == self.world_size:
            self._store.set("left/all", "1")
        with contextlib.suppress(dist.DistError):
            self._store.wait(["left/all"], datetime.timedelta(seconds=30))
