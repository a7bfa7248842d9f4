# SPDX-License-Identifier: Apache-2.0
"""Write docs/options.md from the options themselves; ``--check`` only says whether it is current.

python -m tools.write_options [--check]
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from examples.mimo.digits.options import Options
from mimo_colocated.cli.options import ALONE, COMMANDS, DESCRIPTIONS, parser_of
from mimo_colocated.launch.training_options import TrainingOptions

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "options.md"
HEAD = """# Options

Written by `python -m tools.write_options` from the options themselves.
"""


def text() -> str:
    """Return the page."""
    parts = [HEAD, *_digits()]
    for command in (*COMMANDS, *ALONE):
        parts += [f"## mimo {command}\n", f"{DESCRIPTIONS[command]}\n", _table(_of(command))]
    return "\n".join(parts)


def _digits() -> Iterator[str]:
    yield "## The digits job\n"
    yield '`make train ARGS="..."`, or `.venv/bin/python examples/mimo/digits/train.py ...`.\n'
    fields = dataclasses.fields(Options)
    common = {each.name for each in dataclasses.fields(TrainingOptions)}
    yield "Of this job:\n"
    yield _table(_row(each) for each in fields if each.name not in common)
    yield "Of every job that takes `TrainingOptions`:\n"
    yield _table(_row(each) for each in fields if each.name in common)


def _row(field: dataclasses.Field[Any]) -> tuple[str, str, str]:
    name, default = field.name.replace("_", "-"), field.default
    if isinstance(default, bool):
        return f"--{name}, --no-{name}", "on" if default else "off", field.metadata["help"]
    choices = field.metadata["choices"]
    said = f"--{name} {'|'.join(choices)}" if choices else f"--{name}"
    return said, "" if default is None else str(default), field.metadata["help"]


def _of(command: str) -> Iterator[tuple[str, str, str]]:
    for action in parser_of(command)._actions:
        if action.dest in ("help", "print_config"):
            continue  # the libraries' own
        said = ", ".join(action.option_strings) or str(action.metavar)
        if action.choices:
            said += f" {'|'.join(map(str, action.choices))}"
        default = "" if action.default in (None, False, argparse.SUPPRESS) else str(action.default)
        yield said, default, str(action.help)


def _table(rows: Iterator[tuple[str, str, str]]) -> str:
    lines = ["| option | default | |", "|---|---|---|"]
    for said, default, meaning in rows:
        shown = f"`{default}`" if default else ""
        lines.append(f"| `{said.replace('|', chr(92) + '|')}` | {shown} | {meaning} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Write the page, or say that it is old."""
    check = "--check" in sys.argv[1:]
    current = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
    if current == (new := text()):
        return 0
    if check:
        print(f"{PAGE.relative_to(ROOT)} is old; write it with: python -m tools.write_options")
        return 1
    PAGE.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
