# SPDX-License-Identifier: Apache-2.0
"""The easy-VQA model as a subject: ``mimo train easy-vqa`` as a user types it, a smaller model.

Vision and language have the same TP, so packets are lost in both and on the bridge between them.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mimo_colocated.train.reading import read_recipe
from mimo_colocated.train.recipe import Recipe

_CHANGES = (
    "model.settings.width=64",
    "model.settings.layers=2",
    "model.settings.vision_width=64",
    "model.settings.vision_layers=2",
    "model.settings.patch=16",
    "training.global_batch_size=16",
    "training.warmup_steps=20",
    "training.save_every=0",
    "evaluation.without_images=false",
    "data.train.0.settings.images=1000",
    "data.held_out.0.settings.images=60",
    "run.export=false",
    "run.backend=gloo",
)


def changes(
    tp: int, world: int, steps: int, seed: int, lossy: Mapping[str, Any] | None, out: Path
) -> list[str]:
    """Return what is set in the recipe of a run.

    Args:
        tp: of both models.
        world: ranks.
        steps: of training.
        seed: of weights and data.
        lossy: fields of the recipe's ``lossy``; None: there are no links.
        out: folder of the run.
    """
    own = [
        f"training.steps={steps}",
        f"training.seed={seed}",
        f"model.settings.seed={seed}",
        f"layout.language=tp={tp},dp={world // tp}",
        f"layout.encoders.images=tp={tp},dp={world // tp}",
        f"run.out={out}",
    ]
    return [*_CHANGES, *own, *([] if lossy is None else [f"lossy={json.dumps(lossy)}"])]


def recipe(given: list[str]) -> Recipe:
    """Return the recipe with what is set in it."""
    return read_recipe("easy-vqa", given)


def train(given: list[str], out: Path) -> dict[str, Any]:
    """Run it, again from the beginning; return what its summary and its steps say.

    Raises:
        RuntimeError: it failed; the last line of what it said.
    """
    command = [sys.executable, "-W", "ignore", "-m", "mimo_colocated", "train", "easy-vqa"]
    command += ["--fresh", *_as_options(given)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise RuntimeError(f"exit code {done.returncode}: {last}")
    summary = json.loads((out / "summary.json").read_text())
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {**summary, "losses": [each["loss"] for each in steps]}


def _as_options(given: list[str]) -> Iterator[str]:
    for each in given:
        yield from ("--set", each)
