# SPDX-License-Identifier: Apache-2.0
"""Lossy links in the reduction of gradients over DP, in Megatron's DDP on 8 ranks.

The oracle draws each replica's losses by itself and sums what is left in float64.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.models.mimo.gradients.finalize import (
    MimoGradFinalizer,
    iter_modules,
    wrap_modules_with_ddp,
)
from megatron.core.models.mimo.lossy.draws import Draws, stream_key
from megatron.core.models.mimo.lossy.install import lossy_links
from megatron.core.models.mimo.lossy.loss_models import Bernoulli, GilbertElliott
from megatron.core.models.mimo.lossy.spec import LinkRule, LossySpec
from tests.unit_tests.mimo.tiny_modules import (
    COLOCATED,
    TinyModel,
    config,
    on_all_ranks,
    tiny_model,
)

pytestmark = pytest.mark.ranks(8)

PAYLOAD, SEED = 12, 4
# Half of all packets: a bucket has ten of them.
HALF = GilbertElliott(0.3, 0.3, 0.1, 0.9)
RULE = LinkRule("gradients.*", HALF, collectives=("gradients",), payload=PAYLOAD)
SPEC = LossySpec((RULE,), SEED)


def gradients(bucket: Any) -> torch.Tensor:
    """Each replica's own, the same on its TP ranks where they hold the same weights."""
    count = torch.arange(bucket.grad_data.numel(), device=bucket.grad_data.device)
    return (count % 7 + 1).float()


def reduced(model: TinyModel, spec: LossySpec | None) -> dict[str, Any]:
    """The buckets of the language model after one reduction, and what each replica had lost."""
    module: Any = model.language_model
    groups = model.collections["language"]
    (buckets,) = module.bucket_groups
    (bucket,) = buckets.buckets
    bucket.grad_data.copy_(gradients(bucket) * (1 + groups.dp_cp.rank()))
    if spec is None:
        MimoGradFinalizer(model.collections)([model])
        return {"sum": bucket.grad_data.clone(), "links": None}
    with lossy_links(module, spec) as links:
        MimoGradFinalizer(model.collections)([model])
    return {"sum": bucket.grad_data.clone(), "links": links}


def oracle(model: TinyModel, message: int = 0) -> torch.Tensor:
    """The sum of what each replica's links let through."""
    module: Any = model.language_model
    (bucket,) = module.bucket_groups[0].buckets
    whole, per_packet = gradients(bucket).double(), PAYLOAD // 4
    packets = -(-whole.numel() // per_packet)
    total = torch.zeros_like(whole)
    for replica in range(model.collections["language"].dp_cp.size()):
        first = next(n for n, p in module.module.named_parameters() if p is bucket.params_list[0])
        key = stream_key(
            SEED, "gradients.0 backward gradients from 0", f"replica {replica} of 0 from {first}"
        )
        draws, loss = Draws(key, message), RULE.loss
        lost = loss.send(packets, loss.start(draws), draws, 0).lost
        kept = ~np.repeat(lost, per_packet)[: whole.numel()]
        total += whole * (1 + replica) * torch.from_numpy(kept).to(whole.device)
    return total


@pytest.mark.parametrize("distributed", [False, True], ids=["all_reduce", "reduce_scatter"])
def test_each_replica_loses_what_its_links_say(distributed: bool) -> None:
    with tiny_model(COLOCATED, distributed=distributed) as model:
        found, wanted = reduced(model, SPEC), oracle(model)
        plain = reduced(model, None)
        groups = model.collections["language"]
        part = slice(None)
        if distributed:  # the other parts are other ranks'
            size = wanted.numel() // groups.dp_cp.size()
            part = slice(groups.dp_cp.rank() * size, (groups.dp_cp.rank() + 1) * size)
        (row,) = found["links"].statistics()
        mine = found["sum"][part].contiguous()
        copies = [torch.empty_like(mine) for _ in range(groups.tp.size())]
        dist.all_gather(copies, mine, group=groups.tp)
        told = {
            # Sums of at most 8 whole numbers, exact in float32.
            "exact": torch.equal(mine.double(), wanted[part]),
            "plain": torch.equal(mine, plain["sum"][part]),
            "about": (row["place"], row["direction"], row["payload_bytes"]),
            "lost": (groups.dp_cp.rank(), row["lost"], row["bursts"]),
            "alike": all(torch.equal(copy, mine) for copy in copies),
        }
        # Asserted together, so that no rank waits for one that has failed.
        everywhere = on_all_ranks(told)
    assert all(each["exact"] for each in everywhere)
    assert not all(each["plain"] for each in everywhere)
    about = ("gradients.0", "backward", 4 * wanted.numel())
    assert {each["about"] for each in everywhere} == {about}
    # Replicas lose apart; TP ranks of one lose alike, so what they hold alike stays alike.
    lost = {each["lost"] for each in everywhere}
    assert len(lost) == 4
    assert len({each[1:] for each in lost}) > 1
    assert all(each["alike"] for each in everywhere)


def test_nothing_is_lost_without_loss_and_ddp_is_left_as_it_was() -> None:
    with tiny_model(COLOCATED) as model:
        plain = reduced(model, None)
        none = reduced(model, LossySpec((replace(RULE, loss=Bernoulli(0.0)),), SEED))
        assert torch.equal(plain["sum"], none["sum"])
        assert not any("start_grad_sync" in vars(b) for b in model.language_model.bucket_groups)
        again = reduced(model, SPEC)
        assert not torch.equal(plain["sum"], again["sum"])


def test_overlapping_reductions_lose_once_a_step() -> None:
    """In the first step Megatron asks for a reduction that it has started once more."""
    with tiny_model(COLOCATED, wrap=False) as model:
        settings = DistributedDataParallelConfig(overlap_grad_reduce=True)
        configs = {name: config() for name in COLOCATED}
        wrap_modules_with_ddp(model, configs, settings, model.collections)
        module: Any = model.language_model
        (buckets,) = module.bucket_groups
        before, finalize = buckets.start_grad_sync, MimoGradFinalizer(model.collections)
        messages = []
        with lossy_links(module, SPEC) as links:
            for step in range(3):
                for _, each in iter_modules(model):
                    each.zero_grad_buffer()
                sum((p * p.detach()).sum() for *_, p in model.named()).backward()
                if step == 0:
                    module.start_grad_sync()  # as schedules with a grad_sync_func do
                finalize([model])
                (row,) = links.statistics()
                messages.append(row["messages"])
        assert messages == [1, 2, 3]
        assert buckets.start_grad_sync is before


def test_rules_for_gradients_are_asked_for_by_name() -> None:
    with tiny_model(COLOCATED) as model:
        module: Any = model.language_model
        with pytest.raises(ValueError, match=r"rule 0 fits nothing that sends.*\['gradients\.0'\]"):
            lossy_links(module, LossySpec((LinkRule("*", Bernoulli(0.1)),), SEED))
        with pytest.raises(ValueError, match="rule 0 fits nothing that sends"):
            lossy_links(module, LossySpec((replace(RULE, directions=("forward",)),), SEED))
        with pytest.raises(ValueError, match=r"gradients\.0 is a reduction of .* side='sender'"):
            lossy_links(module, LossySpec((replace(RULE, side="receiver"),), SEED))
        with (
            lossy_links(module, SPEC),
            pytest.raises(ValueError, match=r"gradients\.0 has lossy links already"),
        ):
            lossy_links(module, SPEC)
