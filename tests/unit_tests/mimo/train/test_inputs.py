# SPDX-License-Identifier: Apache-2.0
"""What a recipe's model is called with: uploaded without a wait, but for what the host reads."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from megatron.core.models.mimo.data.arrays import LanguageArrays
from megatron.core.models.mimo.data.loader import Microbatch
from mimo_colocated.train.trainer import RecipeRunner
from tests.harness.host_waits import watched_device

pytestmark = pytest.mark.once


class Tower(nn.Module):
    """Reads one of its inputs on the host."""

    reads_on_host = ("grids",)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("tower", [Tower, nn.Identity])
def test_inputs_are_uploaded_without_a_wait(tower: type[nn.Module], packed: bool) -> None:
    device, runner = watched_device(), object.__new__(RecipeRunner)
    submodules = {"images": SimpleNamespace(encoders={"tower": tower()})}
    part = SimpleNamespace(name="tower", modality="images")
    runner.device = device.device
    runner.model = SimpleNamespace(modality_submodules=submodules)  # type: ignore[assignment]
    runner.built = SimpleNamespace(composite=SimpleNamespace(encoders=[part]))  # type: ignore[assignment]
    ids = np.arange(8)[None] if packed else np.arange(8).reshape(2, 4)
    language = LanguageArrays(
        ids, ids, ids, ids.astype(np.float32), (3, 4), np.array([4, 4]) if packed else None
    )
    shown = {"pixels": np.ones((2, 3), dtype=np.float32), "grids": np.array([[1, 2, 2]])}
    with device.watch():
        inputs: dict[str, Any] = runner.inputs(Microbatch((0, 1), language, {"images": shown}, {}))
        images = inputs["modality_inputs"]["images"]["tower"]
        for tensor in (*(inputs[name] for name in ("input_ids", "labels")), images["pixels"]):
            assert tensor.device == device.device
        assert images["grids"].is_cpu == (tower is Tower)
        if packed:
            lengths = inputs["packing_kwargs"]["cu_seqlens_q"]
            assert lengths.is_cpu
            assert lengths.tolist() == [0, 3, 7]
        assert ("packing_kwargs" in inputs) == packed
    assert [str(each) for each in device.host_waits] == []
    assert torch.equal(inputs["input_ids"].cpu(), torch.from_numpy(ids))
