# SPDX-License-Identifier: Apache-2.0
"""Links that lose packets in a recipe's run; imported only where a recipe has rules for them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron.core.models.mimo.lossy.install import LossyLinks, lossy_links
from megatron.core.models.mimo.lossy.loss_models import (
    Bernoulli,
    GilbertElliott,
    LossModel,
    from_loss_and_burst,
    preset,
)
from megatron.core.models.mimo.lossy.reports import LinkSpeed, step_time
from megatron.core.models.mimo.lossy.spec import LinkRule, LossySpec
from megatron.core.models.mimo.lossy.statistics import sum_counts
from mimo_colocated.launch.errors import JobError, write_atomically
from mimo_colocated.train.recipe import LinkPart, LossyPart

# The field that tells a model from the others -> what makes it.
_MODELS = {"rate": Bernoulli, "p_gb": GilbertElliott, "burst": from_loss_and_burst}


def spec_of(part: LossyPart) -> LossySpec:
    """Return the spec that a recipe's rules mean.

    Raises:
        JobError: the first rule that is wrong, and why; or the speed.
    """
    rules = []
    for number, rule in enumerate(part.rules):
        try:
            rules.append(_rule(rule))
        except (TypeError, ValueError) as error:
            raise JobError(f"lossy.rules.{number}: {error}") from error
    speed_of(part)
    return LossySpec(tuple(rules), part.seed)


def speed_of(part: LossyPart) -> LinkSpeed:
    """Return the stated speed of the links.

    Raises:
        JobError: it is none.
    """
    try:
        return LinkSpeed(**dataclasses.asdict(part.speed))
    except ValueError as error:
        raise JobError(f"lossy.speed: {error}") from error


class SavedLinks:
    """Links of a run as its checkpoints hold them, and from which step on they count.

    Args:
        links: installed.
    """

    def __init__(self, links: LossyLinks) -> None:
        self.links, self.first_step = links, 0

    def start_anew(self, step: int) -> None:
        """Go on after ``step`` steps without what the links remembered: in another layout."""
        self.first_step = step

    def state_dict(self) -> dict[str, Any]:
        """Return this rank's state."""
        return {**self.links.state_dict(), "first_step": self.first_step}

    def load_state_dict(self, saved: Mapping[str, Any], /) -> None:
        """Go on from what ``state_dict`` returned."""
        self.links.load_state_dict(saved)
        self.first_step = saved["first_step"]


def install(part: LossyPart, model: Any) -> SavedLinks:
    """Make the links of a model lose packets; all ranks call it.

    Args:
        part: of the recipe.
        model: a MimoModel, wrapped.

    Raises:
        JobError: the same on all ranks: a rule is wrong or fits nothing.
    """
    try:
        return SavedLinks(lossy_links(model, spec_of(part)))
    except ValueError as error:
        raise JobError(f"lossy: {error}") from error


def sentence(links: LossyLinks, evaluation: str) -> str:
    """Return a line that says what loses packets."""
    count = len(links.places)
    if not count:
        return "lossy links: none on rank 0, which sends nothing over TP or a bridge"
    return f"lossy links: {count} places on rank 0, seed {links.spec.seed}; {evaluation} evaluation"


def write_counts(path: Path, saved: SavedLinks, steps: int, part: LossyPart) -> dict[str, Any]:
    """Write what was sent and lost, on rank 0; all ranks call it.

    Args:
        path: of the file: rows of all links.
        saved: the links.
        steps: of the run, all made.
        part: of the recipe.

    Returns:
        For the summary: sums by direction and collective, and the time of a step at the stated
        speed, of what was counted.

    Raises:
        JobError: it cannot be written.
    """
    rows, counted = saved.links.gathered_statistics(), steps - saved.first_step
    speed = speed_of(part)
    found = {
        "counted_steps": counted,
        "counts": sum_counts(rows, ("direction", "collective")),
        "speed": dataclasses.asdict(speed),
        "step_time": step_time(rows, counted, speed) if rows and counted else None,
    }
    if dist.get_rank() == 0:
        text = json.dumps({**found, "rows": rows}, indent=1) + "\n"
        write_atomically(path, text.encode(), "what the links lost")
    return found


def _rule(part: LinkPart) -> LinkRule:
    lists = {name: tuple(getattr(part, name)) for name in ("directions", "collectives")}
    return LinkRule(**{**dataclasses.asdict(part), **lists, "loss": _loss(part.loss)})


def _loss(values: str | Mapping[str, Any]) -> LossModel:
    """A preset, or the model whose telling field is there.

    Raises:
        ValueError: no or several such fields; a field that the model has not, or is no number.
    """
    if isinstance(values, str):
        return preset(values)
    told = [name for name in _MODELS if name in values]
    if len(told) != 1:
        raise ValueError(
            f"loss={dict(values)} must be a preset's name, or have one of {', '.join(_MODELS)} "
            f"({', '.join(_forms())})"
        )
    try:
        return _MODELS[told[0]](**values)
    except TypeError as error:
        raise ValueError(f"loss={dict(values)}: {str(error).rpartition('() ')[2]}") from error


def _forms() -> Iterator[str]:
    yield "{rate: 0.01}"
    yield "{p_gb: 0.05, p_bg: 0.45}"
    yield "{loss: 0.1, burst: 4}"
