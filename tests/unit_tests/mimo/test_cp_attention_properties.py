# SPDX-License-Identifier: Apache-2.0
"""Cut, rotary positions and attention together: CP 1 to 8 equals the unsharded computation.

Each rank shards the hidden states with the adapter, projects them, rotates queries and keys with
stock's rotary embedding, and attends. Three pieces of code decide independently which positions
a rank holds (the adapter, stock's RoPE, the attention's gather); only if all agree is the result
the unsharded one, which is computed here from the formulas.

float64 throughout. The bound of 1e-11 is a thousand times the rounding observed; a token that is
rotated by a neighbour's position changes results by more than 1e-3.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.mimo.partition.utils import PartitionAdapter, PartitionConfig
from megatron.core.models.mimo.transformer.context_parallel_attention import (
    ContextParallelAttention,
    _GatherSequence,
)
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from tests.unit_tests.mimo.attention_oracle import Case, reference, tiny_config
from tests.unit_tests.mimo.bridge_cases import DEVICE
from tests.unit_tests.mimo.in_process_ranks import InProcessGroup, InProcessWorld

BOUND = {"rtol": 0.0, "atol": 1e-11}
ROTARY_BASE = 10000
HIDDEN = 5


@dataclass(frozen=True)
class RotaryCase:
    """An attention problem of ``attention_oracle`` over ``cp`` ranks, with hidden states."""

    problem: Case
    cp: int
    seed: int

    def drawn(self) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
        """Hidden ``(S, B, H)``, weights of q, k, v ``(heads, H, d)``, gradient ``(S, B, heads*d)``.

        The gradient of padding is zero: no loss comes from there.
        """
        p = self.problem
        generator = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE)

        heads = [(p.heads, p.head_dim), (p.groups, p.head_dim), (p.groups, p.value_dim)]
        weights = [normal(count, HIDDEN, width) for count, width in heads]
        gradient = normal(p.total, p.batch, p.heads * p.value_dim)
        return normal(p.total, p.batch, HIDDEN), weights, gradient


@st.composite
def rotary_cases(draw: Callable[..., Any], packed: bool | None = None) -> RotaryCase:
    """MHA, GQA and MQA; causal and not; dense batches and packed, padded sequences."""
    cp = draw(st.integers(1, 8))
    packed = draw(st.booleans()) if packed is None else packed
    counts = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3 if packed else 1))
    padded = tuple(2 * cp * count for count in counts)
    real = tuple(draw(st.integers(1, length)) for length in padded) if packed else padded
    heads, groups = draw(st.sampled_from([(4, 4), (4, 2), (3, 1), (1, 1)]))
    problem = Case(
        real,
        padded,
        batch=1 if packed else draw(st.integers(1, 2)),
        heads=heads,
        groups=groups,
        causal=draw(st.booleans()),
        packed=packed,
    )
    return RotaryCase(problem, cp, draw(st.integers(0, 999)))


def project(hidden: torch.Tensor, weights: list[torch.Tensor]) -> list[torch.Tensor]:
    """``(s, b, H)`` -> q, k, v ``(s, b, heads, d)``."""
    return [torch.einsum("sbh,nhd->sbnd", hidden, weight) for weight in weights]


def rotated(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """RoPE by its formula: dims ``i`` and ``i + d/2`` are turned by ``p * base ** (-2i/d)``."""
    half = x.size(-1) // 2
    # float32 powers, as in stock's table of frequencies.
    exponents = torch.arange(0, 2 * half, 2, dtype=torch.float32, device=x.device) / (2 * half)
    angle = positions.double()[:, None] * (1.0 / ROTARY_BASE**exponents).double()
    cos, sin = angle.cos()[:, None, None, :], angle.sin()[:, None, None, :]
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def unsharded(case: RotaryCase) -> list[torch.Tensor]:
    """Output, gradient of the hidden states, gradients of the three weights."""
    hidden, weights, gradient = case.drawn()
    leaves = [x.requires_grad_() for x in (hidden, *weights)]
    q, k, v = project(hidden, weights)
    # Positions restart with each packed sequence.
    positions = torch.cat([torch.arange(length) for length in case.problem.padded]).to(DEVICE)
    allowed = case.problem.allowed().to(DEVICE)
    out = reference(rotated(q, positions), rotated(k, positions), v, allowed, None)
    return [out.detach(), *torch.autograd.grad(out, leaves, gradient)]


def rotary_table(case: RotaryCase, group: InProcessGroup) -> torch.Tensor:
    """Stock's angles for this rank (dense) or for the longest sequence (packed), float64."""
    table = RotaryEmbedding(
        case.problem.head_dim,
        1.0,
        rotary_base=ROTARY_BASE,
        use_cpu_initialization=True,
        cp_group=group,
    )
    table.inv_freq = table.inv_freq.double()
    return table(max(case.problem.padded), packed_seq=case.problem.packed)


def packed_params(case: RotaryCase) -> PackedSeqParams | None:
    params = case.problem.packed_params()
    if params is not None:
        lengths = {k: v.to(DEVICE) for k, v in vars(params).items() if torch.is_tensor(v)}
        params = replace(params, **lengths)
    return params


def on_rank(case: RotaryCase, group: InProcessGroup) -> list[torch.Tensor]:
    """What ``unsharded`` returns, as far as this rank knows: its rows, its partial gradients."""
    params = packed_params(case)
    cut = PartitionConfig(False, case.cp > 1, False, case.problem.total, cp_group=group)
    adapter = PartitionAdapter(cut)
    hidden, weights, gradient = case.drawn()
    leaves = [x.requires_grad_() for x in (hidden, *weights)]
    local = adapter.shard(hidden, None, None, params)[0]
    q, k, v = project(local, weights)
    config = tiny_config(context_parallel_size=case.cp)
    cu_seqlens = None
    if params is not None:
        q, k, v = (x.squeeze(1) for x in (q, k, v))
        padded = params.cu_seqlens_q_padded
        cu_seqlens = params.cu_seqlens_q if padded is None else padded
    table = rotary_table(case, group)
    q, k = (apply_rotary_pos_emb(x, table, config, cu_seqlens, cp_group=group) for x in (q, k))
    mask_type = AttnMaskType.causal if case.problem.causal else AttnMaskType.no_mask
    groups = ProcessGroupCollection(cp=group)
    attention = ContextParallelAttention(config, 1, mask_type, "self", pg_collection=groups)
    out = attention(q, k, v, None, packed_seq_params=params)
    out = out.unsqueeze(1) if params is not None else out
    place = case.problem.positions(group.rank(), case.cp)
    return [out.detach(), *torch.autograd.grad(out, leaves, gradient[place])]


def check_rotary_attention(case: RotaryCase) -> None:
    world = InProcessWorld(case.cp, case.seed)

    def body(rank: int) -> list[torch.Tensor]:
        group = InProcessGroup(0, tuple(range(case.cp)), rank)
        return on_rank(case, group)

    ranks = world.run(body)
    whole, *gradients = unsharded(case)
    for rank, (out, *_) in enumerate(ranks):
        torch.testing.assert_close(out, whole[case.problem.positions(rank, case.cp)], **BOUND)
    summed = [sum(parts) for parts in list(zip(*ranks, strict=True))[1:]]
    names = ["hidden states", "weight of q", "weight of k", "weight of v"]
    for name, mine, wanted in zip(names, summed, gradients, strict=True):
        torch.testing.assert_close(
            mine, wanted, **BOUND, msg=lambda text, name=name: f"gradient of {name}: {text}"
        )


@given(case=rotary_cases())
def test_rotary_attention_over_cp_is_the_unsharded_one(case: RotaryCase) -> None:
    check_rotary_attention(case)


def test_second_derivative_is_refused_not_wrong() -> None:
    """The gather's backward communicates outside autograd's sight."""

    def body(rank: int) -> None:
        x = torch.ones(2, 1, 2, dtype=torch.float64, device=DEVICE, requires_grad=True)
        group = InProcessGroup(0, (0, 1), rank)
        y = _GatherSequence.apply(x, group)
        (first,) = torch.autograd.grad((y**2).sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            first.sum().backward()

    InProcessWorld(2).run(body)
