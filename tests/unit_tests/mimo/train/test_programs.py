# SPDX-License-Identifier: Apache-2.0
"""Recipes of the digits example: its options are their fields, and the same job starts."""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from examples.mimo.digits.options import Options, parse_options
from mimo_colocated.launch.errors import JobError
from mimo_colocated.train import command, programs
from mimo_colocated.train.reading import describe_shipped, read_recipe, values_of

pytestmark = pytest.mark.once

ROOT = Path(__file__).resolve().parents[4]


def found(*argv: str) -> argparse.Namespace:
    given = programs.find(["train", *argv], command.parser())
    assert given is not None
    return given


def options(*changes: str, named: str = "digits") -> Any:
    given = found(named, *(f"--set={change}" for change in changes))
    return programs.job_of(given, "script", named).parse([], None)


@pytest.mark.parametrize(("name", "target"), [("digits", "train"), ("digits-audio", "train-audio")])
def test_a_recipe_starts_what_make_starts(name: str, target: str) -> None:
    """Every option is that of the target's command line."""
    lines = (ROOT / "Makefile").read_text().replace("\\\n", " ").splitlines()
    at = next(n for n, line in enumerate(lines) if line.startswith(f"{target}:"))
    typed = re.search(r"digits/train\.py (.*)\$\(ARGS\)", lines[at + 2])
    assert typed is not None
    assert options(named=name) == parse_options(typed[1].split())
    assert f"{name}  " in describe_shipped()


def test_every_option_is_a_field_but_those_of_one_start() -> None:
    fields = programs.Program("digits", values_of("digits")).fields
    names = {each.name for each in fields.values()}
    assert names == {each.name for each in dataclasses.fields(Options)} - {
        *("nproc", "fresh", "memory_plan")
    }
    places = {each.name: path for path, each in fields.items()}
    assert places["vision"] == "layout.encoders.vision"
    assert places["language"] == "layout.language"
    assert places["steps"] == "training.steps"
    assert places["dtype"] == "model.dtype"
    assert places["out"] == "run.out"
    assert places["experts"] == "options.experts"


def test_fields_are_set_and_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes = [
        "training.steps=7",
        "training.lr=1e-3",
        "layout.language=tp=1,dp=8",
        "data.packed=true",
        "options.evaluate=false",
        "model.freeze=[vision-encoder, language]",
        "layout.encoders.audio=dp=8",
        f"run.out={tmp_path}",
    ]
    made = options(*changes)
    assert (made.steps, made.lr, made.packed, made.evaluate) == (7, 1e-3, True, False)
    assert str(made.language) == str(made.audio) == "tp=1,dp=8"
    assert made.freeze == "vision-encoder+language"
    given = found("digits", "--print", *(f"--set={change}" for change in changes))
    with pytest.raises(SystemExit):
        programs.job_of(given, "script", "digits").parse([], None)
    printed = capsys.readouterr().out
    assert list(yaml.safe_load(printed))[:4] == ["name", "job", "model", "layout"]
    (tmp_path / "again.yaml").write_text(printed)
    assert options(named=str(tmp_path / "again.yaml")) == made


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("training.stesp=5", r"training\.stesp is no field of a recipe of job digits; did you"),
        ("data.train=[]", r"data\.train is no field of a recipe of job digits; "),
        ("training.steps=0", r"digits: training\.steps: must be a whole number from 1"),
        ("training.steps={}", r"training\.steps={} is no value of this field"),
        ("options={}", "options is no field of a recipe of job digits"),
        ("training.steps=true", r"training\.steps=True is no value of this field"),
        ("layout.language=tp=3", r"try layout\.encoders\.vision=tp=.* layout\.language=tp="),
        ("job=letters", "job='letters' is not known; known are digits"),
    ],
)
def test_what_is_wrong_is_said_by_the_fields_names(change: str, said: str) -> None:
    with pytest.raises(JobError, match=said) as caught:
        options(change)
    assert "--" not in str(caught.value).replace("--print", "")


def test_such_a_recipe_is_read_by_nobody_else() -> None:
    assert programs.find(["train", "easy-vqa"], command.parser()) is None
    assert programs.find(["train", "nothing"], command.parser()) is None
    assert programs.find(["train", "--list"], command.parser()) is None
    with pytest.raises(JobError, match="digits is a recipe of job digits, .* `mimo train digits`"):
        read_recipe("digits")


def test_what_is_only_for_other_recipes_is_refused() -> None:
    for flag, value in (("lossy", "x.yaml"), ("profile", "1:2"), ("profile_ranks", "0")):
        given = found("digits")
        setattr(given, flag, value)
        name = flag.replace("_", "-")
        with pytest.raises(JobError, match=f"--{name} is not for digits, which is a program of"):
            programs.job_of(given, "script", "digits")
    assert command.main(["train", "digits", "--lossy", "bursts"], "script") == 2


def test_another_package_of_the_programs_name_is_no_traceback(
    monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [each for each in sys.path if each != str(ROOT)])
    monkeypatch.setitem(programs.PROGRAMS, "digits", "examples.elsewhere")
    said = f"the program of job digits cannot be imported from {ROOT}: No module named 'examples.el"
    with pytest.raises(JobError, match=said):
        programs._imported("digits", "job")
    assert sys.path[0] == str(ROOT)


def test_a_dry_run_says_what_would_run(capsys: pytest.CaptureFixture[str]) -> None:
    given = found("digits-audio", "--dry-run", "--nodes", "2", "--set", "options.experts=4",
                  "--set", "layout.sequence_parallel=true")  # fmt: skip
    job = programs.job_of(given, "script", "digits-audio --set a=1")
    assert job.instead(job.parse([], None), "gloo")
    told = capsys.readouterr().out
    assert "audio     tp=1,dp=8  8 ranks, 8 replicas" in told
    assert "vision rows stay within the ranks [0, 1, 2, 3] [4, 5, 6, 7]" in told
    assert re.search(r"memory of the fullest rank, on h100: about \d", told)
    assert told.rstrip().endswith("-m mimo_colocated train digits-audio --set a=1")
    given = found("digits", "--dry-run", "--nodes", "3")
    job = programs.job_of(given, "script", "digits")
    with pytest.raises(JobError, match="--nodes 3 does not divide the 8 ranks"):
        job.instead(job.parse([], None), "gloo")
    assert not programs.job_of(found("digits"), "script", "digits").instead(Options(), "gloo")
    given = found("digits", "--dry-run", "--set", "layout.encoders.vision=tp=2,cp=2,dp=2")
    job = programs.job_of(given, "script", "digits")
    assert job.instead(job.parse([], None), "gloo")
    assert "vision    tp=2,cp=2,dp=2  8 ranks, 2 replicas" in capsys.readouterr().out
