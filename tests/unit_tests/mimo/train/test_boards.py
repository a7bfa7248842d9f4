# SPDX-License-Identifier: Apache-2.0
"""What is logged to Weights & Biases, by a stand-in of its package."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mimo_colocated.launch.errors import JobError
from mimo_colocated.train.boards import boards_of
from mimo_colocated.train.recipe import DataPart, ModelPart, Recipe, RunPart, TrainingPart

pytestmark = pytest.mark.once


class Logged:
    """A run of the stand-in."""

    def __init__(self, kept: list[Any]) -> None:
        self._kept = kept

    def log(self, values: dict[str, float], *, step: int) -> None:
        self._kept.append((step, values))

    def finish(self) -> None:
        self._kept.append("finished")


class StandIn(SimpleNamespace):
    """What we call of the package; keeps what it is told, by run."""

    class Error(Exception):
        """As theirs."""

    def __init__(self, *, logged_in: bool = True) -> None:
        super().__init__(Settings=lambda **settings: settings, runs={}, begun=[])
        self._logged_in = logged_in

    def init(
        self, *, project: str, name: str, id: str, resume: str, dir: str, config: dict[str, Any],
        settings: dict[str, Any],
    ) -> Any:  # fmt: skip
        if not self._logged_in:
            raise self.Error("api_key not configured (no-tty)")
        assert resume == "allow"
        assert settings == {"console": "off"}
        assert Path(dir).is_dir()
        self.begun.append((project, name, id, config["training"]["steps"]))
        return Logged(self.runs.setdefault(id, []))


def recipe_of(out: Path, **run: Any) -> Recipe:
    return Recipe(
        "mine", ModelPart("a"), DataPart([]), TrainingPart(7, 1), RunPart(str(out), **run)
    )


def test_a_run_that_goes_on_is_the_same_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = StandIn()
    monkeypatch.setitem(sys.modules, "wandb", package)
    for first in (1, 2):
        (board,) = boards_of(recipe_of(tmp_path, wandb="ours"), first - 1)
        board.write(first, {"loss": 0.5, "times/encoder": 1.5})
        board.close()
    ((name, kept),) = package.runs.items()
    assert package.begun == [("ours", "mine", name, 7)] * 2
    values = {"loss": 0.5, "times/encoder": 1.5}
    assert kept == [(1, values), "finished", (2, values), "finished"]
    assert (tmp_path / "wandb" / "run_id").read_text() == name
    # Another folder is another run.
    boards_of(recipe_of(tmp_path / "other", wandb="ours"), 0)
    assert len(package.runs) == 2


def test_steps_that_are_made_again_are_in_tensorboard_once(tmp_path: Path) -> None:
    """A run that ended after step 3 goes on from the checkpoint of step 1."""
    for done, last in ((0, 3), (1, 2)):
        (board,) = boards_of(recipe_of(tmp_path, tensorboard=True), done)
        for step in range(done + 1, last + 1):
            board.write(step, {"loss": done + step / 10})
        board.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    found = [(each.step, round(each.value, 3)) for each in events.Scalars("loss")]
    assert found == [(1, 0.1), (2, 1.2)]


def test_what_it_refuses_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", StandIn(logged_in=False))
    said = r"run\.wandb='ours': .* api_key not configured \(no-tty\); run `wandb login`, set WANDB"
    with pytest.raises(JobError, match=said):
        boards_of(recipe_of(tmp_path, wandb="ours"), 0)


def test_no_board_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert boards_of(recipe_of(tmp_path), 0) == []
    assert list(tmp_path.iterdir()) == []
