# SPDX-License-Identifier: Apache-2.0
"""Logits of one token at a time, earlier ones kept, against transformers on whole sequences."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron.core.models.mimo.job.built_model import LANGUAGE
from megatron.core.models.mimo.job.key_value_cache import KeyValueCache, can_cache
from mimo_colocated.launch.layouts import Layout
from tests.unit_tests.mimo.huggingface import harness, models, qwen_vl_models

ONE = harness.Case(Layout())
EVERY = {**models.DENSE, **models.SPARSE}
FURTHER = 4
ASKED = (5, 5, 9, 7)
"""Tokens of each sample before the first further one."""


@pytest.fixture(autouse=True)
def _one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def built_of(family: str, folder: Path) -> tuple[Any, Any]:
    model = harness.randomise(EVERY[family](), seed=1)
    model.save_pretrained(folder)
    with torch.enable_grad():  # which DDP wants, with whatever it wraps
        built = harness.built_case(folder, ONE)
    built.model.eval()
    return model.eval(), built


@pytest.mark.parametrize("family", EVERY)
@torch.no_grad()
def test_logits_of_further_tokens_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    """Samples of several lengths; what fills them up is overwritten when a token is there."""
    theirs, built = built_of(family, tmp_path / "model")
    assert can_cache(built)
    generator = torch.Generator().manual_seed(3)
    length = max(ASKED) + FURTHER
    ids = torch.randint(0, models.VOCABULARY, (len(ASKED), length), generator=generator)
    expected = theirs(input_ids=ids).logits
    bound = harness.LOGITS * float(expected.abs().max())
    filled_up = ids.clone()
    for row, count in zip(filled_up, ASKED, strict=True):
        row[count:] = 3
    cache = KeyValueCache(built, *ids.shape)
    with cache.filled():
        built.model(input_ids=filled_up, position_ids=torch.arange(length).expand_as(ids))
    rows = torch.arange(len(ASKED))
    for place in range(FURTHER):
        positions = [count + place for count in ASKED]
        found = cache.logits(ids[rows, positions], positions)[:, : models.VOCABULARY]
        assert (found - expected[rows, positions]).abs().max() <= bound, place
    # The control: what was kept of one earlier token is of another one.
    last = [count + FURTHER - 1 for count in ASKED]
    cache.logits((ids[rows, ASKED] + 1) % models.VOCABULARY, ASKED)
    found = cache.logits(ids[rows, last], last)[:, : models.VOCABULARY]
    assert (found - expected[rows, last]).abs().amax(dim=1).min() > 10 * bound
    built.destroy()


def test_what_cannot_be_kept_is_not(tmp_path: Path) -> None:
    _, built = built_of("qwen2", tmp_path / "model")
    groups = built.collections[LANGUAGE]
    for axis in ("tp", "cp", "pp", "ep"):
        cut = SimpleNamespace(size=lambda: 2)
        built.collections[LANGUAGE] = SimpleNamespace(**{axis: cut})
        assert not can_cache(built), axis
    built.collections[LANGUAGE] = groups
    assert can_cache(built)
    built.packed = True
    assert not can_cache(built)
    built.packed = False
    built.destroy()
    # Positions that count the rows and columns of images.
    qwen_vl_models.qwen2_5_vl().save_pretrained(tmp_path / "grids")
    built = harness.built_case(
        tmp_path / "grids", harness.Case(Layout(), {"images": Layout()})
    )
    assert not can_cache(built)
    built.destroy()
