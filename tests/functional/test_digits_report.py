# SPDX-License-Identifier: Apache-2.0
"""What the digits job writes and prints: whole files or none, and pictures of what is true."""

from __future__ import annotations

import dataclasses
import errno
import io
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from examples.mimo.digits.predictions import _choose, plot_predictions
from megatron.core.hyper_comm_grid import GridShape
from megatron.core.models.mimo.comm.plan.gather_layout import BridgeLayout
from megatron.core.models.mimo.comm.plan.routed_layout import RouteLayout
from megatron.core.models.mimo.job import results as report
from megatron.core.models.mimo.job.layout_plot import LayoutPlot, plot_layout
from megatron.core.models.mimo.job.plots import plot_loss
from megatron.core.models.mimo.job.results import (
    MetricsWriter,
    Progress,
    print_table,
    read_metrics,
    write_summary,
)
from mimo_colocated.launch.errors import JobError, write_atomically

pytestmark = pytest.mark.once

_FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _raise_full(*_: object) -> int:
    raise _FULL


def _bridge(vision: tuple[int, int], language: tuple[int, int, int]) -> BridgeLayout:
    return BridgeLayout.from_grids(
        GridShape(vision, ("tp", "dp")),
        GridShape(language, ("tp", "cp", "dp")),
        "vision",
        "language",
    )


# ------------------------------------------------------------------------------------- metrics


def test_a_line_per_step(tmp_path: Path) -> None:
    path = tmp_path / "new" / "metrics.jsonl"
    with MetricsWriter(path) as metrics:
        metrics.write(0, loss=2.5, grad_norm=math.inf)
        assert read_metrics(path) == [{"step": 0, "loss": 2.5, "grad_norm": None}]
        metrics.write(1, loss=math.nan)
    assert path.read_text().splitlines()[1] == '{"step": 1, "loss": null}'


def test_a_resumed_run_drops_later_and_broken_lines(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n{"step": 1}\n{"step": 2}\n{"step": 3, "lo')
    with MetricsWriter(path, first_step=2) as metrics:
        metrics.write(2, loss=1.0)
    assert [line["step"] for line in read_metrics(path)] == [0, 1, 2]
    with MetricsWriter(path):
        assert path.read_text() == ""


@pytest.mark.parametrize("line", ["hello", "[1]", "{}", '{"step": "1"}'])
def test_a_file_of_something_else_is_refused(line: str, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{line}\n{{"step": 1}}\n')
    with pytest.raises(JobError, match=r"line 1 of .*metrics\.jsonl is not one step's metrics"):
        MetricsWriter(path, first_step=1)
    assert path.read_text() == f'{line}\n{{"step": 1}}\n'


def test_a_full_disk_leaves_whole_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    real_write, calls = os.write, iter(range(9))

    def half_then_full(file: int, content: bytes) -> int:
        if next(calls):
            raise _FULL
        return real_write(file, content[: len(content) // 2])

    with MetricsWriter(path) as metrics:
        metrics.write(0, loss=2.0)
        metrics.write(1, loss=1.5)
        monkeypatch.setattr(report.os, "write", half_then_full)
        with pytest.raises(JobError, match=r"disk is full: the metrics could not .*metrics\.jsonl"):
            metrics.write(2, loss=1.0)
        monkeypatch.undo()
        assert path.read_text() == '{"step": 0, "loss": 2.0}\n{"step": 1, "loss": 1.5}\n'
        metrics.write(2, loss=1.0)
    assert [line["step"] for line in read_metrics(path)] == [0, 1, 2]


@pytest.mark.parametrize("most", [1, 7, 20])
def test_a_file_that_takes_a_few_bytes_at_a_time_has_every_byte_once(
    most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, real_write = tmp_path / "metrics.jsonl", os.write
    with MetricsWriter(path) as metrics:
        monkeypatch.setattr(report.os, "write", lambda file, text: real_write(file, text[:most]))
        for step in range(3):
            metrics.write(step, loss=1.0 / (step + 1))
        monkeypatch.undo()
    assert [line["step"] for line in read_metrics(path)] == [0, 1, 2]
    assert path.read_text().splitlines()[1] == '{"step": 1, "loss": 0.5}'


# --------------------------------------------------------------------------------------- files


def test_a_full_disk_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "summary.json"
    write_summary(path, {"steps": 1})
    monkeypatch.setattr(os, "fsync", _raise_full)
    with pytest.raises(JobError, match=r"the disk is full: the summary .*summary\.json; free some"):
        write_summary(path, {"steps": 2})
    assert json.loads(path.read_text()) == {"steps": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["summary.json"]


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(JobError, match=r"the summary could not be written to .*file/summary.json"):
        write_atomically(tmp_path / "file" / "summary.json", b"x", "the summary")


def test_the_summary_is_plain_json(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    write_summary(path, {"loss": math.nan, "out": Path("a/b"), "sizes": (1, {"tp": 2.5})})
    assert json.loads(path.read_text()) == {"loss": None, "out": "a/b", "sizes": [1, {"tp": 2.5}]}


# ------------------------------------------------------------------------------------ progress


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def _run(stream: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> Progress:
    """Steps 6 to 8 of 8: the first takes 10 s, the others 2 s each."""
    now = iter([0.0, 10.0, 12.0, 14.0])
    monkeypatch.setattr(report.time, "perf_counter", lambda: next(now))
    progress = Progress(5, 8, 1024, stream)
    for done in (6, 7, 8):
        progress.step(done, 1.0 / done, 0.5)
    progress.close()
    return progress


def test_a_line_per_step_and_no_bar_in_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    progress = _run(stream, monkeypatch)
    assert stream.getvalue().splitlines() == [
        "step 6/8  loss 0.1667  grad norm 0.500  102 tokens/s  00:20 left",
        "step 7/8  loss 0.1429  grad norm 0.500  512 tokens/s  00:02 left",
        "step 8/8  loss 0.1250  grad norm 0.500  512 tokens/s  00:00 left",
    ]
    assert progress.seconds_per_step == 2.0  # the first step warms up


def test_a_line_has_further_words_from_the_seconds() -> None:
    stream = io.StringIO()
    progress = Progress(0, 1, 1024, stream)
    progress.step(1, 1.0, 0.5, more=lambda seconds: f"{seconds >= 0} words")
    progress.close()
    assert " tokens/s  True words  00:00 left" in stream.getvalue()


def test_a_bar_below_the_lines_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = _Terminal()
    _run(stream, monkeypatch)
    text = stream.getvalue()
    assert "step 8/8  loss 0.1250" in text
    assert "100%" in text
    assert "8/8" in text.rsplit("\r", 1)[-1]


def test_the_table_shows_every_entry() -> None:
    stream = io.StringIO()
    shown = {"test_accuracy": 0.98765, "layout": {"vision": "tp=2,dp=4"}, "steps": 3}
    print_table("Digits", shown, stream)
    for text in ("test accuracy", "0.9877", "vision=tp=2,dp=4", "3"):
        assert text in stream.getvalue()


# ------------------------------------------------------------------------------------ pictures


def test_accuracy_counts_what_is_counted(tmp_path: Path) -> None:
    truth = np.arange(12).reshape(3, 4) % 10
    read, counted = truth.copy(), np.ones((3, 4), dtype=bool)
    read[0, 1], read[1, 2], read[2, 3] = -1, 9, 9
    counted[2, 2:] = False
    path = tmp_path / "predictions.png"
    accuracy = plot_predictions(path, np.zeros((3, 4, 8, 8)), truth, read, counted)
    assert accuracy == pytest.approx(1 - 2 / 10)
    assert imread(path).shape[2] == 4


def test_images_sounds_and_names_are_drawn_where_they_are_shown(tmp_path: Path) -> None:
    """Each kind has a colour that the others lack: grey ramps, a blue line, and neither."""
    truth = np.arange(4).reshape(1, 4)
    nothing = np.full((1, 4, 8, 8), np.nan), np.full((1, 4, 4352), np.nan)
    blue, dark = {}, {}
    for kind in ("image", "sound", "name"):
        images, waveforms = (each.copy() for each in nothing)
        if kind == "image":
            images[:] = 1.0
            images[..., 2:6, 2:6] = -1.0
        elif kind == "sound":
            waveforms[:] = np.sin(np.arange(4352) / 3)
        path = tmp_path / f"{kind}.png"
        plot_predictions(path, images, truth, truth, waveforms=waveforms)
        red, green, sky = (imread(path)[..., channel] for channel in range(3))
        blue[kind] = int(((sky > 0.6) & (red < 0.4)).sum())
        dark[kind] = int(((red < 0.2) & (green < 0.2) & (sky < 0.4)).sum())
    assert blue["image"] == blue["name"] == 0
    assert blue["sound"] > 100
    assert dark["image"] > 1.5 * dark["name"]
    assert dark["sound"] > 1.5 * dark["name"]


def test_samples_without_a_mistake_are_taken_from_all_over() -> None:
    wrong = np.zeros(100, dtype=bool)
    wrong[[7, 40]] = True
    chosen = _choose(wrong, 5).tolist()
    assert chosen[:2] == [7, 40]
    assert (chosen[2], chosen[4]) == (0, 99)
    assert _choose(wrong, 1).tolist() == [7]
    assert _choose(wrong[:3], 30).tolist() == [0, 1, 2]
    assert _choose(~wrong, 500).tolist() == [n for n in range(100) if n not in (7, 40)] + [7, 40]


def test_wrong_digits_are_red(tmp_path: Path) -> None:
    truth = np.zeros((6, 4), dtype=int)
    red = []
    for wrong in (0, 1, 3):
        read = truth.copy()
        read[:wrong, 2] = 5
        plot_predictions(tmp_path / "p.png", np.zeros((6, 4, 8, 8)), truth, read)
        pixels = imread(tmp_path / "p.png")[..., :3]
        red.append(int(((pixels[..., 0] > 0.7) & (pixels[..., 1:].max(axis=-1) < 0.3)).sum()))
    assert red[0] == 0
    assert red[2] == pytest.approx(3 * red[1], rel=0.1)


@pytest.mark.parametrize("steps", [0, 1, 5, 60])
def test_the_loss_curve_of_any_length(tmp_path: Path, steps: int) -> None:
    lines = [
        {"step": s, "loss": 2.0 / (s + 1), "grad_norm": None if s == 3 else 0.0}
        for s in range(steps)
    ]
    plot_loss(tmp_path / "loss.png", lines, "title")
    assert imread(tmp_path / "loss.png").shape[0] > 300


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize(
    ("vision", "language"), [((2, 4), (2, 2, 2)), ((4, 2), (1, 2, 4)), ((1, 8), (2, 4, 1))]
)
def test_the_layout_picture_shows_every_token_once(
    vision: tuple[int, int], language: tuple[int, int, int], sequence_parallel: bool
) -> None:
    """Per TP rank of either side (all of them with sequence parallelism) a full cover."""
    picture = LayoutPlot(_bridge(vision, language), 32, 32, sequence_parallel)
    assert picture.cells == 8
    layout = picture.layout
    encoded = [
        c for r in layout.ranks if layout.rank_to_src_pos[r][1] == 0 for c in picture.source(r)
    ]
    assert sorted(encoded) == list(range(8))
    seen = [
        (cell, position)
        for rank in layout.ranks
        if sequence_parallel or layout.rank_to_dest_coords[rank][1] == 0
        for cell in picture.destination(rank)
        for position in picture.positions(rank)
    ]
    assert sorted(seen) == [(cell, position) for cell in range(8) for position in range(32)]


@pytest.mark.parametrize(
    ("vision", "language", "samples"),
    [
        ((2, 4), (2, 2, 2), 8),
        ((4, 2), (1, 2, 4), 32),
        ((1, 1), (1, 1, 1), 3),
        ((2, 20), (2, 2, 10), 40),
    ],
)
def test_the_layout_picture_of_any_bridge(
    tmp_path: Path, vision: tuple[int, int], language: tuple[int, int, int], samples: int
) -> None:
    path = tmp_path / "layout.png"
    plot_layout(path, [_bridge(vision, language)], samples, 32)
    assert imread(path).shape[1] == 13 * 130


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_the_layout_picture_of_a_routed_bridge(tmp_path: Path, sequence_parallel: bool) -> None:
    """Every owner of tokens is reached, from ranks that encode its samples only."""
    src, dest = GridShape((2, 4), ("tp", "dp")), GridShape((2, 2, 2), ("tp", "cp", "dp"))
    routes = RouteLayout.from_grids(src, dest, sequence_parallel=sequence_parallel)
    _check_sends(LayoutPlot(routes, 8, 32, sequence_parallel), routes.ranks)
    for name, drawn in (("routed", routes), ("gather", _bridge((2, 4), (2, 2, 2)))):
        plot_layout(tmp_path / f"{name}.png", [drawn], 8, 32)
    assert imread(tmp_path / "routed.png").shape[1] == 13 * 130
    assert (tmp_path / "routed.png").read_bytes() != (tmp_path / "gather.png").read_bytes()


def test_the_layout_picture_of_pipeline_stages(tmp_path: Path) -> None:
    """Rows go to the first stage; all ranks encode."""
    dest = GridShape((1, 2, 2, 2), ("tp", "cp", "dp", "pp"))
    routes = RouteLayout.from_grids(GridShape((1, 8), ("tp", "dp")), dest)
    _check_sends(LayoutPlot(routes, 8, 32), range(4))
    plot_layout(tmp_path / "stages.png", [routes], 8, 32)
    assert imread(tmp_path / "stages.png").shape[1] == 13 * 130


def test_two_encoders_have_a_panel_each(tmp_path: Path) -> None:
    dest = GridShape((2, 2, 2), ("tp", "cp", "dp"))
    layouts = [
        RouteLayout.from_grids(GridShape((tp, 8 // tp), ("tp", "dp")), dest, name, "language")
        for tp, name in ((2, "images"), (1, "audio"))
    ]
    sizes = []
    for number in (1, 2):
        plot_layout(tmp_path / "p.png", layouts[:number], 8, 32)
        sizes.append(imread(tmp_path / "p.png").shape[:2])
    assert sizes[1] == (2 * sizes[0][0], sizes[0][1])


def _check_sends(picture: LayoutPlot, owners: range) -> None:
    sends = [pair for group in picture.layout.groups() for pair in picture.sends(group)]
    assert len(set(sends)) == len(sends)
    assert {source for source, _ in sends} == set(picture.layout.ranks)
    for target in picture.layout.ranks:
        sources = [source for source, to in sends if to == target]
        encoded = sorted({cell for source in sources for cell in picture.source(source)})
        assert encoded == (list(picture.destination(target)) if target in owners else [])


def test_the_layout_picture_draws_the_object_it_is_given(tmp_path: Path) -> None:
    """Other gather groups make another picture: nothing is worked out a second time."""
    layout = _bridge((2, 4), (2, 2, 2))
    other = dataclasses.replace(layout, gather_groups=((0, 3), (1, 2), (4, 6), (5, 7)))
    for name, drawn in (("a", layout), ("b", other)):
        plot_layout(tmp_path / f"{name}.png", [drawn], 8, 32)
    left, right = imread(tmp_path / "a.png"), imread(tmp_path / "b.png")
    assert left.shape == right.shape
    assert (left != right).any()
