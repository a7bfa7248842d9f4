# SPDX-License-Identifier: Apache-2.0
"""The unsharded computation that the attention tests compare with, and stand-ins for groups."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron.core.models.mimo.partition.sequence_order import packed_positions
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig


@dataclass(frozen=True)
class FakeGroup:
    """Place and size of a process group, for code that reads nothing else."""

    place: int
    count: int

    def rank(self) -> int:
        return self.place

    def size(self) -> int:
        return self.count


@dataclass(frozen=True)
class Case:
    """One attention problem, global.

    Attributes:
        real: real tokens of each sequence; one sequence is the dense case.
        padded: the same with trailing padding.
        batch: dense batch; 1 when packed.
        heads, groups: query heads, key/value heads.
        causal: mask type.
        packed: hand the boundaries over as ``thd`` parameters.
    """

    real: tuple[int, ...]
    padded: tuple[int, ...]
    batch: int = 1
    heads: int = 4
    groups: int = 4
    causal: bool = True
    packed: bool = False
    head_dim: int = 6
    value_dim: int = 6

    @property
    def total(self) -> int:
        return sum(self.padded)

    def tensors(self, seed: int = 0) -> tuple[torch.Tensor, ...]:
        """Global q, k, v (requiring gradients) and output gradient, float64."""
        generator = torch.Generator().manual_seed(seed)
        shapes = (
            (self.total, self.batch, self.heads, self.head_dim),
            (self.total, self.batch, self.groups, self.head_dim),
            (self.total, self.batch, self.groups, self.value_dim),
            (self.total, self.batch, self.heads, self.value_dim),
        )
        q, k, v, grad = (
            torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes
        )
        return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), grad

    def positions(self, cp_rank: int, cp_size: int) -> torch.Tensor:
        """Global positions that a CP rank holds."""
        return torch.tensor(packed_positions(cumulative(self.padded), cp_rank, cp_size))

    def packed_params(self) -> PackedSeqParams | None:
        """The ``thd`` boundaries, global; the padded ones only where they differ."""
        if not self.packed:
            return None
        real = torch.tensor(cumulative(self.real), dtype=torch.int32)
        padded = torch.tensor(cumulative(self.padded), dtype=torch.int32)
        more = {"cu_seqlens_q_padded": padded, "cu_seqlens_kv_padded": padded}
        return PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=real,
            cu_seqlens_kv=real,
            max_seqlen_q=max(self.padded),
            max_seqlen_kv=max(self.padded),
            **(more if self.real != self.padded else {}),
        )

    def allowed(self) -> torch.Tensor:
        """``(total, total)`` bool: may the row's query see the column's key."""
        sequence = torch.repeat_interleave(
            torch.arange(len(self.padded)), torch.tensor(self.padded)
        )
        lengths = zip(self.real, self.padded, strict=True)
        is_real = torch.cat([torch.arange(padded) < real for real, padded in lengths])
        index = torch.arange(self.total)
        mask = (sequence[:, None] == sequence[None, :]) & is_real[:, None] & is_real[None, :]
        return mask & (index[:, None] >= index[None, :]) if self.causal else mask


def cumulative(lengths: tuple[int, ...]) -> list[int]:
    return [sum(lengths[:i]) for i in range(len(lengths) + 1)]


def reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, allowed: torch.Tensor, scale: float | None
) -> torch.Tensor:
    """Attention by the formula: ``(s, b, heads, d)`` -> ``(s, b, heads * d_v)``.

    A query that may see nothing yields zeros.
    """
    repeat = q.size(2) // k.size(2)
    k, v = k.repeat_interleave(repeat, dim=2), v.repeat_interleave(repeat, dim=2)
    scores = torch.einsum("ibhd,jbhd->bhij", q, k) * (scale or q.size(-1) ** -0.5)
    scores = scores.masked_fill(~allowed, -torch.inf)
    peak = scores.amax(dim=-1, keepdim=True).detach().nan_to_num(neginf=0.0)
    weights = torch.exp(scores - peak) * allowed
    total = weights.sum(dim=-1, keepdim=True)
    weights = weights / torch.where(total == 0, torch.ones_like(total), total)
    return torch.einsum("bhij,jbhd->ibhd", weights, v).flatten(-2)


def reference_with_gradients(
    case: Case, scale: float | None = None, seed: int = 0
) -> tuple[torch.Tensor, ...]:
    """Unsharded output and gradients of q, k, v for ``case.tensors(seed)``."""
    q, k, v, grad = case.tensors(seed)
    out = reference(q, k, v, case.allowed(), scale)
    out.backward(grad.flatten(-2))
    return out.detach(), q.grad, k.grad, v.grad


def tiny_config(**changes: object) -> TransformerConfig:
    """A config for attention modules alone; the test's shapes do not depend on it."""
    values: dict[str, object] = {
        "num_layers": 1,
        "hidden_size": 24,
        "num_attention_heads": 4,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
    }
    return TransformerConfig(**{**values, **changes})


def fake_groups(cp: FakeGroup | None = None, tp: FakeGroup | None = None) -> ProcessGroupCollection:
    one = FakeGroup(0, 1)
    return ProcessGroupCollection(cp=cp or one, tp=tp or one, pp=one)


class Storages(TorchDispatchMode):
    """All memory that is taken meanwhile; what of it is alive is asked later."""

    def __init__(self) -> None:
        super().__init__()
        self.taken: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        there = {storage.cdata for storage, _ in _storages((args, kwargs))}
        for storage, size in _storages(out):
            if storage.cdata not in there:
                self.taken[storage.cdata] = storage, size
        return out

    def sizes(self) -> list[int]:
        """Bytes of each."""
        return [size for _, size in self.taken.values()]

    def alive(self) -> int:
        """Bytes of those that something refers to."""
        return sum(size for storage, size in self.taken.values() if not storage.expired())


def _storages(tree: Any) -> list[tuple[StorageWeakRef, int]]:
    found = [x.untyped_storage() for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]
    return [(StorageWeakRef(each), each.nbytes()) for each in found]
