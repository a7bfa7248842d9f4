# SPDX-License-Identifier: Apache-2.0
"""``mimo plan`` and ``mimo draw``, as a user types them, in this process."""

from __future__ import annotations

import json
import logging
import re
import sys
import warnings
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron.core.models.mimo.plan import estimates
from megatron.core.models.mimo.plan.machine import PRESETS, to_json
from mimo_colocated.cli import drawing, planned_recipe, planning
from mimo_colocated.cli.main import main
from mimo_colocated.launch.errors import JobError
from mimo_colocated.launch.layouts import Layout
from mimo_colocated.train.plan import check_model
from mimo_colocated.train.reading import read_recipe
from tests.unit_tests.mimo.huggingface import llava_models, qwen_vl_models, sounds
from tests.unit_tests.mimo.plan.plan_cases import SHAPES

# Nothing of Megatron-Core is in them.
pytestmark = pytest.mark.once


@pytest.fixture(autouse=True)
def _as_loud_as_before() -> Iterator[None]:
    """A command silences the libraries' notes in its process, which is this one."""
    loggers = [logging.getLogger(name) for name in ("megatron", "torch.utils.cpp_extension")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file of shapes; JSON is YAML."""
    path = tmp_path_factory.mktemp("shapes") / "model.yaml"
    encoders = {name: asdict(each) for name, each in SHAPES.encoders.items()}
    path.write_text(json.dumps({"language": asdict(SHAPES.language), "encoders": encoders}))
    return str(path)


LONG = ["--gpus", "32", "--seq", "65536", "--vision-share", "0.75", "--global-batch", "4"]


def test_the_table(
    shapes: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, picture = tmp_path / "plan.json", tmp_path / "plan.svg"
    files = ["--json", str(out), "--picture", str(picture)]
    assert main(["plan", shapes, *LONG, "--top", "3", *files]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:3] == ["ms", "encoder", "language"]
    times = [int(line.split()[0]) for line in lines[1:4]]
    assert times == sorted(times)
    assert "homogeneous: --language" in lines[4]
    assert re.search(r"\+\d+\.\d % against the best homogeneous layout; \d+ ways fit", lines[6])
    assert lines[8] == "memory of the fullest rank, row by row, GB:"
    assert "margin of 5 %" in lines[9]
    memory = [line.split() for line in lines[10:]]
    assert [float(row[10]) for row in memory] == [float(line.split()[10]) for line in lines[1:5]]
    assert all(sum(map(float, row[:10])) == pytest.approx(float(row[10]), 0.02) for row in memory)
    found = json.loads(out.read_text())
    first, fourth = (found["colocated"][n] for n in (0, 3))
    assert str(round(first["bridge_moved"] / 1e6)) == lines[1].split()[11]
    assert first["encoder_spread"] == 1.0
    assert "bridge_moved" not in fourth
    assert found["colocated"][0]["layout"] in lines[1]
    assert found["machine"]["name"] == "h100"
    total = found["colocated"][0]["seconds"]["total"]
    assert found["gain"] == pytest.approx(
        found["homogeneous"][0]["seconds"]["total"] / total - 1
    )
    assert picture.read_text().startswith("<?xml")


def test_a_bridge_that_is_asked_for(shapes: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Planned with, named in the row, and moving more."""
    moved = {}
    for bridge in ("routed", "gather"):
        given = ["--gpus", "8", "--global-batch", "8", "--top", "60", "--bridge", bridge]
        assert main(["plan", shapes, *given]) == 0
        rows = capsys.readouterr().out.partition("\n\n")[0].splitlines()[1:-1]
        assert all(("--bridge gather" in row) == (bridge == "gather") for row in rows)
        pair = "--vision tp=1,dp=8 --language tp=1,cp=4,dp=2"
        moved[bridge] = next(int(row.split()[11]) for row in rows if pair in row)
    assert moved["gather"] > moved["routed"] > 0


def test_small_models_are_told_in_smaller_units(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = {"layers": 2, "hidden": 64, "ffn": 128, "heads": 8, "groups": 8, "head": 8}
    content = {"language": {"stack": small, "vocab": 512}, "encoders": {}}
    (tmp_path / "small.json").write_text(json.dumps(content))
    assert main(["plan", str(tmp_path / "small.json"), "--seq", "64", "--top", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[0] == "us"
    assert all(int(line.split()[0]) > 0 for line in lines[1:3])


def why(shapes: str, layouts: str, capsys: pytest.CaptureFixture[str], *more: str) -> str:
    assert main(["plan", shapes, *LONG, "--why", layouts, *more]) == 0
    return capsys.readouterr().out


def test_why(shapes: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = why(shapes, "tp=4,cp=8,dp=1", capsys)
    assert re.search(r"% more than the first choice, .*\n  encoder: \d+ ms, \+\d+ ms", said)
    said = why(shapes, "tp=1,dp=32/tp=2,cp=8,dp=2", capsys, "--replica-samples", "1")
    assert "--language tp=2,cp=8,dp=2 --micro-batches 2 takes" in said
    said = why(shapes, "tp=1,dp=32/tp=2,cp=2,dp=8", capsys)
    assert "cannot run: 4 samples do not divide over language dp=8" in said
    small = tmp_path / "small.json"
    small.write_text(to_json(replace(PRESETS["h100"], memory=30e9)))
    said = why(shapes, "tp=1,dp=32/tp=1,cp=32,dp=1", capsys, "--gpu", str(small))
    assert re.search(r"does not fit, whatever .* needs \d+\.\d GB of 30\.0 GB \(gradients", said)


def test_nothing_fits(shapes: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = tmp_path / "small.json"
    small.write_text(to_json(replace(PRESETS["h100"], memory=1e9)))
    picture = ["--picture", str(tmp_path / "none.png")]
    assert main(["plan", shapes, "--gpu", str(small), *picture]) == 2
    said = capsys.readouterr()
    assert re.search(r"nothing fits: the smallest, .* of 1.0 GB", said.out)
    assert "nothing to draw" in said.err


def test_only_homogeneous_layouts_fit(
    shapes: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Then something fits, whatever is smallest of what does not."""
    whole = estimates.plan
    for rejected in (True, False):

        def without_pairs(*given: Any, rejected: bool = rejected) -> estimates.Plan:
            found = whole(*given)
            return estimates.Plan([], found.homogeneous, found.colocated if rejected else [])

        monkeypatch.setattr(estimates, "plan", without_pairs)
        assert main(["plan", shapes, *LONG]) == 0
        said = capsys.readouterr().out
        assert re.search(r"only homogeneous layouts fit; \d+ ways fit, \d+ do not; --why", said)
        assert "nothing fits" not in said


def test_why_the_first_choice_and_what_cannot_run(
    shapes: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "plan.json"
    assert main(["plan", shapes, *LONG, "--json", str(out)]) == 0
    capsys.readouterr()
    best = json.loads(out.read_text())["colocated"][0]
    layouts = "/".join(re.findall(r"--(?:vision|language) (\S+)", best["layout"]))
    assert "; nothing that was tried is faster" in why(shapes, layouts, capsys)
    # Of so many ranks nothing can run, which is no reason not to say why this pair cannot.
    assert main(["plan", shapes, "--gpus", "7", "--why", "tp=7"]) == 0
    assert "cannot run: language tp=7 does not divide its" in capsys.readouterr().out


def test_folders_and_their_encoders(tmp_path: Path) -> None:
    for model, encoder in (
        (llava_models.llava("clip-llama"), "vision"),
        (qwen_vl_models.qwen2_5_vl(), "vision"),
        (sounds.qwen2_audio(), "audio"),
    ):
        model.config.save_pretrained(tmp_path)
        assert list(planning.read_shapes(tmp_path, item_tokens=64).encoders) == [encoder]


def test_frozen_modules_take_less_memory(
    shapes: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "plan.json"
    frozen = ["--frozen", "language+vision"]
    assert main(["plan", shapes, "--gpus", "8", "--json", str(out), *frozen]) == 0
    found = json.loads(out.read_text())
    assert found["colocated"][0]["bytes"]["optimizer"] == 0
    last = capsys.readouterr().out.splitlines()[-1].split()
    assert last[1:3] == ["0.0", "0.0"]  # gradients, optimizer


def test_a_recipe_is_planned_and_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its model, batch, length, dtype and frozen parts count; nothing else of it changes."""
    folder, mine, planned = tmp_path / "model", tmp_path / "mine.yaml", tmp_path / "planned.yaml"
    llava_models.llava("clip-llama").config.save_pretrained(folder)
    values = {
        "name": "mine",
        "model": {"folder": str(folder), "freeze": ["images.encoder"], "dtype": "bfloat16"},
        "data": {"train": [{"kind": "chat", "settings": {"path": "a.jsonl"}}], "max_tokens": 512},
        "training": {"steps": 3, "global_batch_size": 64, "lr": 0.5},
        "run": {"out": str(tmp_path / "run")},
    }
    mine.write_text(json.dumps(values))
    command = ["plan", "--recipe", str(mine), "--gpus", "8", "--vision-share", "0.25"]
    out = tmp_path / "plan.json"
    assert main([*command, "--write-recipe", str(planned), "--json", str(out)]) == 0
    assert f"row 1 is in {planned}" in capsys.readouterr().out
    before, after = read_recipe(str(mine)), read_recipe(str(planned))
    best = json.loads(out.read_text())["colocated"][0]
    assert f"--language {after.language}" in best["layout"]
    assert f"--vision {after.encoders()['images']}" in best["layout"]
    assert after.training.micro_batches == best["microbatches"]
    plain = {"micro_batches": 1, "encode_ahead": None, "recompute": "none"}
    changed = replace(after.training, **plain)
    assert replace(after, layout=before.layout, training=changed) == before
    # What the command line changes of the step is written, too.
    step = ["--seq", "256", "--global-batch", "16"]
    assert main([*command, *step, "--write-recipe", str(planned)]) == 0
    other = read_recipe(str(planned))
    assert (other.data.max_tokens, other.training.global_batch_size) == (256, 16)
    said = planned_recipe.options_of(before)
    assert said == {"seq": 512, "global_batch": 64, "itemsize": 2}
    packed = replace(before.data, sequences=4, capacity=2048, packed=True)
    whole = replace(before, data=packed, model=replace(before.model, dtype="float32", freeze=[]))
    said = planned_recipe.options_of(whole)
    assert said == {"seq": 2048, "global_batch": 4, "itemsize": 4}
    assert planned_recipe.trained_in(whole, folder, {"images": "vision"}) == {}
    # A name of nothing is refused, in the words of training.
    mine.write_text(mine.read_text().replace("images.encoder", "images.enkoder"))
    assert main(command) == 2
    assert "'images.enkoder' names no parameter" in capsys.readouterr().err


def test_encoder_cp_is_planned_where_it_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two images a step have four ranks each; the recipe that is written is one that fits."""
    folder, mine, planned = tmp_path / "model", tmp_path / "mine.yaml", tmp_path / "planned.yaml"
    llava_models.llava("clip-llama").save_pretrained(folder)
    values = {
        "name": "mine",
        "model": {"folder": str(folder)},
        "data": {"train": [{"kind": "chat", "settings": {"path": "a.jsonl"}}], "max_tokens": 64},
        "training": {"steps": 3, "global_batch_size": 2},
        "run": {"out": str(tmp_path / "run")},
    }
    mine.write_text(json.dumps(values))
    command = ["plan", "--recipe", str(mine), "--gpus", "8", "--vision-share", "0.15"]
    assert main([*command, "--top", "99"]) == 0
    assert not re.search(r"--vision \S*cp=", capsys.readouterr().out)
    asked = [*command, "--encoder-cp", "4", "--write-recipe", str(planned)]
    assert main([*asked, "--top", "99"]) == 0
    rows = capsys.readouterr().out.partition("\n\n")[0].splitlines()[1:]
    assert all(" --vision tp=1,cp=4,dp=2 " in row for row in rows if "homogeneous" not in row)
    written = read_recipe(str(planned))
    assert written.encoders() == {"images": Layout(cp=4, dp=2)}
    assert check_model(written, folder)["images"] == Layout(cp=4, dp=2)
    layout = replace(written.layout, encoders={"sounds": "tp=1,dp=8"})
    with pytest.raises(JobError, match=r"encoders\.sounds: the model has no such modality; it ha"):
        check_model(replace(written, layout=layout), folder)
    native = {"folder": str(folder), "torch_native": ["images"]}
    mine.write_text(json.dumps({**values, "model": native}))
    assert main(asked) == 2
    said = "--encoder-cp 4: no encoder of the model cuts its items over CP (vision); leave it out"
    assert said in capsys.readouterr().err
    for model in (qwen_vl_models.qwen2_5_vl(), sounds.qwen2_audio()):
        model.config.save_pretrained(folder)
        assert main(["plan", str(folder), "--encoder-cp", "1,2"]) == 2
        assert "no encoder of the model cuts its items" in capsys.readouterr().err


def test_the_best_row_that_fits_is_written_or_the_first_refusal_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Row:
        """A recipe that is refused for a reason, or fits."""

        def __init__(self, reason: str) -> None:
            self.reason = reason

        def check(self) -> None:
            if self.reason:
                raise JobError(self.reason)

    monkeypatch.setattr(planned_recipe, "_of_work", lambda recipe, _work: recipe)
    monkeypatch.setattr(planned_recipe, "_changed", lambda _recipe, row, _flags: Row(row))
    monkeypatch.setattr(planned_recipe, "as_yaml", lambda row: f"row {row.reason}")
    file, write = tmp_path / "a.yaml", planned_recipe.write_recipe
    for rows, said in ((["one", "two"], "one"), ([], "no row of the plan fits the recipe")):
        with pytest.raises(JobError, match=said):
            write(file, None, rows, {}, None)
        assert not file.exists()
    assert write(file, None, ["one", "", "three"], {}, None) == 2
    assert file.read_text() == "row "


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give a Hugging Face folder, a file of shapes, or --recipe"),
        (["folder", "--recipe", "text"], "--recipe names its model; leave out folder"),
        (["folder", "--write-recipe", "x.yaml"], "--write-recipe needs --recipe"),
        (["--recipe", "text"], "runs/text/model is not there; `mimo train text --dry-run` makes"),
        (["--recipe", "text", "--encoder-memory", "keep"], "--encoder-memory is nothing that a"),
        (["--recipe", "text", "--bridge", "gather"], "--bridge gather is nothing that a recipe"),
        (["--recipe", "txt"], "no recipe is called 'txt'; did you mean text"),
    ],
)
def test_wrong_recipes(
    options: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["plan", *options]) == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--encoder-memory", "drop"], "encoder_memory must be one or more of .*'drop'"),
        (["--audio-share", "0.5"], "--audio-share: the model has vision, no audio"),
        (["--frozen", "tower"], "--frozen tower: the model has vision, language, no tower"),
        (["--gpu", "h1000"], "'h1000' is neither a preset nor a file"),
        (["--gpus", "7"], "no layout of 7 ranks can run 8 samples"),
        (["--replica-samples", "0"], "--replica-samples takes whole numbers from 1"),
        (["--encoder-cp", "two"], "--encoder-cp takes whole numbers from 1, as in 1,2, got 'two'"),
        (["--why", "tp=8"], "'tp=8' spans 8 ranks, --gpus is 32"),
        (["--why", "tp=8/tp=8/tp=8"], r"has 2 encoders, the model has 1 \(vision\)"),
        (["--vision-share", "1.5"], "must be a number from 0 to below 1"),
        (["--vision-share", "0"], "more replicas than a microbatch has items, 0, most often"),
        (["--item-tokens", "7"], "--item-tokens 7: .* has the tokens of its items"),
        (["--why", "tp=8", "--json", "x"], "--why explains one pair .*; leave out --json"),
        (["--picture", "x.bmp"], "x.bmp must end in .png or .svg"),
    ],
)
def test_wrong_options(
    options: list[str], message: str, shapes: str, capsys: pytest.CaptureFixture[str]
) -> None:
    gpus = [] if "--gpus" in options else ["--gpus", "32"]
    assert main(["plan", shapes, *gpus, *options]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_wrong_sources(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(tmp_path)]) == 2
    assert "neither a file of shapes nor a folder with config.json" in capsys.readouterr().err
    wrong = tmp_path / "wrong.yaml"
    for text, message in (("language: 3", "language must be a mapping"), ("a: [", "no YAML")):
        wrong.write_text(text)
        assert main(["plan", str(wrong)]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("draw", "a picture needs matplotlib; install it with pip"),
        ("plan", "--picture needs matplotlib; install it with pip"),
        ("report", "a report needs matplotlib; pip install 'megatron-mimo-colocated[train]'"),
    ],
)
def test_pictures_without_the_library_say_what_to_install(
    command: str,
    said: str,
    shapes: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    jobs, reports = "megatron.core.models.mimo.job.", "mimo_colocated.train.report"
    drawing_modules = (f"{jobs}layout_plot", f"{jobs}plan_picture", f"{jobs}plots", reports)
    for name in list(sys.modules):
        if name.startswith(("matplotlib", *drawing_modules)):
            monkeypatch.delitem(sys.modules, name)
            folder, _, name = name.rpartition(".")  # `from folder import name` finds it there, too
            if folder in sys.modules:
                monkeypatch.delattr(sys.modules[folder], name, raising=False)
    monkeypatch.setattr(sys, "meta_path", [Without("matplotlib"), *sys.meta_path])
    target = tmp_path / "x.svg"
    given = {
        "draw": [str(target), *DRAWN],
        "plan": [shapes, *LONG, "--picture", str(target)],
        "report": [str(tmp_path)],
    }
    assert main([command, *given[command]]) == 2
    assert said in capsys.readouterr().err
    assert not target.exists()


class Without:
    """As if a package were not installed."""

    def __init__(self, package: str) -> None:
        self.package = package

    def find_spec(self, name: str, *_more: object) -> None:
        if name.partition(".")[0] == self.package:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def test_a_picture_where_none_can_be_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    main(["draw", str(tmp_path / "file" / "x.svg"), *DRAWN])
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_sequences_of_a_plan_are_those_of_the_recipe() -> None:
    recipe = read_recipe("text")
    filled = replace(recipe, data=replace(recipe.data, sequences=3, capacity=64))
    made = planned_recipe._of_work(filled, SimpleNamespace(samples=8, sequence=4096))
    assert (made.data.sequences, made.data.capacity) == (8, 4096)
    assert made.training == recipe.training
    made = planned_recipe._of_work(recipe, SimpleNamespace(samples=8, sequence=4096))
    assert (made.data.sequences, made.data.max_tokens) == (0, 4096)
    assert made.training.global_batch_size == 8


DRAWN = ["--vision", "tp=1,dp=8", "--language", "tp=2,cp=2,pp=2,dp=1"]


@pytest.mark.parametrize("name", ["layout.png", "layout.svg"])
def test_a_picture_of_two_encoders_and_stages(name: str, tmp_path: Path) -> None:
    target = tmp_path / name
    more = ["--audio", "tp=2,dp=4", "--sequence-parallel", "--seq", "64"]
    assert main(["draw", str(target), *DRAWN, *more]) == 0
    begin = target.read_bytes()[:8]
    assert begin.startswith(b"\x89PNG" if name.endswith("png") else b"<?xml")


def test_a_picture_of_an_encoder_that_is_cut_over_cp(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["draw", str(tmp_path / "x.svg"), "--vision", "tp=2,cp=2,dp=2"]
    given += ["--language", "tp=2,cp=2,dp=2", "--seq", "64"]
    assert main(given) == 0
    assert main([*given, "--bridge", "gather"]) == 2
    assert "its encoder does not cut inputs over CP" in capsys.readouterr().err


def test_what_is_drawn_is_what_executes() -> None:
    source, language = Layout(dp=8), Layout(tp=2, cp=2, dp=2)
    gather = drawing.bridge_of("vision", source, language, "gather", False)
    routed = drawing.bridge_of("vision", source, language, "routed", True)
    assert gather.gather_groups[0] == (0, 1, 2, 3)
    assert routed.group_count == 2
    assert routed.sequence_parallel


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["x.png", "--language", "dp=8"], "give --language and --vision or --audio"),
        (["x.png", "--vision", "dp=4", "--language", "dp=8"], "spans 4 ranks.*try --vision"),
        (["x.pdf", *DRAWN], "x.pdf must end in .png or .svg"),
        (["x.png", *DRAWN, "--bridge", "gather"], "gather with pp=2 has no picture"),
        (
            ["x.png", *DRAWN, "--samples", "6"],
            "samples 6 does not divide over vision dp=8; draw --samples 8",
        ),
        (
            ["x.png", "--vision", "dp=1024", "--language", "dp=1024", "--samples", "1024"],
            "1024 ranks are too many to draw; up to 512",
        ),
    ],
)
def test_wrong_drawings(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["draw", *options]) == 2
    assert re.search(message, capsys.readouterr().err)
