# SPDX-License-Identifier: Apache-2.0
"""Encoder activations of a step: all microbatches encoded first, or a few; with stages or without.

Counted are the bytes that autograd keeps for the encoder's backward pass, at every moment of a
step, the largest of all ranks; storages that several operations keep count once, weights not at
all. Divided by what one microbatch keeps this says how many microbatches are there at a time.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.cases import Pair
from benchmarks.memory import largest_of_ranks
from examples.mimo.digits.data import DigitsBatches
from megatron.core.models.mimo.memory.plan import Step
from mimo_colocated.launch.layouts import Layout
from tests.harness.garbage import end_threads_of_groups
from tests.models.model import VISION, ModelOptions, ModelSize, build_model
from tests.models.trainer import Trainer, TrainOptions

DEFAULT = (
    Pair(Layout(tp=1, dp=8), Layout(tp=1, cp=2, dp=4)),
    Pair(Layout(tp=1, dp=8), Layout(tp=1, cp=2, dp=2, pp=2)),
    Pair(Layout(tp=1, dp=8), Layout(tp=1, cp=2, dp=1, pp=4)),
)
SIZE = ModelSize(vision_hidden=128, language_hidden=64, language_layers=4)
_SAMPLES, _SEED, _COUNTS = 32, 1234, (8, 16)
COLUMNS = {
    "layout": "layout (encoder/language)",
    "encoded": "encode_ahead",
    "microbatches": "microbatches of a step",
    "MiB": "encoder activations, MiB",
    "kept": "of so many microbatches",
    "bound": "bound",
}


class KeptBytes:
    """Counts what autograd keeps for a module's backward pass, now and at most.

    Args:
        module: its forward is watched until :meth:`stop`.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        self.now = self.most = 0
        self._weights = {p.untyped_storage().data_ptr() for p in module.parameters()}
        self._keepers: Counter[int] = Counter()
        self._hooks: list[Any] = []
        self._handles = [
            module.register_forward_pre_hook(self._enter),
            module.register_forward_hook(self._leave, always_call=True),
        ]

    def stop(self) -> None:
        """Watch no more."""
        for handle in self._handles:
            handle.remove()

    def _enter(self, *_: Any) -> None:
        hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda kept: kept[0])
        hooks.__enter__()
        self._hooks.append(hooks)

    def _leave(self, *_: Any) -> None:
        self._hooks.pop().__exit__(None, None, None)

    def _pack(self, tensor: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """What autograd holds instead of the tensor, for as long as it would hold that."""
        storage = tensor.untyped_storage()
        place, size = storage.data_ptr(), storage.nbytes()
        token = _Token()
        if place not in self._weights:
            if not self._keepers[place]:
                self.now += size
                self.most = max(self.most, self.now)
            self._keepers[place] += 1
            weakref.finalize(token, self._release, place, size)
        # Detached: an output that is kept with its history would keep itself.
        return tensor.detach(), token

    def _release(self, place: int, size: int) -> None:
        self._keepers[place] -= 1
        if not self._keepers[place]:
            self.now -= size


class _Token:
    """Dies with what holds it."""


def measure(pairs: tuple[Pair, ...], quick: bool) -> Iterator[dict[str, Any]]:
    """A cell per pair and way to encode; on all ranks."""
    for pair in pairs or (DEFAULT[:1] if quick else DEFAULT):
        built = build_model(pair.vision, pair.language, ModelOptions(size=SIZE, bridge="routed"))
        trainer = Trainer(built, TrainOptions(10, _SAMPLES), True)
        try:
            one = most_kept(trainer, 1, None)
            for ahead in (None, 2, 1):
                yield _cell(pair, one, ahead, [most_kept(trainer, m, ahead) for m in _COUNTS])
        finally:
            dist.barrier()
            built.destroy()
            end_threads_of_groups()


def _cell(pair: Pair, one: int, ahead: int | None, most: list[int]) -> dict[str, Any]:
    bounds = [Step(m, pair.language.pp, ahead).kept for m in _COUNTS]
    kept = [round(each / one, 2) for each in most]
    return {
        "layout": str(pair),
        "encoded": "-" if ahead is None else str(ahead),
        "microbatches": list(_COUNTS),
        "MiB": [round(each / 2**20, 2) for each in most],
        "kept": kept,
        "bound": bounds,
        "passed": all(found <= bound for found, bound in zip(kept, bounds, strict=True)),
    }


def most_kept(trainer: Trainer, count: int, ahead: int | None) -> int:
    """Bytes that a step of ``count`` microbatches keeps at most, on the rank with the most."""
    trainer.options = replace(
        trainer.options,
        global_batch_size=_SAMPLES * count,
        micro_batches=count,
        encode_ahead=ahead,
    )
    kept = KeptBytes(trainer.model.modality_submodules[VISION])
    try:
        trainer.gradients(DigitsBatches(_SEED, "train", _SAMPLES * count), 0)
    finally:
        kept.stop()
    assert kept.now == 0, "a step keeps nothing for the next one"
    return largest_of_ranks(kept.most)
