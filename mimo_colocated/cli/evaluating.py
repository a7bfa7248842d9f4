# SPDX-License-Identifier: Apache-2.0
"""``mimo eval``: loss and exact match of a model on held-out data, in any layout."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mimo_colocated.cli import models
from mimo_colocated.cli.options import CommandOptions
from mimo_colocated.cli.ready_models import (
    ReadyModel,
    checked_model,
    one_sentence,
    ready_model,
)
from mimo_colocated.launch.errors import JobError

READ = (
    "evaluation",
    *(f"data.{name}" for name in ("held_out", "max_tokens", "skip", "look_at_images", "packed")),
)
"""Fields of a recipe that an evaluation reads."""
RESULT = "evaluation.json"
# What a recipe has to have, where a folder is evaluated that was trained by none.
_BARE: Mapping[str, Any] = {
    "name": "evaluation",
    "model": {},
    "data": {"train": []},
    "training": {"steps": 1, "global_batch_size": 1},
    "run": {"out": "runs/evaluation"},
}


def check_first(options: CommandOptions) -> None:
    """Refuse what can be refused before ranks start.

    Raises:
        JobError: the model, the layouts, or the recipe.
    """
    recipe_of(options, checked_model(options))


def recipe_of(options: CommandOptions, model: ReadyModel) -> Any:
    """Return what is evaluated as a recipe in the command's layout that trains nothing.

    Args:
        options: of the command.
        model: that is evaluated.

    Raises:
        JobError: a field is wrong, or is not read; there is no held-out data.
    """
    from mimo_colocated.train import reading
    from mimo_colocated.train.recipe import LayoutPart, ModelPart, RunPart, TrainingPart

    more = options.more
    for change in more["set"]:
        name = change.partition("=")[0]
        if not any(name == field or name.startswith(f"{field}.") for field in READ):
            raise JobError(
                f"--set {name}: an evaluation does not read it; it reads {', '.join(READ)}, and "
                "--language, --vision and --dtype in place of layout and model"
            )
    named = more["recipe"] or str(model.run or model.folder)
    values = reading.values_of(named) if more["recipe"] else model.recipe or _BARE
    given = [f"data.held_out=[{', '.join(more['data'])}]"] if more["data"] else []
    read = reading.recipe_from(named, values, [*given, *more["set"]])
    if not read.data.held_out:
        raise JobError(
            f"{named} names no held-out data; give some, such as --data '{{kind: chat, settings: "
            "{path: held_out.jsonl}}', or a --recipe that has some"
        )
    replicas = options.language.dp
    recipe = dataclasses.replace(
        read,
        model=ModelPart(str(model.folder), torch_native=list(model.torch_native)),
        # Nothing of it is read; a recipe has to name some.
        data=dataclasses.replace(read.data, train=[_nothing(read)], sequences=0, workers=0),
        training=TrainingPart(1, replicas),
        # Batches are shared out over DP, whatever the other axes.
        layout=LayoutPart(f"dp={replicas}"),
        run=RunPart(str(more["out"] or (model.run or Path("runs")) / "evaluation")),
    )
    recipe.check()
    return recipe


def _nothing(recipe: Any) -> Any:
    from mimo_colocated.train.recipe import SourcePart

    return SourcePart("tokens" if recipe.of_tokens else "chat")


def work(options: CommandOptions) -> None:
    """Evaluate the model, on one rank of all."""
    from megatron.core.models.mimo.data.encoding import ChatEncoder
    from megatron.core.models.mimo.huggingface.all_ranks import on_all_ranks
    from megatron.core.models.mimo.job.trainer import TrainOptions
    from mimo_colocated.train.data import side_of
    from mimo_colocated.train.evaluation import Evaluation, open_held_out
    from mimo_colocated.train.items import readers_of, shared_reads
    from mimo_colocated.train.trainer import RecipeRunner

    with one_sentence(), contextlib.ExitStack() as stack:
        model = on_all_ranks(lambda: ready_model(options), "read the model")
        recipe = on_all_ranks(lambda: recipe_of(options, model), "read the recipe")
        data, part, folder = recipe.data, recipe.evaluation, model.folder
        text = None
        if not recipe.of_tokens:
            text = on_all_ranks(lambda: ChatEncoder(folder, data.max_tokens), "open its text")
        encode = text or models.described(folder).language.config.vocab_size
        opened = open_held_out(recipe, encode, Path(recipe.run.out) / "prepared", retry=True)
        said = ["held-out data", *["questions"] * (text is not None)]
        for name, each in zip(said, opened, strict=False):
            models.say(f"{name}: {each.summary()}")
        built = model.build(options, packed=data.packed)
        runner = RecipeRunner(built, TrainOptions(steps=1, global_batch_size=part.batch))
        readers = on_all_ranks(lambda: readers_of(folder, stack), "open its processor")
        share, padding = shared_reads(built), 0 if text is None else text.padding
        evaluation = Evaluation(
            runner,
            data,
            part,
            text,
            lambda data, count: side_of(runner, data, padding, readers, share, count),
            _go_on,
            loss_micro_batches=1,
        )
        found, answers = evaluation.measure(*opened)
        layouts = built.layouts()
        built.destroy()
        for name, value in found.items():
            models.say(f"{name.replace('_', ' ')}: {value:.6g}")
        result = {
            "model": str(model.run or folder),
            "step": None if model.checkpoint is None else model.checkpoint.step,
            "layouts": layouts,
            **found,
            "skipped": opened[0].skipped(),
            "questions_skipped": opened[1].skipped(),
            "answers": [dataclasses.asdict(each) for each in answers],
        }
        on_all_ranks(lambda: _write(Path(recipe.run.out), result), "write the result")
    models.say(f"wrote {Path(recipe.run.out) / RESULT}")


def _go_on() -> None:
    """Nothing stops an evaluation."""


def _write(out: Path, result: Mapping[str, Any]) -> None:
    import torch.distributed as dist

    from megatron.core.models.mimo.job.results import write_summary

    if dist.get_rank() == 0:
        write_summary(out / RESULT, result)
