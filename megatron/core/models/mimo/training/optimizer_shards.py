# SPDX-License-Identifier: Apache-2.0
"""A rank's tensors of the distributed optimizer in ``MimoOptimizer.state_dict``.

Stock leaves them to checkpoint formats of its own, and its ``load_state_dict`` allocates moments
without writing them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

SHARDS = "_mimo_shards"
_MAIN = "main"


def shards_of(inner: Any) -> dict[str, Any]:
    """Return tensors that ``inner`` keeps on this rank, by parameter group and place in it.

    Main copies of half-precision weights are among them; fp32 weights are the model's.
    """
    groups = inner.optimizer.param_groups
    return {
        "rank": dist.get_rank(),
        "world_size": dist.get_world_size(),
        "groups": [[_kept(inner, shard) for shard in group["params"]] for group in groups],
    }


def load_shards(inner: Any, saved: dict[str, Any], name: str) -> None:
    """Write the tensors of ``saved`` into ``inner``, whose state is allocated.

    Raises:
        ValueError: they are of another rank or layout.
    """
    mine = shards_of(inner)
    check_place(saved, name, same_shapes=_shapes(saved) == _shapes(mine))
    for own, loaded in zip(mine["groups"], saved["groups"], strict=True):
        for tensors, values in zip(own, loaded, strict=True):
            for key, tensor in tensors.items():
                tensor.copy_(values[key])


def check_place(saved: dict[str, Any], name: str, *, same_shapes: bool = True) -> None:
    """Raise unless shards are of this rank.

    Raises:
        ValueError: they are of another rank or layout.
    """
    mine = {"rank": dist.get_rank(), "world_size": dist.get_world_size()}
    if not same_shapes or any(saved[key] != mine[key] for key in mine):
        raise ValueError(
            f"the state of module '{name}' holds shards of rank {saved['rank']} of "
            f"{saved['world_size']}, this is rank {mine['rank']} of {mine['world_size']} "
            "(or another layout): MimoOptimizer.state_dict() fits the same rank of the same "
            "layout; use sharded_state_dict() or CheckpointStore to go on in another"
        )


def _kept(inner: Any, shard: torch.Tensor) -> dict[str, torch.Tensor]:
    state = inner.optimizer.state[shard]
    kept = {k: v for k, v in state.items() if k != "step" and torch.is_tensor(v)}
    views = {id(view) for group in inner.shard_fp32_groups for view in group}
    return kept if id(shard) in views else {**kept, _MAIN: shard.detach()}


def _shapes(shards: dict[str, Any]) -> list:
    return [
        [{key: tuple(value.shape) for key, value in each.items()} for each in group]
        for group in shards["groups"]
    ]
