# SPDX-License-Identifier: Apache-2.0
"""The digits job's step and memory, torch-native modules beside Megatron's layers.

The same sizes in the same layouts: a tower or a language model of transformers, sharded by PyTorch,
in the place of Megatron's. The models take turns, step by step, on the same batches. They are not
the same functions (CLIP has a class token, another order of norms), so their losses differ.

Memory is what a rank keeps between steps: weights, gradients, fp32 copies and moments.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.cases import Pair
from benchmarks.paths import rank_device
from benchmarks.wall_time import alternate
from examples.mimo.digits.data import DigitsBatches
from megatron.core.models.mimo.gradients.finalize import iter_modules
from megatron.core.models.mimo.training.inner_optimizers import inner_optimizers
from megatron.core.models.mimo.wrappers import stepped
from mimo_colocated.launch.layouts import Layout
from tests.harness.garbage import end_threads_of_groups
from tests.models.model import LANGUAGE, VISION, BuiltModel, ModelOptions, ModelSize, build_model
from tests.models.trainer import Trainer, TrainOptions

DEFAULT = (
    Pair(Layout(tp=2, dp=4), Layout(tp=2, dp=4)),
    Pair(Layout(tp=2, dp=4), Layout(dp=8)),
)
SIZE = ModelSize(vision_hidden=128, language_hidden=256)
VARIANTS = {
    "Megatron's layers": (),
    "torch-native tower": (VISION,),
    "torch-native language model": (LANGUAGE,),
    "both torch-native": (VISION, LANGUAGE),
}
_BATCH, _SEED, _SECONDS = 32, 1234, 8.0
COLUMNS = {
    "layout": "layout (encoder/language)",
    "variant": "",
    "step_ms": "step ms",
    "ratio": "to Megatron's",
    "kept_MiB": "kept MiB per rank",
    "kept_ratio": "to Megatron's",
}


def measure(pairs: tuple[Pair, ...], quick: bool) -> Iterator[dict[str, Any]]:
    """Cells of four variants per pair; on all ranks."""
    for pair in pairs or DEFAULT:
        yield from _compare(pair, 2.0 if quick else _SECONDS)


def _compare(pair: Pair, seconds: float) -> Iterator[dict[str, Any]]:
    built, runs, trainers = [], {}, {}
    for name, native in VARIANTS.items():
        options = ModelOptions(
            size=SIZE, seed=_SEED, sequence_parallel=LANGUAGE not in native, native=native,
            overlap_grad_reduce=False,
        )  # fmt: skip
        built.append(build_model(pair.vision, pair.language, options))
        runs[name], trainers[name] = _stepper(built[-1])
    dist.barrier()
    taken = alternate(runs, seconds)
    medians = {name: statistics.median(each) for name, each in taken.items()}
    kept = {name: _most(_kept(trainer)) for name, trainer in trainers.items()}
    first = next(iter(VARIANTS))
    for name in VARIANTS:
        yield {
            "layout": str(pair),
            "variant": name,
            "step_ms": round(medians[name] * 1e3, 1),
            "ratio": round(medians[name] / medians[first], 2),
            "kept_MiB": round(kept[name] / 2**20, 2),
            "kept_ratio": round(kept[name] / kept[first], 2),
            "passed": None,
        }
    dist.barrier()
    for made in built:
        made.destroy()
    del built, runs, trainers, made
    end_threads_of_groups()


def _stepper(built: BuiltModel) -> tuple[Callable[[], None], Trainer]:
    options = TrainOptions(steps=1000, global_batch_size=_BATCH)
    trainer = Trainer(built, options, distributed_optimizer=True)
    batches, done = DigitsBatches(_SEED, "train", _BATCH), iter(range(1000))
    return lambda: _step(trainer, batches, next(done)), trainer


def _step(trainer: Trainer, batches: DigitsBatches, step: int) -> None:
    assert trainer.step(batches, step).success


def _kept(trainer: Trainer) -> int:
    """Bytes of weights, gradients, copies and moments on this rank; what shares memory once."""
    tensors = []
    for _, module in iter_modules(trainer.model):
        for parameter in stepped(module).parameters():
            tensors += [parameter, getattr(parameter, "main_grad", None)]
    for optimizer in inner_optimizers(trainer.optimizer._active_optimizers):
        tensors += optimizer.get_parameters()
        tensors += [value for state in optimizer.state.values() for value in state.values()]
    storages = {}
    for tensor in tensors:
        if torch.is_tensor(tensor):
            storage = tensor.detach().untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _most(own: int) -> int:
    """The largest of all ranks' numbers."""
    value = torch.tensor(own, device=rank_device())
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return int(value)
