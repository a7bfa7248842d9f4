# SPDX-License-Identifier: Apache-2.0
"""Recipes and the planner: what a recipe trains, and the planner's first choice in a recipe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mimo_colocated.cli.models import trained_of
from mimo_colocated.launch.errors import JobError, write_atomically
from mimo_colocated.train.reading import as_yaml, read_recipe
from mimo_colocated.train.recipe import Recipe


def open_recipe(named: str) -> tuple[Recipe, Path]:
    """Return a recipe and the folder of its model.

    Args:
        named: one that ships, or a YAML file.

    Raises:
        JobError: there is none, or its model has not been made yet.
    """
    recipe = read_recipe(named)
    folder = Path(recipe.model.folder or Path(recipe.run.out) / "model").expanduser()
    if not (folder / "config.json").is_file():
        made = "" if recipe.model.folder else f"; `mimo train {named} --dry-run` makes it"
        raise JobError(f"recipe {recipe.name}: its model's folder {folder} is not there{made}")
    return recipe, folder


def options_of(recipe: Recipe) -> dict[str, Any]:
    """Return the values of options of ``mimo plan`` that a recipe says.

    A packed sequence is as long as it may be, and so is a sample: what is planned is the fullest
    step.

    Args:
        recipe: with data and training.
    """
    data, training = recipe.data, recipe.training
    return {
        "seq": data.capacity if data.sequences else data.max_tokens,
        "global_batch": data.sequences or training.global_batch_size,
        "itemsize": 4 if recipe.model.dtype == "float32" else 2,
    }


def trained_in(recipe: Recipe, folder: Path, flags: dict[str, str]) -> dict[str, Any]:
    """Return what of the model trains, by the encoders' options: frozen parts, adapters.

    Args:
        recipe: with names or patterns of what is frozen, adapters and parameter groups.
        folder: of the model.
        flags: modality -> the encoder's option.

    Raises:
        JobError: a name that means nothing, or nothing is left to train.
    """
    model = recipe.model
    if not (model.freeze or model.lora.rank or recipe.training.groups):
        return {}
    found = trained_of(folder, model.freeze, model.lora, recipe.training.groups)
    named = {}
    for name, trained in found.items():
        module, dot, part = name.partition(".")
        named[f"{flags.get(module, module)}{dot}{part}"] = trained
    return named


def write_recipe(
    path: Path, recipe: Recipe, candidates: Sequence[Any], flags: dict[str, str], work: Any
) -> int:
    """Write a recipe with the layouts, microbatches and recomputation of a candidate.

    Its length and its batch are those that were planned.

    Args:
        path: a YAML file.
        recipe: that everything else is of.
        candidates: the planner's choices, the best first; recipes keep what encoders keep.
        flags: modality -> the encoder's option.
        work: the step that was planned.

    Returns:
        Which of them it is, from 1: the first that the recipe's data can be shared out for.

    Raises:
        JobError: there is none, or the file cannot be written.
    """
    refusal: JobError | None = None
    recipe = _of_work(recipe, work)
    for number, candidate in enumerate(candidates, start=1):
        changed = _changed(recipe, candidate, flags)
        try:
            changed.check()
        except JobError as error:
            refusal = refusal or error
            continue
        write_atomically(path, as_yaml(changed).encode(), "the recipe")
        return number
    raise refusal or JobError("no row of the plan fits the recipe")


def _of_work(recipe: Recipe, work: Any) -> Recipe:
    """The recipe with a step's length and batch; the other way round than :func:`options_of`."""
    data, training = recipe.data, recipe.training
    if data.sequences:
        data = replace(data, sequences=work.samples, capacity=work.sequence)
    else:
        data = replace(data, max_tokens=work.sequence)
        training = replace(training, global_batch_size=work.samples)
    return replace(recipe, data=data, training=training)


def _changed(recipe: Recipe, candidate: Any, flags: dict[str, str]) -> Recipe:
    encoders = {
        modality: str(candidate.encoder(flag))
        for modality, flag in flags.items()
        if flag in candidate.encoders
    }
    layout = replace(
        recipe.layout,
        language=str(candidate.language),
        encoders=encoders,
        sequence_parallel=candidate.language.tp > 1,
        virtual_stages=candidate.virtual_stages,
    )
    # As the planner counts what stages keep.
    alone = candidate.language.pp > 1 and candidate.virtual_stages == 1
    training = replace(
        recipe.training,
        micro_batches=candidate.microbatches,
        encode_ahead=1 if alone else None,
        recompute=candidate.recompute,
    )
    return replace(recipe, layout=layout, training=training)
