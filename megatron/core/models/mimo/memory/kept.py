# SPDX-License-Identifier: Apache-2.0
"""What autograd keeps of any module, found by running it once and counting."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from megatron.core.models.mimo.memory.plan import PartBytes


class KeptStorages:
    """Bytes that autograd keeps within its context; every storage counts once.

    Args:
        lasting: weights and buffers, which do not count.
    """

    def __init__(self, lasting: Iterable[torch.Tensor]) -> None:
        self._known = {StorageWeakRef(tensor.untyped_storage()) for tensor in lasting}
        self._hooks: Any = None
        self.bytes = 0

    def __enter__(self) -> KeptStorages:
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda kept: kept)
        self._hooks.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._hooks.__exit__(*exception)

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        key = StorageWeakRef(storage)
        if key not in self._known:
            self._known.add(key)
            self.bytes += storage.nbytes()
        return tensor.detach()


def part_bytes(submodule: Any, encoder_inputs: Mapping[str, Mapping[str, Any]]) -> PartBytes:
    """Return the bytes of one microbatch of any modality, for :func:`.plan.plan`.

    It runs forward once, where it is, and counts what its operations really keep there: for
    encoders that are no Megatron-Core transformers, for parts that train in part, and for kernels
    of Transformer Engine. All ranks of its TP group call it together. The bytes grow with the
    items, so a small batch will do.

    Args:
        submodule: a ``ModalitySubmodules``, not wrapped.
        encoder_inputs: as for its ``forward``.
    """
    lasting = [*submodule.parameters(), *submodule.buffers()]
    with KeptStorages(lasting) as kept:
        rows = submodule.combine_embeddings(submodule.encode(encoder_inputs))
        encoder = kept.bytes
        submodule.project_embeddings([rows])
    inputs = {StorageWeakRef(t.untyped_storage()): t for t in _tensors(encoder_inputs)}
    return PartBytes(
        inputs=sum(tensor.untyped_storage().nbytes() for tensor in inputs.values()),
        encoder=encoder,
        rows=rows.untyped_storage().nbytes(),
        projector=kept.bytes - encoder,
    )


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if torch.is_tensor(value):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _tensors(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _tensors(inner)
