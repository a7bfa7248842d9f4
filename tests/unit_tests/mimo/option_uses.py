# SPDX-License-Identifier: Apache-2.0
"""Which public arguments and fields the package has a default for, and which of them tests set.

Read from source text; nothing is imported or run. An *option* is an argument with a default of a
public function, method or constructor, or a field with a default of a public dataclass. Tests set
it where they call its owner with another value, by name or by position. Where a call takes ``**``,
where only one owner has the name, and for ``forward``, which modules call by themselves, any
keyword, dict's key and attribute of that name counts: helpers hand them on.
"""

from __future__ import annotations

import ast
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Option:
    """An argument or field that has a default.

    Attributes:
        owner: the function, method or class that takes it.
        name: of the argument.
        default: as source text.
        place: among the positional arguments of a call; ``None`` for a keyword only.
    """

    owner: str
    name: str
    default: str
    place: int | None

    def __str__(self) -> str:
        return f"{self.owner}({self.name})"


def options_of(files: Iterable[Path]) -> list[Option]:
    """Every option of public code in these files; methods that override share one entry."""
    found = [option for path in files for option in _in_body(ast.parse(path.read_text()).body)]
    return list(dict.fromkeys(found))


def _in_body(body: list[ast.stmt], owner: str = "") -> Iterator[Option]:
    for node in body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            if any("dataclass" in ast.unparse(each) for each in node.decorator_list):
                yield from _fields(node)
            yield from _in_body(node.body, node.name)
        elif isinstance(node, ast.FunctionDef):
            name = owner if node.name == "__init__" else node.name
            if not name.startswith("_"):
                yield from _arguments(node, name, bound=bool(owner))


def _fields(node: ast.ClassDef) -> Iterator[Option]:
    fields = [each for each in node.body if isinstance(each, ast.AnnAssign)]
    for place, each in enumerate(fields):
        if each.value is not None and not each.target.id.startswith("_"):
            yield Option(node.name, each.target.id, ast.unparse(each.value), place)


def _arguments(node: ast.FunctionDef, owner: str, *, bound: bool) -> Iterator[Option]:
    arguments = node.args
    if bound and not any(ast.unparse(each) == "staticmethod" for each in node.decorator_list):
        arguments.args = arguments.args[1:]
    places = [*arguments.posonlyargs, *arguments.args]
    first = len(places) - len(arguments.defaults)
    for place, default in enumerate(arguments.defaults, start=first):
        yield Option(owner, places[place].arg, ast.unparse(default), place)
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        if default is not None:
            yield Option(owner, argument.arg, ast.unparse(default), None)


class Uses:
    """The calls of some source files, and what they hand on by name.

    Args:
        files: of the tests.
        code: of the package, for what inherits from what.
    """

    def __init__(self, files: Iterable[Path], code: Iterable[Path] = ()) -> None:
        self._calls: dict[str, list[ast.Call]] = defaultdict(list)
        self._named: dict[str, set[str]] = defaultdict(set)
        self._subclasses: dict[str, set[str]] = defaultdict(set)
        for path in files:
            for node in ast.walk(ast.parse(path.read_text())):
                self._note(node)
        for path in code:
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ClassDef):
                    for base in node.bases:
                        self._subclasses[_last_name(base)].add(node.name)

    def _note(self, node: ast.AST) -> None:
        if isinstance(node, ast.Call):
            self._calls[_last_name(node.func)].append(node)
            for keyword in node.keywords:
                if keyword.arg is not None:
                    self._named[keyword.arg].add(ast.unparse(keyword.value))
        elif isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                self._note_key(key, value)
        elif isinstance(node, ast.Assign):
            target = node.targets[0]
            if isinstance(target, ast.Subscript):
                self._note_key(target.slice, node.value)
            elif isinstance(target, ast.Attribute):
                self._named[target.attr].add(ast.unparse(node.value))

    def _note_key(self, key: ast.expr | None, value: ast.expr) -> None:
        if isinstance(key, ast.Constant) and isinstance(key.value, str):
            self._named[key.value].add(ast.unparse(value))

    def unset(self, options: Iterable[Option]) -> list[Option]:
        """The options that no call sets to another value than the default."""
        options = list(options)
        owners = Counter(option.name for option in options)
        return [
            option
            for option in options
            if not self._sets(option, named=owners[option.name] == 1 or option.owner == "forward")
        ]

    def names(self, name: str, default: str) -> bool:
        """Whether a keyword, a dict's key or an attribute of this name has another value."""
        return bool(self._named[name] - {default})

    def _family(self, owner: str) -> set[str]:
        """The owner and all that inherit from it."""
        return {owner}.union(*(self._family(each) for each in self._subclasses[owner]))

    def _sets(self, option: Option, *, named: bool) -> bool:
        if named and self.names(option.name, option.default):
            return True
        owners = self._family(option.owner)
        calls = [call for owner in owners for call in self._calls[owner]]
        partial = [call for call in self._calls["partial"] if _last_name(call.args[0]) in owners]
        return any(self._sets_in(call, option) for call in calls) or any(
            self._sets_in(call, option, skip=1) for call in partial
        )

    def _sets_in(self, call: ast.Call, option: Option, skip: int = 0) -> bool:
        for keyword in call.keywords:
            if keyword.arg is None and self.names(option.name, option.default):
                return True
            if keyword.arg == option.name:
                return ast.unparse(keyword.value) != option.default
        place = None if option.place is None else option.place + skip
        if place is None or len(call.args) <= place:
            return False
        return ast.unparse(call.args[place]) != option.default


def _last_name(node: ast.expr) -> str:
    """``c`` of ``a.b.c``; empty for what has no name."""
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")
