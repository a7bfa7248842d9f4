# SPDX-License-Identifier: Apache-2.0
"""Cutting the fused sequence for context parallelism (CP) and sequence parallelism (SP).

Which positions a rank keeps is decided in :mod:`.sequence_order`; here tensors are cut.

The names ``get_pg_size``, ``get_pg_rank``, ``get_batch_on_this_cp_rank``,
``get_context_parallel_group``, ``get_tensor_model_parallel_group``, ``tensor_parallel``, ``tex``
and ``is_te_min_version`` are looked up in this module when they are used, so they can be
replaced here.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch.distributed import ProcessGroup

from megatron.core import tensor_parallel
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.models.mimo.partition.packed_lengths import CU_SEQLENS, check_packing
from megatron.core.models.mimo.partition.sequence_order import (
    SequenceShardError,
    cp_chunks,
    packed_spans,
    shard_factor,
)
from megatron.core.models.mimo.stand_ins import TakesStandIns, on_stand_ins
from megatron.core.models.mimo.uploads import upload
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.parallel_state import (
    get_context_parallel_group,
    get_tensor_model_parallel_group,
)
from megatron.core.utils import get_pg_rank, get_pg_size, is_te_min_version

try:
    tex: Any = importlib.import_module("transformer_engine_torch")
except ImportError:
    tex = None

_adapter_method = on_stand_ins(__name__, "PartitionAdapter")
_HAVE_TEX = tex is not None
# The first Transformer Engine release whose index kernel handles padded packed sequences.
_TEX_MIN_VERSION = "1.10.0"

Sharded = tuple[
    torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, PackedSeqParams | None
]


@dataclass(frozen=True)
class PartitionConfig:
    """What the adapter needs to know; made by :meth:`from_mp_config`.

    Attributes:
        seq_parallel: scatter embeddings over the TP group.
        use_cp: cut sequences over the CP group.
        tp_comm_overlap: TP communication overlaps; the sequence must then be ``max_seq_len`` long.
        max_seq_len: tokens of the longest sequence.
        kv_format: ``"sbhd"`` (dense) or ``"thd"`` (packed).
        cp_group: the CP group; needed with ``use_cp``.
        tp_group: the TP group; needed with ``seq_parallel``.
    """

    seq_parallel: bool
    use_cp: bool
    tp_comm_overlap: bool
    max_seq_len: int
    kv_format: str = "sbhd"
    cp_group: ProcessGroup | None = None
    tp_group: ProcessGroup | None = None

    @classmethod
    def from_mp_config(
        cls,
        mp: ModelParallelConfig,
        *,
        max_seq_len: int,
        kv_format: str = "sbhd",
        cp_group: ProcessGroup | None = None,
        tp_group: ProcessGroup | None = None,
    ) -> PartitionConfig:
        """Derive the partitioning from a model-parallel config.

        Groups that are given are used as they are. Megatron's global ``parallel_state`` is asked
        only for one that the config needs and the caller did not give.

        Raises:
            TypeError: ``mp`` is not a ``ModelParallelConfig``.
        """
        if not isinstance(mp, ModelParallelConfig):
            raise TypeError(f"mp must be a ModelParallelConfig instance, got {type(mp).__name__}")
        if cp_group is None and mp.context_parallel_size > 1:
            cp_group = get_context_parallel_group()
        if tp_group is None and mp.sequence_parallel:
            tp_group = get_tensor_model_parallel_group()
        return cls(
            seq_parallel=mp.sequence_parallel,
            use_cp=get_pg_size(cp_group) > 1,
            tp_comm_overlap=mp.tp_comm_overlap,
            max_seq_len=max_seq_len,
            kv_format=kv_format,
            cp_group=cp_group,
            tp_group=tp_group,
        )


def get_batch_on_this_cp_rank(
    batch: Mapping[str, torch.Tensor | None],
    is_hybrid_cp: bool = False,
    cp_group: ProcessGroup | None = None,
) -> dict[str, torch.Tensor | None]:
    """Return this CP rank's two chunks of every batch-first dense tensor.

    ``(B, S, ...)`` -> ``(B, S/cp, ...)``. The gradient is zero outside the rank's chunks, so the
    full gradient is the sum over the CP group. The signature is that of Megatron-Core 0.19; 0.16
    has the same function without ``is_hybrid_cp``.

    Raises:
        ValueError: ``is_hybrid_cp`` is set.
        SequenceShardError: a sequence does not divide by ``2 * cp``.
    """
    if is_hybrid_cp:
        raise ValueError("is_hybrid_cp=True (a CP size per sample) is not supported; use False")
    group = get_context_parallel_group() if cp_group is None else cp_group
    cp_size, cp_rank = get_pg_size(group), get_pg_rank(group)
    if cp_size == 1:
        return dict(batch)
    return {
        key: None if value is None else _dense_chunks(value, cp_rank, cp_size)
        for key, value in batch.items()
    }


class PartitionAdapter(TakesStandIns):
    """Cuts fused embeddings, labels and loss mask for the language model's CP and SP.

    Args:
        cfg: see :class:`PartitionConfig`.
    """

    # What was found out about the latest packed batch.
    _checked_lengths: tuple[list[Any], Any, list[int] | None] | None = None
    _index: tuple[list[int], torch.device, torch.Tensor] | None = None

    def __init__(self, cfg: PartitionConfig) -> None:
        self.cfg = cfg

    @_adapter_method
    def shard(
        self,
        embeddings: torch.Tensor | None,
        labels: torch.Tensor | None,
        loss_mask: torch.Tensor | None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Sharded:
        """Cut what is given for this rank; nothing is cut before everything is checked.

        ========== ============= ==================== ============================
        tensor     in            out                  gradient
        ========== ============= ==================== ============================
        embeddings ``(S,B,H)``   ``(S/(cp*tp),B,H)``  gathered over TP (with SP),
                                                      zero outside the CP chunks
        labels     ``(B,S)``     ``(B,S/cp)``
        loss_mask  ``(B,S)``     ``(B,S/cp)``
        ========== ============= ==================== ============================

        ``tp`` counts with sequence parallelism only. Labels and loss mask are not cut over TP:
        the loss is taken after the TP gather, on the CP-local sequence.

        Args:
            embeddings: ``None`` on pipeline stages after the first.
            packed_seq_params: with ``qkv_format="thd"`` each packed sequence is cut by itself.

        Returns:
            embeddings, labels, loss mask and ``packed_seq_params`` (unchanged).

        Raises:
            SequenceShardError: a length or a shape that cannot be cut.
        """
        if not self.cfg.use_cp and not self.cfg.seq_parallel:
            return embeddings, labels, loss_mask, packed_seq_params
        if embeddings is not None or labels is not None or loss_mask is not None:
            self._check(embeddings, labels, loss_mask, packed_seq_params)
        if self.cfg.use_cp:
            batch_first = None if embeddings is None else embeddings.transpose(0, 1)
            batch_first, labels, loss_mask, packed_seq_params = self._apply_context_parallel(
                batch_first, labels, loss_mask, packed_seq_params
            )
            if batch_first is not None:
                embeddings = batch_first.transpose(0, 1).contiguous()
        if self.cfg.seq_parallel and embeddings is not None:
            embeddings = tensor_parallel.scatter_to_sequence_parallel_region(
                embeddings, group=self.cfg.tp_group
            )
        return embeddings, labels, loss_mask, packed_seq_params

    def _check(
        self,
        embeddings: torch.Tensor | None,
        labels: torch.Tensor | None,
        loss_mask: torch.Tensor | None,
        packed_seq_params: PackedSeqParams | None,
    ) -> list[int] | None:
        batch, seq_len = _batch_and_length(embeddings, labels, loss_mask)
        return self.check(batch, seq_len, packed_seq_params, embeddings is not None)

    def check(
        self,
        batch: int,
        seq_len: int,
        packed_seq_params: PackedSeqParams | None = None,
        with_embeddings: bool = True,
    ) -> list[int] | None:
        """Refuse a batch that cannot be cut.

        Args:
            batch, seq_len: ``(B, S)``.
            packed_seq_params: of a packed batch.
            with_embeddings: embeddings are cut too, not labels and loss mask alone.

        Returns:
            The cumulative padded lengths of a packed batch under CP, else ``None``.

        Raises:
            SequenceShardError: a length or a shape that cannot be cut.
        """
        cp = get_pg_size(self.cfg.cp_group) if self.cfg.use_cp else 1
        # Only embeddings are scattered over TP; a stage without them does not need the factor.
        scattered = self.cfg.seq_parallel and with_embeddings
        tp = get_pg_size(self.cfg.tp_group) if scattered else 1
        packed = _is_packed(packed_seq_params)
        factor = cp * tp if packed else shard_factor(cp, tp)
        if seq_len % factor:
            raise SequenceShardError(
                f"Sequence length should be divisible by {factor} for Sequence/Context "
                f"parallelism, got {seq_len} (cp {cp}, tp with sequence parallelism {tp}); "
                f"pad it to {-(-seq_len // factor) * factor}"
            )
        overlapped = scattered and self.cfg.tp_comm_overlap and not packed
        if overlapped and seq_len != self.cfg.max_seq_len:
            raise SequenceShardError(
                "TP Comm overlap requires Vision+Text token length == "
                f"language_max_sequence_length, got {seq_len} and {self.cfg.max_seq_len}"
            )
        return self._check_packed(packed_seq_params, batch, seq_len, cp) if packed else None

    def _check_packed(
        self, params: Any, batch: int, seq_len: int, cp: int
    ) -> list[int] | None:
        """The cumulative lengths, checked once per batch."""
        tensors = [getattr(params, name) for name in CU_SEQLENS]
        # Tensors of inference mode count no versions, so a change would not be seen: no memo.
        known = not any(tensor is not None and tensor.is_inference() for tensor in tensors)
        longest = params.max_seqlen_q, params.max_seqlen_kv
        versions = [(id(t), t._version) for t in tensors if t is not None and known]
        key = (batch, seq_len, longest, versions)
        memo = self._checked_lengths
        if known and memo is not None and memo[1] == key:
            return memo[2]
        lengths = check_packing(params, batch, seq_len, cp)
        # The tensors are kept, so that no other ones get their ids.
        self._checked_lengths = (tensors, key, lengths if cp > 1 else None)
        return self._checked_lengths[2]

    @_adapter_method
    def _apply_context_parallel(
        self,
        embeddings: torch.Tensor | None,
        labels: torch.Tensor | None,
        loss_mask: torch.Tensor | None,
        packed_seq_params: Any,
    ) -> Sharded:
        """Keep this CP rank's positions: ``(B,S,H)`` -> ``(B,S/cp,H)``, ``(B,S)`` -> ``(B,S/cp)``.

        Raises:
            SequenceShardError: a length or a shape that cannot be cut.
        """
        named = {"embeddings": embeddings, "labels": labels, "loss_mask": loss_mask}
        batch = {key: value for key, value in named.items() if value is not None}
        if not self.cfg.use_cp or not batch:
            return embeddings, labels, loss_mask, packed_seq_params
        if not _is_packed(packed_seq_params):
            batch = get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=self.cfg.cp_group)
        else:
            samples, length = next(iter(batch.values())).shape[:2]
            cp_size = get_pg_size(self.cfg.cp_group)
            lengths = self._check_packed(packed_seq_params, samples, length, cp_size)
            batch = {
                key: value.index_select(
                    1, self._packed_index(packed_seq_params, lengths, value.device)
                )
                for key, value in batch.items()
            }
        cut = batch.get("embeddings"), batch.get("labels"), batch.get("loss_mask")
        return (*cut, packed_seq_params)

    def _packed_index(
        self, params: Any, lengths: Any, device: torch.device
    ) -> torch.Tensor:
        """Positions this CP rank keeps of a packed batch, on ``device``, in local order."""
        memo = self._index
        if memo is not None and memo[0] is lengths and memo[1] == device:
            return memo[2]
        cp_size, cp_rank = get_pg_size(self.cfg.cp_group), get_pg_rank(self.cfg.cp_group)
        if _kernel_applies(device):
            bounds = params.cu_seqlens_q_padded
            if bounds is None:
                bounds = params.cu_seqlens_q
            # One int32 dim on the device is what the kernel reads.
            bounds = upload(bounds.flatten().to(torch.int32), device)
            index = tex.thd_get_partitioned_indices(bounds, lengths[-1], cp_size, cp_rank)
        else:
            index = upload(packed_index(lengths, cp_rank, cp_size), device)
        self._index = (lengths, device, index)
        return index


def packed_index(lengths: list[int], cp_rank: int, cp_size: int) -> torch.Tensor:
    """Return the positions a CP rank keeps of a packed batch: int64 ``(S/cp,)`` on the host.

    Args:
        lengths: cumulative padded lengths with a leading 0.

    Raises:
        SequenceShardError: lengths that cannot be cut over ``cp_size`` ranks.
    """
    spans = packed_spans(lengths, cp_rank, cp_size)
    pieces = [torch.arange(start, stop) for start, stop in spans]
    return torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.int64)


def cuts_as_ours(adapter: Any) -> TypeGuard[PartitionAdapter]:
    """Return whether a partition adapter cuts as :meth:`PartitionAdapter.shard` does."""
    shard = getattr(adapter, "shard", None)
    return getattr(shard, "__func__", None) is PartitionAdapter.shard


def _kernel_applies(device: torch.device) -> bool:
    """Transformer Engine's index kernel works on device tensors only."""
    return _HAVE_TEX and device.type != "cpu" and is_te_min_version(_TEX_MIN_VERSION)


def _is_packed(params: PackedSeqParams | None) -> bool:
    return params is not None and getattr(params, "qkv_format", "sbhd") == "thd"


def _dense_chunks(value: torch.Tensor, cp_rank: int, cp_size: int) -> torch.Tensor:
    """Chunks ``r`` and ``2cp-1-r`` of dim 1. Narrows, so no index has to reach the device."""
    seq_len, factor = value.size(1), shard_factor(cp_size)
    if seq_len % factor:
        raise SequenceShardError(
            f"Sequence length should be divisible by {factor} for Sequence/Context parallelism, "
            f"got {seq_len}; pad it to {-(-seq_len // factor) * factor}"
        )
    length = seq_len // factor
    chunks = [value.narrow(1, c * length, length) for c in cp_chunks(cp_rank, cp_size)]
    return torch.cat(chunks, dim=1)


def _batch_and_length(
    embeddings: torch.Tensor | None, labels: torch.Tensor | None, loss_mask: torch.Tensor | None
) -> tuple[int, int]:
    """The common ``(B, S)`` of all tensors that are given (at least one is)."""
    shapes: dict[str, tuple[Any, ...]] = {}
    if embeddings is not None:
        shapes["embeddings"] = (embeddings.size(1), embeddings.size(0))
    for name, value in (("labels", labels), ("loss_mask", loss_mask)):
        if value is not None:
            shapes[name] = tuple(value.shape)
    if len(set(shapes.values())) != 1 or len(next(iter(shapes.values()))) != 2:
        raise SequenceShardError(
            "embeddings (S,B,H), labels (B,S) and loss_mask (B,S) must hold the same (B,S), got "
            + ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        )
    batch, seq_len = next(iter(shapes.values()))
    return batch, seq_len
