# SPDX-License-Identifier: Apache-2.0
"""Cells, intervals and pages of the study of lossy links; nothing is trained."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from campaigns.command import main
from mimo_colocated.cli.main import main as mimo
from mimo_colocated.train.lossy import spec_of as spec_of_recipe
from studies.lossy import campaign as module
from studies.lossy import easy_vqa, work
from studies.lossy.campaign import END, START, LossyStudy
from studies.lossy.grid import EASY_VQA, GPT2, NOWHERE, RESENT, SETS, Cell, cells
from studies.lossy.results import interval, same_as_lossless, settings, table

pytestmark = pytest.mark.once


@pytest.mark.parametrize("name", SETS)
def test_sets_have_what_they_are_compared_with(name: str) -> None:
    found = cells(name)
    assert len({str(cell) for cell in found}) == len(found)
    plain = {(c.subject, c.tp, c.steps, c.seed) for c in found if c.where == NOWHERE}
    assert {(c.subject, c.tp, c.steps, c.seed) for c in found} == plain
    by = {cell.setting for cell in found if cell.replacement != RESENT}
    assert len([c for c in found if c.replacement != RESENT]) == 3 * len(by)
    for cell in found:
        assert (work.spec_of(cell) is None) == (cell.where == NOWHERE)
        if cell.where != NOWHERE:
            assert work.model_of(cell).mean_loss == pytest.approx(cell.rate)


def test_the_shipped_set_covers_the_grid() -> None:
    found = {cell for cell in cells("shipped") if cell.subject == GPT2}
    assert {cell.tp for cell in found} == {2, 4, 8}
    assert {cell.where for cell in found} == {NOWHERE, "forward", "backward", "gradients"}
    assert {cell.replacement for cell in found} == {"zero", "stale", "rescaled", RESENT}
    assert {cell.burst for cell in found} == {1, 4, 16}
    assert set(cells("tiny")).isdisjoint(cells("small"))  # other lengths


def test_the_recipe_of_a_cell_has_the_links_of_the_cell(tmp_path: Path) -> None:
    for cell in cells("shipped"):
        if cell.subject == EASY_VQA:
            given = easy_vqa.changes(2, 8, 50, cell.seed, work.recipe_links(cell), tmp_path)
            recipe = easy_vqa.recipe(given)
            assert str(recipe.language) == "tp=2,dp=4"
            if cell.where == NOWHERE:
                assert not recipe.lossy.rules
            else:
                assert spec_of_recipe(recipe.lossy) == work.spec_of(cell)


def test_intervals_are_students() -> None:
    found = interval([0.8, 0.9, 1.0])
    assert found.mean == pytest.approx(0.9)
    assert found.half == pytest.approx(4.303 * 0.1 / 3**0.5)
    assert interval([0.5]).half is None


def result(accuracy: float, lost: bool, losses: list[float]) -> dict[str, Any]:
    counts = {"packets": 100, "lost": 10} if lost else None
    times = dict.fromkeys(("send_s", "resend_s", "wait_s"), 1e-3) | {"total_s": 3e-3, "rank": 0}
    return {
        "passed": True,
        "accuracy": accuracy,
        "accuracy_lossy": accuracy - 0.1,
        "held_out_loss": 1.0,
        "curve": {"20": accuracy / 2, "40": accuracy},
        "losses": losses,
        "counts": counts,
        "step_time": times if lost else None,
        "seconds": 2.0,
    }


def results(cell: Cell) -> dict[str, Any]:
    lossy = cell.where != NOWHERE
    accuracy = (0.8 if lossy and cell.replacement != RESENT else 0.9) + 0.01 * cell.seed
    return result(accuracy, lossy, [2.0, 1.0 + accuracy])


def test_changes_are_taken_seed_by_seed() -> None:
    every = {cell: results(cell) for cell in cells("tiny")}
    found = settings(every)
    assert found[0].change is None
    lossy = next(each for each in found if each.cell.where == "forward")
    # All seeds change alike, so the interval of the change is nothing, that of the accuracy not.
    assert (lossy.change.mean, lossy.change.half) == (pytest.approx(-0.1), pytest.approx(0.0))
    assert lossy.accuracy.half > 0.01
    assert lossy.lost == 0.1
    # 90 % of 0.91 is reached by 0.82 alone.
    assert lossy.to_target == [None, None, 40]
    assert found[0].to_target == [40, 40, 40]
    assert "| gpt2 | 2 | forward | 10% | each by itself | zero | 3 | 0.810" in table(found)
    resent = [cell for cell in every if cell.replacement == RESENT]
    assert [same_as_lossless(cell, every) for cell in resent] == [True, True]
    every[resent[0]] = result(0.9, True, [2.0, 1.0])
    assert same_as_lossless(resent[0], every) is False


def fake_launch(runs: list[str], wrong: str = "") -> Any:
    def start(_world: int, tasks: list[str], _work: str, plan: Any, *_: Any, **how: Any) -> Any:
        assert how["backend"] == "gloo"
        for task in tasks:
            runs.append(task)
            yield "started", task, {}
            found = results(Cell(**plan[task]))
            yield "finished", task, {**found, "losses": [5.0]} if task == wrong else found

    return start


def test_a_study_goes_on_and_writes_its_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page, runs = tmp_path / "lossy.md", []
    page.write_text(f"before\n{START}\nold\n{END}\nafter\n")
    study = LossyStudy(fake_launch(runs), page)
    given = ["--set", "tiny", "--out", str(tmp_path / "out"), "--docs"]
    assert main(study, given) == 0
    assert len(runs) == len(cells("tiny"))
    assert main(LossyStudy(fake_launch(runs), page), given) == 0
    assert len(runs) == len(cells("tiny"))  # all were kept
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert f"Set `tiny`: {len(runs)} runs on 8 gloo ranks" in text
    assert "old" not in text
    found = json.loads((tmp_path / "lossy_study.json").read_text())
    assert len(found["settings"]) == len(settings({c: results(c) for c in cells("tiny")}))
    for name in ("lossy_accuracy.png", "lossy_curves.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert "left]" in capsys.readouterr().out


def test_a_run_that_sends_again_must_train_as_without_loss(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = next(str(cell) for cell in cells("tiny") if cell.replacement == RESENT)
    study = LossyStudy(fake_launch([], wrong), tmp_path / "lossy.md")
    assert main(study, ["--set", "tiny", "--out", str(tmp_path)]) == 1
    assert "FAIL: " in capsys.readouterr().out


def test_what_cannot_be_done_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert mimo(["study"]) == 2
    assert "mimo study needs the name of a study, got none; there is lossy" in (
        capsys.readouterr().err
    )
    assert mimo(["study", "lossy", "--set", "huge"]) == 2
    assert "--set: invalid choice: 'huge'" in capsys.readouterr().err
    assert mimo(["study", "lossy", "--set", "tiny", "--list"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(cells("tiny"))

    def none(*_: Any, **__: Any) -> Iterator:
        return iter(())

    monkeypatch.setattr(module, "run_tasks", none)
    given = ["--set", "tiny", "--out", str(tmp_path), "--docs"]
    assert main(LossyStudy(page=tmp_path / "lossy.md"), given) == 2
    assert "17 of 17 runs have no result yet, and --docs writes whole" in capsys.readouterr().err
