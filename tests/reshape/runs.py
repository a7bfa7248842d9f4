# SPDX-License-Identifier: Apache-2.0
"""The run of a place: the digits model or its language model alone, either with stages."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from tests.parity.language import LanguageTrainer, build_language_model
from tests.parity.measure import TEXT_SIZE
from tests.parity.rows import axis_sizes
from tests.parity.tasks import TextBatches
from tests.reshape.plan import LAYERS, MICRO_BATCHES, Place
from tests.unit_tests.mimo.digits_runs import (
    BATCH,
    DATA_SEED,
    SIZE,
    Layout,
    ModelOptions,
    Run,
    Trainer,
    build_model,
    ended,
    train_options,
)


@contextlib.contextmanager
def run_at(place: Place, seed: int) -> Iterator[Run]:
    """A new run; all ranks of the place call it together.

    Args:
        place: layouts and options.
        seed: of the initial weights.
    """
    options: dict[str, Any] = {
        "seed": seed,
        "distributed_optimizer": place.distributed,
        "sequence_parallel": place.sequence_parallel,
    }
    if not place.vision:
        sizes = axis_sizes(place.language)
        built = build_language_model(sizes, ModelOptions(TEXT_SIZE, **options), place.tied)
        with ended(built):
            trainer = LanguageTrainer(built, train_options(MICRO_BATCHES), place.distributed)
            yield Run(built, trainer, TextBatches(DATA_SEED, "train", BATCH))
        return
    size, micro_batches = SIZE, 1
    if place.tied:
        size, micro_batches = replace(SIZE, language_layers=LAYERS), MICRO_BATCHES
        options |= {"tied": True, "virtual_stages": place.virtual_stages}
    layouts = Layout.parse(place.vision, "vision"), Layout.parse(place.language, "language")
    built = build_model(*layouts, ModelOptions(size, **options))
    with ended(built):
        yield Run(built, Trainer(built, train_options(micro_batches), place.distributed))
