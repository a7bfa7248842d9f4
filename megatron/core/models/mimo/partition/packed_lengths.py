# SPDX-License-Identifier: Apache-2.0
"""Lengths of packed sequences as host integers, from Megatron-Core's ``PackedSeqParams``.

``cu_seqlens_q`` counts real tokens; ``cu_seqlens_q_padded`` says where sequences stand, with the
padding that follows each. Without the latter there is no padding and the former says both::

    tokens                 a a a a a . . .  b b b .
    cu_seqlens_q           0 5 8
    cu_seqlens_q_padded    0 8 12

They are best given on the host. Those on a device are read once per microbatch, all in one wait
(:func:`read_lengths`); kernels that want them on a device get them from :func:`on_device`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from megatron.core.models.mimo.partition.sequence_order import SequenceShardError, check_packed
from megatron.core.models.mimo.uploads import Download, upload
from megatron.core.packed_seq_params import PackedSeqParams

CU_SEQLENS = ("cu_seqlens_q", "cu_seqlens_kv", "cu_seqlens_q_padded", "cu_seqlens_kv_padded")

# Device tensor -> its version, and what it holds, on the host. Not all that writes into a tensor
# counts a version (collectives, kernels), so nothing is known of the tensors of a new microbatch.
_known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def unread_lengths(fields: Mapping[str, Any]) -> list[Tensor]:
    """Return the tensors of cumulative lengths whose values only a device has.

    Args:
        fields: of ``PackedSeqParams``, some of them.
    """
    tensors = [fields.get(name) for name in CU_SEQLENS]
    found = {id(t): t for t in tensors if isinstance(t, Tensor) and not _is_known(t)}
    return list(found.values())


def forget_lengths(fields: Mapping[str, Any] | None) -> None:
    """Forget what was read from tensors: a microbatch begins, and they may hold other values."""
    for name in CU_SEQLENS:
        if isinstance(field := (fields or {}).get(name), Tensor):
            _known.pop(field, None)


def keep_lengths(tensors: Sequence[Tensor], copies: Sequence[Tensor]) -> None:
    """Remember what tensors hold: copies of them on the host.

    Not of tensors of inference mode: they count no versions, so a change would not be seen.
    """
    for tensor, host in zip(tensors, copies, strict=True):
        if not tensor.is_cpu and not tensor.is_inference():
            _known[tensor] = (tensor._version, host)


def read_lengths(fields: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return copies of the cumulative lengths among fields on the host, int32; one wait at most.

    Args:
        fields: as for :func:`unread_lengths`.
    """
    unread = unread_lengths(fields)
    copies = Download(unread).arrive()
    read = {id(tensor): host for tensor, host in zip(unread, copies, strict=True)}
    found: dict[str, Tensor] = {}
    made: dict[int, Tensor] = {}  # one for the fields that are one
    for name in CU_SEQLENS:
        field = fields.get(name)
        if isinstance(field, Tensor):
            if id(field) not in made:
                host = read.get(id(field), field)
                host = host if host.is_cpu else _known[field][1]
                # A loader may fill its own anew, and backward passes read these again.
                made[id(field)] = host.to(torch.int32, copy=True)
            found[name] = made[id(field)]
    return found


def end_to_end(lengths: Sequence[int], device: torch.device | None = None) -> PackedSeqParams:
    """Return the packing of sequences without padding between them.

    Args:
        lengths: of each.
        device: of kernels that read the bounds; ``None`` leaves them on the host.
    """
    bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    longest = max(lengths, default=0)
    packed = PackedSeqParams("thd", bounds, bounds, max_seqlen_q=longest, max_seqlen_kv=longest)
    return packed if device is None else on_device(packed, device)


def on_device(params: PackedSeqParams, device: torch.device) -> PackedSeqParams:
    """Return a copy whose tensors are on a device; what they hold stays known on the host."""
    made = copy.copy(params)
    for memo in ("_host_ints", "_for_kernels"):
        made.__dict__.pop(memo, None)
    uploaded: dict[int, Tensor] = {}
    for name, value in vars(params).items():
        if isinstance(value, Tensor):
            if id(value) not in uploaded:
                uploaded[id(value)] = upload(value, device)
                if value.is_cpu:
                    keep_lengths([uploaded[id(value)]], [value])
            setattr(made, name, uploaded[id(value)])
    return made


def for_kernels(params: PackedSeqParams, device: torch.device) -> PackedSeqParams:
    """Return packing as Transformer Engine's attention reads it without asking the device.

    Where it is not told whether there is padding between sequences it compares the two kinds of
    lengths, on the device, and waits. Here the host has compared them.
    """
    padded = padded_bounds(params)
    real = _host_ints(params, "cu_seqlens_q") or padded
    known = params.__dict__.get("_for_kernels")
    if known is None or known[0] != (device, real, padded):
        made: Any = copy.copy(params)
        if real == padded:
            made.cu_seqlens_q_padded = made.cu_seqlens_kv_padded = None
        made = on_device(made, device)
        made.pad_between_seqs = real[:-1] != padded[:-1]
        known = params.__dict__["_for_kernels"] = ((device, real, padded), made)
    return known[1]


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
    """A field of ``params`` as integers, read once and not once per layer."""
    field = getattr(params, name)
    if field is None:
        return None
    cache: dict[str, tuple[Tensor, int, list[int]]] = params.__dict__.setdefault("_host_ints", {})

    def is_stale(name: str, tensor: Tensor) -> bool:
        seen = cache.get(name)
        # Tensors of inference mode count no versions, so a change would not be seen.
        return seen is None or seen[0] is not tensor or seen[1] != _version(tensor)

    if is_stale(name, field):
        for each, host in read_lengths(vars(params)).items():
            tensor = getattr(params, each)
            if is_stale(each, tensor):
                cache[each] = (tensor, _version(tensor) or 0, host.flatten().tolist())
    return cache[name][2]


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def _is_known(tensor: Tensor) -> bool:
    """Whether the host knows what a tensor holds now."""
    if tensor.is_cpu:
        return True
    known = _known.get(tensor)
    return known is not None and not tensor.is_inference() and known[0] == tensor._version


def _differences(cumulative: list[int]) -> list[int]:
    return [b - a for a, b in zip(cumulative[:-1], cumulative[1:], strict=True)]
