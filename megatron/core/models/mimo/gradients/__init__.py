# SPDX-License-Identifier: Apache-2.0
"""Gradients: summed, divided, reduced in one order, checked."""
