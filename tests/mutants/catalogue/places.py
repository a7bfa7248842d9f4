# SPDX-License-Identifier: Apache-2.0
"""Folders that the catalogue names often."""

CORE = "megatron/core/"
MIMO = CORE + "models/mimo/"
UNIT = "tests/unit_tests/mimo/"
FUNCTIONAL = "tests/functional/"
EXAMPLE = "examples/mimo/digits/"
