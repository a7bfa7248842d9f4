# SPDX-License-Identifier: Apache-2.0
"""Checks of a language model in pipeline stages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch.distributed as dist
from torch import nn

from megatron.core.models.mimo.comm.plan_guard import words_of
from megatron.core.models.mimo.config.role import MIMO_LANGUAGE_MODULE_KEY, ModuleLayout
from megatron.core.models.mimo.model.language_groups import known_size
from megatron.core.models.mimo.model.row_path import RowPath
from megatron.core.utils import unwrap_model

VIRTUAL_SIZE = "virtual_pipeline_model_parallel_size"


def refuse_stages(role: Any) -> NoReturn:
    """Refuse to run ``forward`` on a rank that has some of the language model's stages only.

    Raises:
        ValueError: always.
    """
    raise ValueError(
        "forward runs a whole language model, this rank has some pipeline stages of it "
        f"(it is {_stage_words(role)}); run steps with "
        "megatron.core.models.mimo.training.pipeline_step.forward_backward_pipelined"
    )


def check_stages(role: Any, config: Any, stages: Sequence[nn.Module]) -> None:
    """Refuse stages other than those that the grid puts here.

    Args:
        role: of the rank.
        config: the language model's.
        stages: those that were built, in order.

    Raises:
        ValueError: one embeds or has a head where it must not, or the other way round; or
            their number is not the config's.
    """
    if getattr(role, "mode", None) is not ModuleLayout.COLOCATED:
        return
    stage = role.modules[MIMO_LANGUAGE_MODULE_KEY]
    virtual = known_size(getattr(config, VIRTUAL_SIZE, None)) or 1
    if len(stages) != virtual:
        raise ValueError(
            f"The language config has virtual_pipeline_model_parallel_size {virtual}, but "
            f"{len(stages)} stages are given (language_model_spec and virtual_stage_specs); "
            "give one spec per virtual stage"
        )
    for number, each in enumerate(map(unwrap_model, stages)):
        wanted = {
            "pre_process": stage.is_first_stage and number == 0,
            "post_process": stage.is_last_stage and number == virtual - 1,
        }
        for flag, value in wanted.items():
            found = getattr(each, flag, value)
            if isinstance(found, bool) and found != value:
                raise ValueError(
                    f"The language model's virtual stage {number} was built with "
                    f"{flag}={found}, but by its grid this rank is {_stage_words(role)}; "
                    f"build it with {flag}={value}"
                )


def check_problems(path: RowPath, problem: str | None, count: int) -> None:
    """Raise what any rank has to say against encoding so many microbatches.

    Args:
        path: the ranks that exchange rows over it hear each other.
        problem: this rank's.
        count: of the microbatches.

    Raises:
        ValueError: on every rank of an exchange group (over gather bridges: of a coarser
            replica) that has one with a problem in it.
    """
    problems = {} if problem is None else {dist.get_rank(): problem}
    # Groups differ between modalities: what was heard in one is told in the next.
    problems = path.exchange_problems(problems, count)
    if problems:
        raise ValueError(f"Nothing was encoded. {words_of(problems)}")


def _stage_words(role: Any) -> str:
    stage = role.modules[MIMO_LANGUAGE_MODULE_KEY]
    names = [
        name
        for name, holds in (("first", stage.is_first_stage), ("last", stage.is_last_stage))
        if holds
    ]
    return f"on the {' and '.join(names)} stage" if names else "on a stage in the middle"
