# SPDX-License-Identifier: Apache-2.0
"""Models that a recipe makes are made once, by one rank, with the settings that the recipe has."""

from __future__ import annotations

import json
import multiprocessing
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from megatron.core.models.mimo.checkpoint.manifest import Manifest
from mimo_colocated.launch.errors import JobError
from mimo_colocated.train import makers
from mimo_colocated.train.makers import make_model
from mimo_colocated.train.recipe import DataPart, ModelPart, Recipe, RunPart, TrainingPart

pytestmark = pytest.mark.once

DRAWN = "drawn"
TINY = {"width": 8, "layers": 1, "heads": 1, "inner": 8, "vocabulary": 8}


def test_models_that_nobody_makes_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On every rank alike, before one makes it and the others wait."""
    for rank in (None, "0", "1"):
        if rank:
            monkeypatch.setenv("RANK", rank)
        with pytest.raises(JobError, match=r"model\.make='gpt' is not known; known are easy-vqa"):
            make_model("gpt", {}, tmp_path / "model")
        with pytest.raises(JobError, match=r"settings\.depth is not known; .*easy-vqa takes"):
            make_model("easy-vqa", {"depth": 3}, tmp_path / "model")
        said = "model.settings of llava are image_token, images, language, got images"
        with pytest.raises(JobError, match=said):
            make_model("llava", {"images": "a"}, tmp_path / "model")
        with pytest.raises(JobError, match=r"model\.settings\.depth is not known; .*text takes w"):
            make_model("text", {"depth": 3}, tmp_path / "model")
        if rank:
            folders = dict.fromkeys(("images", "language", "image_token"), "a")
            with pytest.raises(JobError, match="folders are joined before ranks start: run the"):
                make_model("llava", folders, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.delenv("RANK")
    (tmp_path / "file").write_text("")
    with pytest.raises(JobError, match=r"cannot be written to .*file/model"):
        make_model("easy-vqa", {}, tmp_path / "file" / "model")


@pytest.mark.parametrize(
    ("manifest", "said"),
    [
        ("{", r"checkpoint .*step_00000004 cannot be read \(.*; remove that folder to use an ear"),
        ({}, r"model\.from_run=.*: its checkpoint does not say which Hugging Face folder its"),
        (
            {"huggingface": {"source": "/gone"}},
            r"model\.from_run: the model of .* came from /gone, which is not there; put it back",
        ),
        (
            {"huggingface": {"source": "/gone", "torch_native": ["images"]}},
            r"was trained with model\.torch_native=\['images'\], this recipe has \[\], whose",
        ),
    ],
)
def test_a_run_that_no_model_can_be_taken_from_is_one_sentence(
    manifest: Any, said: str, tmp_path: Path
) -> None:
    """Before ranks start."""
    step = tmp_path / "first" / "checkpoints" / "step_00000004"
    step.mkdir(parents=True)
    if not isinstance(manifest, str):
        manifest = json.dumps(Manifest(4, {}, 1, {}, manifest).__dict__)
    (step / "mimo.json").write_text(manifest)
    begins = ModelPart(from_run=str(tmp_path / "first"))
    run = RunPart(str(tmp_path / "run"))
    recipe = Recipe("mine", begins, DataPart([]), TrainingPart(1, 1), run)
    with pytest.raises(JobError, match=said):
        makers.model_folder(recipe)


def test_a_model_that_is_there_is_not_made_again(tmp_path: Path) -> None:
    folder = make_model("text", TINY, tmp_path / "model")
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert make_model("text", {**TINY, "seed": 0}, folder) == folder  # what it has by default
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("text", {**TINY, "seed": 1}, "has model.settings.seed=0, this recipe has 1; use another"),
        ("text", {**TINY, "width": 16}, r"width=8, this recipe has 16; use another run\.out"),
        ("text", {}, r"width=8, this recipe has 1024; use another run\.out, or move it away"),
        ("easy-vqa", {}, "has model.make=text, this recipe has easy-vqa; use another run.out"),
        ("text", {"depth": 3}, r"model\.settings\.depth is not known; .*text takes width"),
        ("text", {"layer": 3}, r"settings\.layer is not known; did you mean layers\? text takes"),
        ("text", {"experts": 4, "chosen": 1}, r"settings\.chosen=1; .* choose at least 2"),
    ],
)
def test_a_model_of_other_settings_is_not_taken_for_the_recipes(
    name: str, settings: dict[str, Any], said: str, tmp_path: Path
) -> None:
    made = {"make": "text", "settings": TINY}
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "made.json").write_text(json.dumps(made))
    with pytest.raises(JobError, match=said):
        make_model(name, settings, tmp_path)


@pytest.mark.parametrize("text", [None, "{", "5", "{}"])
def test_a_model_that_does_not_say_how_it_was_made(text: str | None, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    if text is not None:
        (tmp_path / "made.json").write_text(text)
    with pytest.raises(JobError, match="holds a model that does not say how it was made; move it"):
        make_model("text", TINY, tmp_path)


def _make(rank: int | None, folder: Path, drawn: Any, told: Any) -> None:
    """One process of a job under torchrun, whose model takes a while."""

    def draw(_settings: Mapping[str, Any], place: Path) -> None:
        drawn.release()
        time.sleep(0.3)
        (place / "config.json").write_text("{}")

    patched = pytest.MonkeyPatch()
    patched.setitem(makers.MAKERS, "text", draw)
    if rank is not None:
        patched.setenv("RANK", str(rank))
    try:
        told.put(str(make_model("text", TINY, folder)))
    except JobError as error:
        told.put(str(error))


@pytest.mark.parametrize(
    ("ranks", "most"), [((1, 0, 2), 1), ((None, None), 2)], ids=["ranks", "two commands"]
)
def test_processes_that_begin_together_all_have_the_model(
    ranks: tuple[int | None, ...], most: int, tmp_path: Path
) -> None:
    """Rank 0 draws it, the others wait; of two commands one may draw in vain."""
    context = multiprocessing.get_context("fork")
    drawn, told = context.Semaphore(0), context.SimpleQueue()
    folder = tmp_path / "model"
    processes = [context.Process(target=_make, args=(r, folder, drawn, told)) for r in ranks]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    assert [told.get() for _ in ranks] == [str(folder)] * len(ranks)
    assert 1 <= drawn.get_value() <= most
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_rank_does_not_wait_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    said = r"rank 3 sees no model in .*model after 0\.1 s; rank 0 makes it, in a folder that all"
    with pytest.raises(JobError, match=said):
        make_model("text", TINY, tmp_path / "model", wait_s=0.1)
