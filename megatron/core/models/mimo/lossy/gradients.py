# SPDX-License-Identifier: Apache-2.0
"""Gradient reduction over DP with links that lose packets: in Megatron's DDP, before it reduces.

A message is a bucket of a replica's gradients, padding included, as it goes into the all-reduce or
the reduce-scatter of the distributed optimizer; what is lost is written into the bucket, which is
DDP's own. TP ranks of a replica lose the same packets, so weights that they hold alike get equal
gradients. Megatron's own scaling comes after, and commutes with what replaces a packet.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import nn

from megatron.core.distributed import DistributedDataParallel
from megatron.core.models.mimo.lossy.layers import Remove, Where
from megatron.core.models.mimo.lossy.place import Place
from megatron.core.models.mimo.lossy.spec import BACKWARD, GRADIENTS
from megatron.core.models.mimo.training.global_names import global_modules, join

PLACE: Where = (BACKWARD, GRADIENTS)


def buckets_of(module: nn.Module, name: str) -> Iterator[tuple[str, Any]]:
    """Yield ``(name, group of buckets)`` of what a module reduces; none of other modules.

    Args:
        module: DDP's wrapper, or anything else.
        name: of what it wraps.
    """
    if not isinstance(module, DistributedDataParallel):
        return
    kinds = (("", module.bucket_groups), ("experts", module.expert_parallel_bucket_groups))
    for kind, groups in kinds:
        for number, group in enumerate(groups):
            yield ".".join(filter(None, ("gradients", name, kind, str(number)))), group


def reducing_group(buckets: Any) -> Any:
    """Return the ranks over which a group of buckets is reduced."""
    sharded = getattr(buckets, "intra_distributed_optimizer_instance_group", None)
    return buckets.data_parallel_group if sharded is None else sharded


def replica_of(module: nn.Module, buckets: Any) -> str:
    """Return who sends a group of buckets: the same for all TP ranks of a replica.

    Args:
        module: the model; the first weight of the buckets tells pipeline stages apart.
        buckets: of this rank.
    """
    first = buckets.buckets[0].params_list[0]
    weight = next(
        join(name, key)
        for name, owner in global_modules(module)
        for key, parameter in owner.named_parameters(recurse=False)
        if parameter is first
    )
    instances = getattr(buckets, "inter_distributed_optimizer_instance_group", None)
    instance = 0 if instances is None else instances.rank()
    return f"replica {reducing_group(buckets).rank()} of {instance} from {weight}"


def check_buckets(name: str, buckets: Any, at_receiver: bool) -> None:
    """Refuse buckets whose messages cannot be told apart.

    Raises:
        ValueError: packets are to be lost at the receiver; it has lossy links.
    """
    if at_receiver:
        raise ValueError(
            f"{name} is a reduction of gradients, which loses packets at the sender only; give "
            "side='sender' to the rule that names it"
        )
    if hasattr(vars(buckets).get("start_grad_sync"), "place"):
        raise ValueError(f"{name} has lossy links already; remove() the first ones")


def change_buckets(buckets: Any, places: dict[Where, Place]) -> Remove:
    """Make buckets send over the links of their place; returns what undoes it."""
    place, stock = places[PLACE], buckets.start_grad_sync

    def start_grad_sync(*args: Any, **options: Any) -> Any:
        # Of a reduction that is under way Megatron asks once more in the first step.
        if buckets.grad_reduce_handle is None:
            for number, bucket in enumerate(buckets.buckets):
                arrived = place.carry(bucket.grad_data, number)
                if arrived is not bucket.grad_data:
                    bucket.grad_data.copy_(arrived)
        return stock(*args, **options)

    found = vars(buckets).get("start_grad_sync")
    start_grad_sync.place = place  # type: ignore[attr-defined]
    buckets.start_grad_sync = start_grad_sync
    if found is None:
        return partial(delattr, buckets, "start_grad_sync")
    return partial(setattr, buckets, "start_grad_sync", found)  # ours, which keeps their order
