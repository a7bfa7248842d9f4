# SPDX-License-Identifier: Apache-2.0
"""Small runs of the proof model that train, save and load, for tests of checkpoints."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from examples.mimo.digits.data import DigitsBatches
from megatron.core.models.mimo.checkpoint.store import CheckpointStore
from mimo_colocated.launch.layouts import Layout
from tests.models.model import BuiltModel, ModelOptions, ModelSize, build_model
from tests.models.trainer import Trainer, TrainOptions

BATCH = 16
DATA_SEED = 7
SIZE = ModelSize(
    vision_hidden=32,
    vision_layers=1,
    language_hidden=64,
    language_layers=1,
    language_query_groups=4,
)
FAN_IN = ("tp=2,dp=4", "tp=2,cp=2,dp=2")
FAN_OUT = ("tp=4,dp=2", "tp=1,cp=2,dp=4")
# The encoder cuts each image over CP ranks of its own.
ENCODER_CP = ("tp=2,cp=2,dp=2", "tp=2,cp=2,dp=2")


@dataclass
class Run:
    """A run that trains, saves and loads.

    Attributes:
        built: the model.
        trainer: of the model.
        batches: what it trains on.
    """

    built: BuiltModel
    trainer: Trainer
    batches: DigitsBatches = field(default_factory=lambda: DigitsBatches(DATA_SEED, "train", BATCH))

    def store(self, root: Path, **options: Any) -> CheckpointStore:
        group = self.built.collections["language"].dp_cp
        return CheckpointStore(root, self.built.layouts(), self.built.randomness, group, **options)

    def save(self, store: CheckpointStore, step: int, background: bool = False) -> Path:
        model, optimizer = self.built.model, self.trainer.optimizer
        return store.save(step, model, optimizer, background=background)

    def load(self, store: CheckpointStore, step: int) -> None:
        store.load(step, self.built.model, self.trainer.optimizer)
        self.trainer.resume_schedule(step)

    def train(self, start: int, stop: int) -> list[float]:
        """Losses of the steps; each must have moved the weights."""
        results = [self.trainer.step(self.batches, step) for step in range(start, stop)]
        assert all(result.success for result in results)
        return [result.loss for result in results]

    def weights(self) -> dict[str, torch.Tensor]:
        self.built.model.start_param_sync(force_sync=True)
        return {n: p.detach().clone() for n, p in self.built.model.named_parameters()}

    def optimizer_state(self) -> list[torch.Tensor]:
        """What Adam remembers on this rank, its step counts included."""
        found = []
        for module in self.trainer.optimizer._active_optimizers:
            for inner in getattr(module, "chained_optimizers", [module]):
                for state in inner.optimizer.state.values():
                    found += [torch.as_tensor(state[key]).clone() for key in sorted(state)]
        return found


@contextlib.contextmanager
def run(
    pair: tuple[str, str], distributed: bool = True, seed: int = 5, **options: Any
) -> Iterator[Run]:
    built = build_model(
        Layout.parse(pair[0], "vision"),
        Layout.parse(pair[1], "language"),
        ModelOptions(**{"size": SIZE, **options}, seed=seed, distributed_optimizer=distributed),
    )
    with ended(built):
        yield Run(built, Trainer(built, train_options(), distributed))


def train_options(micro_batches: int = 1) -> TrainOptions:
    """Of all runs; the schedule is longer than any of them."""
    return TrainOptions(
        steps=10,
        global_batch_size=BATCH,
        micro_batches=micro_batches,
        warmup_steps=1,
        # float16: low enough that no step is skipped.
        initial_loss_scale=2.0**8,
    )


@contextlib.contextmanager
def ended(built: BuiltModel) -> Iterator[None]:
    """Releases the model's groups at the end, when all ranks are there."""
    try:
        yield
    finally:
        dist.barrier()
        built.destroy()


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether both have the same names with the same values."""
    return sorted(one) == sorted(other) and all(torch.equal(one[k], other[k]) for k in one)


def only_rank_0(action: Callable[[], Any]) -> None:
    """Call it on rank 0; the others wait until it is done."""
    if dist.get_rank() == 0:
        action()
    dist.barrier()
