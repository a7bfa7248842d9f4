# SPDX-License-Identifier: Apache-2.0
"""Lengths of packed sequences as host integers, from Megatron-Core's ``PackedSeqParams``.

``cu_seqlens_q`` counts real tokens; ``cu_seqlens_q_padded`` says where sequences stand, with the
padding that follows each. Without the latter there is no padding and the former says both::

    tokens                 a a a a a . . .  b b b .
    cu_seqlens_q           0 5 8
    cu_seqlens_q_padded    0 8 12
"""

from __future__ import annotations

from torch import Tensor

from megatron.core.models.mimo.partition.sequence_order import SequenceShardError, check_packed
from megatron.core.packed_seq_params import PackedSeqParams

CU_SEQLENS = ("cu_seqlens_q", "cu_seqlens_kv", "cu_seqlens_q_padded", "cu_seqlens_kv_padded")


def check_packing(
    params: PackedSeqParams, batch: int, seq_len: int, cp_size: int = 1
) -> list[int]:
    """Refuse a packed batch that cannot be cut, or that layers would misread.

    Args:
        params: of the batch.
        batch, seq_len: ``(B, S)`` of the tokens, before they are cut.
        cp_size: ranks that each sequence is cut over.

    Returns:
        Where the sequences stand: cumulative lengths, padding included.

    Raises:
        SequenceShardError: no lengths; they do not start at 0, decrease, do not end at ``S`` or
            cannot be cut; several rows; a sequence with more real than padded tokens; other
            boundaries for keys than for queries; ``max_seqlen`` below the longest sequence.
    """
    bounds = padded_bounds(params)
    check_packed(bounds, cp_size)
    if batch != 1 or bounds[-1] != seq_len:
        raise SequenceShardError(
            "A packed batch is one row whose length is the last entry of cu_seqlens, got "
            f"{batch} rows of {seq_len} tokens and cu_seqlens that end at {bounds[-1]}"
        )
    padded, _ = packed_lengths(params)
    for name in ("max_seqlen_q", "max_seqlen_kv"):
        given = getattr(params, name)
        if given is not None and given < max(padded):
            raise SequenceShardError(
                f"{name} is {given}, but the longest packed sequence has {max(padded)} tokens, "
                "padding included; give that number or leave it out"
            )
    return bounds


def padded_bounds(params: PackedSeqParams | None) -> list[int]:
    """Return cumulative lengths with the padding between sequences counted, if there is any.

    Raises:
        SequenceShardError: there are none.
    """
    bounds = None if params is None else _host_ints(params, "cu_seqlens_q_padded")
    if bounds is None and params is not None:
        bounds = _host_ints(params, "cu_seqlens_q")
    if bounds is None:
        raise SequenceShardError("A packed batch needs cu_seqlens_q_padded or cu_seqlens_q")
    return bounds


def longest_sequence(params: PackedSeqParams) -> int:
    """Return the tokens of the longest packed sequence, padding included.

    Raises:
        SequenceShardError: no lengths; others are not checked.
    """
    return max(_differences(padded_bounds(params)), default=0)


def packed_lengths(params: PackedSeqParams) -> tuple[list[int], list[int]]:
    """Return ``(padded, real)`` lengths of the packed sequences, as host integers.

    Raises:
        SequenceShardError: queries and keys have different boundaries, or more real than padded
            tokens.
    """
    padded_cu = padded_bounds(params)
    real_cu = _host_ints(params, "cu_seqlens_q") or padded_cu
    for name, mine in (("cu_seqlens_kv", real_cu), ("cu_seqlens_kv_padded", padded_cu)):
        other = _host_ints(params, name)
        if other is not None and other != mine:
            raise SequenceShardError(
                f"Packed self-attention needs the same boundaries for queries and keys, but "
                f"{name} is {other} and the queries' is {mine}"
            )
    real, padded = _differences(real_cu), _differences(padded_cu)
    fits = len(real) == len(padded) and real_cu[:1] == [0]
    if not fits or any(not 0 <= r <= p for r, p in zip(real, padded, strict=True)):
        raise SequenceShardError(
            f"cu_seqlens_q {real_cu} does not fit into cu_seqlens_q_padded {padded_cu}: both "
            "count from 0, and each sequence needs at least as many padded as real tokens"
        )
    return padded, real


def _host_ints(params: PackedSeqParams, name: str) -> list[int] | None:
    """A field of ``params`` as integers, fetched from the device once and not once per layer."""
    field = getattr(params, name)
    if field is None:
        return None
    if field.is_inference():
        return field.flatten().tolist()  # counts no versions, so a change would not be seen
    cache: dict[str, tuple[Tensor, int, list[int]]] = params.__dict__.setdefault("_host_ints", {})
    seen = cache.get(name)
    if seen is None or seen[0] is not field or seen[1] != field._version:
        seen = cache[name] = (field, field._version, field.flatten().tolist())
    return seen[2]


def _differences(cumulative: list[int]) -> list[int]:
    return [b - a for a, b in zip(cumulative[:-1], cumulative[1:], strict=True)]
