# SPDX-License-Identifier: Apache-2.0
"""Tests of tests.reshape, and the small part of it that runs with all tests."""
