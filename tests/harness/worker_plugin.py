# SPDX-License-Identifier: Apache-2.0
"""pytest in the process that runs tests of one process beside the supervisor's own.

It is no rank: its tests find what they find in the supervisor. What they say goes into records, as
a rank's does, and the supervisor reports it.
"""

from __future__ import annotations

import faulthandler
import os
import signal
from collections.abc import Generator
from typing import Any

import pytest

from tests.harness.plugin import keep
from tests.harness.programs import end_with
from tests.harness.records import (
    DIRECTORY_VARIABLE,
    SUPERVISOR_VARIABLE,
    RecordWriter,
    planned,
    read_plan,
    stacks_path,
)


class WorkerPlugin:
    """Hooks of that process."""

    def __init__(self, config: pytest.Config) -> None:
        directory, self.plan = read_plan()
        self.config = config
        self.writer = RecordWriter(directory, 0)
        self.stacks = stacks_path(directory, 0).open("w")
        config.option.basetemp = str(directory / "tmp")
        end_with(int(os.environ[SUPERVISOR_VARIABLE]))
        # What tests start is not part of this launch.
        del os.environ[DIRECTORY_VARIABLE], os.environ[SUPERVISOR_VARIABLE]

    @pytest.hookimpl(trylast=True)
    def pytest_configure(self) -> None:
        """Leave stacks behind when stopped."""
        faulthandler.register(signal.SIGTERM, file=self.stacks, chain=True)
        self.writer.write("pid", pid=os.getpid())

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Keep the launch's tests."""
        keep(self.config, items, planned(items, self.plan, "the process beside this one"))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, Any, Any]:
        """Say when a test begins and when it has ended."""
        self.writer.write("start", test=item.nodeid)
        result = yield
        self.writer.write("finish", test=item.nodeid)
        return result

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Pass each phase's report on as soon as it is there."""
        data = self.config.hook.pytest_report_to_serializable(config=self.config, report=report)
        self.writer.write("report", test=report.nodeid, report=data)

    @pytest.hookimpl(trylast=True)
    def pytest_unconfigure(self) -> None:
        """Say that the end was reached."""
        self.writer.write("end")
