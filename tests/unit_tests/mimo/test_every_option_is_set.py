# SPDX-License-Identifier: Apache-2.0
"""Every public argument and field with a default is set to another value by some test.

An option that nobody sets can be ignored, or mean its opposite, and every test passes.
"""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer.transformer_config import TransformerConfig
from tests.unit_tests.mimo.option_uses import Option, Uses, options_of

pytestmark = pytest.mark.once

ROOT = Path(__file__).resolve().parents[3]
# Options of a command line are set as text (functional/test_digits_options.py), fields of a recipe
# as YAML (unit_tests/mimo/train/test_recipe.py).
CODE = [
    path
    for folder in ("megatron", "mimo_colocated")
    for path in sorted(ROOT.glob(f"{folder}/**/*.py"))
    if path.name not in ("training_options.py", "recipe.py")
]
# What trains, too: tests of the digits job run it, and it hands on what the job is told.
JOB = [*ROOT.glob("examples/mimo/digits/*.py"), *ROOT.glob("megatron/core/models/mimo/job/*.py")]
TESTS = [
    path
    for path in [*ROOT.glob("tests/**/*.py"), *JOB]
    if "mutants" not in path.parts and path != Path(__file__).resolve()
]

_RECORD = "what the package itself writes into it is compared by the tests of what it records"
# Option -> why no test sets it. One that a test sets is to leave this list.
EXCEPTIONS = {
    **dict.fromkeys(
        (
            "Statement(digest)",
            "Statement(planned_rows)",
            "Statement(problem)",
            "TokenRuns(cu_seqlens)",
            "HostUse(now)",
            "HostUse(moved)",
            "EncodedMicrobatch(stands_for)",
            "EncodedMicrobatches(later)",
            "EncoderOutput(sequence_first)",
            "Answer(problem)",
            "LanguageBatch(problem)",
            "LanguageBatch(packed)",
            "Reason(log)",
            "StepResult(modules)",
            "RouteLayout(later_stages)",
            "RouteLayout(dest_stage)",
            "RoutePlan(later)",
            "RowsForPlaces(arrived)",
            "LanguageBatch(lengths)",
            "EncoderOutput(where)",
        ),
        _RECORD,
    ),
    "peel(wrappers)": "the callers' constant",
    "sharded_state_dict_of_children(wrappers)": "the callers' constant",
    "settle(patience_s)": "a deadline, which correctness does not depend on",
    **dict.fromkeys(
        ("check_place(same_shapes)", "load_inner_state(settings)"),
        "handed on by MimoOptimizer.load_state_dict; test_optimizer_table sets it there",
    ),
    **dict.fromkeys(
        ("check_shared(what)", "plan(dtype)"),
        "handed on by to_folder; test_export_8rank sets it there, or reads it in the error",
    ),
    **dict.fromkeys(
        (
            "LanguagePart(spellings)",
            "EncoderPart(spellings)",
            "EncoderPart(sequence_parallel)",
            "EncoderPart(cuts_items)",
            "EncoderPart(drawn)",
            "EncoderPart(level_layers)",
            "Composite(encoders)",
            "Composite(unused)",
            "Family(ignores)",
            "Family(refuses)",
            "check_fields(ignores)",
            "check_fields(refuses)",
            "check_fits(virtual_stages)",
            "Folders(drawn)",
            "ImportedGPTModel(rotary)",
            "tower_part(projector)",
            "Rotary(sections)",
            "Rotary(interleaved)",
            "Table(unused)",
            "Part(drawn)",
            "QwenVisionShape(patch_bias)",
            "QwenVisionShape(table_side)",
            "PatchMerger(norm_merged)",
            "Table(repeated)",
        ),
        "a family of the package says it, and each is compared with transformers' own model",
    ),
    "Described(begin)": _RECORD,
}


# Field of a stock config -> why no test sets it.
UNSET_FIELDS = {
    "use_mup": "of 0.19 only; read beside tied embeddings, whose case is tested",
    "use_layer_wise_distributed_optimizer": "of Muon in 0.19, which tests see refused otherwise",
    "use_precision_aware_optimizer": "its optimizer is Transformer Engine's",
    **dict.fromkeys(
        ("kv_channels", "layernorm_epsilon"),
        "a folder's configuration says it; its models have other values than Megatron's defaults",
    ),
    "loss_scale": "a scale that never changes is no state that ranks could disagree about",
}


def test_every_option_is_set_to_another_value_than_its_default() -> None:
    options = options_of(CODE)
    assert len(options) > 200
    unset = {str(option): option.default for option in Uses(TESTS, CODE).unset(options)}
    missing = {name: default for name, default in unset.items() if name not in EXCEPTIONS}
    assert not missing, f"set these in a test that notices it, or say why not: {missing}"
    assert not EXCEPTIONS.keys() - unset.keys(), "these exceptions are stale"


def test_every_field_of_stocks_configs_that_is_read_is_set() -> None:
    known = {
        field.name: ast.unparse(ast.parse(repr(field.default)))
        for config in (DistributedDataParallelConfig, OptimizerConfig, TransformerConfig)
        for field in dataclasses.fields(config)
        if isinstance(field.default, bool | int | float | str | None)
    }
    read = {name for path in CODE for name in fields_read(path)} & known.keys()
    assert len(read) > 30
    uses = Uses(TESTS)
    unset = {name for name in read if not uses.names(name, known[name])}
    assert unset == UNSET_FIELDS.keys() & known.keys()


def fields_read(path: Path) -> Iterator[str]:
    """Attributes that a file reads of what it calls a config: ``config.x``, ``getattr``."""
    for node in ast.walk(ast.parse(path.read_text())):
        loaded = isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
        if loaded and _is_config(node.value):
            yield node.attr
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr"):
            owner, name = node.args[:2]
            if isinstance(name, ast.Constant) and _is_config(owner):
                yield name.value


def _is_config(node: ast.expr) -> bool:
    return ast.unparse(node).rpartition(".")[2].endswith("config")


_PACKAGE = '''
from dataclasses import dataclass

def public(a, known=1, *, by_name=None, invented=0): ...
def _private(unseen=1): ...

class Base:
    def __init__(self, size=1, shared=None): ...
    @staticmethod
    def apply(first=1, second=2): ...

class Derived(Base): ...

@dataclass
class Settings:
    required: int
    threshold: float = 1.1
    units: object = None
    shared: int = 3
'''
_TESTS = '''
public(1, 2, by_name=x)
public(1, invented=0)
Derived(4)
Base.apply(1, 3)
{"threshold": 1.1}
helper(units=f)
Other(shared=7)
partial(Base, 1, shared=None)
'''


def test_options_that_no_test_sets_are_found(tmp_path: Path) -> None:
    """A default that is given explicitly sets nothing; another owner's option neither."""
    package, tests = tmp_path / "package.py", tmp_path / "test_it.py"
    package.write_text(_PACKAGE)
    tests.write_text(_TESTS)
    options = options_of([package])
    assert Option("public", "known", "1", 1) in options
    unset = {str(option) for option in Uses([tests], [package]).unset(options)}
    assert unset == {
        "public(invented)",
        "apply(first)",
        "Settings(threshold)",
        "Settings(shared)",
        "Base(shared)",
    }
    tests.write_text(_TESTS + "public(1, **options)\n{'invented': 5}\nSettings(1, 2.0, shared=0)\n")
    assert {str(option) for option in Uses([tests], [package]).unset(options)} == {
        "apply(first)",
        "Base(shared)",
    }


@pytest.mark.parametrize("text", ["config.x", "self.config.x", "getattr(mimo_config, 'x', None)"])
def test_what_is_read_of_a_config(text: str, tmp_path: Path) -> None:
    path = tmp_path / "code.py"
    path.write_text(f"y = {text}\nother.y\nconfig.z = 1\n")
    assert list(fields_read(path)) == ["x"]
