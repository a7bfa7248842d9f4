# SPDX-License-Identifier: Apache-2.0
"""Microbatches as mappings: one process."""

from __future__ import annotations

import pytest
import torch

from megatron.core.hyper_comm_grid import GridShape
from megatron.core.models.mimo.comm.plan.gather_layout import BridgeLayout, SliceInfo
from megatron.core.models.mimo.pipeline.microbatches import narrow_language_batch


def test_fan_out_gives_every_language_replica_its_samples_of_everything():
    """Ids, labels, masks and 3-D position ids alike; encoder inputs stay the encoder's."""
    layout = BridgeLayout.from_grids(
        GridShape((4, 2), ("tp", "dp")), GridShape((1, 2, 4), ("tp", "cp", "dp"))
    )
    samples, length = 6, 5
    ids = torch.arange(samples * length).view(samples, length)
    pixels = torch.randn(7, 3)
    batch = {
        "input_ids": ids,
        "labels": ids + 100,
        "loss_mask": ids + 200,
        "position_ids": torch.stack([ids + 300, ids + 400, ids + 500]),
        "modality_inputs": {"images": {"encoder": {"x": pixels}}},
    }
    for rank in layout.ranks:
        mine = narrow_language_batch(batch, layout.slot_slice(rank, samples))
        rows = slice(0, 3) if rank // 2 % 2 == 0 else slice(3, 6)
        assert torch.equal(mine["input_ids"], ids[rows])
        assert torch.equal(mine["labels"], ids[rows] + 100)
        assert torch.equal(mine["loss_mask"], ids[rows] + 200)
        assert torch.equal(mine["position_ids"][1], ids[rows] + 400)
        assert mine["position_ids"].shape == (3, 3, length)
        assert mine["modality_inputs"] is batch["modality_inputs"]


def test_plain_position_ids_and_missing_tensors():
    ids = torch.arange(8).view(4, 2)
    mine = narrow_language_batch({"position_ids": ids, "labels": None}, SliceInfo(1, 2))
    assert torch.equal(mine["position_ids"], ids[1:3])
    assert mine["labels"] is None


def test_what_cannot_be_narrowed_is_refused():
    ids = torch.zeros(4, 2)
    with pytest.raises(ValueError, match=r"input_ids \(4, 2\) has 4 samples, wanted are 3 to 4"):
        narrow_language_batch({"input_ids": ids}, SliceInfo(3, 2))
    for name in ("attention_mask", "packing_kwargs"):
        with pytest.raises(ValueError, match=f"batch with {name} cannot be narrowed"):
            narrow_language_batch({"input_ids": ids, name: ids}, SliceInfo(0, 2))
