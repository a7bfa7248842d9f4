# SPDX-License-Identifier: Apache-2.0
"""Who sees GPUs, and that multi-rank tests say where their tensors lie. No GPU is needed."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch

from tests.harness import gpus

TESTS = Path(__file__).resolve().parents[1]
# Without a device these make CPU tensors, which NCCL and a module on a GPU refuse.
CONSTRUCTORS = {"tensor", "zeros", "ones", "empty", "full", "arange", "eye", "linspace"}
CONSTRUCTORS |= {"rand", "randn", "randint", "randperm", "scalar_tensor"}
# What multi-rank tests build their modules and tensors with.
HELPERS = ("tiny_modules.py",)


def without_device(source: str) -> list[str]:
    """Calls of torch's constructors that neither pass ``device=`` nor end in ``.to(…)``."""
    tree = ast.parse(source)
    nodes = list(ast.walk(tree))
    parents = {child: node for node in nodes for child in ast.iter_child_nodes(node)}
    calls = [n for n in nodes if isinstance(n, ast.Call) and is_constructor(n.func)]
    return [
        f"line {call.lineno}: {ast.unparse(call)}"
        for call in calls
        if all(k.arg != "device" for k in call.keywords) and not is_moved(call, parents)
    ]


def is_constructor(function: ast.expr) -> bool:
    name = ast.unparse(function)
    return name.startswith("torch.") and name.removeprefix("torch.") in CONSTRUCTORS


def is_moved(call: ast.expr, parents: dict[ast.AST, ast.AST]) -> bool:
    """Whether ``.to(…)`` follows, perhaps after other methods."""
    method = parents.get(call)
    while isinstance(method, ast.Attribute) and isinstance(parents[method], ast.Call):
        if method.attr == "to":
            return True
        method = parents.get(parents[method])
    return False


def rank_tests() -> list[Path]:
    """The files whose tests run on several ranks, and what they build from."""
    files = sorted((TESTS / "unit_tests").rglob("*.py"))
    return [p for p in files if "mark.ranks" in p.read_text() or p.name in HELPERS]


@pytest.mark.parametrize("path", rank_tests(), ids=lambda path: path.name)
def test_tensors_of_multi_rank_tests_lie_where_they_say(path: Path) -> None:
    assert without_device(path.read_text()) == []


def test_the_multi_rank_tests_are_found() -> None:
    names = {path.name for path in rank_tests()}
    assert len(names) >= 28
    assert {"test_grad_finalize_8rank.py", "test_own_groups.py", *HELPERS} <= names


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("torch.tensor(1)", True),
        ("dist.all_reduce(torch.zeros(2, dtype=torch.int))", True),
        ("f(torch.ones(2)).to(device)", True),
        ("torch.ones(2).double()", True),
        ("torch.zeros(2, device=here)", False),
        ("torch.rand(2, generator=g).double().to(here)", False),
        ("torch.zeros_like(x)", False),
    ],
)
def test_the_search_finds_tensors_without_a_device(code: str, found: bool) -> None:
    assert bool(without_device(code)) is found


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with four GPUs."""
    monkeypatch.setattr(gpus, "installed", lambda: 4)


@pytest.mark.parametrize(
    ("visible", "count"), [(None, 4), ("0,2", 2), ("", 0), ("1,-1,2", 1), ("0,1,2,3,4,5", 4)]
)
def test_gpus_are_counted_as_cuda_counts_them(
    machine: None, visible: str | None, count: int
) -> None:
    env = {} if visible is None else {gpus.VISIBLE: visible}
    assert gpus.visible(env) == count


@pytest.mark.parametrize("before", [None, "0,1,2,3", "0,1"])
def test_gpus_are_hidden_from_all_but_a_launch_with_one_for_each_rank(
    machine: None, before: str | None
) -> None:
    env = {} if before is None else {gpus.VISIBLE: before}
    gpus.prepare(env)
    assert env[gpus.VISIBLE] == "", "tests of one process have CPU tensors"
    for size in (1, 2, 4, 8):
        launch = dict(env)
        shown = gpus.show_to_ranks(launch, size)
        assert shown is (size <= (2 if before == "0,1" else 4))
        assert launch.get(gpus.VISIBLE) == (before if shown else "")
        # The ranks, which the launch started, decide the same.
        rank = {**launch, "WORLD_SIZE": str(size)}
        gpus.prepare(rank)
        assert rank.get(gpus.VISIBLE) == launch.get(gpus.VISIBLE)


def test_torchrun_without_the_harness_decides_the_same(machine: None) -> None:
    enough, few = {"WORLD_SIZE": "4"}, {"WORLD_SIZE": "8"}
    gpus.prepare(enough)
    gpus.prepare(few)
    assert gpus.VISIBLE not in enough
    assert few[gpus.VISIBLE] == ""


def test_this_process_sees_no_gpu() -> None:
    assert not torch.cuda.is_available()
