# SPDX-License-Identifier: Apache-2.0
"""A number that may be ``None`` is compared with it: 0 and 0.0 are values. Read off the sources.

``if layers:`` and ``layers or default`` take 0 for "not given". What is asked by its truth
nevertheless is listed with the reason why 0 cannot come there or means the same.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.once

ROOT = Path(__file__).parents[3]
FOLDERS = ("megatron", "mimo_colocated", "examples")
NUMBERS = ("int", "float")
_MIMO = "megatron/core/models/mimo/"
_REFUSED = "0 is refused before"
# (file, function, name) -> why.
BY_THEIR_TRUTH = {
    (_MIMO + "huggingface/own_encoders.py", "tower_part", "width"): "no tower has rows without one",
    (_MIMO + "memory/plan.py", "kept", "encode_ahead"): _REFUSED,
    (_MIMO + "pipeline/windows.py", "of", "encode_ahead"): _REFUSED,
    ("mimo_colocated/launch/training_options.py", "_check_pipeline", "encode_ahead"): _REFUSED,
    ("mimo_colocated/stop_requests.py", "_received", "_terminated_at"): "a clock since the boot",
}


def is_number_or_none(annotation: ast.expr | None) -> bool:
    """``int | None``, ``str | float | None``, ``int | tuple[int, ...] | None``, in any order."""
    members, left = [], [annotation]
    while left:
        each = left.pop()
        if isinstance(each, ast.BinOp):
            left += [each.left, each.right]
        else:
            members.append(each)
    may_be_none = any(isinstance(m, ast.Constant) and m.value is None for m in members)
    return may_be_none and any(isinstance(m, ast.Name) and m.id in NUMBERS for m in members)


def asked(node: ast.AST) -> Iterator[ast.expr]:
    """Expressions that the node takes for true or false."""
    if isinstance(node, (ast.If, ast.IfExp, ast.While, ast.Assert)):
        yield node.test
    elif isinstance(node, ast.BoolOp):
        yield from node.values
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield node.operand
    elif isinstance(node, ast.comprehension):
        yield from node.ifs
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "bool":
        yield from node.args


def by_their_truth(source: str) -> set[tuple[str, str]]:
    """(function, name) of parameters and attributes that are asked for their truth."""
    tree = ast.parse(source)
    fields = {
        each.target.id
        for each in ast.walk(tree)
        if isinstance(each, ast.AnnAssign)
        and isinstance(each.target, ast.Name)
        and is_number_or_none(each.annotation)
    }
    fields |= {
        each.target.attr
        for each in ast.walk(tree)
        if isinstance(each, ast.AnnAssign)
        and isinstance(each.target, ast.Attribute)
        and is_number_or_none(each.annotation)
    }
    found = set()
    for function in ast.walk(tree):
        if not isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        given = function.args
        named = {
            each.arg
            for each in (*given.posonlyargs, *given.args, *given.kwonlyargs)
            if is_number_or_none(each.annotation)
        }
        for node in ast.walk(function):
            for value in asked(node):
                if isinstance(value, ast.Name) and value.id in named | fields:
                    found.add((function.name, value.id))
                if isinstance(value, ast.Attribute) and value.attr in fields:
                    found.add((function.name, value.attr))
    return found


def everywhere() -> set[tuple[str, str, str]]:
    files = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    return {
        (path.relative_to(ROOT).as_posix(), *each)
        for path in files
        for each in by_their_truth(path.read_text())
    }


def test_zero_is_not_taken_for_none() -> None:
    assert everywhere() == set(BY_THEIR_TRUTH)


@pytest.mark.parametrize(
    ("body", "found"),
    [
        ("if x is not None: pass", set()),
        ("return x == 0 or y", set()),
        ("if x: pass", {("f", "x")}),
        ("return x or 3", {("f", "x")}),
        ("return y and not x", {("f", "x")}),
        ("return [n for n in y if x]", {("f", "x")}),
        ("return 1 if self.z else 2", {("f", "z")}),
        ("return bool(x)", {("f", "x")}),
    ],
)
def test_what_is_seen(body: str, found: set[tuple[str, str]]) -> None:
    """The control: each way to ask a number for its truth, and none that compares it."""
    fields = "class A:\n z: int | tuple[int, ...] | None\n"
    given = "self, x: str | int | None, y"
    assert by_their_truth(f"{fields} def f({given}):\n  {body}") == found
