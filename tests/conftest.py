# SPDX-License-Identifier: Apache-2.0
"""Set-up shared by all tests: threads, Ctrl-C, repeatable examples, the rank harness."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator

# A shell lets what it runs in the background ignore Ctrl-C, and so would all that tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# Before anything imports torch: eight processes share a handful of cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Transformer Engine has no fp64, and its fp32 is TF32: only tests about it build its layers.
os.environ.setdefault("MIMO_LAYERS", "local")
os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")

import hypothesis
import pytest

from tests.harness import gpus

# Before anything imports torch, too.
gpus.prepare(os.environ)
# On a busy machine drawing an example takes as long as it takes; that is no failure.
common = hypothesis.settings(
    deadline=None,
    database=None,
    print_blob=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
# Derandomised: every rank of a launch has to draw the same examples, and so has every CI run.
hypothesis.settings.register_profile("repo", common, derandomize=True, max_examples=25)
# `make properties`: as many as asked for, drawn from --hypothesis-seed.
examples = int(os.environ.get("PROPERTY_EXAMPLES", "0"))
if examples:
    hypothesis.settings.register_profile("many", common, max_examples=examples)
hypothesis.settings.load_profile("many" if examples else "repo")

pytest_plugins = ("tests.harness.plugin",)


@pytest.fixture(autouse=True)
def _what_a_command_silences_speaks_again() -> Iterator[None]:
    """Commands of `mimo` that run in a test's process silence libraries, as they do for a user."""
    loggers = [logging.getLogger(name) for name in ("megatron", "torch.utils.cpp_extension")]
    levels = [logger.level for logger in loggers]
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)
