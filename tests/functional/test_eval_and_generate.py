# SPDX-License-Identifier: Apache-2.0
"""``mimo eval`` and ``mimo generate``: what they refuse before a rank starts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import transformers

from mimo_colocated.cli.main import main
from tests.unit_tests.mimo.huggingface import harness, models
from tests.unit_tests.mimo.train import strangers

pytestmark = pytest.mark.once

DATA = "{kind: chat, settings: {path: nowhere.jsonl}}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model with its text."""
    place = tmp_path_factory.mktemp("folders")
    strangers.write_folders(place)
    return place / "language"


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("seeing")
    strangers.write_qwen_vl(place)
    return place


@pytest.fixture(autouse=True)
def no_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(*_anything: object) -> None:
        raise AssertionError("ranks were started")

    monkeypatch.setattr("mimo_colocated.launch.launcher._start_and_wait", start)


def refused(capsys: pytest.CaptureFixture, *arguments: object) -> str:
    """The error of a command line that starts no rank."""
    capsys.readouterr()  # what was made before has bars
    assert main([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    return captured.err


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("--top-k", "5"), "--top-k says how tokens are drawn, and without --temperature none is"),
        (("--top-p", "0.5"), "--top-p says how tokens are drawn"),
        (("--seed", "0"), "--seed says how tokens are drawn"),
        (("--temperature", "0"), "must be a number above 0, got '0'"),
        (("--top-p", "1.5"), "must be a number above 0, to 1, got '1.5'"),
        (("--top-k", "0"), "must be a whole number from 1"),
        (("--seed", "-1"), "must be a whole number from 0"),
        (("--max-new-tokens", "32760"), "and the answer may have 32760, together more than the"),
        (("--image", "x.png"), "--image is given, and the model in"),
        (("--sound", "x.wav"), "language takes text alone"),
        (("--audio", "x.wav"), "'x.wav' is no layout, such as tp=2,dp=4; a sound that is played"),
        (("--source", "a"), "is a model itself; leave --source out"),
        (("--vision", "tp=1"), "--vision is given, but the model in"),
        (("--language", "tp=8"), "language tp=8 does not divide its"),
    ],
)
def test_a_question_that_cannot_be_answered_is_refused(
    given: tuple[str, ...], said: str, folder: Path, capsys: pytest.CaptureFixture
) -> None:
    assert said in refused(capsys, "generate", folder, "what is it", *given)


def test_images_that_cannot_be_shown_are_refused(
    seeing: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    words = refused(capsys, "generate", seeing, "what", "--image", tmp_path / "x.png")
    assert "x.png cannot be read: No such file or directory" in words
    words = refused(capsys, "generate", seeing, "what", "--image", seeing / "config.json")
    assert "config.json is no image" in words
    words = refused(capsys, "generate", tmp_path, "what")
    assert "is no checkpoint and no run" in words
    bare = tmp_path / "bare"
    harness.randomise(models.DENSE["llama"](), seed=4).save_pretrained(bare)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(bare)
    words = refused(capsys, "generate", bare, "what")
    assert "has no chat template; put one into chat_template.jinja there" in words


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ((), "names no held-out data; give some, such as --data '{kind: chat"),
        (("--data", "{kind: chats}"), "data.held_out.0.kind: 'chats' is no kind of data; did you"),
        (("--data", "{kind: ["), "data.held_out: '[{kind: []' is no YAML: while parsing a flow"),
        (("--data", "{path: a}"), "data.held_out.0.path is no field of a recipe"),
        (("--recipe", "easy-vqb"), "no recipe is called 'easy-vqb'; did you mean easy-vqa?"),
        (("--data", DATA, "--set", "training.lr=1"), "--set training.lr: an evaluation does not"),
        (("--data", DATA, "--set", "layout.language=tp=2"), "--language, --vision and --dtype in"),
        (("--data", DATA, "--set", "data.train=[]"), "--set data.train: an evaluation does not"),
        (("--data", DATA, "--set", "evaluation.bach=2"), "did you mean evaluation.batch?"),
        (("--data", DATA, "--language", "dp=3"), "evaluation.batch=64 does not divide over 3"),
    ],
)
def test_an_evaluation_that_cannot_be_is_refused(
    given: tuple[str, ...], said: str, folder: Path, capsys: pytest.CaptureFixture
) -> None:
    assert said in refused(capsys, "eval", folder, *given)


def test_sounds_that_cannot_be_played_are_refused(
    seeing: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    hearing = tmp_path / "hearing"
    strangers.write_qwen_audio(hearing)
    for name, length in (("long", 2 * strangers.RATE), ("short", 0)):
        strangers.write_wav(tmp_path / f"{name}.wav", np.zeros(length))
    for folder, given, said in (
        (hearing, ("--image", "x.png"), "--image is given, and the model in"),
        (hearing, ("--image", "x.png"), "hearing takes sounds"),
        (seeing, ("--sound", "x.wav"), "takes images"),
        (seeing, ("--vision", "cp=2", "--language", "dp=2"), "vision cp=2: a qwen2_5_vl_vision"),
        (hearing, ("--audio", "cp=2", "--language", "dp=2"), "audio cp=2: a qwen2_audio_encoder"),
        (hearing, ("--sound", tmp_path / "x.wav"), "x.wav cannot be read: No such file"),
        (hearing, ("--sound", hearing / "config.json"), "config.json is no sound"),
        (hearing, ("--sound", tmp_path / "long.wav"), "long.wav has 2 s, and its processor takes"),
        (hearing, ("--sound", tmp_path / "short.wav"), "short.wav has 0 s, too few for a row"),
    ):
        assert said in refused(capsys, "generate", folder, "what", *given)
