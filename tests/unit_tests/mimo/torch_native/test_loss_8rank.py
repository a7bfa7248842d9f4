# SPDX-License-Identifier: Apache-2.0
"""Cross entropy over a vocabulary cut over 8 ranks, against PyTorch's of the whole."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn import functional

from megatron.core.models.mimo.torch_native import cross_entropy, mesh_of, sum_over_data
from tests.unit_tests.mimo.torch_native.native_cases import grid_of

# Nothing of Megatron-Core's is in it.
pytestmark = [pytest.mark.ranks(8), pytest.mark.once]


def test_values_and_gradients_are_those_of_the_whole_vocabulary(rank_device) -> None:
    with grid_of(1, 8) as grid:
        mesh = mesh_of(grid, rank_device.type)["tp"]
        for vocabulary in (64, 99, 9, 5):  # even, uneven, ranks with one column less or none
            generator = torch.Generator().manual_seed(vocabulary)
            whole = 5 * torch.randn(3, 7, vocabulary, generator=generator).to(rank_device)
            labels = torch.randint(vocabulary, (3, 7), generator=generator).to(rank_device)
            labels[0] = labels[2, 1] = -100
            for reduction in ("none", "sum", "mean"):
                check(mesh, whole, labels, reduction)
            with pytest.raises(AssertionError):  # the control
                check(mesh, whole, labels.roll(1), "mean", labels)


def check(mesh, whole, labels, reduction, true_labels=None) -> None:
    logits = distribute_tensor(whole, mesh, [Shard(2)], src_data_rank=None).requires_grad_()
    expected = whole.clone().requires_grad_()
    loss = cross_entropy(logits, labels, reduction=reduction)
    truth = functional.cross_entropy(
        expected.flatten(0, 1),
        (labels if true_labels is None else true_labels).flatten(),
        reduction=reduction,
    )
    assert type(loss) is torch.Tensor
    torch.testing.assert_close(loss.flatten(), truth.flatten(), rtol=1e-5, atol=1e-6)
    weights = torch.linspace(1, 2, truth.numel(), device=whole.device)
    (loss.flatten() * weights).sum().backward()
    (truth.flatten() * weights).sum().backward()
    gradient = logits.grad.full_tensor()
    torch.testing.assert_close(gradient, expected.grad, rtol=1e-5, atol=1e-6)


def test_another_label_may_stand_for_tokens_that_do_not_count(rank_device) -> None:
    with grid_of(1, 8) as grid:
        mesh = mesh_of(grid, rank_device.type)["tp"]
        whole = torch.randn(2, 5, 9, generator=torch.Generator().manual_seed(0)).to(rank_device)
        labels = torch.tensor([[0, 1, 2, 8, 2], [2, 2, 4, 2, 8]], device=rank_device)
        truth = functional.cross_entropy(whole.flatten(0, 1), labels.flatten(), ignore_index=2)
        split = distribute_tensor(whole, mesh, [Shard(2)], src_data_rank=None)
        for logits in (whole, split):
            loss = cross_entropy(logits, labels, ignore_index=2)
            assert abs(float(loss - truth)) <= 1e-6


def test_what_does_not_fit_is_refused(rank_device) -> None:
    with grid_of(1, 8) as grid:
        mesh = mesh_of(grid, rank_device.type)["tp"]
        logits = torch.zeros(2, 3, 16, device=rank_device)
        labels = torch.zeros(2, 3, dtype=torch.long, device=rank_device)
        with pytest.raises(ValueError, match=r"one of \['none', 'sum', 'mean'\], got 'average'"):
            cross_entropy(logits, labels, reduction="average")
        with pytest.raises(ValueError, match=r"\(2, 3, 16\) need labels \(2, 3\), got \(3, 2\)"):
            cross_entropy(logits, labels.T)
        with pytest.raises(
            ValueError, match=r"split along their last dim, S\(2\) on a mesh .*got "
        ):
            cross_entropy(DTensor.from_local(logits, mesh, [Replicate()]), labels)


def test_scalars_are_summed_over_data_ranks_only(rank_device) -> None:
    with grid_of(2, 4) as grid:
        group = mesh_of(grid, rank_device.type).get_group("fsdp")
        value = float(grid.coords(dist.get_rank())["dp"] + 1)
        own = torch.tensor(value, requires_grad=True, device=rank_device)
        total = sum_over_data(own, group)
        assert type(total) is torch.Tensor
        assert not total.requires_grad
        assert float(total) == 1 + 2
        world = own.detach().clone()
        dist.all_reduce(world)
        assert float(world) == 4 * (1 + 2)  # the control: over the world it is tp times as much
