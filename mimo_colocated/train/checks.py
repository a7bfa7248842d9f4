# SPDX-License-Identifier: Apache-2.0
"""What of a recipe cannot run, as far as its numbers tell."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from mimo_colocated.launch.errors import did_you_mean

if TYPE_CHECKING:
    from mimo_colocated.train.recipe import Recipe

# Here, where nothing heavy is imported; those of ``megatron.core.models.mimo.data.sources``.
DATA_KINDS = ("llava", "chat", "datasets", "webdataset", "energon", "easy-vqa", "tokens")
LINK_PRESETS = (
    *("default", "one", "one_percent", "half_percent", "point2", "long_point1"),
    *("long_2percent", "short_1percent", "short_2percent"),
)
"""Those of ``megatron.core.models.mimo.lossy.loss_models``."""
SEQUENCE_MULTIPLE = 16
"""What samples are padded to in sequences of one capacity: the same in every layout."""


def problems(recipe: Recipe) -> Iterator[str]:
    """Yield what is wrong, most basic first, each with what to set instead."""
    yield from _sources(recipe)
    yield from _schedule(recipe)
    yield from _groups(recipe)
    yield from _model(recipe)
    yield from _stages(recipe)
    yield from _bubbles(recipe)
    yield from _sequences(recipe)
    yield from _batches(recipe)
    yield from _links(recipe)


def _sources(recipe: Recipe) -> Iterator[str]:
    for name in ("train", "held_out"):
        for number, part in enumerate(getattr(recipe.data, name)):
            where = f"data.{name}.{number}"
            if part.kind not in DATA_KINDS:
                meant = did_you_mean(part.kind, DATA_KINDS)
                yield (
                    f"{where}.kind: {part.kind!r} is no kind of data; {meant}the kinds are "
                    f"{', '.join(DATA_KINDS)}"
                )
            weight = part.weight
            if not math.isfinite(weight):
                yield f"{where}.weight={weight} is no finite number"
            elif weight <= 0:
                yield f"{where}.weight={weight}; it must be above 0, or leave the data out"
            elif name == "held_out" and weight != 1:
                yield f"{where}.weight={weight}; held-out data is seen once, leave it out"


def _schedule(recipe: Recipe) -> Iterator[str]:
    training = recipe.training
    for field in dataclasses.fields(training):
        value = getattr(training, field.name)
        if isinstance(value, float) and not math.isfinite(value):
            yield f"training.{field.name}={value} is no finite number"
    if training.min_lr > training.lr:
        yield (
            f"training.min_lr={training.min_lr} is above training.lr={training.lr}; set it to at "
            "most that"
        )
    if training.warmup_steps is not None and training.warmup_steps >= training.steps:
        yield (
            f"training.warmup_steps={training.warmup_steps} leaves none of "
            f"training.steps={training.steps} after the warm-up; set it below that"
        )


def _groups(recipe: Recipe) -> Iterator[str]:
    training = recipe.training
    for number, group in enumerate(training.groups):
        if problem := group.problem(training.lr, training.min_lr):
            yield f"training.groups.{number}: {problem}"


def _model(recipe: Recipe) -> Iterator[str]:
    if recipe.model.torch_native and recipe.training.recompute == "selective":
        yield (
            "training.recompute=selective is of Megatron's layers, and model.torch_native names "
            f"{recipe.model.torch_native}; set training.recompute to full or none"
        )
    model = recipe.model
    if problem := model.lora.problem():
        yield f"model.lora.{problem}"
    if model.lora.rank and model.from_run and model.torch_native:
        yield (
            "model.lora with model.from_run loads weights before modules are sharded, which those "
            f"of model.torch_native={model.torch_native} cannot; export that run and name its "
            "folder as model.folder"
        )
    if model.settings and not model.make:
        there = f"model.folder={model.folder!r}" if model.folder else "model.from_run"
        yield (
            f"model.settings are of what model.make makes, and {there} is there already; leave one "
            "of them out"
        )
    if model.from_run and Path(model.from_run).resolve() == Path(recipe.run.out).resolve():
        yield f"model.from_run={model.from_run!r} is this run's own run.out; use another run.out"
    if not model.folder:
        return
    if Path(model.folder) == Path(recipe.run.out) / "exported":
        yield f"model.folder={model.folder!r} is what the run writes; use another run.out"


def _stages(recipe: Recipe) -> Iterator[str]:
    """What a pipelined language model needs; see ``TrainingOptions`` for other jobs."""
    training, stages, virtual = recipe.training, recipe.language.pp, recipe.layout.virtual_stages
    ahead, micro_batches = training.encode_ahead, training.micro_batches
    if stages == 1:
        if virtual > 1:
            yield (
                "layout.virtual_stages is for a pipelined language model; add pp=2 to "
                "layout.language"
            )
        if ahead is not None and micro_batches == 1:
            yield (
                f"training.encode_ahead={ahead} encodes further microbatches while the language "
                "model works on one, and training.micro_batches=1 has no further ones; use 2 or "
                "more, or add pp=2 to layout.language"
            )
        return
    if "language" in recipe.model.torch_native:
        yield (
            f"layout.language={recipe.language} has pipeline stages, and model.torch_native names "
            "language, which has none; leave one of them out"
        )
    if virtual == 1:
        return
    if micro_batches % stages:
        yield (
            f"layout.virtual_stages={virtual} interleaves groups of {stages} microbatches, got "
            f"training.micro_batches={micro_batches}; use a multiple of {stages}"
        )
    if (ahead or micro_batches) < micro_batches:
        yield (
            f"training.encode_ahead={ahead} needs layout.virtual_stages=1, got {virtual}: with "
            "virtual stages all microbatches of a step are encoded together"
        )
    if stages == 2 and recipe.lengths_differ:
        yield (
            f"layout.virtual_stages={virtual} on pp=2 needs samples of one length, and these have "
            "several: two ranks that interleave cannot tell each other lengths; use pp=4, or "
            "layout.virtual_stages=1"
        )


def _bubbles(recipe: Recipe) -> Iterator[str]:
    """What encoding in the bubbles of a pipeline needs; see ``TrainingOptions`` for other jobs."""
    training, stages, virtual = recipe.training, recipe.language.pp, recipe.layout.virtual_stages
    given, most = training.encode_in_bubbles, training.micro_batches - stages
    if not given:
        return
    if stages == 1 or virtual > 1:
        yield (
            f"training.encode_in_bubbles={given} needs layout.language with pp=2 or more and "
            f"layout.virtual_stages=1, got pp={stages} and {virtual}"
        )
    elif training.encode_ahead is not None:
        yield (
            f"training.encode_in_bubbles={given} and training.encode_ahead="
            f"{training.encode_ahead} say both when microbatches are encoded; set one of them"
        )
    elif given > most:
        yield (
            f"training.encode_in_bubbles={given} of training.micro_batches="
            f"{training.micro_batches}: the first stage begins with {stages} before it waits for "
            f"the others, so it can be at most {max(most, 0)}"
        )


def _sequences(recipe: Recipe) -> Iterator[str]:
    data = recipe.data
    if not data.sequences:
        if data.capacity:
            yield (
                f"data.capacity={data.capacity} is of packed sequences; set data.sequences, or "
                "leave it out"
            )
        return
    longest, said = recipe.longest, f"data.max_tokens={data.max_tokens}"
    if recipe.of_tokens:
        longest += 1
        said = f"a sample's {longest} tokens"
    needed = -(-longest // SEQUENCE_MULTIPLE) * SEQUENCE_MULTIPLE
    if not data.packed or data.capacity < needed:
        yield (
            f"data.sequences={data.sequences} needs data.packed=true and data.capacity of at "
            f"least {needed} ({said}, padded to a multiple of {SEQUENCE_MULTIPLE}), got "
            f"{data.packed} and {data.capacity}"
        )


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
        micro_batches = recipe.held_out_micro_batches
        over = f"{micro_batches} microbatches and " * (micro_batches > 1)
        over += f"{replicas} language replicas"
        yield from _unshared(name, size, micro_batches * replicas, over, packed=data.packed)


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


def _links(recipe: Recipe) -> Iterator[str]:
    """What of the rules can be told without the room that applies them; it looks at the rest."""
    lossy = recipe.lossy
    if lossy.evaluation not in ("lossless", "lossy"):
        yield f"lossy.evaluation={lossy.evaluation!r} is lossless or lossy"
    if not lossy.rules and dataclasses.asdict(lossy) != dataclasses.asdict(type(lossy)()):
        yield "lossy has no rules, so nothing would be lost; give lossy.rules, or leave lossy out"
    for number, rule in enumerate(lossy.rules):
        if isinstance(rule.loss, str) and rule.loss not in LINK_PRESETS:
            meant = did_you_mean(rule.loss, LINK_PRESETS)
            yield (
                f"lossy.rules.{number}.loss={rule.loss!r} is no preset; {meant}there are "
                f"{', '.join(LINK_PRESETS)}; or give numbers, such as {{rate: 0.01}}"
            )
