# SPDX-License-Identifier: Apache-2.0
"""An encoder of one weight whose items are balanced, against the global picture; see
``routed_cases``. For real ranks and for played ones."""

from __future__ import annotations

import numpy as np
import torch

from megatron.core.models.mimo.comm.item_exchange import ItemExchange
from megatron.core.models.mimo.comm.plan.balance import EncoderBalance, plan_balance
from megatron.core.models.mimo.comm.plan.routes import plan_routes
from megatron.core.models.mimo.comm.plan.token_runs import expand, split_items
from megatron.core.models.mimo.comm.routed_bridge import RoutedBridge
from tests.unit_tests.mimo.routed_cases import Picture

LINEAR = EncoderBalance(threshold=1, cost=lambda tokens: tokens)
WIDTH = 3


def cut_in_items(total: int) -> np.ndarray:
    """Tokens of items, unlike one another, that make up ``total``; two of them none."""
    sizes, left = [0], total
    while left:
        sizes.append(min(left, 1 + len(sizes) * 5 % 7))
        left -= sizes[-1]
    return np.array([*sizes, 0])


def check_balanced_encoder(
    made: RoutedBridge, masks: list[np.ndarray], device: torch.device | None = None
) -> tuple[float, float]:
    """Pixels move, are encoded by one weight, and their rows reach their places; and back.

    One unit is one token's patch. The rows are functions of global pixels, so the picture of the
    global batch says what must arrive; the weight's gradient, summed over the replicas, must be
    that of the unsharded encoder. Bit-equal rows: each is one product of its own pixels.
    """
    items = ItemExchange(made, LINEAR)
    picture = Picture(made, masks, device)
    tokens = cut_in_items(sum(each.count for each in picture.tokens))
    me = items.exchange.index(items.rank)
    replica = int(items.exchange.src_of[me])
    # The first replica reads most items, and the last none.
    readers = max(items.exchange.src_dps.size - 1, 1)
    counts = [len(part) for part in split_items(tokens.size, readers)]
    counts += [0] * (items.exchange.src_dps.size - readers)
    bounds = np.cumsum([0, *counts])
    mine = slice(bounds[replica], bounds[replica + 1])
    plan = items.plan(tokens[mine])
    assert plan.digest() == plan_balance(tokens, counts, LINEAR).digest()

    count = int(tokens.sum()) * WIDTH
    pixels = torch.arange(count, dtype=torch.float64, device=device).view(-1, 1, WIDTH) / 64
    ends = np.cumsum([0, *tokens])
    read = pixels[ends[mine.start] : ends[mine.stop]]
    encoded = items.move(read, plan, tokens)
    even = torch.arange(tokens.size, device=device)[mine] % 2 == 0
    kept = items.move(even, plan)  # booleans, one per item
    assert kept.tolist() == [item % 2 == 0 for item in plan.assignment[replica]]
    assert torch.equal(encoded, pixels[expand(plan.held_rows()[replica])])

    weight = torch.tensor([1.0, -0.5, 0.25], dtype=torch.float64, device=device)
    copy = weight.clone().requires_grad_()
    rows = encoded.squeeze(1) * copy
    route = plan_routes(made.layout, items.rank, picture.tokens, plan.held_rows())
    made.confirm(route, rows)
    own = made.move(rows, route)
    place = made.tensors(route, own.device).place
    fused = own.new_zeros(len(picture.at), WIDTH).index_copy(0, place, own)
    assert torch.equal(fused.detach(), picture.local(pixels.squeeze(1) * weight))
    fused.backward(picture.local(picture.gradient))

    parts = items._gather(copy.grad.view(torch.int64).numpy(force=True)).view(np.float64)
    summed = parts[items.exchange.src_ranks[:, 0]].sum(0)
    expected = (picture.gradient.detach() * pixels.squeeze(1)).sum(0)
    # Double precision; the sums are over other orders.
    np.testing.assert_allclose(summed, expected.numpy(force=True), rtol=1e-12, atol=1e-11)
    return plan.before, plan.after
