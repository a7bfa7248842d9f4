# SPDX-License-Identifier: Apache-2.0
"""Count private methods that a class calls through ``self`` and another class defines.

    python tools/private_calls.py [FOLDER]      default: megatron/core/models/mimo

A method that another class, a mixin or a base, keeps for itself is called where nothing imports it:
a dependency that no import shows. This prints each one and ends with their number.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Class:
    """One class of the package: where it stands, what it defines and calls."""

    name: str
    file: Path
    defines: set[str] = field(default_factory=set)
    calls: list[tuple[str, int]] = field(default_factory=list)


def classes_of(file: Path) -> Iterator[Class]:
    """The classes of a file, with every ``self._name`` that they read."""
    for node in ast.walk(ast.parse(file.read_text())):
        if not isinstance(node, ast.ClassDef):
            continue
        found = Class(node.name, file)
        for part in ast.walk(node):
            if isinstance(part, ast.FunctionDef):
                found.defines.add(part.name)
            elif isinstance(part, ast.Call) and isinstance(part.func, ast.Attribute):
                owner, name = part.func.value, part.func.attr
                if isinstance(owner, ast.Name) and owner.id == "self" and _is_private(name):
                    found.calls.append((name, part.lineno))
        yield found


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def foreign_calls(classes: list[Class]) -> list[tuple[Class, str, int, str]]:
    """(caller, method, line, owner) of each call of a method that only another class defines."""
    return [
        (each, name, line, owner.name)
        for each in classes
        for name, line in each.calls
        if name not in each.defines
        for owner in classes
        if name in owner.defines
    ]


def main(folder: str = "megatron/core/models/mimo") -> None:
    """Print the calls and their number."""
    classes = [c for file in sorted(Path(folder).rglob("*.py")) for c in classes_of(file)]
    found = foreign_calls(classes)
    for caller, name, line, owner in found:
        print(f"{caller.file}:{line}: {caller.name} calls {owner}.{name} through self")
    print(f"{len(found)} private calls across classes")


if __name__ == "__main__":
    main(*sys.argv[1:2])
