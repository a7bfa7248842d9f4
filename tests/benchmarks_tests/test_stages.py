# SPDX-License-Identifier: Apache-2.0
"""What is counted as kept for the backward pass. One process."""

from __future__ import annotations

import torch

from benchmarks.stages import KeptBytes


def test_activations_count_once_from_forward_to_backward():
    module = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Tanh())
    kept = KeptBytes(module)
    x = torch.randn(16, 4)
    # Input of the linear layer and the two outputs of tanh; neither weights nor what is between.
    bytes_of_one = 4 * 16 * (4 + 8 + 8)
    first = module(x)
    assert kept.now == kept.most == bytes_of_one
    second = module(x.clone())
    assert kept.now == kept.most == 2 * bytes_of_one
    # Autograd lets go as it walks; outputs that are still held here are no longer kept for it.
    first.sum().backward()
    assert kept.now == bytes_of_one
    del second
    assert (kept.now, kept.most) == (0, 2 * bytes_of_one)
    kept.stop()
    module(x).sum().backward()
    assert kept.most == 2 * bytes_of_one


def test_a_tensor_that_two_operations_keep_counts_once():
    module = torch.nn.Bilinear(4, 4, 1)
    kept = KeptBytes(module)
    x = torch.randn(16, 4, requires_grad=True)
    y = module(x, x)
    assert kept.now == x.untyped_storage().nbytes()
    del y
    assert kept.now == 0
