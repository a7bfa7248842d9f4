# SPDX-License-Identifier: Apache-2.0
"""What is changed for a while is as before afterwards, when what ran inside has failed too."""

from __future__ import annotations

import ast
import contextlib
import logging
import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from megatron.core.models.common.embeddings.rotary_pos_embedding import MultimodalRotaryEmbedding
from megatron.core.models.gpt import GPTModel
from megatron.core.models.mimo.compat import lend_tp_group, tied_heads_as_copies
from megatron.core.models.mimo.gradients.nonfinite import _watched
from megatron.core.models.mimo.memory.kept import KeptStorages
from megatron.core.models.mimo.model.multimodal_rotary import rotary_positions_of
from megatron.core.models.mimo.training import optimizer_savers
from megatron.core.models.mimo.training.agreement import _overheard
from megatron.core.models.mimo.training.initial_weights import seeded
from megatron.core.models.mimo.training.inner_optimizers import held_scales
from megatron.core.models.mimo.training.optimizer_state import _known_groups
from megatron.core.optimizer.optimizer import FP32Optimizer
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from mimo_colocated.launch.launcher import _environment
from mimo_colocated.stop_requests import SIGNALS, StopRequests

ROOT = Path(__file__).parents[3]
FOLDERS = ("megatron", "mimo_colocated", "examples")
# (file, function) -> why what follows its yield is left out when the body raises.
ONLY_AFTER_SUCCESS = {
    ("megatron/core/models/mimo/model/language_runner.py", "_adding"): "looks at what was done",
    ("megatron/core/models/mimo/model/row_path.py", "settled"): "after an error it forgets",
    ("mimo_colocated/phases.py", "during"): "where a rank failed is what others ask for",
    ("mimo_colocated/phases.py", "waiting"): "where a rank failed is what others ask for",
}
Case = tuple[Callable[[], Any], Callable[[], Any]]


def bare(kind: type) -> Any:
    """An object of a class that was not set up: what is changed on it shows."""
    made = object.__new__(kind)
    if issubclass(kind, nn.Module):
        nn.Module.__init__(made)
    return made


def attributes(*objects: Any) -> Callable[[], Any]:
    return lambda: [dict(vars(each)) for each in objects]


def lent() -> Case:
    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1)
    without, own = MegatronModule(config=config), MegatronModule(config=config)
    own.tp_group = "its own"
    both = nn.ModuleList([without, own])
    return lambda: lend_tp_group(both, "lent"), attributes(without, own)


def tied() -> Case:
    model = bare(GPTModel)
    return lambda: tied_heads_as_copies(model), attributes(model)


def watched() -> Case:
    module = nn.Linear(2, 2)
    return lambda: _watched([("a", module)]), lambda: len(module._forward_hooks)


def rotary() -> Case:
    model, inner = nn.Module(), bare(MultimodalRotaryEmbedding)
    model.rotary_pos_emb, inner.cp_group = inner, "of its own"
    return lambda: rotary_positions_of(model, None, "another"), lambda: inner.cp_group


def drawn() -> Case:
    return (
        lambda: seeded(torch.device("cpu"), 5),
        lambda: torch.get_rng_state().tolist(),
    )


def scales() -> Case:
    scaler: Any = SimpleNamespace()
    return lambda: held_scales([scaler]), attributes(scaler)


def mended() -> Case:
    inner = bare(FP32Optimizer)
    return lambda: optimizer_savers.mended(inner), attributes(inner)


def groups() -> Case:
    """While stock loads, groups have numbers where factors of their weight decay stand."""
    mine = [{"params": [], "wd_mult": 1.0, "lr": 0.1}, {"params": [], "wd_mult": 0.0, "lr": 0.1}]
    inner: Any = SimpleNamespace(param_groups=mine)
    saved = {"param_groups": [dict(group) for group in mine]}
    return (
        lambda: _known_groups([(saved, inner)]),
        lambda: [group["wd_mult"] for group in inner.param_groups],
    )


def overheard() -> Case:
    logger = logging.getLogger("megatron.core.dist_checkpointing")
    return _overheard, lambda: (logger.propagate, list(logger.handlers))


def environment() -> Case:
    return _environment, lambda: dict(os.environ)


def stopped() -> Case:
    return StopRequests, lambda: [signal.getsignal(sent) for sent in SIGNALS]


def counted() -> Case:
    kept = KeptStorages([])

    def counts() -> bool:
        before = kept.bytes
        torch.ones(9, requires_grad=True).exp()
        return kept.bytes > before

    return lambda: kept, counts


CASES = [lent, tied, watched, rotary, drawn, scales, mended, groups, overheard, environment]
CASES += [stopped, counted]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("fails", [False, True], ids=["done", "failed"])
def test_it_is_as_before(case: Callable[[], Case], fails: bool) -> None:
    change, state = case()
    before = state()
    inside = None
    with contextlib.suppress(OSError), change():
        if case is drawn:
            torch.rand(3)
        if case is environment:
            os.environ["MIMO_OF_A_JOB"] = "1"
        inside = state()
        if fails:
            raise OSError("no")
    assert inside != before, "nothing is changed, so nothing is proven"
    assert state() == before


def yields(node: ast.AST) -> bool:
    return any(isinstance(each, (ast.Yield, ast.YieldFrom)) for each in ast.walk(node))


def goes_on_after_its_yield(body: list[ast.stmt]) -> bool:
    """Whether statements follow a yield that no ``finally`` guards."""
    for place, each in enumerate(body):
        if not yields(each) or (isinstance(each, ast.Try) and each.finalbody):
            continue
        ends = any(isinstance(last, ast.Return) for last in getattr(each, "body", [])[-1:])
        after = [more for more in body[place + 1 :] if not isinstance(more, ast.Return)]
        if after and not ends:
            return True
        if any(goes_on_after_its_yield(getattr(each, part, [])) for part in ("body", "orelse")):
            return True
    return False


def unguarded(source: str) -> list[str]:
    """Context managers made of generators that put something back, but not after an exception."""
    return [
        each.name
        for each in ast.walk(ast.parse(source))
        if isinstance(each, ast.FunctionDef)
        and any("contextmanager" in ast.unparse(decorator) for decorator in each.decorator_list)
        and goes_on_after_its_yield(each.body)
    ]


def test_what_is_put_back_is_put_back_after_an_exception_too() -> None:
    files = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    found = {
        (path.relative_to(ROOT).as_posix(), name)
        for path in files
        for name in unguarded(path.read_text())
    }
    assert found == set(ONLY_AFTER_SUCCESS)


def asks_for_the_exception(source: str) -> list[str]:
    """Classes that end a ``with`` in one way after an exception and in another without."""
    return [
        kind.name
        for kind in ast.walk(ast.parse(source))
        if isinstance(kind, ast.ClassDef)
        for each in kind.body
        if isinstance(each, ast.FunctionDef) and each.name == "__exit__"
        if any(isinstance(inner, (ast.If, ast.IfExp, ast.BoolOp)) for inner in ast.walk(each))
    ]


def test_what_ends_a_with_ends_it_after_an_exception_too() -> None:
    files = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    assert [path for path in files if asks_for_the_exception(path.read_text())] == []
    left = "class A:\n  def __exit__(self, kind, *_):\n    if kind is None:\n      self.close()"
    assert asks_for_the_exception(left) == ["A"]


@pytest.mark.parametrize(
    ("body", "found"),
    [
        ("yield", False),
        ("x = 1; yield", False),
        ("yield; x = 1", True),
        ("with a: yield\n  x = 1", True),
        ("with a: yield", False),
        ("try: yield\n  finally: x = 1", False),
        ("try: yield\n  except ValueError: x = 1", False),
        ("for a in b:\n   yield\n   x = 1", True),
    ],
)
def test_what_the_search_sees(body: str, found: bool) -> None:
    assert bool(unguarded(f"@contextmanager\ndef f():\n  {body}")) == found
