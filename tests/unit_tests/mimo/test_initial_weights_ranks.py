# SPDX-License-Identifier: Apache-2.0
"""Initial weights on 8 ranks: shards gathered over real TP groups, and models as functions."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from tests.harness.backend import own_device
from tests.unit_tests.mimo.parallel_models import (
    VOCABULARY,
    Layout,
    Shape,
    gpt,
    own_part,
    process_groups,
)

pytestmark = pytest.mark.ranks(8)

LAYOUTS = [
    Layout(cp=2),
    Layout(tp=2, cp=2),
    Layout(tp=4),
    Layout(tp=4, sequence_parallel=True),
]
SHAPES = {
    "gated": Shape(dtype=torch.float32),
    "plain-bias-tied": Shape(gated=False, bias=True, tied=True, dtype=torch.float32),
}


def gather_over(tensor: torch.Tensor, group: dist.ProcessGroup | None) -> list[torch.Tensor]:
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, tensor.detach().contiguous(), group=group)
    return parts


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_weights_are_the_unsharded_ones_on_every_rank(layout: Layout, shape: Shape) -> None:
    with process_groups(Layout()) as alone:
        whole = dict(gpt(shape, Layout(), alone).named_parameters())
    with process_groups(layout) as groups:
        model = gpt(shape, layout, groups)
        for name, parameter in model.named_parameters():
            expected = own_part(whole[name].detach(), parameter, name, groups)
            assert torch.equal(parameter.detach(), expected), name


def test_unsharded_weights_agree_bit_for_bit_over_the_world() -> None:
    with process_groups(Layout()) as groups:
        model = gpt(SHAPES["gated"], Layout(), groups)
    for name, parameter in model.named_parameters():
        copies = gather_over(parameter, None)
        assert all(torch.equal(copy, parameter) for copy in copies), name


@pytest.mark.parametrize(("tp_size", "query_groups"), [(2, 4), (2, 2), (4, 4)])
def test_logits_are_those_of_one_rank(tp_size: int, query_groups: int) -> None:
    shape = Shape(query_groups=query_groups, dtype=torch.float32)
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, VOCABULARY, (2, 16), generator=generator).to(own_device())
    with process_groups(Layout()) as alone:
        expected = gpt(shape, Layout(), alone)(ids, None, None).detach()
    with process_groups(Layout(tp=tp_size)) as groups:
        local = gpt(shape, Layout(tp=tp_size), groups)(ids, None, None).detach()
        logits = torch.cat(gather_over(local, groups.tp), dim=-1)
    # fp32 sums over TP in another order; logits are of order 10.
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    assert expected.abs().max() > 1.0
