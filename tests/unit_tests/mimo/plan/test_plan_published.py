# SPDX-License-Identifier: Apache-2.0
"""Predicted against published steps, with controls that must be far off."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import pytest

from benchmarks import plan_check, published
from benchmarks.plan_check import compare, gains_within, mean_error, passes
from benchmarks.published import ROWS, fit, h100
from megatron.core.models.mimo.plan import encoder_parts, step_time
from megatron.core.models.mimo.plan.machine import PRESETS, REACHED
from mimo_colocated.launch.layouts import Layout

# Nothing of Megatron-Core is in them.
pytestmark = pytest.mark.once


def test_published_steps_are_predicted() -> None:
    """Mean error of time at most 5 %, gains within 6 points in three rows, with the preset."""
    compared = [compare(row, PRESETS["h100"]) for row in ROWS]
    assert passes(compared)
    assert mean_error(compared) < 0.02
    assert gains_within(compared) == len(ROWS)


def test_the_preset_is_what_is_fitted() -> None:
    fitted = fit(ROWS)
    assert plan_check.same_constants(fitted, REACHED)
    assert not plan_check.same_constants(replace(fitted, attention=0.35), REACHED)


def test_a_row_that_was_left_out_is_predicted() -> None:
    """Twice the bound for all rows: three rows tell of five constants with what is usual."""
    left_out = [
        compare(row, h100(fit([other for other in ROWS if other is not row]))) for row in ROWS
    ]
    assert mean_error(left_out) < 0.05
    assert gains_within(left_out) >= 3


def _encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a homogeneous step: CP ranks share out the items, as if nothing were repeated."""
    once = encoder_parts.items_per_replica

    def items(name: str, candidate: Any, *more: Any) -> float:
        found = once(name, candidate, *more)
        return found / candidate.language.cp if candidate.homogeneous else found

    monkeypatch.setattr(step_time, "items_per_replica", items)


def _free_collectives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_time, "tp_seconds", lambda *_: 0.0)


@pytest.mark.parametrize("mistake", [_encoded_once, _free_collectives])
def test_a_model_without_the_physics_fails_in_spite_of_a_fit_of_its_own(
    mistake: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    mistake(monkeypatch)
    machine = h100(fit(ROWS))
    assert not passes([compare(row, machine) for row in ROWS])


def test_one_virtual_stage_still_passes() -> None:
    """The paper does not say how many there are; the bounds do not hang on it."""
    compared = [compare(row, PRESETS["h100"], virtual=[1]) for row in ROWS]
    assert mean_error(compared) < 0.05
    assert gains_within(compared) == 3


def test_the_table_has_every_row_and_the_command_its_verdict(
    capsys: pytest.CaptureFixture[str], tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_check, "fit", lambda _rows: REACHED)
    out, further = tmp_path / "check.json", tmp_path / "further.json"
    large = {**asdict(ROWS[0]), "vision": "6B", "language": "70B", "share": 0.5}
    further.write_text(json.dumps([asdict(ROWS[1]), large]))
    assert plan_check.main(["--json", str(out), "--held-out", str(further)]) == 0
    text = capsys.readouterr().out
    assert all(str(row) in text for row in ROWS)
    assert "| 6B+70B, 16K, 50 %, 16 |" in text
    assert "of 2." in text
    assert text.endswith("PASS\n")
    assert '"left_out_gains_within"' in out.read_text()
    monkeypatch.setattr(plan_check, "MEAN_ERROR", 0.001)
    assert plan_check.main([]) == 1
    assert capsys.readouterr().out.endswith("FAIL\n")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, r"rows must be a list of mappings with \['colocated'"),
        ([{"language": "7B"}], "a row's fields must be .*, got {'language': '7B'}"),
        ([{**asdict(ROWS[0]), "vision": "9B"}], "vision must be one of .*'1B'.*, got '9B'"),
    ],
)
def test_wrong_rows(values: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        published.rows_from(values)


def test_rows_whose_microbatches_cannot_interleave() -> None:
    """One microbatch of two stages: there is one stage a rank, whatever is offered."""
    staged = replace(ROWS[3], microbatches=1, colocated="tp=4,cp=4,pp=2,dp=2")
    both = staged.estimates(PRESETS["h100"])
    assert [each.candidate.virtual_stages for each in both] == [1, 1]
    assert [each.candidate.virtual_stages for each in ROWS[3].estimates(PRESETS["h100"])] == [4, 1]


def test_colocated_layouts_span_the_same_ranks() -> None:
    for row in ROWS:
        sizes = {
            Layout.parse(text, "language").size
            for text in (row.homogeneous, row.encoder, row.colocated)
        }
        assert sizes == {row.ranks}, row
    assert published.USUAL != REACHED
