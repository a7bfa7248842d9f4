# SPDX-License-Identifier: Apache-2.0
"""Tests of the mutation check itself; the folder's name keeps ``mutants`` free of test files."""
