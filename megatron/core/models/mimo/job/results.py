# SPDX-License-Identifier: Apache-2.0
"""What rank 0 tells: a line per step and a bar, ``metrics.jsonl``, ``summary.json``, a table."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from mimo_colocated.launch.errors import JobError, write_atomically, writing


class MetricsWriter:
    """``metrics.jsonl``: one line per step, whole lines only, each step once.

    A run that resumes at step ``n`` goes on from the lines of the steps before ``n``; later ones,
    and a last line that a kill cut short, are dropped first.
    """

    def __init__(self, path: Path, first_step: int = 0) -> None:
        """Open the file for the lines from ``first_step`` on (0 starts an empty file).

        Raises:
            JobError: for a full disk or a path that cannot be written.
        """
        self.path = path
        kept = [line for line in read_metrics(path) if line["step"] < first_step]
        content = "".join(_line(line) for line in kept).encode()
        write_atomically(path, content, "the metrics")
        self._size = len(content)
        with writing(path, "the metrics"):
            self._file = os.open(path, os.O_WRONLY | os.O_APPEND)

    def write(self, step: int, **values: Any) -> None:
        """Append what one step was like; NaN and infinities become ``null``.

        Raises:
            JobError: when the disk is full; the file then ends with the previous step's line.
        """
        content = _line({"step": step, **values}).encode()
        with writing(self.path, "the metrics"):
            try:
                written = 0
                while written < len(content):
                    written += os.write(self._file, content[written:])
            except OSError:
                os.ftruncate(self._file, self._size)
                raise
        self._size += len(content)

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _line(values: Mapping[str, Any]) -> str:
    return json.dumps(_plain(values), allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    """The same value in JSON's terms: no NaN, no infinities, paths as text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the whole lines of a ``metrics.jsonl``; none if there is no file.

    Raises:
        JobError: for a file that is something else: a line before the last one is broken.
    """
    if not path.exists():
        return []
    lines = path.read_text(errors="replace").splitlines()
    parsed: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        try:
            values = json.loads(line)
            if not isinstance(values, dict) or not isinstance(values.get("step"), int):
                raise ValueError("no step")
        except ValueError as error:
            if number == len(lines):  # cut short by a kill
                break
            raise JobError(
                f"line {number} of {path} is not one step's metrics; "
                "move the file away or start anew with --fresh"
            ) from error
        parsed.append(values)
    return parsed


class Progress:
    """One line per step, and on a terminal a bar below the lines."""

    def __init__(
        self, first_step: int, steps: int, tokens_per_step: int, stream: TextIO | None = None
    ) -> None:
        """Start the clock.

        Args:
            first_step: steps that are done already (a resumed run).
            steps: steps in all.
            tokens_per_step: of the global batch, padding included.
            stream: where to print; stdout by default.
        """
        self.steps, self.tokens_per_step = steps, tokens_per_step
        self.stream = sys.stdout if stream is None else stream
        self.seconds: list[float] = []
        self._last = time.perf_counter()
        self._bar = tqdm(
            total=steps,
            initial=first_step,
            unit="step",
            file=self.stream,
            disable=not self.stream.isatty(),  # carriage returns would fill a log file
            dynamic_ncols=True,
        )

    @property
    def seconds_per_step(self) -> float:
        """Median over this run's steps, the first left out if there are more; NaN without any."""
        steady = sorted(self.seconds[1:] or self.seconds)
        return steady[len(steady) // 2] if steady else math.nan

    def step(
        self,
        done: int,
        loss: float,
        grad_norm: float,
        more: Callable[[float], str] = lambda _seconds: "",
    ) -> float:
        """Report that ``done`` steps are done; return the seconds the last one took.

        Args:
            done: steps in all.
            loss: of the step.
            grad_norm: of the step.
            more: from the step's seconds to further words of its line; empty for none.
        """
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        self.seconds.append(seconds)
        left = tqdm.format_interval((self.steps - done) * self.seconds_per_step)
        width = len(str(self.steps))
        rate = self.tokens_per_step / max(seconds, 1e-9)
        said = more(seconds)
        self.say(
            f"step {done:>{width}}/{self.steps}  loss {loss:.4f}  grad norm {grad_norm:.3f}  "
            f"{rate:,.0f} tokens/s  {said}{'  ' if said else ''}{left} left"
        )
        self._bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)
        self._bar.update(1)
        return seconds

    def pause(self) -> None:
        """Do not count the time since the last step (a checkpoint was written)."""
        self._last = time.perf_counter()

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        self._bar.write(line, file=self.stream)
        self.stream.flush()

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()


def write_summary(path: Path, summary: Mapping[str, Any]) -> None:
    """Write ``summary`` as JSON, all of it or nothing.

    Raises:
        JobError: for a full disk or a path that cannot be written.
    """
    content = json.dumps(_plain(summary), indent=2, allow_nan=False) + "\n"
    write_atomically(path, content.encode(), "the summary")


def print_table(title: str, summary: Mapping[str, Any], stream: TextIO | None = None) -> None:
    """Print a summary as a table; nested values are shown as ``key=value`` pairs.

    Args:
        title: above the table.
        summary: key -> value.
        stream: where to print; stdout by default.
    """
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_style="bold", show_header=False)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for key, value in summary.items():
        table.add_row(key.replace("_", " "), _cell(value))
    Console(file=stream or sys.stdout).print(table)


def _cell(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key}={_cell(inner)}" for key, inner in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)
