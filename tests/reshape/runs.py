# SPDX-License-Identifier: Apache-2.0
"""The run of a place: the digits model, or its language model alone over pipeline stages."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from tests.parity.language import LanguageTrainer, build_language_model
from tests.parity.measure import TEXT_SIZE
from tests.parity.rows import axis_sizes
from tests.parity.tasks import TextBatches
from tests.reshape.plan import MICRO_BATCHES, Place
from tests.unit_tests.mimo.digits_runs import (
    BATCH,
    DATA_SEED,
    ModelOptions,
    Run,
    ended,
    run,
    train_options,
)


@contextlib.contextmanager
def run_at(place: Place, seed: int) -> Iterator[Run]:
    """A new run; all ranks of the place call it together.

    Args:
        place: layouts and options.
        seed: of the initial weights.
    """
    if place.vision:
        pair = place.vision, place.language
        options = {"sequence_parallel": place.sequence_parallel}
        with run(pair, place.distributed, seed, **options) as one:
            yield one
        return
    options = ModelOptions(
        size=TEXT_SIZE,
        seed=seed,
        distributed_optimizer=place.distributed,
        sequence_parallel=place.sequence_parallel,
    )
    built = build_language_model(axis_sizes(place.language), options, place.tied)
    with ended(built):
        trainer = LanguageTrainer(built, train_options(MICRO_BATCHES), place.distributed)
        yield Run(built, trainer, TextBatches(DATA_SEED, "train", BATCH))
