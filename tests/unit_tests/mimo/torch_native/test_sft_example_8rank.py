# SPDX-License-Identifier: Apache-2.0
"""examples/mimo/torch_native_sft.py: the same losses in every layout, and a folder at the end."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import transformers

from examples.mimo import torch_native_sft
from tests.unit_tests.mimo.torch_native.native_cases import side_by_side

# Nothing of Megatron-Core's is in it.
pytestmark = [pytest.mark.ranks(8, timeout=300), pytest.mark.once]


def losses_of_transformers_alone(options) -> list[float]:
    model = torch_native_sft.build(None).train()
    adam = torch.optim.AdamW(model.parameters(), lr=options.lr, foreach=False)
    losses = []
    for ids, labels in torch_native_sft.batches(options, model.config.vocab_size):
        loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        adam.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def test_every_layout_trains_as_transformers_alone(shared_tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(torch_native_sft._SHAPE, "num_hidden_layers", 1)
    options = torch_native_sft.parse(["--steps", "3", "--batch", "8"])
    expected = losses_of_transformers_alone(options)
    assert expected[-1] < expected[0]
    for dp, tp in ((2, 2), (4, 2), (8, 1), (2, 4)):
        options.save = str(shared_tmp_path / f"{dp}-{tp}") if dp * tp == 8 else None
        with side_by_side(dp, tp) as grid:
            losses = torch_native_sft.train(options, grid)
        # Adam divides by the gradient's size, so rounding grows a little from step to step.
        assert losses == pytest.approx(expected, rel=1e-4), (dp, tp)
    dist.barrier()
    whole = transformers.AutoModelForCausalLM.from_pretrained(shared_tmp_path / "8-1")
    split = transformers.AutoModelForCausalLM.from_pretrained(shared_tmp_path / "2-4")
    for name, value in whole.state_dict().items():
        assert (split.state_dict()[name] - value).abs().max() <= 1e-3, name


def test_a_batch_that_data_ranks_cannot_share_is_refused() -> None:
    options = torch_native_sft.parse(["--batch", "9"])
    with side_by_side(2, 4) as grid, pytest.raises(ValueError, match="--batch 9 must be a mult"):
        torch_native_sft.train(options, grid)
