# SPDX-License-Identifier: Apache-2.0
"""The methods that Megatron's schedules, optimizers and checkpoints call on a parallel model.

``MimoModel`` is not wrapped as a whole: each of its modules has a DDP wrapper with a layout of
its own. These methods hand the call to every wrapper that takes part.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from megatron.core.dist_checkpointing.utils import replace_prefix_for_sharding
from megatron.core.distributed import DistributedDataParallel
from megatron.core.models.mimo import compat
from megatron.core.models.mimo.model.rank_modules import (
    LANGUAGE_MODEL,
    VIRTUAL_STAGES,
    RankModules,
)
from megatron.core.models.mimo.stand_ins import TakesStandIns, model_method
from megatron.core.models.mimo.wrappers import clean_name
from megatron.core.transformer.module import Float16Module


def in_low_precision(part: nn.Module) -> bool:
    """Return whether a layer's config has it compute in less than 16 bits (fp8, fp4, kitchen's)."""
    config = getattr(part, "config", None)
    return any(getattr(config, name, None) for name in ("fp8", "fp4", "use_kitchen"))


def first_microbatch_layers(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield (name, layer) of what Transformer Engine tells which microbatch is a step's first."""
    for name, part in module.named_modules():
        if hasattr(part, "is_first_microbatch"):
            yield clean_name(module, name), part


def finish_param_gather(group: Any) -> None:
    """Wait for a bucket group's gather, if one is under way, and start none of the next group."""
    if group.param_gather_handle is not None:
        group.finish_param_sync(skip_next_bucket_dispatch=True)


class DDPMethods(TakesStandIns):
    """Mixin: data-parallel calls, handed on to the wrapped modules of this rank."""

    def _active_submodules(self) -> Iterator[Any]:
        raise NotImplementedError

    def _active_ddp_modules(self) -> Iterator[Any]:
        raise NotImplementedError

    def _overlapping(self, option: str) -> list[Any]:
        """The DDP modules of this rank whose config has an overlap option on."""
        return [m for m in self._active_ddp_modules() if getattr(m.ddp_config, option)]

    @model_method
    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Let gradients only accumulate, inside: modules that reduce in the backward pass wait."""
        with ExitStack() as stack:
            for module in self._overlapping("overlap_grad_reduce"):
                stack.enter_context(module.no_sync())
            yield

    @model_method
    def start_grad_sync(self, *unused: Any) -> None:
        """Start the gradient reduction of modules that overlap it."""
        for module in self._overlapping("overlap_grad_reduce"):
            module.start_grad_sync()

    def set_is_first_microbatch(self) -> None:
        """Tell Transformer Engine's layers that a step begins: they convert weights to fp8 anew.

        Stock asks the whole model's config, which is the language model's; here each layer's own.
        """
        for module in self._active_submodules():
            for _, part in first_microbatch_layers(module):
                if in_low_precision(part):
                    part.is_first_microbatch = True

    @model_method
    def zero_grad_buffer(self) -> None:
        """Forget the gradients of all modules of this rank, wrapped or not."""
        for module in self._active_submodules():
            if hasattr(module, "zero_grad_buffer"):
                module.zero_grad_buffer()
            else:
                module.zero_grad()

    @model_method
    def start_param_sync(
        self, *unused: Any, force_sync: bool = False, force_dispatch: bool = False
    ) -> None:
        """Start the parameter gather of modules that overlap it.

        Args:
            force_sync: wait for it.
            force_dispatch: start it even if the wrapper would wait for a forward pass.
        """
        if force_sync:
            # Stock waits where a gather is under way and gathers elsewhere; ranks may differ.
            self.finish_param_gathers()
        for module in self._overlapping("overlap_param_gather"):
            module.start_param_sync(force_sync=force_sync, force_dispatch=force_dispatch)

    def start_param_gathers(self) -> bool:
        """Start all parameter gathers that are due, of modules whose forward waits for them.

        Every rank calls it before anything of a step runs, so replicas enter their gathers in one
        order and none waits for a replica whose batch leaves an encoder out. Stock starts a
        bucket's gather only when the forward pass has come to the bucket before it. Encoders come
        first, as in the forward pass.

        Returns:
            Whether there is any module whose gathers are to be finished.
        """
        groups = list(self._gathering())
        for group in groups:
            # Forward hooks only wait: whatever a rank runs starts no gather of its own.
            group.next_param_gather_bucket_group = None
            if not group.param_gather_dispatched:
                group.start_param_sync()
        return bool(groups)

    def finish_param_gathers(self) -> None:
        """Wait for gathers that no forward hook has waited for: of what this rank did not run.

        The optimizer must not write weights that are still being gathered.
        """
        for group in self._gathering():
            finish_param_gather(group)

    def _gathering(self) -> Iterator[Any]:
        """Bucket groups whose weights forward hooks wait for, in the order of the forward pass."""
        if not isinstance(self, nn.Module):
            return  # of a stand-in no step is run
        modules = self._overlapping("overlap_param_gather")
        stages = {id(stage) for stage in RankModules(self).stages} if modules else set()
        for module in sorted(modules, key=lambda module: id(module) in stages):
            if getattr(module, "remove_forward_pre_hook_handles", None):
                # Buckets are filled from a module's last parameter on.
                yield from reversed(module.bucket_groups)
                yield from reversed(module.expert_parallel_bucket_groups)

    @model_method
    def enable_forward_pre_hook(self) -> None:
        """Forward passes wait for gathered parameters, in modules that overlap the gather."""
        for module in self._overlapping("overlap_param_gather"):
            module.enable_forward_pre_hook()

    @model_method
    def disable_forward_pre_hook(self, param_sync: bool = True) -> None:
        """Undo :meth:`enable_forward_pre_hook`; ``param_sync`` gathers the parameters now."""
        self.finish_param_gathers()
        for module in self._overlapping("overlap_param_gather"):
            module.disable_forward_pre_hook(param_sync=param_sync)

    @model_method
    def free_overlap_buffers(self) -> None:
        """Release the gather buffers of modules that overlap the parameter gather.

        Megatron-Core 0.16 keeps none beyond the step, and its wrapper has no such method.
        """
        for module in self._overlapping("overlap_param_gather"):
            if hasattr(module, "free_overlap_buffers"):
                module.free_overlap_buffers()

    @model_method
    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: compat.ShardedOffsets = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Return the distributed-checkpoint view of all modules of this rank.

        Each module's replicas are those of its own ``pg_collection``. As in stock, DDP and
        ``Float16Module`` add ``module.`` to the keys; other wrappers do not show in the names on
        the disk, and ``load_state_dict`` takes names with and without any of them. Where a module
        overlaps its parameter gather, the weights of the last step are gathered here first: all
        ranks call it together.

        Raises:
            ValueError: a module's ``pg_collection`` has no ``dp_cp`` group.
        """
        self.start_param_sync(force_sync=True)
        wrappers = (DistributedDataParallel, Float16Module)
        state: dict[str, Any] = {}
        for path, module in RankModules(self).named():
            inner, _ = compat.peel(module, "", wrappers)
            groups = getattr(inner, "pg_collection", None)
            child = (f"{prefix}{path}.", module)
            part = compat.sharded_state_dict_of_children(
                [child], sharded_offsets, metadata, groups, path, wrappers
            )
            if path.startswith(f"{VIRTUAL_STAGES}."):
                # On disk there is one language model, whatever its stages.
                replace_prefix_for_sharding(part, f"{prefix}{path}.", f"{prefix}{LANGUAGE_MODEL}.")
            state.update(part)
        return state
