# SPDX-License-Identifier: Apache-2.0
"""Token losses over a vocabulary cut over 8 ranks, against PyTorch's cross entropy of the whole."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from megatron.core.models.mimo.transformer.exact_loss import vocab_parallel_loss

pytestmark = pytest.mark.ranks(8)

VOCABULARY = 64


@pytest.mark.parametrize(
    # Losses are some units in the last place of fp32 and fp64; bf16 gradients are rounded once.
    "dtype, tolerance, gradient_tolerance",
    [
        (torch.float32, 1e-6, 1e-6),
        (torch.float64, 1e-14, 1e-14),
        (torch.bfloat16, 1e-6, 2.0**-8),
    ],
    ids=["fp32", "fp64", "bf16"],
)
def test_losses_and_gradients_are_those_of_the_whole_vocabulary(
    dtype, tolerance, gradient_tolerance, rank_device
) -> None:
    generator = torch.Generator().manual_seed(3)
    whole = torch.randn(6, 4, VOCABULARY, generator=generator).to(rank_device)
    whole = (5 * whole).to(dtype)
    labels = torch.randint(VOCABULARY, (6, 4), generator=generator).to(rank_device)
    weights = torch.rand(6, 4, generator=generator).to(rank_device)
    part = slice(dist.get_rank() * VOCABULARY // 8, (dist.get_rank() + 1) * VOCABULARY // 8)
    logits = whole[..., part].clone().requires_grad_()
    losses = vocab_parallel_loss(logits, labels, dist.group.WORLD)
    (losses * weights).sum().backward()

    expected = whole.double().requires_grad_()
    truth = torch.nn.functional.cross_entropy(
        expected.flatten(0, 1), labels.flatten(), reduction="none"
    ).view(6, 4)
    (truth * weights).sum().backward()
    torch.testing.assert_close(losses.double(), truth, rtol=tolerance, atol=10 * tolerance)
    assert logits.grad.dtype is dtype
    difference = logits.grad.double() - expected.grad[..., part]
    assert difference.norm() <= gradient_tolerance * expected.grad[..., part].norm()
