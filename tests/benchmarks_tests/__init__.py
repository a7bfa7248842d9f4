# SPDX-License-Identifier: Apache-2.0
"""Tests of the parity suite itself: that it notices what is wrong, and survives what breaks."""
