# SPDX-License-Identifier: Apache-2.0
"""Training: process groups, initial weights, randomness, gradients, schedules, checkpoints."""
