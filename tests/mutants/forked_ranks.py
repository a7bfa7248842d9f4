# SPDX-License-Identifier: Apache-2.0
"""A pytest plugin: the ranks of multi-rank tests are forked instead of launched by torchrun.

Without the address of a fork server in the environment it does nothing.
"""

from __future__ import annotations

import os
import subprocess

import pytest

from tests.harness.supervisor import Launch
from tests.mutants.fork_server import ADDRESS_VARIABLE, Forked, Start


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Exchange how a launch starts its ranks."""
    if ADDRESS_VARIABLE in os.environ:
        Launch.start_ranks = _fork_ranks


def _fork_ranks(launch: Launch, config: pytest.Config, size: int) -> subprocess.Popen | Forked:
    command = launch.command(config, size)
    (launch.directory / "agent.log").touch()
    start = Start(
        arguments=command[command.index("pytest") + 1 :],
        folder=str(config.invocation_params.dir),
        environment=launch.environment(),
        output=str(launch.directory / "logs" / "{rank}" / "stdout.log"),
        ranks=size,
    )
    return Forked(os.environ[ADDRESS_VARIABLE], start)
