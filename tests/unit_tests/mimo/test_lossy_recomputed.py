# SPDX-License-Identifier: Apache-2.0
"""What is computed again in backward meets the losses that it met in forward. One process.

Both ways to recompute, with other messages of the same links in between.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from megatron.core.models.mimo.lossy.draws import stream_key
from megatron.core.models.mimo.lossy.link import Link
from megatron.core.models.mimo.lossy.loss_models import GilbertElliott
from megatron.core.models.mimo.lossy.recomputation import follow
from megatron.core.models.mimo.memory import recomputed
from megatron.core.tensor_parallel import random

pytestmark = pytest.mark.once


def megatrons(part: Callable[..., Any], x: torch.Tensor) -> torch.Tensor:
    return random.checkpoint(part, False, x)


def ours(part: Callable[..., Any], x: torch.Tensor) -> torch.Tensor:
    return recomputed.recomputed(part, x, trains=True)


def steps(how: Callable[..., Any] | None, replacement: str, followed: bool) -> Any:
    """Two microbatches forward, then both backward; what links let through, and gradients."""
    there, back = (
        Link(GilbertElliott(0.3, 0.3, 0.1, 0.9), replacement, stream_key(1, name, 0), 16)
        for name in ("there", "back")
    )
    end = follow([there, back]) if followed else lambda: None

    def part(x: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(there.carry(x)) * x

    inputs, results = [], []
    for number in range(4):
        x = torch.linspace(-1, 1 + number, 40, requires_grad=True)
        y = part(x) if how is None else how(part, x)
        y.register_hook(lambda dy: back.carry(dy))
        inputs.append(x)
        results.append(y)
        if number % 2:
            results[number - 1].sum().backward()
            results[number].sum().backward()
    end()
    return there, [x.grad for x in inputs]


@pytest.mark.parametrize("how", [megatrons, ours])
@pytest.mark.parametrize("replacement", ["zero", "stale", "rescaled"])
def test_gradients_are_those_of_what_is_kept(how: Any, replacement: str) -> None:
    there, kept = steps(None, replacement, followed=True)
    again_there, again = steps(how, replacement, followed=True)
    assert all(map(torch.equal, kept, again))
    assert (there.counts.repeated, again_there.counts.repeated) == (0, 4)
    again_there.counts.repeated = 0
    assert again_there.counts == there.counts
    assert again_there.state.messages == there.state.messages == 4
    # The control: links that nobody follows lose other packets the second time.
    _, other = steps(how, replacement, followed=False)
    assert not all(map(torch.equal, kept, other))


def test_functions_are_as_they_were_when_the_last_links_leave() -> None:
    def found() -> list[Any]:
        return [
            random._get_all_rng_states,
            random._set_all_rng_states,
            recomputed._states,
            recomputed._restore,
        ]

    before = found()
    first, second = follow([]), follow([])
    changed = found()
    assert all(a is not b for a, b in zip(before, changed, strict=True))
    first()
    assert found() == changed
    second()
    second()
    assert found() == before


def test_states_that_were_noted_before_the_links_came_can_be_put_back() -> None:
    before = random._get_all_rng_states(), recomputed._states()
    link = Link(GilbertElliott(0.3, 0.3), "zero", 1, 16)
    end = follow([link])
    link.carry(torch.ones(8))
    random._set_all_rng_states(*before[0])
    recomputed._restore(before[1])
    assert link.state.messages == 1
    end()
