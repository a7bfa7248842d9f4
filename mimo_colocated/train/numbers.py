# SPDX-License-Identifier: Apache-2.0
"""What a step did: FLOPs by module, how fast, and what a homogeneous layout would do besides."""

from __future__ import annotations

import resource
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from megatron.core.models.mimo.data.loader import RankBatch
from megatron.core.models.mimo.huggingface.plan_shapes import composite_shapes
from megatron.core.models.mimo.job.built_model import LANGUAGE
from megatron.core.models.mimo.plan.peak import peak_flops
from megatron.core.models.mimo.plan.shapes import Shapes
from megatron.core.models.mimo.plan.step_flops import Frozen, homogeneous_runs, step_flops
from mimo_colocated.launch.layouts import Layout

TERA = 1e12


@dataclass(frozen=True)
class StepNumbers:
    """Counts the work of steps.

    Attributes:
        shapes: of the model.
        language: the layout of its language model.
        frozen: what does not train.
        peak: FLOPs a second of one rank's accelerator; None where it is not known.
    """

    shapes: Shapes
    language: Layout
    frozen: Frozen
    peak: float | None

    @classmethod
    def of_model(
        cls,
        composite: Any,
        language: Layout,
        freeze: Collection[str],
        dtype: str,
        adapted: Collection[str],
    ) -> StepNumbers:
        """Return what counts the steps of a model on this rank's device.

        Args:
            composite: what the model is made of.
            language: the layout of its language model.
            freeze: what does not train, as ``model.freeze`` of a recipe names it.
            dtype: of the weights.
            adapted: modules in which adapters train.
        """
        shapes = composite_shapes(composite)
        peak = None
        if torch.cuda.is_available():
            peak = peak_flops(torch.cuda.get_device_name(), dtype)
        return cls(shapes, language, Frozen.of(freeze, shapes, adapted), peak)

    def flops(self, batch: RankBatch, *, causal: bool = True) -> dict[str, float]:
        """Return module -> FLOPs of a global batch, forward and backward.

        Args:
            batch: with the lengths of its samples and the rows of its items.
            causal: as of :func:`.step_flops`.
        """
        of_items: list[int] = batch.rows.tolist()
        rows = dict.fromkeys(self.shapes.encoders, of_items)
        lengths = batch.batch.lengths.tolist()
        return step_flops(self.shapes, lengths, rows, self.frozen, causal=causal)

    def of(self, batch: RankBatch, seconds: float) -> dict[str, Any]:
        """Return what ``metrics.jsonl`` says of a step's work.

        Args:
            batch: that it was on.
            seconds: that it took, waiting for data among them.

        Returns:
            ``tflop``: module -> 1e12 FLOPs of all ranks together. ``tflop_repeated``: what encoders
            would do besides in the language model's layout. ``tflops_per_rank``: 1e12 FLOPs a
            second, what would be repeated not among them. ``mfu``: of the peak, 0 to 1, where it is
            known. ``peak_memory``: bytes of this rank.
        """
        flops = self.flops(batch)
        encoders = sum(count for name, count in flops.items() if name != LANGUAGE)
        rate = sum(flops.values()) / max(seconds, 1e-9) / self.language.size
        return {
            "tflop": {name: count / TERA for name, count in flops.items()},
            "tflop_repeated": encoders * (homogeneous_runs(self.language) - 1) / TERA,
            "tflops_per_rank": rate / TERA,
            **({} if self.peak is None else {"mfu": rate / self.peak}),
            "peak_memory": peak_memory(),
        }

    def by_part(
        self, tflop: Mapping[str, float], times: Mapping[str, float]
    ) -> dict[str, dict[str, float]]:
        """Return how fast the encoders and the language model are, each in its own time.

        Args:
            tflop: module -> 1e12 FLOPs of a step, of all ranks.
            times: part -> seconds of this rank.

        Returns:
            ``tflops_per_rank_of`` and, where the peak is known, ``mfu_of``: by ``encoder``, all of
            them, and ``language``; what took no time is left out.
        """
        language = tflop[LANGUAGE]
        work = {"encoder": sum(tflop.values()) - language, LANGUAGE: language}
        rates = {
            name: count / times[name] / self.language.size
            for name, count in work.items()
            if count and times.get(name)
        }
        found = {"tflops_per_rank_of": rates}
        if self.peak is not None:
            found["mfu_of"] = {name: rate * TERA / self.peak for name, rate in rates.items()}
        return found


def said(numbers: Mapping[str, Any]) -> str:
    """Return what the line of a step says of :meth:`StepNumbers.of`.

    >>> said({"tflop": {"images": 1.0, "language": 3.0}, "tflop_repeated": 1.0,
    ...       "tflops_per_rank": 0.5})
    '0.5 TFLOP/s per rank (homogeneous: +25% work)'
    """
    rate = said_rate(numbers["tflops_per_rank"])
    share = f", {numbers['mfu']:.1%} MFU" if "mfu" in numbers else ""
    repeated = numbers["tflop_repeated"] / max(sum(numbers["tflop"].values()), 1e-12)
    return rate + share + (f" (homogeneous: +{repeated:.0%} work)" if repeated else "")


def said_rate(tera: float) -> str:
    """Return 1e12 FLOPs a second of a rank in words; those of tiny models in 1e9.

    >>> said_rate(0.02)
    '20 GFLOP/s per rank'
    """
    rate = f"{tera:.3g} TFLOP/s" if tera >= 0.1 else f"{tera * 1e3:.3g} GFLOP/s"
    return rate + " per rank"


def peak_memory() -> int:
    """Return the most bytes that this rank had at once: of its GPU, or of the process without."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
