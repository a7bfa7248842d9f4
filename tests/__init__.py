# SPDX-License-Identifier: Apache-2.0
"""Tests of the project; see ``tests/harness`` for how the multi-rank ones are run."""
