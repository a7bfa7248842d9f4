# SPDX-License-Identifier: Apache-2.0
"""Bridges over links that lose packets, all ranks as threads of one process.

What a bridge does without loss is compared bit for bit; what is lost is 0, and the rest as it was.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron.core.models.mimo.lossy.install import lossy_links
from megatron.core.models.mimo.lossy.loss_models import Bernoulli
from megatron.core.models.mimo.lossy.spec import LossySpec
from tests.unit_tests.mimo.lossy_jobs import (
    spec,
)
from tests.unit_tests.mimo.test_routed_model import EQUAL, FAN_IN, FAN_OUT, Case


def bridged(case: Case, how: LossySpec | None, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A forward and backward pass of a ``MimoModel`` on all ranks, with links or without."""
    build, kept = Case.build, []

    def with_links(self: Case) -> Any:
        model, grids = build(self)
        if how is not None:
            kept.append(lossy_links(model, how))
        return model, grids

    with monkeypatch.context() as patch:
        patch.setattr(Case, "build", with_links)
        try:
            results = case.run()
        finally:
            for links in kept:
                links.remove()
    return SimpleNamespace(results=results, links=kept)


LAYOUTS = {"fan_in": FAN_IN, "fan_out": FAN_OUT, "equal": EQUAL}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bridge", ["routed", "gather"])
def test_bridges_over_links(layout: str, bridge: str, monkeypatch: pytest.MonkeyPatch) -> None:
    src, dest = LAYOUTS[layout]
    case = Case(src, dest, [1] * 8, [8 // src[1]] * src[1], bridge=bridge)
    on_bridge = {"layers": "bridge.images", "collectives": ("exchange",)}
    plain = bridged(case, None, monkeypatch).results
    none = bridged(case, spec(**on_bridge, loss=Bernoulli(0.0)), monkeypatch).results
    lossy = bridged(case, spec(**on_bridge), monkeypatch)
    tp = dest[0]
    changed = 0
    for rank, (before, same_, after) in enumerate(zip(plain, none, lossy.results, strict=True)):
        assert torch.equal(before.fused, same_.fused)
        for name, value in before.gradients.items():
            assert torch.equal(value, same_.gradients[name])
            changed += not torch.equal(value, after.gradients[name])
        # What is lost is 0, the rest as it was; and the TP ranks of a replica see the same,
        # forward and backward.
        difference = before.fused != after.fused
        changed += int(difference.sum())
        assert not after.fused[difference].any()
        first = lossy.results[rank // tp * tp].fused
        assert torch.equal(after.fused, first)
        first = lossy.results[rank // src[0] * src[0]].gradients
        for name, value in after.gradients.items():
            assert not name.startswith("modality") or torch.equal(value, first[name])
    assert changed > 0
    rows = [row for links in lossy.links for row in links.statistics()]
    assert sum(row["lost"] for row in rows) > 0


def test_a_routed_bridge_loses_at_the_receiver_what_came_from_others(monkeypatch) -> None:
    case = Case(*FAN_IN, [1] * 8, [2] * 4)
    everything = spec(
        layers="bridge.*", loss=Bernoulli(1.0), side="receiver", directions=("forward",)
    )
    plain = bridged(case, None, monkeypatch).results
    lossy = bridged(case, everything, monkeypatch)
    gone = kept = 0
    for before, after in zip(plain, lossy.results, strict=True):
        lost = before.fused != after.fused
        assert not after.fused[lost].any()
        gone, kept = gone + int(lost.sum()), kept + int((~lost).sum())
    assert gone > 0 < kept
    backward = spec(
        layers="bridge.*", loss=Bernoulli(1.0), side="receiver", directions=("backward",)
    )
    after = bridged(case, backward, monkeypatch)
    for mine, theirs in zip(plain, after.results, strict=True):
        assert torch.equal(mine.fused, theirs.fused)
    assert any(
        not torch.equal(value, theirs.gradients[name])
        for mine, theirs in zip(plain, after.results, strict=True)
        for name, value in mine.gradients.items()
    )


def test_a_gather_bridge_loses_at_the_sender_only(monkeypatch) -> None:
    case = Case(*FAN_IN, [1] * 8, [2] * 4, bridge="gather")
    with pytest.raises(ValueError, match="bridge.images is a gather bridge.*side='sender'"):
        bridged(case, spec(layers="bridge.*", side="receiver"), monkeypatch)
