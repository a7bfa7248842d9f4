# SPDX-License-Identifier: Apache-2.0
"""Padding for a language replica without samples: what it is made of, and when it may not be."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron.core.models.mimo.model.no_samples import (
    padded_shape,
    padding_for,
    padding_problem,
    without_items,
)


def model(adapter: Any = None, special: tuple[int, ...] = (), **config: Any) -> Any:
    return SimpleNamespace(
        partition_adapter=adapter,
        special_token_ids=dict(enumerate(special)),
        config=SimpleNamespace(**config),
    )


@pytest.mark.parametrize(("special", "text"), [((), 0), ((5,), 0), ((0,), 1), ((1, 0, 3), 2)])
def test_padding_is_text(special: tuple[int, ...], text: int) -> None:
    batch = {"input_ids": torch.zeros(0, 4, dtype=torch.int64)}
    made = padding_for(model(special=special), batch, (1, 4))
    assert made["input_ids"].tolist() == [[text] * 4]


def test_a_mask_of_no_samples_is_none_and_others_stay() -> None:
    ids = torch.zeros(0, 4, dtype=torch.int64)
    causal = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    for mask, expected in ((torch.zeros(0, 1, 4, 4), None), (causal, causal), (None, None)):
        made = padding_for(model(), {"input_ids": ids, "attention_mask": mask}, (1, 4))
        assert made["attention_mask"] is expected


def test_a_batch_without_a_length_gets_one_that_cp_and_sequence_parallelism_can_cut() -> None:
    cut = model(object(), context_parallel_size=2, tensor_model_parallel_size=4)
    assert padded_shape(cut, torch.zeros(0, 0)) == (1, 16)
    assert padded_shape(cut, torch.zeros(0, 48)) == (1, 48)
    assert padded_shape(model(), torch.zeros(0, 0)) == (1, 1)


def test_inputs_are_none_only_if_all_their_tensors_are_empty() -> None:
    none, some = torch.zeros(0, 3), torch.zeros(2, 3)
    given = {
        "images": {"vit": {"x": some, "boxes": none}},
        "sounds": {"a": {"x": none}, "b": {"x": none, "rate": 16000}},
        "maps": {"vit": {"scale": torch.tensor(1.0)}},
        "missing": None,
    }
    assert without_items(given) == {**given, "sounds": None}


@pytest.mark.parametrize(
    ("settings", "refused"),
    [
        ({"num_moe_experts": 4, "moe_aux_loss_coeff": [0.0, 0.0]}, False),
        ({"num_moe_experts": 4, "moe_aux_loss_coeff": [0.0, 0.1]}, True),
        ({"num_moe_experts": 4, "moe_z_loss_coeff": 0.1}, True),
        ({"num_moe_experts": 4, "moe_z_loss_coeff": None}, False),
        ({"num_moe_experts": None, "moe_z_loss_coeff": 0.1}, False),
    ],
)
def test_experts_that_would_count_padding_refuse_it(
    settings: dict[str, Any], refused: bool
) -> None:
    problem = padding_problem(model(**settings))
    assert (problem is not None) == refused
    assert not refused or "would count the padding" in problem
