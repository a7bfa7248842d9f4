# SPDX-License-Identifier: Apache-2.0
"""``report.html``: a run on one page that needs no network, no server and no script."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import yaml

from megatron.core.models.mimo.job.results import read_metrics
from mimo_colocated.launch.errors import JobError, write_atomically
from mimo_colocated.launch.layouts import LANGUAGE, Layout
from mimo_colocated.train import report_figures as figures

PAGE = "report.html"
ANSWERS = 20
"""That are shown."""
_AXES = ("tp", "cp", "dp", "pp")
# Nothing is loaded from outside, whatever stands in an answer.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #1b1f24; max-width: 62rem; margin: 2rem auto;
       padding: 0 1rem; }
table { border-collapse: collapse; } td, th { padding: .2rem .7rem; text-align: left;
        border-bottom: 1px solid #d0d7de; vertical-align: top; }
th { font-weight: 600; } img { max-width: 100%; } figure { margin: 1rem 0; }
figcaption { color: #6e7781; } .right { color: #1a7f37; } .wrong { color: #cf222e; }
pre { background: #f6f8fa; padding: .8rem; overflow: auto; }
"""


@dataclass(frozen=True)
class Run:
    """What a run's folder holds, so far.

    Attributes:
        recipe: its fields, as plain values.
        record: of ``run.json``.
        lines: of ``metrics.jsonl``.
        summary: of ``summary.json``; empty until the run ends.
        answers: of ``answers.json``.
    """

    recipe: Mapping[str, Any]
    record: Mapping[str, Any]
    lines: Sequence[Mapping[str, Any]]
    summary: Mapping[str, Any]
    answers: Sequence[Mapping[str, str]]

    @classmethod
    def read(cls, folder: Path) -> Run:
        """Read it; a run that is still under way, too.

        Args:
            folder: of the run, as ``run.out`` names it.

        Raises:
            JobError: it is no run, or a file of it is broken.
        """
        needed = [name for name in ("recipe.yaml", "run.json") if not (folder / name).is_file()]
        if needed:
            raise JobError(
                f"{folder} holds no {needed[0]}, so it is no run of `mimo train`; give the folder "
                "that run.out names"
            )
        try:
            recipe = yaml.safe_load((folder / "recipe.yaml").read_text("utf-8"))
        except yaml.YAMLError as error:
            raise JobError(f"{folder / 'recipe.yaml'} is no YAML: {error}") from error
        return cls(
            recipe,
            _json(folder / "run.json"),
            read_metrics(folder / "metrics.jsonl"),
            _json(folder / "summary.json"),
            _json(folder / "answers.json").get("answers", []),
        )

    @property
    def layouts(self) -> dict[str, Layout]:
        """Module -> its layout."""
        return {
            name: Layout(**{axis: sizes.get(axis, 1) for axis in _AXES})
            for name, sizes in self.record.get("layouts", {}).items()
        }


def write_report(folder: Path) -> Path:
    """Write the page of a run into its folder, whole or not at all; return where it is.

    Args:
        folder: of the run.

    Raises:
        JobError: the folder holds no run, or cannot be written to.
    """
    content = page(Run.read(folder), folder.resolve().name)
    write_atomically(folder / PAGE, content.encode(), "the page of the run")
    return folder / PAGE


def page(run: Run, name: str) -> str:
    """Return a run's page.

    Args:
        run: what it left.
        name: of its folder.
    """
    title = escape(f"{run.recipe.get('name', 'run')} in {name}")
    parts = [
        _table(_facts(run)),
        *_figures(run),
        *_samples(run),
        *_answers(run.answers),
        "<h2>Versions</h2>",
        _table(_versions(run.record)),
        "<h2>Recipe</h2>",
        f"<pre>{escape(yaml.safe_dump(dict(run.recipe), sort_keys=False))}</pre>",
    ]
    return "\n".join(
        [
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            f"<title>{title}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>",
            *parts,
            "</body>\n</html>\n",
        ]
    )


def _facts(run: Run) -> dict[str, str]:
    """What is told first."""
    lines, steps = run.lines, run.recipe.get("training", {}).get("steps")
    found = {"steps": f"{lines[-1]['step'] if lines else 0} of {steps}"}
    found |= {f"layout of {name}": str(at) for name, at in run.layouts.items()}
    if lines:
        found["last loss"] = _number(lines[-1].get("loss"))
        found["seconds per step"] = _number(sorted(_all(lines, "seconds"))[len(lines) // 2])
        found["waiting for data"] = f"{waited_share(lines):.1%} of the time"
        found |= _work_facts(lines)
    shown = ("held_out_loss", "questions", "exact_match", "majority_answer")
    for key in (*shown, "exact_match_without_images"):
        if key in run.summary:
            found[key.replace("_", " ")] = _number(run.summary[key])
    return found


def _work_facts(lines: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Medians and sums of what steps did."""
    found = {}
    for key, said in (("tflops_per_rank", "TFLOP/s per rank"), ("mfu", "MFU")):
        if values := sorted(_all(lines, key)):
            found[f"{said}, median"] = _number(values[len(values) // 2])
    work = sum(sum(line.get("tflop", {}).values()) for line in lines)
    if repeated := _sum(lines, "tflop_repeated"):
        found["a homogeneous layout would repeat"] = f"{repeated / max(work, 1e-12):.1%} more work"
    if memory := _all(lines, "peak_memory"):
        found["peak memory of rank 0"] = f"{max(memory) / 2**30:.3g} GiB"
    return found


def _figures(run: Run) -> Iterator[str]:
    lines = run.lines
    if lines:
        yield "<h2>Curves</h2>"
        yield _figure("curves", figures.curves(lines), "loss, gradient norm and learning rate")
        yield "<h2>Time and work</h2>"
        said = "seconds per step, and how long it waited for its data"
        yield _figure("seconds", figures.seconds(lines), said)
        if "tflop" in lines[0]:
            said = "what the images and tokens of a step need, forward and backward"
            yield _figure("work", figures.work(lines), said)
            yield _figure("rate", figures.rate(lines), "how fast that was")
    layouts = run.layouts
    if len(layouts) > 1 and layouts[LANGUAGE].size <= figures.MOST_RANKS:
        yield "<h2>Layouts</h2>"
        drawn = figures.layout(
            layouts,
            run.recipe["data"]["max_tokens"],
            sequence_parallel=run.recipe["layout"]["sequence_parallel"],
        )
        yield _figure("layout", drawn, "which rank holds what")


def _figure(name: str, svg: str, said: str) -> str:
    data = base64.b64encode(svg.encode()).decode()
    shown = f'<img id="{name}" alt="{escape(said)}" src="data:image/svg+xml;base64,{data}">'
    return f"<figure>{shown}<figcaption>{escape(said)}</figcaption></figure>"


def _samples(run: Run) -> Iterator[str]:
    yield "<h2>Samples</h2>"
    seen = {
        f"{name} seen": f"{_sum(run.lines, name):,.0f}" for name in ("samples", "images", "tokens")
    }
    skipped = run.record.get("skipped", {})
    counts = {f"skipped: {reason}": f"{count:,}" for reason, count in skipped.items()}
    yield _table({**seen, **(counts or {"skipped": "none"})})


def _answers(answers: Sequence[Mapping[str, str]]) -> Iterator[str]:
    if not answers:
        return
    from mimo_colocated.train.answers import Answer

    read = [Answer(**each) for each in answers]
    right = sum(each.right for each in read)
    yield f"<h2>Answers</h2><p>{right:,} of {len(read):,} are right. The first of them:</p>"
    yield "<table><tr><th>question</th><th>wanted</th><th>said</th><th></th></tr>"
    for each in read[:ANSWERS]:
        word = "right" if each.right else "wrong"
        cells = "".join(f"<td>{escape(t)}</td>" for t in (each.question, each.wanted, each.said))
        yield f'<tr>{cells}<td class="{word}">{word}</td></tr>'
    yield "</table>"


def _versions(record: Mapping[str, Any]) -> dict[str, str]:
    git = record.get("git") or {}
    found = {**record.get("versions", {}), "ranks": str(record.get("ranks", ""))}
    if git:
        changed = f", {len(git['changed'])} files changed" if git["changed"] else ""
        found["commit"] = git["commit"] + changed
    return {**found, "command": " ".join(record.get("command", []))}


def _table(rows: Mapping[str, str]) -> str:
    cells = (f"<tr><th>{escape(k)}</th><td>{escape(v)}</td></tr>" for k, v in rows.items())
    return f"<table>{''.join(cells)}</table>"


def _json(path: Path) -> dict[str, Any]:
    """What a file holds; nothing if it is not there."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text("utf-8"))
        if not isinstance(found, dict):
            raise ValueError(f"it holds {type(found).__name__}")
    except ValueError as error:
        raise JobError(f"{path} is not what a run leaves: {error}; move it away") from error
    return found


def _all(lines: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    return [line[name] for line in lines if line.get(name) is not None]


def waited_share(lines: Sequence[Mapping[str, Any]]) -> float:
    """Return the part of the steps' time that they waited for their data.

    Args:
        lines: of ``metrics.jsonl``.
    """
    return _sum(lines, "waited_s") / max(_sum(lines, "seconds"), 1e-9)


def _sum(lines: Sequence[Mapping[str, Any]], name: str) -> float:
    return sum(_all(lines, name))


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
