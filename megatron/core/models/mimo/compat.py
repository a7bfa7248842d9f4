# SPDX-License-Identifier: Apache-2.0
"""What differs between the supported Megatron-Core versions, or is too narrow in all of them.

One place for it, so that the rest of the package reads as if there were one version.
"""

from __future__ import annotations

import contextlib
import inspect
import queue
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields, replace
from typing import Any, cast

import torch
from torch import nn

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelLoadStrategyWrapper,
    FullyParallelSaveStrategyWrapper,
)
from megatron.core.dist_checkpointing.strategies.torch import (
    TorchDistLoadShardedStrategy,
    TorchDistSaveShardedStrategy,
)
from megatron.core.distributed import DistributedDataParallel
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.models.mimo.wrappers import hide_in_checkpoint
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import Float16Module, MegatronModule
from megatron.core.transformer.moe.moe_utils import get_updated_expert_bias
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.utils import sharded_state_dict_default

WRAPPERS: tuple[type[nn.Module], ...] = (DistributedDataParallel, Float16Module)

# The router's bias is updated over groups that the caller gives, from 0.19.
EXPERT_BIAS_TAKES_GROUPS = "tp_dp_cp_group" in inspect.signature(get_updated_expert_bias).parameters
# Under per-token losses 0.16 scales the router's losses by the tokens of this rank alone, although
# the tokens of all TP x CP ranks divide them later. 0.19, which has other parameters, does not.
ROUTER_LOSSES_MISS_RANKS = (
    "reduce_group_has_dp"
    in inspect.signature(TopKRouter.attach_and_log_load_balancing_loss).parameters
)

# Stock declares a tuple of exactly one.
ShardedOffsets = Any


class ContractError(ValueError, AssertionError):
    """A caller's mistake that stock Megatron-Core asserts.

    It is a ``ValueError`` as all callers' mistakes here, and an ``AssertionError`` too, so that
    code written for stock that catches the assertion keeps working.
    """


def peel(
    module: nn.Module, prefix: str, wrappers: tuple[type[nn.Module], ...] = WRAPPERS
) -> tuple[nn.Module, str]:
    """Take the DDP and Float16 wrappers off; the prefix grows by ``module.`` for each.

    The wrappers hand ``sharded_state_dict`` on without a ``module.`` of their own, while
    ``load_state_dict`` of a parent expects one per level. With this prefix the two agree.
    """
    while isinstance(module, wrappers):
        module, prefix = cast(nn.Module, module.module), f"{prefix}module."
    return module, prefix


def sharded_state_dict_of_children(
    children: Iterable[tuple[str, nn.Module]],
    sharded_offsets: ShardedOffsets,
    metadata: Mapping[str, Any] | None,
    pg_collection: Any,
    owner: str,
    wrappers: tuple[type[nn.Module], ...] = WRAPPERS,
) -> dict[str, Any]:
    """Return the sharded state of several modules that share their process groups.

    Megatron's global ``parallel_state`` is asked only if ``pg_collection`` is ``None`` and
    ``metadata`` has no ``dp_cp_group``.

    Args:
        children: (key prefix, module) pairs; wrappers are taken off.
        pg_collection: the groups of these modules; ``dp_cp`` is needed, ``tp`` is used.
        owner: what the error calls the holder of ``pg_collection``.

    Raises:
        ContractError: ``pg_collection`` has no ``dp_cp`` group.
    """
    own_metadata = metadata_with_dp_cp_group(metadata, pg_collection, owner)
    tp_group = getattr(pg_collection, "tp", None)
    state: dict[str, Any] = {}
    for prefix, child in children:
        module, prefix = peel(child, prefix, wrappers)
        with lend_tp_group(module, tp_group), tied_heads_as_copies(module):
            state.update(
                sharded_state_dict_default(
                    module, prefix, sharded_offsets, own_metadata, tp_group=tp_group
                )
            )
    hide_in_checkpoint(state)
    return state


def metadata_with_dp_cp_group(
    metadata: Mapping[str, Any] | None, pg_collection: Any, owner: str
) -> dict[str, Any] | None:
    """Return a copy of ``metadata`` that names ``pg_collection``'s ``dp_cp`` group, if any.

    A copy, since Megatron fills the dict it is given, and the next module has other groups.

    Raises:
        ContractError: ``pg_collection`` has no ``dp_cp`` group.
    """
    if pg_collection is None:
        return None if metadata is None else dict(metadata)
    dp_cp_group = getattr(pg_collection, "dp_cp", None)
    if dp_cp_group is None:
        raise ContractError(
            f"pg_collection on '{owner}' is missing dp_cp group, which says who holds replicas; "
            "set pg_collection.dp_cp before saving"
        )
    return {**(metadata or {}), "dp_cp_group": dp_cp_group}


@contextlib.contextmanager
def lend_tp_group(module: nn.Module, tp_group: Any) -> Iterator[None]:
    """Lend Megatron modules without a ``tp_group`` this one, inside the context.

    Without one, ``MegatronModule.sharded_state_dict`` asks the global ``parallel_state``, which
    colocated modules with TP sizes of their own do not have.
    """
    borrowers: list[Any] = [
        m
        for m in module.modules()
        if tp_group is not None and isinstance(m, MegatronModule) and not hasattr(m, "tp_group")
    ]
    for borrower in borrowers:
        borrower.tp_group = tp_group
    try:
        yield
    finally:
        for borrower in borrowers:
            del borrower.tp_group


@contextlib.contextmanager
def tied_heads_as_copies(module: nn.Module) -> Iterator[None]:
    """Save, inside, a head that is tied to another stage's embeddings as a copy of them.

    So it is in stock, which asks the global ``parallel_state`` which copy this rank has; the
    head's own entry in the sharded state says so, too.
    """
    models = [m for m in module.modules() if isinstance(m, LanguageModule)]
    for model in models:
        model.tie_embeddings_and_output_weights_state_dict = _tie_head_of(model)
    try:
        yield
    finally:
        for model in models:
            del model.tie_embeddings_and_output_weights_state_dict


def _tie_head_of(model: LanguageModule) -> Callable[..., None]:
    def tie(state: dict[str, Any], head: str, embeddings: str, *_metadata: Any) -> None:
        # The first stage's embeddings are the head as well; stages between have neither.
        if model.pre_process or head not in state:
            return
        own = state[head]
        copy = (1, *own.replica_id[1:])
        state[head] = replace(own, key=embeddings, replica_id=copy, allow_shape_mismatch=True)

    return tie


def packed_seq_params(packing_kwargs: Mapping[str, Any]) -> PackedSeqParams:
    """Make ``PackedSeqParams`` in ``thd`` format; cumulative lengths become int32.

    Raises:
        ValueError: a field that ``PackedSeqParams`` of the installed version does not have.
    """
    known = [f.name for f in fields(PackedSeqParams)]
    unknown = sorted(set(packing_kwargs) - set(known))
    if unknown:
        raise ValueError(
            f"packing_kwargs has {unknown}, which PackedSeqParams of this Megatron-Core version "
            f"does not take; it takes {known}"
        )
    values = {
        name: value.to(torch.int32) if "cu_seqlens" in name and value is not None else value
        for name, value in packing_kwargs.items()
    }
    return PackedSeqParams(**{**values, "qkv_format": "thd"})


def fully_parallel_save() -> FullyParallelSaveStrategyWrapper:
    """Return a way to save: all ranks write about as many bytes of what they have in common.

    Without it the first holder of a replicated tensor writes it, which is mostly rank 0. Ranks
    tell each other what they hold, not the data. A new one for every save: it keeps state.
    """
    return FullyParallelSaveStrategyWrapper(TorchDistSaveShardedStrategy("torch_dist", 1))


def plan_save(state: Any, folder: str) -> Any:
    """Plan a save that shares the writing out over all ranks, who call it together.

    The ``AsyncRequest`` says what this rank writes. Nothing but this process will write it, so its
    results need no queue in another one, which stock starts on every rank.
    """
    filesystem_async._results_queue = queue.Queue()
    takes_strategy = "async_strategy" in inspect.signature(dist_checkpointing.save).parameters
    strategy: dict[str, Any] = {"async_strategy": "mcore"} if takes_strategy else {}
    return dist_checkpointing.save(
        state, folder, fully_parallel_save(), async_sharded_save=True, **strategy
    )


def host_copies(request: Any, *, copy: bool) -> list[Any]:
    """Return what this rank writes of a planned save, on the host, file by file.

    The request keeps it in place of the tensors on the device.

    Args:
        request: of ``plan_save``.
        copy: also of what is on the host.
    """
    if request.async_fn is None:  # nothing to write
        return []
    buckets = request.async_fn_args[1]
    buckets[:] = [
        (path, name, (blobs, [(item, tensor.to("cpu", copy=copy)) for item, tensor in tensors]))
        for path, name, (blobs, tensors) in buckets
    ]
    return buckets


def write_file(request: Any, number: int, bucket: Any) -> Any:
    """Write a file of a planned save and have it on the disk; returns where its items lie.

    Raises:
        Exception: what kept it from being written.
    """
    results, running = queue.Queue(), queue.Queue()
    running.put(number)
    transforms = request.async_fn.args[0]
    write: Any = filesystem_async.FileSystemWriterAsync.write_preloaded_data
    write(transforms, number, bucket, results, running, True)
    _, found = results.get_nowait()
    if isinstance(found, Exception):
        raise _without_frames(found)
    return found


def _without_frames(error: Exception) -> Exception:
    """Take the calls that led to ``error``, and to what it came after, off it.

    They hold PyTorch's file writer. Once a write has failed, it takes the process down when the
    garbage collector frees it.
    """
    each: BaseException | None = error
    while each is not None:
        each.__traceback__ = None
        each = each.__context__
    return error


def save_done(request: Any, results: list[Any]) -> None:
    """Complete a planned save whose files are written; all ranks call it together."""
    if request.async_fn is not None:
        request.async_fn_args[2].put(dict(enumerate(results)))
    for finalize in request.finalize_fns:
        finalize()


def fully_parallel_load(
    group: torch.distributed.ProcessGroup | None,
) -> FullyParallelLoadStrategyWrapper:
    """Return a way to load: the ranks of ``group`` (None: all) read each byte once and share it."""
    return FullyParallelLoadStrategyWrapper(TorchDistLoadShardedStrategy(), group)
