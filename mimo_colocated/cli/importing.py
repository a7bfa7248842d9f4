# SPDX-License-Identifier: Apache-2.0
"""``mimo import``: a Hugging Face folder becomes a checkpoint to train from."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from mimo_colocated.cli import models
from mimo_colocated.cli.options import CommandOptions
from mimo_colocated.launch.errors import JobError
from mimo_colocated.launch.lora import Lora

RECORD = "huggingface"
"""What a checkpoint's manifest says of its source, among ``extra``."""
TORCH_NATIVE = "torch_native"
"""Field of it: the modules that are transformers' own, whose tensors have other names."""

LORA = "lora"
"""Field of it: settings of adapters, where there are any."""


class NoOptimizer:
    """Nothing trains yet: a run that loads the checkpoint begins its optimizer's state anew."""

    config = SimpleNamespace(use_distributed_optimizer=None)

    def sharded_state_dict(self, *_state: Any, **_how: Any) -> dict[str, Any]:
        """Return no state."""
        return {}


def check_first(options: CommandOptions) -> None:
    """Refuse what can be refused before ranks start.

    Raises:
        JobError: the folder, the layouts or the target.
    """
    from megatron.core.models.mimo.huggingface.target import TargetError, check_place

    models.check_source(options.folder, options, ())
    target = options.target
    try:
        check_place(target)
    except TargetError as error:
        raise JobError(str(error)) from error
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise JobError(f"{target} exists and is not empty; give another folder")


def work(options: CommandOptions) -> None:
    """Read the folder and write step 0, on one rank of all."""
    from megatron.core.models.mimo.checkpoint.store import CheckpointStore

    with models.one_sentence():
        built = models.build(options.folder, options, dtype=options.dtype)
        store = CheckpointStore(options.target, built.layouts(), built.randomness)
        extra = {RECORD: source_of(options.folder, built)}
        path = store.save(0, built.model, NoOptimizer(), extra)
    models.say(
        f"wrote {path}; a run loads it with CheckpointStore({str(options.target)!r}, ...)"
        ".load(0, model, optimizer)"
    )


def source_of(folder: Path, built: Any) -> dict[str, Any]:
    """Return what a checkpoint records of its model: where it came from, what it is built of.

    Args:
        folder: the Hugging Face folder.
        built: the model.
    """
    return {
        "source": str(folder.resolve()),
        "model_type": built.composite.language.config.model_type,
        TORCH_NATIVE: list(built.torch_native),
        **({LORA: dataclasses.asdict(built.lora)} if built.lora else {}),
    }


def lora_of(record: Mapping[str, Any]) -> Lora | None:
    """Return the adapters that a checkpoint's record tells of; None without any."""
    return Lora(**record[LORA]) if LORA in record else None
