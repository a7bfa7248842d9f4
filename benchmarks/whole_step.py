# SPDX-License-Identifier: Apache-2.0
"""The digits job's step: the encoder on its own layout against forced onto the language model's.

Forced (*homogeneous*), every CP rank encodes all images of its replica, as Megatron-Core alone
does it; the gradients are summed over DP and CP. The models take turns, step by step, on the same
batches and weights. Where time goes is read between hooks on the modules and on the gradients
that pass between them; gradients are reduced after backward, so that reducing has a time of its
own.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.cases import Pair
from benchmarks.paths import rank_device, synchronize
from benchmarks.wall_time import alternate
from examples.mimo.digits.data import DigitsBatches
from mimo_colocated.launch.layouts import Layout
from tests.harness.garbage import end_threads_of_groups
from tests.models.model import VISION, BuiltModel, ModelOptions, ModelSize, build_model
from tests.models.trainer import Trainer, TrainOptions

DEFAULT = tuple(
    Pair(Layout(tp=2, dp=4), Layout(tp=2, cp=cp, dp=4 // cp)) for cp in (1, 2, 4)
)
SIZES = {"as it is": ModelSize(), "4x wider": ModelSize(vision_hidden=256)}
SECTIONS = ("encoder", "bridge", "language model", "gradient sync", "optimizer", "rest")
_BATCH, _SEED, _SECONDS = 32, 1234, 8.0
COLUMNS = {
    "layout": "layout (encoder/language)",
    "encoder": "encoder",
    "cp": "CP",
    "variant": "",
    "step_ms": "step ms",
    "ratio": "to homogeneous",
    "sections_ms": " | ".join(SECTIONS),
    "bridge_share": "bridge's share",
}


class Sections:
    """Seconds of one step by section; what runs between two marks belongs to the later one's name.

    Hooks stand where a module starts and ends, and where gradients leave the language model and
    arrive at the encoder.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._last, self._step = 0.0, dict.fromkeys(SECTIONS, 0.0)
        self.steps: list[dict[str, float]] = []
        self.losses: list[float] = []
        model = trainer.model
        encoder, language = model.modality_submodules[VISION], model.language_model
        encoder.register_forward_pre_hook(lambda *_: self.mark("rest"))
        encoder.register_forward_hook(self._encoded)
        language.register_forward_pre_hook(self._fused, with_kwargs=True)
        finalize = trainer.model.config.finalize_model_grads_func

        def timed_finalize(*args: Any, **kwargs: Any) -> None:
            self.mark("encoder")
            finalize(*args, **kwargs)
            self.mark("gradient sync")

        trainer.model.config.finalize_model_grads_func = timed_finalize

    def mark(self, name: str) -> None:
        """The time since the last mark was spent on ``name``."""
        synchronize()
        now = time.perf_counter()
        self._step[name] += now - self._last
        self._last = now

    def start(self) -> None:
        """A step begins."""
        self._last, self._step = time.perf_counter(), dict.fromkeys(SECTIONS, 0.0)

    def end(self) -> None:
        """The step is over."""
        self.mark("optimizer")
        self.steps.append(self._step)

    def _encoded(self, _module: Any, _inputs: Any, rows: torch.Tensor) -> None:
        self.mark("encoder")
        rows.register_hook(lambda _gradient: self.mark("bridge"))

    def _fused(self, _module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        self.mark("bridge")
        kwargs["decoder_input"].register_hook(lambda _gradient: self.mark("language model"))


def measure(pairs: tuple[Pair, ...], quick: bool) -> Iterator[dict[str, Any]]:
    """Cells of three variants per pair and encoder size; on all ranks."""
    small, large = SIZES
    for pair in pairs or (DEFAULT[1:2] if quick else DEFAULT):
        yield from _compare(pair, small, 2.0 if quick else _SECONDS)
    if not quick:
        for pair in pairs or DEFAULT[1:2]:
            yield from _compare(pair, large, _SECONDS)


def _compare(pair: Pair, size: str, seconds: float) -> Iterator[dict[str, Any]]:
    variants = {
        "homogeneous": (None, "gather"),
        "gather": (pair.vision, "gather"),
        "routed": (pair.vision, "routed"),
    }
    built, sections, runs = [], {}, {}
    for name, (vision, bridge) in variants.items():
        options = ModelOptions(
            size=SIZES[size], seed=_SEED, bridge=bridge, overlap_grad_reduce=False
        )
        made = build_model(vision, pair.language, options)
        built.append(made)
        runs[name], sections[name] = _stepper(made)
    dist.barrier()
    taken = alternate(runs, seconds)
    _check_losses({name: each.losses for name, each in sections.items()})
    medians = {name: statistics.median(each) for name, each in taken.items()}
    for name in variants:
        spent = _mean_sections(sections[name].steps[-len(taken[name]) :])
        yield {
            "layout": str(pair),
            "encoder": size,
            "cp": pair.language.cp,
            "variant": name,
            "step_ms": round(medians[name] * 1e3, 1),
            "ratio": round(medians[name] / medians["homogeneous"], 3),
            "sections_ms": [round(value * 1e3, 1) for value in spent],
            "bridge_share": round(spent[SECTIONS.index("bridge")] / sum(spent), 4),
            "passed": None,
        }
    dist.barrier()
    for made in built:
        made.destroy()
    del built, sections, runs, made
    end_threads_of_groups()


def _stepper(built: BuiltModel) -> tuple[Callable[[], None], Sections]:
    trainer = Trainer(built, TrainOptions(steps=1000, global_batch_size=_BATCH), True)
    sections = Sections(trainer)
    batches, done = DigitsBatches(_SEED, "train", _BATCH), iter(range(1000))

    def step() -> None:
        sections.start()
        sections.losses.append(trainer.step(batches, next(done)).loss)
        sections.end()

    return step, sections


def _check_losses(losses: dict[str, list[float]]) -> None:
    """The variants must train alike, or their times say nothing.

    Raises:
        AssertionError: losses of the first steps differ by more than fp32's rounding may.
    """
    for several in zip(*losses.values(), strict=False):
        assert max(several) - min(several) <= 1e-4 * max(several), losses


def _mean_sections(steps: list[dict[str, float]]) -> list[float]:
    """Median over the steps, mean over the ranks, by section."""
    mine = [statistics.median(step[name] for step in steps) for name in SECTIONS]
    table = torch.tensor(mine, dtype=torch.float64, device=rank_device())
    dist.all_reduce(table)
    return (table / dist.get_world_size()).tolist()


