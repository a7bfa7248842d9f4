# SPDX-License-Identifier: Apache-2.0
"""Whole jobs and what the README promises."""
