# SPDX-License-Identifier: Apache-2.0
"""Write docs/options.md from the options themselves; ``--check`` only says whether it is current.

python -m tools.write_options [--check]
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from examples.mimo.digits.options import Options
from mimo_colocated.cli.options import ALONE, COMMANDS, DESCRIPTIONS, parser_of
from mimo_colocated.launch.training_options import TrainingOptions
from mimo_colocated.train import command as train
from mimo_colocated.train.recipe import Recipe

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "options.md"
HEAD = """# Options

Written by `python -m tools.write_options` from the options themselves.
"""


def text() -> str:
    """Return the page."""
    parts = [HEAD, *_digits()]
    for command in (*COMMANDS, *ALONE):
        own = _of(parser_of(command))
        parts += [f"## mimo {command}\n", f"{DESCRIPTIONS[command]}\n", _table(own)]
    parts += ["## mimo train\n", f"{train.DESCRIPTION}\n", _table(_of(train.parser()))]
    parts += ["The fields of a recipe ([training.md](training.md)):\n", _table(_fields(Recipe, ""))]
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


def _of(parser: argparse.ArgumentParser) -> Iterator[tuple[str, str, str]]:
    for action in parser._actions:
        if action.dest in ("help", "print_config"):
            continue  # the libraries' own
        said = ", ".join(action.option_strings) or str(action.metavar)
        if action.choices:
            said += f" {'|'.join(map(str, action.choices))}"
        none = (None, False, [], argparse.SUPPRESS)
        default = "" if action.default in none else str(action.default)
        yield said, default, str(action.help)


def _fields(kind: Any, path: str) -> Iterator[tuple[str, str, str]]:
    """Every field of a recipe, by its path; what it means stands in the docstring of its part."""
    types = typing.get_type_hints(kind)
    meanings = _meanings(kind.__doc__ or "")
    for field in dataclasses.fields(kind):
        inner, name = types[field.name], f"{path}{field.name}"
        each = typing.get_args(inner)[:1]
        if dataclasses.is_dataclass(inner):
            yield from _fields(inner, f"{name}.")
            continue
        yield name, _default(field), meanings[field.name]
        if each and dataclasses.is_dataclass(each[0]) and field.name in ("train", "rules"):
            yield from _fields(each[0], f"{name}.N.")


def _default(field: dataclasses.Field[Any]) -> str:
    made = field.default
    if field.default_factory is not dataclasses.MISSING:
        made = field.default_factory()
    return "" if made in (dataclasses.MISSING, "", [], {}) else str(made)


def _meanings(docstring: str) -> dict[str, str]:
    """Field -> what the ``Attributes`` of a docstring say of it."""
    found: dict[str, str] = {}
    for line in docstring.partition("Attributes:")[2].splitlines():
        name, colon, text = line.strip().partition(": ")
        if line.startswith(" " * 8) and not line.startswith(" " * 9) and colon:
            found[name] = text
        elif found and line.strip():
            found[list(found)[-1]] += " " + line.strip()
    return {name: text.replace("``", "`").rstrip(".") for name, text in found.items()}


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
