# SPDX-License-Identifier: Apache-2.0
"""Qwen2's and Qwen2.5's plan: Llama's. Biases of queries, keys and values go with their rows."""

from __future__ import annotations

from megatron.core.models.mimo.torch_native.plans.llama import PLAN

__all__ = ["PLAN"]
