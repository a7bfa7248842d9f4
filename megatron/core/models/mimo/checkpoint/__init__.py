# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: whole or absent, of any layout."""
