# SPDX-License-Identifier: Apache-2.0
"""Small pytest projects that use the harness, run as processes of their own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.harness.fork_server import shared_server

REPO = Path(__file__).resolve().parents[2]
_RANK_VARIABLES = re.compile(
    r"(LOCAL_|GROUP_)?(RANK|WORLD_SIZE)|MASTER_.*|TORCHELASTIC.*|MIMO_TEST.*"
)

_CONFTEST = """
import json, pathlib, pytest
pytest_plugins = ("tests.harness.plugin",)

REPORTS = []

def pytest_runtest_logreport(report):
    if report.when == "call" or report.outcome != "passed":
        text = str(report.longrepr) if report.longrepr else ""
        REPORTS.append((report.nodeid.split("::")[-1], report.when, report.outcome, text))

def pytest_sessionfinish(session):
    if session.config.pluginmanager.has_plugin("mimo-supervisor"):
        (session.config.rootpath / "reports.json").write_text(json.dumps(REPORTS))
"""


@dataclass(frozen=True)
class Report:
    """One report the outer pytest got: when it failed and with what text."""

    when: str
    outcome: str
    text: str


@dataclass(frozen=True)
class Result:
    """A finished pytest: exit code, what it printed, and the report of each test."""

    returncode: int
    output: str
    reports: dict[str, Report]


def run_project(
    folder: Path, files: dict[str, str], *, torchrun: int | None = None, **ini: int | str
) -> Result:
    """Write test files into ``folder`` and run pytest there, under torchrun if asked to."""
    lines = "\n".join(f"{name} = {value}" for name, value in ini.items())
    (folder / "pytest.ini").write_text(f"[pytest]\n{lines}\n")
    (folder / "conftest.py").write_text(_CONFTEST)
    for name, text in files.items():
        (folder / name).write_text(text)
    command = [sys.executable]
    if torchrun is not None:
        command += ["-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
        command += [f"--nproc-per-node={torchrun}"]
    shared_server()  # found by the project's launches in their environment
    env = {k: v for k, v in os.environ.items() if not _RANK_VARIABLES.fullmatch(k)}
    done = subprocess.run(
        [*command, "-m", "pytest", "-q", "-p", "no:cacheprovider"],
        cwd=folder,
        env={**env, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=400,
        check=False,
    )
    return Result(done.returncode, done.stdout, _read_reports(folder))


def _read_reports(folder: Path) -> dict[str, Report]:
    path = folder / "reports.json"
    rows = json.loads(path.read_text()) if path.exists() else []
    return {name: Report(when, outcome, text) for name, when, outcome, text in rows}
