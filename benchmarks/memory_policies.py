# SPDX-License-Identifier: Apache-2.0
"""What recomputing and offloading the encoder's activations saves, predicted and measured.

Measured are the bytes that are allocated at the moments when the language model begins a forward
pass, the most of a step, less with a policy than with everything kept; on the median rank. On the
CPU it is the C library that says how much it has given out; what stands for host memory is taken
off. Predicted is the same from sizes alone, before the model is built. Gradients must be bit-equal.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.cases import Pair
from benchmarks.paths import rank_device
from examples.mimo.digits.data import DIGITS_PER_SAMPLE, DigitsBatches
from megatron.core.models.mimo.memory.offload import HostUse
from megatron.core.models.mimo.memory.plan import (
    PartBytes,
    Prediction,
    Step,
    predict,
    transformer_bytes,
)
from megatron.core.models.mimo.memory.policy import EncoderMemory
from megatron.core.utils import unwrap_model
from mimo_colocated.launch.layouts import Layout
from tests.harness.garbage import end_threads_of_groups
from tests.models.memory import encoder_shape
from tests.models.model import VISION, ModelOptions, ModelSize, build_model
from tests.models.trainer import Trainer, TrainOptions
from tests.parity.tensors import local_gradients

SIZE = ModelSize(vision_hidden=128, vision_layers=3, language_hidden=128)
_SAMPLES, _SEED, _FROM = 128, 1234, 1024
# Measured over predicted saving may differ from 1 by this much.
BOUND = 0.3
# Times that a step is measured; the least counts. What a transport's thread has not released yet
# comes on top, by chance.
_TIMES = 2
POLICIES = (
    ("keep", "keep"),
    ("keep", "recompute"),
    ("keep", "offload"),
    ("recompute", "keep"),
    ("recompute", "recompute"),
    ("offload", "keep"),
    ("offload", "offload"),
)
COLUMNS = {
    "layout": "layout (encoder/language)",
    "step": "step",
    "encoder": "encoder",
    "projector": "projector",
    "kept": "microbatches at a time",
    "saving_MiB": "saving, MiB, predicted | measured",
    "ratio": "measured / predicted",
    "host_MiB": "on the host, MiB, predicted | measured",
    "gradients": "gradients",
}


@dataclass(frozen=True)
class Case:
    """One step.

    Attributes:
        pair: the layouts.
        microbatches: of the step, each of ``_SAMPLES`` samples.
        ahead: microbatches that are encoded together; None for all.
        options: further ones of the model.
    """

    pair: Pair
    microbatches: int
    ahead: int | None
    options: ModelOptions

    def __str__(self) -> str:
        said = [f"{self.microbatches} mb"]
        if self.pair.language.pp > 1:
            said += [f"{self.ahead or 'all'} encoded together"]
        said += ["dropout"] if self.options.dropout else []
        said += [f"{self.options.recompute} recompute"] if self.options.recompute != "none" else []
        return ", ".join(said)

    def parts(self) -> PartBytes:
        """Of one microbatch on one rank, by formula."""
        accelerated = rank_device().type != torch.empty(0).device.type
        shape = encoder_shape(self.pair.vision.tp, self.options, accelerated)
        return transformer_bytes(shape, _SAMPLES * DIGITS_PER_SAMPLE // self.pair.vision.dp)

    def predicted(self, memory: EncoderMemory) -> Prediction:
        """What a policy comes to."""
        step = Step(self.microbatches, self.pair.language.pp, self.ahead)
        return predict(self.parts(), step, memory)


_PLAIN = ModelOptions(size=SIZE)
_STAGES = Pair(Layout(tp=1, dp=8), Layout(tp=1, cp=2, dp=2, pp=2))
_WHOLE = Pair(Layout(tp=2, dp=4), Layout(tp=2, cp=2, dp=2))
DEFAULT = (
    Case(_STAGES, 8, None, _PLAIN),
    Case(_STAGES, 8, 1, _PLAIN),
    Case(_WHOLE, 2, None, replace(_PLAIN, dropout=0.1)),
)


@dataclass(frozen=True)
class Usage:
    """Bytes of a step on this rank, beyond what was there before.

    Attributes:
        held: most when the language model begins a forward pass.
        curve: (milliseconds, bytes) over the step, as sampled.
    """

    held: int
    curve: list[tuple[float, int]]


def measure(pairs: tuple[Pair, ...], quick: bool) -> Iterator[dict[str, Any]]:
    """A cell per case and policy; on all ranks."""
    cases = tuple(Case(pair, 4, None, _PLAIN) for pair in pairs) or DEFAULT
    for case in cases[1:2] if quick and not pairs else cases:
        built = build_model(case.pair.vision, case.pair.language, case.options)
        trainer = Trainer(built, _options(case), True)
        trainer.model.train()
        try:
            yield from _cells(case, trainer)
        finally:
            dist.barrier()
            built.destroy()
            end_threads_of_groups()


def _options(case: Case) -> TrainOptions:
    samples = _SAMPLES * case.microbatches
    return TrainOptions(10, samples, case.microbatches, case.ahead)


def _cells(case: Case, trainer: Trainer) -> Iterator[dict[str, Any]]:
    states = trainer.built.randomness.get_states()
    _step(case, trainer, states)  # what is allocated once
    kept: tuple[Usage, dict[str, torch.Tensor]] | None = None
    for policy in POLICIES:
        memory = EncoderMemory(*policy, offload_from=_FROM)
        module = unwrap_model(trainer.model.modality_submodules[VISION])
        module.use_memory(memory)
        host = module.activation_memory.host
        run = partial(_step, case, trainer, states)
        usage = min((used(trainer, host, run) for _ in range(_TIMES)), key=lambda each: each.held)
        gradients = {n: g.clone() for n, g in local_gradients(trainer.model).items()}
        kept = kept or (usage, gradients)
        equal = all(torch.equal(gradients[name], kept[1][name]) for name in kept[1])
        mine = kept[0].held - usage.held, host.most, equal
        found: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(found, mine)
        yield _cell(case, case.predicted(memory), found) | {"curve": usage.curve}


def _step(case: Case, trainer: Trainer, states: dict[str, Any]) -> None:
    trainer.built.randomness.set_states(states)
    trainer.gradients(DigitsBatches(_SEED, "train", _SAMPLES * case.microbatches), 0)


def _cell(
    case: Case, predicted: Prediction, found: list[tuple[int, int, bool]]
) -> dict[str, Any]:
    savings, hosts, equal = zip(*found, strict=True)
    saving = statistics.median(savings)
    ratio = saving / predicted.saving if predicted.saving else None
    baseline = predicted.memory == EncoderMemory(offload_from=_FROM)
    return {
        "layout": str(case.pair),
        "step": str(case),
        "encoder": predicted.memory.encoder,
        "projector": predicted.memory.projector,
        "kept": predicted.kept,
        "saving_MiB": None if baseline else [_mib(predicted.saving), _mib(saving)],
        "ratio": None if ratio is None else round(ratio, 3),
        "host_MiB": [_mib(predicted.host), _mib(max(hosts))] if predicted.host else None,
        "gradients": "the baseline" if baseline else ("equal" if all(equal) else "DIFFERENT"),
        "passed": None if baseline else all(equal) and abs(ratio - 1) <= BOUND,
    }


def _mib(size: float) -> float:
    return round(size / 2**20, 2)


def used(trainer: Trainer, host: HostUse, run: Callable[[], None]) -> Usage:
    """Measure a step."""
    gc.collect()
    gc.freeze()  # so that collecting looks through the step's objects only
    before, held = allocated(host), [0]

    def note(*_: Any) -> None:
        gc.collect()  # what lies in cycles of references is not held by anybody
        held.append(allocated(host) - before)

    hooks = [stage.register_forward_pre_hook(note) for stage in trainer.model.language_stages()]
    with _sampled(lambda: allocated(host) - before) as curve:
        run()
    for hook in hooks:
        hook.remove()
    gc.unfreeze()
    return Usage(max(held), curve)


def allocated(host: HostUse) -> int:
    """Bytes on the rank's device that are in use."""
    if rank_device().type != torch.empty(0).device.type:
        return torch.get_device_module(rank_device().type).memory_allocated()
    found = _mallinfo()
    return found.uordblks + found.hblkhd - host.now


class _MallInfo(ctypes.Structure):
    """What ``mallinfo2`` of the GNU C library returns."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks",
                     "uordblks", "fordblks", "keepcost")
    ]  # fmt: skip


def _mallinfo() -> _MallInfo:
    function = ctypes.CDLL(None).mallinfo2
    function.restype = _MallInfo
    return function()


@contextlib.contextmanager
def _sampled(read: Callable[[], int]) -> Iterator[list[tuple[float, int]]]:
    """(milliseconds, value) every few milliseconds while the context is open; on rank 0."""
    curve: list[tuple[float, int]] = []
    ended, started = threading.Event(), time.perf_counter()

    def sample() -> None:
        while not ended.wait(0.004):
            curve.append((1e3 * (time.perf_counter() - started), read()))

    thread = threading.Thread(target=sample, daemon=True)
    if dist.get_rank() == 0:
        thread.start()
    try:
        yield curve
    finally:
        ended.set()
        if thread.is_alive():
            thread.join()
