# SPDX-License-Identifier: Apache-2.0
"""Decisions of a training job: what may change, what is one error on all ranks, when it gives up.

One process; ranks, where there are several, take turns.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from examples.mimo.digits.job import DigitsLoop
from examples.mimo.digits.options import Options
from megatron.core.models.mimo.job import loop
from megatron.core.models.mimo.job.loop import TrainingLoop
from megatron.core.models.mimo.job.settings import language_settings
from megatron.core.models.mimo.job.trainer import StepResult, Trainer
from mimo_colocated.launch.errors import JobError
from mimo_colocated.launch.layouts import Layout

pytestmark = pytest.mark.once

# What a run may be resumed with: where it runs, how fast, what is said and kept of it.
MAY_CHANGE = {
    *("language", "vision", "nproc", "backend", "timeout", "sequence_parallel", "bridge"),
    *("encode_ahead", "encode_in_bubbles", "virtual_stages"),
    *("distributed_optimizer", "overlap_grad_reduce"),
    *("overlap_param_gather", "recompute", "encoder_memory", "projector_memory", "memory_plan"),
    *("eval_batch_size", "evaluate", "clip_grad", "max_skipped", "packed", "experts", "freeze"),
    *("out", "save_every", "background_saves", "checkpoint_digests", "fresh"),
}


def started(options: Options) -> Any:
    made = object.__new__(DigitsLoop)
    made.options = options
    return made


# Sounds may not come or go, their layout may change: test_digits_two_encoders.py.
NAMES = sorted({field.name for field in dataclasses.fields(Options)} - {"audio"})


@pytest.mark.parametrize("name", NAMES)
def test_what_a_resumed_run_may_change(name: str) -> None:
    """Every option, new ones too, is on one side or the other."""
    now = Options()
    before = {**now.as_dict(), name: "another"}
    if name in MAY_CHANGE:
        started(now).check_options(before, now.as_dict())
        return
    flag = name.replace("_", "-")
    said = f"holds a run with --{flag} another, this one has .*; give --{flag} another to resume it"
    with pytest.raises(JobError, match=said):
        started(now).check_options(before, now.as_dict())


@pytest.mark.parametrize("extra", [{}, {"options": {"seed": Options().seed}}])
def test_a_run_that_knew_fewer_options_had_their_defaults(extra: dict[str, Any]) -> None:
    made, manifest = started(Options()), SimpleNamespace(step=3, extra=extra)
    made.rank, made._load = 1, lambda _manifest: None
    made.store = SimpleNamespace(steps=lambda: [3], manifest=lambda _step: manifest)
    assert made.start() == 3
    made.options = dataclasses.replace(Options(), steps=Options().steps + 1)
    with pytest.raises(JobError, match="holds a run with --steps "):
        made.start()


@pytest.mark.parametrize("full", [False, True], ids=["moved", "full"])
def test_results_that_cannot_be_set_aside_are_one_error_on_all_ranks(
    full: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0 says it to the others before it raises."""
    told: list[Any] = []

    def move(_out: Path, _names: Any, _say: Any) -> None:
        if full:
            raise OSError(28, "No space left on device")

    def broadcast(objects: list[Any], src: int) -> None:
        assert src == 0
        if told:
            objects[:] = told[0]
        else:
            told.append(list(objects))

    monkeypatch.setattr(loop, "_move_results", move)
    monkeypatch.setattr(dist, "broadcast_object_list", broadcast)
    said = []
    for rank in range(3):
        made = object.__new__(TrainingLoop)
        made.options, made.rank = SimpleNamespace(out="runs/x"), rank
        try:
            made._set_aside()
        except JobError as error:
            said.append(str(error))
    assert len(told) == 1
    assert len(set(said)) == full
    assert len(said) == 3 * full
    assert all("earlier results in runs/x cannot be moved: " in each for each in said)


@pytest.mark.parametrize("most", [1, 2, 3])
def test_a_run_stops_after_as_many_skipped_steps_in_a_row_as_said(most: int) -> None:
    """A step that counts begins anew, and so does one that looked for a loss scale."""
    made = object.__new__(TrainingLoop)
    made.options = SimpleNamespace(max_skipped=most, lr=1e-3)
    made.store, made._skipped_in_a_row = SimpleNamespace(wait=lambda: None), 0
    done, failed = StepResult(1.0, 1.0, 1, 1e-3, True), StepResult(1.0, 1.0, 1, 1e-3, False, "why")
    looked = dataclasses.replace(failed, scaling=True)
    for end in (done, looked):
        for _ in range(most - 1):
            made._stop_if_stuck(5, failed)
        made._stop_if_stuck(5, end)
    for _ in range(most - 1):
        made._stop_if_stuck(5, failed)
    with pytest.raises(JobError, match=f"the last of {most} in a row: why"):
        made._stop_if_stuck(5, failed)


@pytest.mark.parametrize("experts", [1, 2, 3, 8])
def test_a_token_goes_to_two_experts_where_there_are_two(experts: int) -> None:
    options = Options(experts=experts, language=Layout(dp=8))
    assert language_settings(options)["moe_router_topk"] == (1 if experts == 1 else 2)


# ---- steps that were skipped -----------------------------------------------------------------


def explained(
    monkeypatch: pytest.MonkeyPatch, loss: float, others: float = 0.0, **settings: Any
) -> tuple[StepResult, int]:
    """What a rank says of a skipped step, and how often it looked for outputs with the others."""
    trainer: Any = object.__new__(Trainer)
    options = {"scale": 2.0, "fp16": True, **settings}
    looked: list[None] = []
    trainer.device = torch.device("cpu")
    trainer.optimizer = SimpleNamespace(
        nonfinite_modules=(),
        config=SimpleNamespace(min_loss_scale=1.0, fp16=options["fp16"]),
        get_loss_scale=lambda: torch.tensor(options["scale"]),
    )
    trainer._nonfinite_outputs = lambda *_: looked.append(None) or {"language": (0, 1)}
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: tensor.add_(others))
    return trainer._explain(StepResult(loss, 1.0, 1, 1e-3, False), None, 0), len(looked)


@pytest.mark.parametrize(
    ("given", "scaling"),
    [
        ({"loss": 1.0, "scale": 1.5}, True),
        # There is no smaller one to look for.
        ({"loss": 1.0, "scale": 1.0}, False),
        ({"loss": 1.0, "scale": 0.5}, False),
        ({"loss": float("nan"), "scale": 2.0}, False),
        ({"loss": 1.0, "scale": 2.0, "fp16": False}, False),
    ],
    ids=str,
)
def test_when_a_smaller_loss_scale_may_mend_it(
    given: dict[str, Any], scaling: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, looked = explained(monkeypatch, **given)
    assert found.scaling is scaling
    assert looked == np.isnan(given["loss"])


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), 0.0], ids=str)
def test_ranks_with_a_loss_that_is_finite_look_with_those_that_have_none(
    broken: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each TP rank computes its own; the second forward pass has collectives of all."""
    found, looked = explained(monkeypatch, 1.0, broken)
    assert looked == (broken != 0.0)
    assert ("the loss is not finite" in found.problem) == (broken != 0.0)
    assert np.isfinite(found.loss) == (broken == 0.0)
    assert found.scaling == (broken == 0.0)
