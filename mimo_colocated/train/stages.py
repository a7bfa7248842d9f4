# SPDX-License-Identifier: Apache-2.0
"""A run that begins with the weights of another one: ``model.from_run``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mimo_colocated.cli.exporting import Found, find
from mimo_colocated.cli.importing import RECORD, TORCH_NATIVE, lora_of
from mimo_colocated.launch.errors import JobError
from mimo_colocated.train.recipe import Recipe

if TYPE_CHECKING:
    from megatron.core.models.mimo.huggingface.earlier_run import EarlierRun


@dataclass(frozen=True)
class Stage:
    """The run before.

    Attributes:
        found: its last checkpoint, or the one that is named.
        record: what the checkpoint says of its model.
    """

    found: Found
    record: dict[str, Any]

    @classmethod
    def of(cls, recipe: Recipe) -> Stage:
        """Return the run that a recipe begins with.

        Raises:
            JobError: it has no checkpoint, one that cannot be read, or one of a model that is not
                the recipe's.
        """
        from megatron.core.models.mimo.checkpoint.history import History
        from mimo_colocated.cli import models

        said = f"model.from_run={recipe.model.from_run}"
        found = find(Path(recipe.model.from_run).expanduser())
        with models.one_sentence():
            record = History(found.root, 1).manifest(found.step).extra.get(RECORD)
        if record is None:
            raise JobError(
                f"{said}: its checkpoint does not say which Hugging Face folder its model came "
                "from; give a run of `mimo train`, or what `mimo import` wrote"
            )
        then, now = sorted(record.get(TORCH_NATIVE, [])), sorted(recipe.model.torch_native)
        if then != now:
            raise JobError(
                f"{said} was trained with model.torch_native={then}, this recipe has {now}, whose "
                f"weights have other names; set model.torch_native={then}, or export that run and "
                "name its folder as model.folder"
            )
        return cls(found, record)

    def folder(self) -> Path:
        """Return the Hugging Face folder that its model came from.

        Raises:
            JobError: it is gone.
        """
        folder = Path(self.record["source"])
        if not (folder / "config.json").is_file():
            raise JobError(
                f"model.from_run: the model of {self.found.root} came from {folder}, which is not "
                "there; put it back, its tokenizer and configuration are needed"
            )
        return folder

    def weights(self) -> EarlierRun:
        """Return where the weights are."""
        from megatron.core.models.mimo.huggingface.earlier_run import EarlierRun

        return EarlierRun(self.found.root, self.found.step, lora_of(self.record))
