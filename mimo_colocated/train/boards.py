# SPDX-License-Identifier: Apache-2.0
"""Where else the numbers of steps are written: TensorBoard, Weights & Biases."""

from __future__ import annotations

import dataclasses
import importlib
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from mimo_colocated.launch.errors import JobError, write_atomically
from mimo_colocated.train.recipe import Recipe


class Board(Protocol):
    """Takes the numbers of a step."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Take name -> value of a step, from 1."""

    def close(self) -> None:
        """Write what is left."""


class TensorBoard:
    """Writes event files.

    Args:
        folder: for them.
        first: the first step; what an earlier run wrote of it and later ones is not shown.
    """

    def __init__(self, folder: Path, first: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=first)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Take name -> value of a step, from 1."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()


class WeightsAndBiases:
    """Logs a run; one that goes on is the same run there, whose steps it does not log twice.

    Args:
        recipe: names the project and the run.
        out: folder of the run.

    Raises:
        JobError: the run cannot be started there.
    """

    def __init__(self, recipe: Recipe, out: Path) -> None:
        wandb: Any = importlib.import_module("wandb")  # an extra, which type checks do without
        try:
            self._run: Any = wandb.init(
                project=recipe.run.wandb,
                name=recipe.name,
                id=_run_id(out / "wandb" / "run_id"),
                resume="allow",
                dir=str(out),
                config=dataclasses.asdict(recipe),
                settings=wandb.Settings(console="off"),
            )
        except wandb.Error as error:
            raise JobError(
                f"run.wandb={recipe.run.wandb!r}: Weights & Biases says: {error}; run `wandb "
                "login`, set WANDB_MODE=offline, or leave run.wandb empty"
            ) from error

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Take name -> value of a step, from 1."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Write what is left."""
        self._run.finish()


def boards_of(recipe: Recipe, done: int) -> list[Board]:
    """Return those that a recipe asks for; the command has looked for their packages.

    Args:
        recipe: with ``run.tensorboard`` and ``run.wandb``.
        done: steps that are done already.

    Raises:
        JobError: one of them cannot be opened.
    """
    out, found = Path(recipe.run.out), []
    if recipe.run.tensorboard:
        found.append(TensorBoard(out / "tensorboard", done + 1))
    if recipe.run.wandb:
        found.append(WeightsAndBiases(recipe, out))
    return found


def _run_id(place: Path) -> str:
    """The name of a run there, the same when it goes on."""
    if not place.is_file():
        write_atomically(place, secrets.token_hex(8).encode(), "the name of the W&B run")
    return place.read_text()
