# SPDX-License-Identifier: Apache-2.0
"""Tests of ``tests/faults``: what is drawn, and what passes for a right message. No process."""
