# SPDX-License-Identifier: Apache-2.0
"""Lengths of packed sequences as host integers, from Megatron-Core's ``PackedSeqParams``."""

from __future__ import annotations

from torch import Tensor

from megatron.core.packed_seq_params import PackedSeqParams


def packed_lengths(params: PackedSeqParams) -> tuple[list[int], list[int]]:
    """``(padded, real)`` lengths of the packed sequences, as host integers.

    Raises:
        ValueError: queries and keys have different boundaries, or more real than padded tokens.
    """
    real_cu = _host_ints(params, "cu_seqlens_q")
    padded_cu = _host_ints(params, "cu_seqlens_q_padded") or real_cu
    for name, mine in (("cu_seqlens_kv", real_cu), ("cu_seqlens_kv_padded", padded_cu)):
        other = _host_ints(params, name)
        if other is not None and other != mine:
            raise ValueError(
                f"Packed self-attention needs the same boundaries for queries and keys, but "
                f"{name} is {other} and the queries' is {mine}"
            )
    real, padded = _differences(real_cu), _differences(padded_cu)
    if len(real) != len(padded) or any(r > p for r, p in zip(real, padded, strict=True)):
        raise ValueError(
            f"cu_seqlens_q {real_cu} does not fit into cu_seqlens_q_padded {padded_cu}: each "
            f"sequence needs at least as many padded as real tokens"
        )
    return padded, real


def _host_ints(params: PackedSeqParams, name: str) -> list[int] | None:
    """A field of ``params`` as integers, fetched from the device once and not once per layer."""
    field = getattr(params, name)
    if field is None:
        return None
    if field.is_inference():
        return field.tolist()  # counts no versions, so a change would not be seen
    cache: dict[str, tuple[Tensor, int, list[int]]] = params.__dict__.setdefault("_host_ints", {})
    seen = cache.get(name)
    if seen is None or seen[0] is not field or seen[1] != field._version:
        seen = cache[name] = (field, field._version, field.tolist())
    return seen[2]


def _differences(cumulative: list[int]) -> list[int]:
    return [b - a for a, b in zip(cumulative[:-1], cumulative[1:], strict=True)]
