# SPDX-License-Identifier: Apache-2.0
"""Every argument of a public function or method is read by its body, or is here with its reason.

By inspection of the source: a name that no statement of the body mentions is accepted and ignored.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

from tests.functional.readme_blocks import REPO

pytestmark = pytest.mark.once

# FILE::function(argument) -> why it is accepted and not read.
NOT_READ = {
    "megatron/core/models/mimo/model/ddp_methods.py::start_grad_sync(unused)": (
        "schedules name parameters; all of a module's buckets start together"
    ),
    **{
        f"megatron/core/models/mimo/model/gathered_path.py::{name}": "other ways have use for it"
        for name in ("make_bridge(config)", "build(options)")
    },
    "megatron/core/models/mimo/model/routed_path.py::levels(batch)": (
        "its rows know their places; the gathered way looks for them"
    ),
    "megatron/core/models/mimo/model/gathered_path.py::plan(route_plan)": (
        "MimoModel has refused one before"
    ),
    "megatron/core/models/mimo/model/ddp_methods.py::start_param_sync(unused)": (
        "schedules name parameters; all of a module's buckets start together"
    ),
    "megatron/core/models/mimo/submodules/base.py::decode(embeddings)": "raises always",
    "megatron/core/models/mimo/submodules/base.py::decode(data_batch)": "raises always",
    "megatron/core/models/mimo/gradients/finalize.py::__call__(pg_collection)": (
        "schedules pass the language model's groups, which were given at construction"
    ),
    "megatron/core/models/mimo/transformer/context_parallel_attention.py::"
    "__init__(cp_comm_type)": "chooses how stock communicates, not what comes out",
    "megatron/core/models/mimo/transformer/context_parallel_attention.py::__init__(unused)": (
        "Megatron-Core versions pass shapes, which the tensors tell"
    ),
    "megatron/core/models/mimo/transformer/context_parallel_attention.py::forward(unused)": (
        "Megatron-Core versions pass kernels' options"
    ),
    "megatron/core/models/mimo/transformer/ulysses_attention.py::forward(unused)": (
        "Megatron-Core versions pass kernels' options"
    ),
    "megatron/core/models/mimo/transformer/norms.py::__new__(unused)": (
        "Megatron-Core versions pass kernels' options"
    ),
    **{
        f"megatron/core/models/mimo/huggingface/cuts.py::{name}": "other kinds of cut read it"
        for name in ("length(heads)", "runs(heads)", "runs(lengths)", "runs(shard)")
    },
    "megatron/core/models/mimo/huggingface/folder.py::__exit__(ended)": (
        "a context manager is told how its block ended"
    ),
    "mimo_colocated/_startup.py::find_spec(path)": "a finder of the import system is called so",
    "mimo_colocated/_startup.py::find_spec(target)": "a finder of the import system is called so",
    "megatron/core/models/mimo/torch_native/data_parallel.py::sharded_state_dict(metadata)": (
        "says how Megatron's modules save; a tensor's part is the same whatever it says"
    ),
    "megatron/core/models/mimo/torch_native/language_model.py::forward(position_ids)": (
        "stock's signature of an embedding; rotary positions are the attention's concern"
    ),
}


def public_functions(tree: ast.Module) -> Iterator[ast.FunctionDef]:
    """Functions and methods that a user may call: no underscore, not inside another one."""
    for node in tree.body:
        owners = node.body if isinstance(node, ast.ClassDef) else [node]
        for each in owners if not getattr(node, "name", "").startswith("_") else []:
            name = getattr(each, "name", "_")
            if isinstance(each, ast.FunctionDef) and (name[0] != "_" or name.startswith("__")):
                yield each


def not_read(function: ast.FunctionDef) -> list[str]:
    """Arguments that the body does not mention; those of a body without statements are none."""
    arguments = function.args
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    named += [each for each in (arguments.vararg, arguments.kwarg) if each is not None]
    names = [each.arg for each in named if each.arg not in ("self", "cls")]
    statements = [
        each
        for each in function.body
        if not (isinstance(each, ast.Expr) and isinstance(each.value, ast.Constant))
    ]
    read = {n.id for each in statements for n in ast.walk(each) if isinstance(n, ast.Name)}
    return [name for name in names if statements and name not in read and name[0] != "_"]


def ignored(source: str, path: str) -> list[str]:
    return [
        f"{path}::{function.name}({name})"
        for function in public_functions(ast.parse(source))
        for name in not_read(function)
    ]


def test_every_argument_is_read_or_named_with_its_reason() -> None:
    found: list[str] = []
    for package in ("megatron", "mimo_colocated"):
        for path in sorted((REPO / package).rglob("*.py")):
            found += ignored(path.read_text("utf-8"), path.relative_to(REPO).as_posix())
    assert set(found) - set(NOT_READ) - cpu_stand_ins(found) == set()
    assert set(NOT_READ) - set(found) == set(), "these are read now"


def cpu_stand_ins(found: list[str]) -> set[str]:
    """Of the CPU backend: what stands for CUDA's streams and events has nothing to do."""
    return {each for each in found if each.startswith("megatron/core/models/mimo/cpu_backend.py")}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("def f(a, *, b=None):\n    'doc'\n    return a\n", ["x.py::f(b)"]),
        ("class C:\n    def m(self, a):\n        return 1\n", ["x.py::m(a)"]),
        ("class C:\n    def m(self, a):\n        'abstract'\n", []),
        ("def f(a):\n    def inner(b): return a\n    return inner\n", []),
        ("def f(**kwargs):\n    return 1\n", ["x.py::f(kwargs)"]),
    ],
)
def test_the_inspection_sees_what_is_ignored(source: str, expected: list[str]) -> None:
    assert ignored(source, "x.py") == expected
