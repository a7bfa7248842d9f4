# SPDX-License-Identifier: Apache-2.0
"""What a memory policy will save. Pure integers; that real layers keep it is for 8 ranks to say."""

from __future__ import annotations

import io
from dataclasses import replace
from fractions import Fraction

import pytest
import torch

from megatron.core.models.mimo.memory.__main__ import main
from megatron.core.models.mimo.memory.kept import part_bytes
from megatron.core.models.mimo.memory.plan import (
    PartBytes,
    Step,
    TransformerShape,
    plan,
    predict,
    transformer_bytes,
)
from megatron.core.models.mimo.memory.policy import POLICIES, EncoderMemory
from megatron.core.models.mimo.memory.table import print_plan
from tests.unit_tests.mimo.test_activation_memory import OUT, WIDTH, built, pixels

pytestmark = pytest.mark.once

PARTS = PartBytes(inputs=10, encoder=1000, rows=40, projector=200, encoder_flops=90,
                  projector_flops=10)  # fmt: skip
SHAPE = TransformerShape(
    layers=3, hidden=64, ffn=256, heads=8, tokens=16, patch=12, projected=128, itemsize=2
)


def test_inputs_are_counted_in_their_own_bytes():
    """Pixels may be bytes while activations are 16 or 32 bits."""
    found = {size: transformer_bytes(replace(SHAPE, input_itemsize=size), 3) for size in (1, 4)}
    assert (found[1].inputs, found[4].inputs) == (3 * 16 * 12, 3 * 16 * 12 * 4)
    assert replace(found[1], inputs=0) == replace(found[4], inputs=0)


def test_what_a_microbatch_holds_while_the_language_model_runs():
    held = {(p.memory.encoder, p.memory.projector): p.held for p in plan(PARTS, Step())}
    assert held == {
        ("keep", "keep"): 1200,
        ("keep", "recompute"): 1040,
        ("keep", "offload"): 1000,
        ("recompute", "keep"): 210,
        ("recompute", "recompute"): 10,
        ("recompute", "offload"): 10,
        ("offload", "keep"): 200,
        ("offload", "recompute"): 0,
        ("offload", "offload"): 0,
    }


def test_microbatches_that_are_there_multiply_what_is_held_and_saved():
    step = Step(microbatches=16, stages=4, encode_ahead=2)
    found = predict(PARTS, step, EncoderMemory("offload", "offload"))
    assert (found.kept, found.total, found.saving) == (6, 0, 6 * 1200)
    assert (found.host, found.moved) == (6 * 1200, 2 * 16 * 1200)
    # One of them is in its backward pass.
    assert found.peak == 1200
    found = predict(PARTS, step, EncoderMemory("recompute", "keep"))
    assert (found.total, found.peak) == (6 * 210, 5 * 210 + 1210)
    assert found.extra_flops == Fraction(90, 300)


@pytest.mark.parametrize("stages", range(2, 9))
@pytest.mark.parametrize("window", range(1, 9))
def test_windows_under_way(stages: int, window: int):
    """As the pipelined step does it: see ``_Encoders`` in ``pipeline/step.py``."""
    for microbatches in (1, 5, 64):
        lag = -(-(stages - 1) // window)
        under_way, most = set(), 0
        for number in range(0, microbatches, window):
            under_way.discard(number // window - 1 - lag)
            under_way.add(number // window)
            most = max(most, sum(min(window, microbatches - w * window) for w in under_way))
        kept = Step(microbatches, stages, window).kept
        assert kept == most
        assert kept <= max(stages - 2 + 2 * window, window)


def test_without_stages_there_is_one_microbatch_at_a_time_and_those_ahead():
    """And, as ``test_pipeline_step_8rank`` counts, one whose gradients are on their way back."""
    assert [Step(microbatches).kept for microbatches in (1, 8)] == [1, 1]
    assert [Step(8, encode_ahead=ahead).kept for ahead in (1, 2, 6, 7)] == [3, 4, 8, 8]
    assert [Step(count, encode_ahead=1).kept for count in (1, 2, 3)] == [1, 2, 3]
    assert Step(8, stages=2).kept == 8


def test_frozen_parts_keep_nothing():
    frozen = Step(encoder_trains=False)
    for memory in (EncoderMemory(a, b) for a in POLICIES for b in POLICIES):
        found = predict(PARTS, frozen, memory)
        stays = {"keep": 200, "recompute": 0 if memory.encoder == "offload" else 40, "offload": 0}
        assert found.held == stays[memory.projector]
        assert found.extra_flops == (Fraction(10, 300) if memory.projector == "recompute" else 0)
        nothing = predict(PARTS, replace(frozen, projector_trains=False), memory)
        assert (nothing.held, nothing.host, nothing.saving, nothing.extra_flops) == (0, 0, 0, 0)


def test_16_bits_with_dropout_are_those_of_korthikanti_et_al():
    """sbh (34 + 5 a s / h) bytes, of which softmax and its dropout are the second part.

    Theirs counts a score, its dropout's mask and the dropped score, ours three 32-bit numbers. And
    it has query and key once, where PyTorch's kernel scales both in 32 bits.
    """
    one = replace(SHAPE, dropout=True, attention="fused", layers=1)
    none = transformer_bytes(replace(one, layers=2), 1).encoder - transformer_bytes(one, 1).encoder
    h, tokens = one.hidden, one.tokens
    # Fused kernels keep the output and a float per head; theirs has neither. Nor has it statistics
    # of norms, or the attention's output a second time, its sequence first.
    extra = tokens * (4 * one.heads + 4 * one.itemsize) + tokens * h * 2
    # Theirs keeps a mask for each of both hidden dropouts: 2 of the 34.
    assert none == 34 * tokens * h + 2 * tokens * h - 2 * tokens * h + extra


def test_tensor_parallelism_shares_all_but_the_norms():
    whole, halved = (transformer_bytes(replace(SHAPE, tp=tp), 10) for tp in (1, 2))
    tokens, e, h = 160, SHAPE.itemsize, SHAPE.hidden
    per_layer = 4 * e * h + 4 * e
    shared = whole.encoder - tokens * (SHAPE.layers * per_layer + e * SHAPE.patch + e * h + 2 * e)
    assert whole.encoder - halved.encoder == shared // 2
    assert whole.projector - halved.projector == tokens * e * SHAPE.projected
    assert (whole.rows, whole.inputs) == (halved.rows, halved.inputs)


def test_recomputed_layers():
    found = {
        kind: transformer_bytes(replace(SHAPE, recompute=kind), 1).encoder
        for kind in ("none", "selective", "full")
    }
    tokens, e, h = SHAPE.tokens, SHAPE.itemsize, SHAPE.hidden
    assert found["none"] - found["selective"] == 3 * tokens * (e * h + 4 * SHAPE.heads)
    assert found["full"] == tokens * e * (SHAPE.patch + 3 * h + h + 2)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"layers": 0}, "layers must be 1 or more, got 0"),
        ({"tp": 3}, "tp=3 must divide heads=8"),
        ({"pooled": 7}, "pooled=7 must divide tokens="),
        ({"recompute": "half"}, "recompute must be one of .*, got 'half'"),
        ({"attention": "flash"}, "attention must be one of .*, got 'flash'"),
    ],
)
def test_shapes_that_are_none(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        replace(SHAPE, **changes)
    with pytest.raises(ValueError, match="encode_ahead must be 1 or more, got 0"):
        Step(encode_ahead=0)


def test_counting_says_the_same_of_any_module_as_its_tensors():
    made = built()
    found = part_bytes(made, {"one": {"x": pixels(64)}})
    row = 4 * WIDTH
    assert found.inputs == found.rows == 64 * row
    # The rows are the encoder's output, kept for the projector's sake alone.
    assert found.projector == 64 * (3 * row + row)
    assert all(p.grad is None for p in made.parameters())
    # A list of tensors, as an encoder takes that packs them itself.
    parts = list(pixels(64).split(16))
    made.encoders["one"].forward = lambda x, own=made.encoders["one"].forward: own(torch.cat(x))
    apart = part_bytes(made, {"one": {"x": [part.clone() for part in parts]}})
    assert apart.inputs == found.inputs
    assert OUT < WIDTH  # the projector's output is none of it


SIZES = {"items": 16, "tokens": 256, "layers": 24, "hidden": 1024, "heads": 16, "projected": 4096,
         "tp": 2, "micro-batches": 16, "pp": 4, "encode-ahead": 1}  # fmt: skip
ARGUMENTS = [text for name, size in SIZES.items() for text in (f"--{name}", str(size))]


def test_the_command_prints_every_policy(capsys):
    assert main(ARGUMENTS) == 0
    out = capsys.readouterr().out
    assert "16 microbatches a step, 4 pipeline stages, 1 encoded together" in out
    assert len([line for line in out.splitlines() if line.startswith("│ ")]) >= 9
    shape = TransformerShape(24, 1024, 4096, 16, 256, 588, 4096, tp=2)
    parts = transformer_bytes(shape, 16)
    saving = predict(parts, Step(16, 4, 1), EncoderMemory("recompute", "keep")).saving
    assert f"{saving / 2**20:,.2f}" in out


def test_the_table_goes_to_the_stream_that_is_given(capsys):
    stream = io.StringIO()
    print_plan(PARTS, Step(), stream=stream)
    assert "Encoder activations on one rank" in stream.getvalue()
    assert capsys.readouterr().out == ""


def test_every_column_has_what_its_heading_says(capsys):
    assert main(ARGUMENTS) == 0
    rows = [
        [cell.strip() for cell in line.split("│")[1:-1]]
        for line in capsys.readouterr().out.splitlines()
    ]
    (found,) = [row for row in rows if row[:2] == ["recompute", "offload"]]
    shape = TransformerShape(24, 1024, 4096, 16, 256, 588, 4096, tp=2)
    one = predict(
        transformer_bytes(shape, 16), Step(16, 4, 1), EncoderMemory("recompute", "offload")
    )
    sizes = (one.total, one.saving, one.peak, one.host, one.moved)
    together, *others = [f"{size / 2**20:,.2f}" for size in sizes]
    held = f"{one.held / 2**20:,.2f}"
    assert found[2:] == [held, str(one.kept), together, *others, f"{float(one.extra_flops):.0%}"]


def test_every_option_of_the_command_counts(monkeypatch):
    told = []
    monkeypatch.setattr(f"{main.__module__}.print_plan", lambda *told_of: told.append(told_of))
    options = (
        "--items 3 --tokens 4 --layers 2 --hidden 8 --heads 2 --projected 16 --ffn 24 --patch 5 "
        "--tp 2 --bytes 4 --dropout --recompute none --attention math --mask 4 --micro-batches 6 "
        "--pp 2 --encode-ahead 3 --frozen projector"
    )
    assert main(options.split()) == 0
    shape = TransformerShape(
        2, 8, 24, 2, 4, 5, 16, tp=2, itemsize=4, dropout=True, attention="math", mask=4
    )
    step = Step(6, 2, 3, encoder_trains=True, projector_trains=False)
    assert told == [(transformer_bytes(shape, 3), step)]


def test_inputs_count_in_their_own_precision():
    found = transformer_bytes(replace(SHAPE, itemsize=2, input_itemsize=4), 10)
    assert found.inputs == 10 * SHAPE.tokens * SHAPE.patch * 4


def test_buffers_stay_and_do_not_count():
    made = built()
    scale = torch.full((1000, 1, WIDTH), 2.0)
    made.encoders["one"].register_buffer("scale", scale)
    made.encoders["one"].embedding.register_forward_hook(lambda _m, _x, y: y * scale)
    found = part_bytes(made, {"one": {"x": pixels(1000)}})
    plain = part_bytes(built(), {"one": {"x": pixels(1000)}})
    assert found.encoder == plain.encoder


def test_a_wrong_command_is_one_sentence(capsys):
    assert main([*ARGUMENTS, "--tp", "3"]) == 2
    assert capsys.readouterr().err == "error: tp=3 must divide heads=16\n"


def test_the_table_goes_where_it_is_told(capsys):
    stream = io.StringIO()
    print_plan(PARTS, Step(), stream=stream)
    assert "recompute" in stream.getvalue()
    assert capsys.readouterr().out == ""
