# SPDX-License-Identifier: Apache-2.0
"""The page of a run: everything stands on it, and nothing is loaded from elsewhere."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml
from matplotlib.figure import Figure

from megatron.core.models.mimo.job.plots import draw_series
from mimo_colocated.cli.main import main
from mimo_colocated.launch import errors
from mimo_colocated.launch.errors import JobError
from mimo_colocated.train import report_figures
from mimo_colocated.train.report import ANSWERS, write_report
from mimo_colocated.train.report_figures import times_of

pytestmark = pytest.mark.once

LOADING = {"src", "href", "srcset", "poster", "data", "action", "background", "xlink:href"}
NAMESPACES = {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
WORK = {"images": 0.5, "language": 2.0}
TIMES = {"data": 0.5, "encoder": 0.4, "bridge": 0.02, "language": 0.9, "gradients": 0.1,
         "optimizer": 0.05, "other": 0.03}  # fmt: skip
LINES = [
    {
        "step": step,
        "loss": 6.0 / step,
        "grad_norm": 1.0,
        "learning_rate": 1e-3,
        "samples": 8,
        "images": 10,
        "tokens": 150,
        "seconds": 2.0,
        "waited_s": 0.5,
        "tflop": WORK,
        "tflop_repeated": 0.5,
        "tflops_per_rank": 0.3125,
        "peak_memory": 2**31,
        "times": TIMES,
        "spread_before": {"images": 1.5},
        "spread_after": {"images": 1.1},
    }
    for step in range(1, 5)
]
RECIPE = {
    "name": "<mine> & others",
    "data": {"max_tokens": 250},
    "layout": {"sequence_parallel": True},
    "training": {"steps": 9},
}
RECORD = {
    "command": ["mimo", "train", "mine"],
    "ranks": 8,
    "versions": {"torch": "2.99"},
    "git": {"commit": "abc123", "changed": ["M a.py"]},
    "layouts": {
        "images": {"tp": 2, "cp": 1, "pp": 1, "dp": 4},
        "language": {"tp": 2, "cp": 2, "pp": 1, "dp": 2, "ep": 1},
    },
    "skipped": {"too_long": 1234},
}
FIGURES = ["curves", "split", "seconds", "work", "rate", "spread", "layout"]
CODE = '<script src="http://elsewhere/x.js"></script>'


def said(number: int) -> dict[str, str]:
    """Every third answer is wrong; one tries to be code."""
    question = CODE if number == 1 else f"question {number}"
    return {"question": question, "wanted": "red", "said": "blue" if number % 3 == 0 else " red"}


def leave(place: Path) -> Path:
    """Files of a run on 8 ranks, of whose 9 steps 4 are done."""
    place.mkdir()
    (place / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    (place / "run.json").write_text(json.dumps(RECORD))
    cut = json.dumps(LINES[0])[:20]  # a run that is writing its next line
    (place / "metrics.jsonl").write_text("\n".join([*map(json.dumps, LINES), cut]))
    skipped = {"held_out_skipped": {}, "questions_skipped": {"no_supervision": 5}}
    summary = {"exact_match": 0.625, "questions": 30, **skipped}
    (place / "summary.json").write_text(json.dumps(summary))
    answers = {"answers": [said(number) for number in range(30)]}
    (place / "answers.json").write_text(json.dumps(answers))
    return place


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return leave(tmp_path / "run")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_report(leave(tmp_path_factory.mktemp("report") / "run")).read_text()


class Reader(HTMLParser):
    """Tags that are open, attributes by tag, and text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, Any]]] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.texts.append(data)

    def of(self, tag: str) -> list[dict[str, Any]]:
        return [attributes for name, attributes in self.found if name == tag]


def parsed(text: str) -> Reader:
    reader = Reader()
    reader.feed(text)
    reader.close()
    assert reader.open == []
    return reader


def drawn(reader: Reader) -> Iterator[tuple[str, str]]:
    for image in reader.of("img"):
        head, _, data = image["src"].partition(",")
        assert head == "data:image/svg+xml;base64"
        yield image["id"], base64.b64decode(data, validate=True).decode()


def outside(text: str) -> list[str]:
    """What a browser would load that does not stand in the text itself."""
    reader = parsed(text)
    loaded = [
        value or ""
        for _, attributes in reader.found
        for name, value in attributes.items()
        if name in LOADING
    ]
    styles = re.findall(r"url\(([^)]*)\)|(@import[^;]*)", text)
    found = [*loaded, *(one or other for one, other in styles)]
    bad = [value for value in found if not value.strip("'\"").startswith(("data:", "#"))]
    return bad + [tag for tag, _ in reader.found if tag in ("script", "iframe", "link", "object")]


def test_every_figure_stands_on_the_page(written: str) -> None:
    figures = dict(drawn(parsed(written)))
    assert list(figures) == FIGURES
    for name, svg in figures.items():
        tree = ElementTree.fromstring(svg)
        assert tree.tag == "{http://www.w3.org/2000/svg}svg"
        assert len(list(tree.iter("{http://www.w3.org/2000/svg}path"))) > 5, name
        # What marks text in it is drawn: no font is looked for.
        assert "<text" not in svg


@pytest.mark.parametrize("name", ["curves", "seconds", "work", "rate", "spread"])
def test_what_lies_over_the_steps_says_so_and_marks_whole_ones(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of few steps, too, between which there is room for more marks."""
    made: list[Figure] = []
    monkeypatch.setattr(report_figures, "_svg", made.append)
    getattr(report_figures, name)(LINES[:2])
    (figure,) = made
    axes = figure.axes[-1]
    assert axes.get_xlabel() == "step"
    assert all(mark == round(mark) for mark in axes.get_xticks())
    assert all(each.get_ylabel() for each in figure.axes)


def test_nothing_is_loaded_from_outside(written: str) -> None:
    assert outside(written) == []
    for name, svg in drawn(parsed(written)):
        assert outside(svg) == [], name
        assert set(re.findall(r"https?://[^\"'\s<]*", svg)) <= NAMESPACES, name
    (policy,) = (m["content"] for m in parsed(written).of("meta") if "http-equiv" in m)
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    # Controls: a picture of another host, a style's, and an answer that is not escaped.
    assert outside(written.replace("data:image", "https://elsewhere/image", 1))
    assert outside(written.replace("</style>", "p { background: url(http://elsewhere/) }</style>"))
    assert outside(written.replace("</body>", f"{CODE}</body>"))


def test_what_the_page_tells(written: str) -> None:
    texts = parsed(written).texts
    assert "<mine> & others in run" in texts
    rows = dict(zip(texts, texts[1:], strict=False))
    assert rows["steps"] == "4 of 9"
    assert rows["last loss"] == "1.5"
    assert rows["seconds per step, median"] == "2"
    assert rows["waiting for data"] == "25.0% of the time"
    assert rows["a homogeneous layout would repeat"] == "20.0% more work"
    assert rows["rate, median"] == "0.312 TFLOP/s per rank"
    assert rows["peak memory of rank 0"] == "2 GiB"
    assert rows["layout of language"] == "tp=2,cp=2,dp=2"
    assert (rows["samples seen"], rows["images seen"], rows["tokens seen"]) == ("32", "40", "600")
    assert rows["skipped: too_long"] == "1,234"
    assert rows["questions, skipped: no_supervision"] == "5"
    assert rows["torch"] == "2.99"
    assert rows["commit"] == "abc123, 1 files changed"
    assert rows["exact match"] == "0.625"
    assert "MFU, median" not in rows
    assert "links that lose packets" not in rows


def test_what_only_some_runs_have_is_told_of_them(folder: Path) -> None:
    rules = [{"replacement": each} for each in ("stale", "zero", "stale")]
    recipe = {**RECIPE, "lossy": {"rules": rules}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    lines = [{**line, "mfu": 0.1 * line["step"]} for line in LINES]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    texts = parsed(write_report(folder).read_text()).texts
    rows = dict(zip(texts, texts[1:], strict=False))
    assert rows["MFU, median"] == "30.0%"
    assert rows["links that lose packets"] == "by lossy.rules, stale and zero instead"


def test_the_first_answers_are_shown_right_or_wrong(written: str) -> None:
    reader = parsed(written)
    words = [each["class"] for each in reader.of("td") if "class" in each]
    assert words == ["right" if number % 3 else "wrong" for number in range(ANSWERS)]
    assert "20 of 30 are right. The first of them:" in reader.texts
    assert CODE in reader.texts
    assert "question 19" in reader.texts
    assert "question 20" not in reader.texts


def test_a_run_that_has_only_begun_has_a_page(folder: Path) -> None:
    for name in ("metrics.jsonl", "summary.json", "answers.json"):
        (folder / name).unlink()
    reader = parsed(write_report(folder).read_text())
    assert [name for name, _ in drawn(reader)] == ["layout"]
    assert "0 of 9" in reader.texts
    record = {**RECORD, "layouts": {"language": {"tp": 1, "dp": 1}}, "skipped": {}, "git": None}
    (folder / "run.json").write_text(json.dumps(record))
    reader = parsed(write_report(folder).read_text())
    assert list(drawn(reader)) == []  # text alone has no bridge
    assert "none" in reader.texts


def test_the_command(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(folder)]) == 0
    assert capsys.readouterr().out == f"wrote {folder / 'report.html'}\n"
    assert main(["report", str(tmp_path)]) == 2
    said = f"{tmp_path} holds no recipe.yaml, so it is no run of `mimo train`; give the folder"
    assert said in capsys.readouterr().err


def test_files_that_no_run_leaves_are_refused(folder: Path) -> None:
    (folder / "answers.json").write_text("[1]")
    with pytest.raises(JobError, match=r"answers\.json is not what a run leaves: it holds list"):
        write_report(folder)
    (folder / "recipe.yaml").write_text("a: [")
    with pytest.raises(JobError, match=r"recipe\.yaml is no YAML: "):
        write_report(folder)
    assert not (folder / "report.html").exists()


def test_the_page_is_whole_or_what_it_was(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "metrics.jsonl").unlink()
    before = write_report(folder).read_bytes()

    def full(_number: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(errors.os, "fsync", full)
    (folder / "summary.json").unlink()
    with pytest.raises(JobError, match="the disk is full: the page of the run could not be"):
        write_report(folder)
    assert (folder / "report.html").read_bytes() == before
    assert not list(folder.glob(".report*"))


def test_a_series_has_the_colour_and_the_name_that_it_is_given() -> None:
    axes = Figure().subplots()
    lines = [{"step": step, "value": 1.0 + step} for step in range(50)]
    draw_series(axes, lines, "value", colour="#123456", label="it")
    named = [line for line in axes.get_lines() if line.get_label() == "it"]
    assert [line.get_color() for line in named] == ["#123456"]
    assert len(axes.get_lines()) == 2  # with the mean of many


def test_the_first_step_is_no_usual_one() -> None:
    """It is left out of the mean, and does not make the others flat."""
    usual = {"times": {"language": 1.0, "data": 0.5}}
    lines = [{"step": 1, "times": {"language": 9.0}}, *({"step": n, **usual} for n in (2, 3))]
    assert times_of(lines) == usual["times"]
    assert times_of(lines[:1]) == {"language": 9.0}
    assert times_of([{"step": 1, "seconds": 1.0}]) == {}
