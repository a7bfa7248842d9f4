# SPDX-License-Identifier: Apache-2.0
"""What of a recipe cannot run, as far as its numbers tell."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mimo_colocated.train.recipe import Recipe


def problems(recipe: Recipe) -> Iterator[str]:
    """Yield what is wrong, most basic first, each with what to set instead."""
    yield from _batches(recipe)


def _batches(recipe: Recipe) -> Iterator[str]:
    """Batches that cannot be shared out, those of the evaluation too; see ``plan_batch``."""
    data, training = recipe.data, recipe.training
    micro_batches, replicas = training.micro_batches, recipe.language.dp
    bins = micro_batches * replicas
    over = f"{micro_batches} microbatches and {replicas} language replicas"
    if data.sequences:
        yield from _uneven("data.sequences", data.sequences, bins, over)
    else:
        name, size = "training.global_batch_size", training.global_batch_size
        yield from _unshared(name, size, bins, over, packed=data.packed)
    if data.held_out:
        name, size = "evaluation.batch", recipe.evaluation.batch
        over = f"{replicas} language replicas"
        yield from _unshared(name, size, replicas, over, packed=data.packed)


def _unshared(name: str, size: int, bins: int, over: str, *, packed: bool) -> Iterator[str]:
    if not packed:
        yield from _uneven(name, size, bins, over)
    elif size < bins:
        yield (
            f"{name}={size} leaves some of {bins} packed sequences empty; use at least {bins} "
            f"for {over}"
        )


def _uneven(name: str, size: int, bins: int, over: str) -> Iterator[str]:
    if size % bins:
        yield f"{name}={size} does not divide over {over}; use a multiple of {bins}"
