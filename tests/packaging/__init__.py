# SPDX-License-Identifier: Apache-2.0
"""Tests of installing, uninstalling and of the start-up hook."""
