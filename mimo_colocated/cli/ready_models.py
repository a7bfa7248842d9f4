# SPDX-License-Identifier: Apache-2.0
"""A model with weights: a Hugging Face folder, or what a run trained from one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mimo_colocated.cli import exporting, models
from mimo_colocated.cli.options import CommandOptions
from mimo_colocated.launch.errors import JobError


@dataclass(frozen=True)
class ReadyModel:
    """Where a model's parts are.

    Attributes:
        folder: of Hugging Face, with its configuration, text and processor.
        checkpoint: that has the weights; None where the folder has them.
        recipe: fields of the recipe that the checkpoint's run trained by; empty without one.
        torch_native: modules that are transformers' own.
        dtype: of the weights when they are built.
    """

    folder: Path
    checkpoint: exporting.Found | None
    recipe: Mapping[str, Any]
    torch_native: tuple[str, ...]
    dtype: str

    @property
    def run(self) -> Path | None:
        """Folder of the run whose checkpoint it is; None without one."""
        if self.checkpoint is None:
            return None
        root = self.checkpoint.root
        return root.parent if root.name == "checkpoints" else root

    def build(self, options: CommandOptions, *, packed: bool) -> Any:
        """Return the model on this rank, weights loaded, nothing of it to train.

        Args:
            options: of the command.
            packed: it takes packed sequences.
        """
        return models.build(
            self.folder,
            options,
            weights=None if self.checkpoint is None else exporting.weights_of(self.checkpoint),
            dtype=self.dtype,
            torch_native=self.torch_native,
            packed=packed,
        )


def ready_model(options: CommandOptions) -> ReadyModel:
    """Return the model of a command.

    Args:
        options: ``checkpoint`` is the folder, the run or the checkpoint.

    Raises:
        JobError: there is no model.
    """
    from megatron.core.models.mimo.checkpoint.history import History

    path, found, recipe = options.checkpoint, None, {}
    if (path / "config.json").is_file():
        if options.source is not None:
            raise JobError(
                f"--source says where a checkpoint's model came from, and {path} is a model "
                "itself; leave --source out"
            )
        folder, native = path, []
    else:
        with models.one_sentence():
            found = exporting.find(path)
            folder = exporting.source_of(options, found)
            native = exporting.torch_native_of(options, found)
            saved = History(found.root, 1).manifest(found.step).extra
        recipe = saved.get("options", {}).get("recipe", {})
    with models.one_sentence():
        trained = recipe.get("model", {}).get("dtype")
        dtype = options.dtype or trained or models.folder_dtype(folder)
    return ReadyModel(folder, found, recipe, tuple(native), dtype)


def checked_model(options: CommandOptions) -> ReadyModel:
    """Return the model of a command; before ranks start, for its files are looked at.

    Args:
        options: see :func:`ready_model`.

    Raises:
        JobError: there is no model, or it cannot be built in the layouts.
    """
    model = ready_model(options)
    own = replace(options, source=model.folder)
    models.check_source(model.folder, own, model.torch_native)
    return model


@contextlib.contextmanager
def one_sentence() -> Iterator[None]:
    """Show errors of a model, its text or data that are one sentence without a traceback.

    Raises:
        JobError: in their place.
    """
    from megatron.core.models.mimo.data.conversation import SampleError
    from megatron.core.models.mimo.data.encoding import TemplateError
    from megatron.core.models.mimo.data.readers import ReadError
    from megatron.core.models.mimo.data.sources import SourceError

    try:
        with models.one_sentence():
            yield
    except (ReadError, SampleError, SourceError, TemplateError) as error:
        raise JobError(str(error)) from error
