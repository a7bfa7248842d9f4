# SPDX-License-Identifier: Apache-2.0
"""Weights that were loaded stay when others are drawn, and are the same on all ranks."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from torch import nn

from megatron.core.models.mimo.training import pretrained
from megatron.core.models.mimo.training.initial_weights import initialize_weights
from megatron.core.models.mimo.training.pretrained import keep_weights, refuse_different_weights
from tests.unit_tests.mimo.attention_oracle import FakeGroup
from tests.unit_tests.mimo.test_hugging_face_encoders import clip


def changed(module: nn.Module) -> set[str]:
    """Names of weights that ``initialize_weights`` draws anew."""
    before = {name: weight.detach().clone() for name, weight in module.named_parameters()}
    initialize_weights(module, 5, name_prefix="images")
    after = module.named_parameters()
    return {name for name, weight in after if not torch.equal(weight, before[name])}


def modality() -> nn.ModuleDict:
    torch.manual_seed(1)
    return nn.ModuleDict({"encoder": nn.Sequential(nn.Linear(3, 3)), "projection": nn.Linear(3, 2)})


ENCODER = {"encoder.0.weight", "encoder.0.bias"}
PROJECTION = {"projection.weight", "projection.bias"}


@pytest.mark.parametrize("part", ["encoder", "projection"])
def test_what_is_marked_stays(part, caplog):
    model = modality()
    assert keep_weights(model[part]) is model[part]
    with caplog.at_level(logging.WARNING):
        found = changed(model)
    assert found == (PROJECTION if part == "encoder" else ENCODER)
    (said,) = [each.getMessage() for each in caplog.records]
    assert said == (
        "initialize_weights kept 2 pretrained parameters of images and draws the other 2"
    )


def test_without_a_mark_all_are_drawn_and_nothing_is_said(caplog):
    assert changed(modality()) == ENCODER | PROJECTION
    assert not caplog.records


def test_where_nothing_is_drawn_nothing_is_said(caplog):
    model = modality()
    keep_weights(model)
    with caplog.at_level(logging.WARNING):
        assert changed(model) == set()
    assert not caplog.records


def test_only_rank_0_says_it(monkeypatch, caplog):
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda group=None: 1)
    assert changed(keep_weights(modality())) == set()
    assert not caplog.records


@pytest.mark.parametrize("wrapped_first", [True, False])
def test_the_mark_goes_through_wrappers_and_copies(wrapped_first):
    model = modality()
    if wrapped_first:
        model["encoder"] = torch.compile(model["encoder"])
        keep_weights(model["encoder"])
    else:
        model["encoder"] = torch.compile(keep_weights(model["encoder"]))
    assert {name.replace("_orig_mod.", "") for name in changed(model)} == PROJECTION
    assert changed(copy.deepcopy(keep_weights(modality()))) == set()


def test_what_transformers_loaded_stays_and_what_its_file_lacked_is_drawn(tmp_path: Path):
    saved = clip()
    assert "encoder.layers.0.mlp.fc1.weight" in {name[-31:] for name in changed(saved)}
    saved.save_pretrained(tmp_path)
    for kind in (torch.float32, torch.bfloat16):
        loaded = transformers.CLIPVisionModel.from_pretrained(tmp_path).to(kind)
        assert changed(loaded) == set()
        assert all(
            torch.equal(a.to(kind), b)
            for a, b in zip(saved.parameters(), loaded.parameters(), strict=True)
        )
    beside = nn.ModuleDict({"clip": loaded, "marked": keep_weights(nn.Linear(3, 3))})
    assert changed(beside) == set()
    partly = transformers.CLIPVisionModelWithProjection.from_pretrained(tmp_path, projection_dim=12)
    assert changed(partly) == {"visual_projection.weight"}


# --- the same on all ranks -----------------------------------------------------------------

WORLD = 4


def compare(monkeypatch: pytest.MonkeyPatch, models: list[nn.Module], tp: int = 1) -> list[str]:
    """What each rank says of weights of which ``models`` has one rank's each."""
    told: list[Any] = []

    def record(mine: Any) -> list[Any]:
        told.append(mine)
        return [mine] * WORLD

    said = []
    for exchange in (record, lambda _mine: told):
        monkeypatch.setattr(pretrained, "gathered", exchange)
        said.clear()
        for rank, model in enumerate(models):
            groups = {"images": SimpleNamespace(tp=FakeGroup(rank % tp, tp), pp=FakeGroup(0, 1))}
            try:
                refuse_different_weights({"images": [model]}, groups)
            except ValueError as error:
                said.append(str(error))
    return said


def test_one_file_on_all_ranks_is_right(monkeypatch):
    assert compare(monkeypatch, [keep_weights(modality()) for _ in range(WORLD)]) == []


@pytest.mark.parametrize("how", ["another file", "not loaded", "bits of two weights"])
def test_another_file_on_one_rank_is_one_error_on_all(monkeypatch, how):
    models = [keep_weights(modality()) for _ in range(WORLD)]
    if how == "another file":
        models[2]["projection"].weight.data[0, 0] += 1e-6
    elif how == "not loaded":
        models[2] = modality()
    else:
        models[2]["projection"].bias.data = models[2]["encoder"][0].bias.data[:2].clone()
    said = compare(monkeypatch, models)
    assert len(said) == WORLD
    assert len(set(said)) == 1
    assert "pretrained weights of module 'images' differ between ranks [0, 1, 3] and [2]" in said[0]


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn],
    ids=str,
)
def test_weights_of_every_dtype_are_compared(monkeypatch, dtype):
    models = [keep_weights(modality().to(dtype)) for _ in range(WORLD)]
    assert compare(monkeypatch, models) == []
    weight = models[2]["projection"].weight.data
    weight.copy_((weight.float() + 1).to(dtype))
    assert "ranks [0, 1, 3] and [2]" in compare(monkeypatch, models)[0]


def test_weights_that_are_not_pretrained_are_not_compared(monkeypatch):
    models = [modality() for _ in range(WORLD)]
    models[2]["projection"].weight.data += 1
    assert compare(monkeypatch, models) == []


def test_parts_of_tensor_parallel_ranks_differ(monkeypatch):
    """Ranks 0 and 2 hold one part of a weight, 1 and 3 the other; the rest is whole on all."""
    models = [keep_weights(modality()) for _ in range(WORLD)]
    for rank, model in enumerate(models):
        model["projection"].weight.tensor_model_parallel = True
        model["projection"].weight.data += rank % 2
    assert compare(monkeypatch, models, tp=2) == []
    models[3]["projection"].weight.data += 1
    assert "ranks [1] and [3]" in compare(monkeypatch, models, tp=2)[0]
    models[3]["projection"].weight.data -= 1
    models[3]["projection"].bias.data += 1
    assert "ranks [0, 1, 2] and [3]" in compare(monkeypatch, models, tp=2)[0]


def test_experts_of_different_ranks_are_no_copies(monkeypatch):
    models = [keep_weights(modality()) for _ in range(WORLD)]
    for rank, model in enumerate(models):
        for weight in model["projection"].parameters():
            weight.allreduce = False
            weight.data += rank
    assert compare(monkeypatch, models) == []
