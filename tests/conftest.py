# SPDX-License-Identifier: Apache-2.0
"""Set-up shared by all tests: one thread per process, repeatable examples, the rank harness."""

from __future__ import annotations

import os

# Before anything imports torch: eight processes share a handful of cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis

# Derandomised: every rank of a launch has to draw the same examples, and so has every CI run.
hypothesis.settings.register_profile("repo", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("repo")

pytest_plugins = ("tests.harness.plugin",)
