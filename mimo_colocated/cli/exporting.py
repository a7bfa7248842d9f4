# SPDX-License-Identifier: Apache-2.0
"""``mimo export``: a checkpoint of any layout becomes a Hugging Face folder."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mimo_colocated.cli import models
from mimo_colocated.cli.importing import RECORD, TORCH_NATIVE, lora_of
from mimo_colocated.cli.options import CommandOptions
from mimo_colocated.launch.errors import JobError
from mimo_colocated.launch.layouts import LANGUAGE

if TYPE_CHECKING:
    from megatron.core.models.mimo.huggingface.earlier_run import EarlierRun

_STEP = re.compile(r"step_(\d{8,})")


@dataclass(frozen=True)
class Found:
    """A checkpoint.

    Attributes:
        root: folder of the line that it is on.
        step: of it.
    """

    root: Path
    step: int


def find(path: Path) -> Found:
    """Return the checkpoint that a path means: itself, or the last of a run.

    Raises:
        JobError: there is none.
    """
    from megatron.core.models.mimo.checkpoint.history import History

    named = _STEP.fullmatch(path.resolve().name)
    if named and (path / "mimo.json").is_file():
        return Found(path.resolve().parent, int(named[1]))
    for root in (path, path / "checkpoints"):
        steps = History(root, 1).steps()
        if steps:
            return Found(root, steps[-1])
    raise JobError(
        f"{path} is no checkpoint and no run: it has neither mimo.json nor a folder step_..., "
        "itself or below checkpoints/"
    )


def source_of(options: CommandOptions, found: Found) -> Path:
    """Return the folder that the model came from.

    Raises:
        JobError: neither the user nor the checkpoint names it, or it is gone.
    """
    if options.source is not None:
        return options.source
    recorded = _recorded(found).get("source")
    if recorded is None:
        raise JobError(
            f"the checkpoint in {found.root} does not say which Hugging Face folder its model "
            "came from; name it with --source"
        )
    if not Path(recorded).is_dir():
        raise JobError(
            f"the model came from {recorded}, which is not there; name its folder with --source"
        )
    return Path(recorded)


def torch_native_of(options: CommandOptions, found: Found) -> list[str]:
    """Return the checkpoint's torch-native modules.

    Raises:
        JobError: a layout that they do not take.
    """
    native = _recorded(found).get(TORCH_NATIVE, [])
    if LANGUAGE in native and options.language.pp > 1:
        raise JobError(
            f"the language model of {found.root} is torch-native, which has no pipeline stages, "
            f"and --language gives pp={options.language.pp}; give those ranks to tp, cp or dp"
        )
    return native


def weights_of(found: Found) -> EarlierRun:
    """Return a checkpoint's weights, adapters among them, to build a model from."""
    from megatron.core.models.mimo.huggingface.earlier_run import EarlierRun

    return EarlierRun(found.root, found.step, lora_of(_recorded(found)))


def _recorded(found: Found) -> dict[str, Any]:
    from megatron.core.models.mimo.checkpoint.history import History

    return History(found.root, 1).manifest(found.step).extra.get(RECORD, {})


def check_first(options: CommandOptions) -> None:
    """Refuse what can be refused before ranks start.

    Raises:
        JobError: the checkpoint, its source, the layouts or the target.
    """
    from megatron.core.models.mimo.huggingface.folder import ModelFolder
    from megatron.core.models.mimo.huggingface.target import Target, TargetError

    with models.one_sentence():
        found = find(options.checkpoint)
        source = source_of(options, found)
        models.check_source(source, options, torch_native_of(options, found))
        with ModelFolder(source) as opened:
            target = Target(options.target, overwrite=options.more["overwrite"], source=opened)
            try:
                target.check()
            except TargetError as error:
                raise JobError(str(error)) from error


def work(options: CommandOptions) -> None:
    """Load the checkpoint's weights and write them, on one rank of all."""
    from megatron.core.models.mimo.huggingface.export import to_folder
    from mimo_colocated.cli.progress import bar

    found = find(options.checkpoint)
    with models.one_sentence():
        source = source_of(options, found)
        native = torch_native_of(options, found)
        built = models.build(
            source,
            options,
            dtype=options.dtype,
            torch_native=native,
            weights=weights_of(found),
        )
        dtype = models.torch_dtype(options.dtype) if options.dtype else None
        with bar("writing") as tick:
            overwrite = options.more["overwrite"]
            to_folder(built, options.target, dtype=dtype, overwrite=overwrite, tick=tick)
    models.say(f"wrote {options.target}: step {found.step} of {found.root}")
