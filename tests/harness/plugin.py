# SPDX-License-Identifier: Apache-2.0
"""pytest hooks of the rank harness: options, the marker, and which side this process is."""

from __future__ import annotations

import os

import pytest

from tests.harness.garbage import set_imports_aside
from tests.harness.records import DIRECTORY_VARIABLE

SIZES = (1, 2, 4, 8)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declare how ranks start, and the deadlines, in seconds (a test's own: ``timeout=``)."""
    parser.addini("ranks_timeout", "deadline of one multi-rank test", default="400")
    parser.addini(
        "ranks_grace", "how long the other ranks may go on after a test failed on one", default="15"
    )
    parser.addini("ranks_startup", "deadline for a launch to reach its first test", default="300")
    parser.addini(
        "ranks_start",
        "fork: on CPUs from a process that has the imports; or torchrun",
        default="fork",
    )
    parser.addini(
        "beside",
        "folders and files whose tests of one process run in a process of their own, beside the "
        "others",
        type="linelist",
    )
    parser.addini("beside_from", "so many of them at least; fewer run here", default="300")


def ranks_of(item: pytest.Item) -> int | None:
    """Return how many ranks a test wants, None for a one-process test.

    Raises:
        pytest.UsageError: the marker's argument is not one of the supported sizes.
    """
    marker = item.get_closest_marker("ranks")
    if marker is None:
        return None
    size = marker.args[0] if len(marker.args) == 1 else None
    if size not in SIZES or set(marker.kwargs) - {"timeout"}:
        raise pytest.UsageError(
            f"{item.nodeid}: expected ranks(n) or ranks(n, timeout=seconds) with n one of {SIZES}, "
            f"got args {marker.args} and keywords {marker.kwargs}"
        )
    return size


def timeout_of(item: pytest.Item) -> float:
    """Return a multi-rank test's deadline in seconds."""
    marker = item.get_closest_marker("ranks")
    default = float(item.config.getini("ranks_timeout"))
    return float(marker.kwargs.get("timeout", default)) if marker else default


def keep(config: pytest.Config, items: list[pytest.Item], kept: list[pytest.Item]) -> None:
    """Deselect all but ``kept``; every module of the tests is imported now."""
    chosen = set(kept)
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = kept
    set_imports_aside()


def pytest_configure(config: pytest.Config) -> None:
    """Declare the marker."""
    config.addinivalue_line(
        "markers",
        "ranks(n, timeout=seconds): run on n processes that share an initialised "
        f"torch.distributed world; n is one of {SIZES}",
    )
    config.addinivalue_line(
        "markers",
        "once: does the same on every Megatron-Core; .ci/run has it on one",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Register the plugin of this process's side, before any plugin is configured."""
    # Asked once, here: tests may change the variable later.
    if "WORLD_SIZE" in os.environ:
        from tests.harness.rank_plugin import RankPlugin

        config.pluginmanager.register(RankPlugin(config), "mimo-rank")
    elif DIRECTORY_VARIABLE in os.environ:
        from tests.harness.worker_plugin import WorkerPlugin

        config.pluginmanager.register(WorkerPlugin(config), "mimo-worker")
    else:
        from tests.harness.supervisor import SupervisorPlugin

        config.pluginmanager.register(SupervisorPlugin(config), "mimo-supervisor")


@pytest.fixture(scope="session")
def rank_harness(request: pytest.FixtureRequest):
    """The rank side of the harness; available to tests marked ``ranks`` only."""
    plugin = request.config.pluginmanager.get_plugin("mimo-rank")
    if plugin is None:
        raise pytest.UsageError("rank fixtures need the marker ranks(n) on the test")
    return plugin


@pytest.fixture
def rank_device(rank_harness):
    """``torch.device`` of this rank: its GPU when the world runs on NCCL, else the CPU."""
    return rank_harness.device


@pytest.fixture
def shared_tmp_path(rank_harness, tmp_path):
    """A fresh directory that is the same one on all ranks of the test."""
    return rank_harness.shared_path(tmp_path)
