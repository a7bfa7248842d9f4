# SPDX-License-Identifier: Apache-2.0
"""Shapes, steps and machines: what is refused, and what a file or a folder says."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import transformers

from megatron.core.models.mimo.huggingface.composites import describe
from megatron.core.models.mimo.huggingface.family import UnsupportedModelError
from megatron.core.models.mimo.huggingface.plan_shapes import composite_shapes, folder_shapes
from megatron.core.models.mimo.plan.machine import (
    DATA_SHEETS,
    PRESETS,
    Reached,
    find_machine,
    machine_of,
    to_json,
    with_memory,
)
from megatron.core.models.mimo.plan.shapes import EncoderShape, Stack, Work, shapes_from
from tests.unit_tests.mimo.huggingface import llava_models, models, qwen_vl_models, sounds
from tests.unit_tests.mimo.plan.plan_cases import H100, LANGUAGE, SMALL

# Nothing of Megatron-Core is in them.
pytestmark = pytest.mark.once

_STACK = {"layers": 2, "hidden": 64, "ffn": 128, "heads": 4, "groups": 2, "head": 16}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": 0}, "layers must be 1 or more, got 0"),
        ({"groups": 3}, "heads=4 must be a multiple of groups=3"),
        ({"expert_layers": 3}, "expert_layers must be 0 to layers=2, got 3"),
        ({"expert_layers": 1, "experts": 4}, "chosen must be 1 to experts=4 .* got 0"),
    ],
)
def test_wrong_layers(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Stack(**{**_STACK, **changes})


def test_wrong_encoders_and_steps() -> None:
    with pytest.raises(ValueError, match="patch must be 1 or more, got 0"):
        EncoderShape(Stack(**_STACK), 16, 16, 0, 64, 0)
    with pytest.raises(ValueError, match="rows=17 must be at most tokens=16"):
        EncoderShape(Stack(**_STACK), 16, 17, 48, 64, 0)
    with pytest.raises(ValueError, match="samples must be 1 or more, got 0"):
        Work(64, 0, {})
    with pytest.raises(ValueError, match=r"at most 1 together, got \{'a': 0.7, 'b': 0.6\}"):
        Work(64, 1, {"a": 0.7, "b": 0.6})


def test_shapes_of_plain_values() -> None:
    values = {"language": asdict(SMALL.language), "encoders": {"vision": asdict(
        SMALL.encoders["vision"])}}  # fmt: skip
    assert shapes_from(json.loads(json.dumps(values))) == SMALL
    for wrong, message in (
        ({}, r"the model has unknown fields \[\] and lacks \['language'\]"),
        ({"language": {"stack": _STACK}}, "language: .*vocab.*its fields are"),
        ({"language": {"stack": {**_STACK, "w": 3}, "vocab": 9}}, r"unknown fields \['w'\]"),
        ({"language": 3}, "language must be a mapping of names to values, got 3"),
        ({**values, "encoders": {"eye": {"stack": _STACK}}}, "encoder eye: .*missing"),
    ):
        with pytest.raises(ValueError, match=message):
            shapes_from(wrong)


@pytest.mark.parametrize("name", [*models.DENSE, *models.SPARSE])
def test_weights_are_those_of_transformers(name: str) -> None:
    """Within 5 %: biases and norms of tiny layers are not counted."""
    model = {**models.DENSE, **models.SPARSE}[name]()
    ours = composite_shapes(describe(model.config)).language
    ours = replace(ours, vocab=models.VOCABULARY)
    positions = 64 * 32 if name == "gpt2" else 0
    theirs = sum(each.numel() for each in model.parameters()) - positions
    assert ours.weights == pytest.approx(theirs, rel=0.05)


def test_encoders_of_folders(tmp_path: Path) -> None:
    for model, shape in (
        (llava_models.llava("clip-llama"), {"tokens": 10, "rows": 9, "projected": 32}),
        (qwen_vl_models.qwen3_vl(), {"tokens": 256, "rows": 64, "levels": 3}),
        (sounds.qwen2_audio(), {"tokens": 20, "rows": 10, "projected": 0}),
    ):
        model.config.save_pretrained(tmp_path)
        (found,) = folder_shapes(tmp_path, item_tokens=256).encoders.values()
        assert {name: getattr(found, name) for name in shape} == shape
        assert found.sequence_parallel


def test_a_folder_that_is_not_known(tmp_path: Path) -> None:
    transformers.BertConfig().save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="model_type 'bert' is not known"):
        folder_shapes(tmp_path)


def test_machines_of_files(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    mine = replace(H100, name="mine", node=4)
    path.write_text(to_json(mine))
    assert find_machine(str(path)) == mine
    assert find_machine("H100") == H100
    for text, message in (
        ("{", "is no machine: .*; calibrate it again"),
        ("{}", "is no machine: its fields must be "),
        (to_json(mine).replace('"node": 4', '"node": "4"'), "must be numbers: {'node': '4'}"),
        (to_json(mine).replace('"fused": true', '"fused": 1'), "fused must be true or false"),
        (to_json(mine).replace('"node": 4', '"node": 0'), "node must be more than 0, got 0"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            find_machine(str(path))
    with pytest.raises(ValueError, match="neither a preset nor a file; presets are .*'h100'"):
        find_machine("h1000")


def test_machines_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="inside_latency must be 0 or more, got -1"):
        replace(H100, inside_latency=-1)
    with pytest.raises(ValueError, match="between must be more than 0, got 0"):
        replace(H100, between=0)
    with pytest.raises(ValueError, match="hidden must be at most 1, got 2"):
        replace(H100, hidden=2)
    assert with_memory(H100, 1e9).memory == 1e9


def test_links_of_groups() -> None:
    """A group within a node, one whose members lie alone in their nodes, and one between."""
    assert H100.link(8) == (H100.inside, H100.inside_latency)
    assert H100.link(9) == (H100.between, H100.between_latency)
    assert H100.group_link(4, 2)[0] == H100.inside
    assert H100.group_link(16, 8)[0] == H100.between
    assert H100.group_link(16, 4)[0] == 2 * H100.between
    assert H100.group_link(64, 1)[0] == H100.inside


def test_presets_reach_the_same_parts_of_their_sheets() -> None:
    assert set(PRESETS) == {"a100", "h100", "h200", "b200"}
    all_of_it = machine_of("b200", DATA_SHEETS["b200"], Reached(1, 1, 1, 1, 1))
    assert PRESETS["b200"].matmul / all_of_it.matmul == pytest.approx(
        PRESETS["h100"].matmul / DATA_SHEETS["h100"].flops
    )
    assert LANGUAGE.stack.groups == 32
