# SPDX-License-Identifier: Apache-2.0
"""Qwen3's plan: Llama's, and norms of queries and keys, whose gradients sum over heads.

transformers says ``replicated_with_grad_allreduce`` of them, which is right.
"""

from __future__ import annotations

from dataclasses import replace

from megatron.core.models.mimo.torch_native.plans import llama
from megatron.core.models.mimo.torch_native.plans.plan import Style

_NORMS = {f"layers.*.self_attn.{name}": Style.HEADS for name in ("q_norm", "k_norm")}
PLAN = replace(llama.PLAN, styles={**llama.PLAN.styles, **_NORMS})
