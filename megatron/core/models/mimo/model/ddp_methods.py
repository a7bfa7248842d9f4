# SPDX-License-Identifier: Apache-2.0
"""The methods that Megatron's schedules and optimizers call on a data-parallel model.

``MimoModel`` is not wrapped as a whole: each of its modules has a DDP wrapper with a layout of
its own. These methods hand the call to every wrapper that takes part.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from megatron.core.models.mimo.stand_ins import TakesStandIns, model_method
from megatron.core.models.mimo.wrappers import clean_name


def in_low_precision(part: nn.Module) -> bool:
    """Whether a layer's config has it compute in less than 16 bits (fp8, fp4, kitchen's)."""
    config = getattr(part, "config", None)
    return any(getattr(config, name, None) for name in ("fp8", "fp4", "use_kitchen"))


def first_microbatch_layers(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, layer) of what Transformer Engine tells which microbatch is a step's first."""
    for name, part in module.named_modules():
        if hasattr(part, "is_first_microbatch"):
            yield clean_name(module, name), part


def finish_param_gather(group: Any) -> None:
    """Wait for a bucket group's gather, if one is under way, and start none of the next group."""
    if group.param_gather_handle is not None:
        group.finish_param_sync(skip_next_bucket_dispatch=True)


class DDPMethods(TakesStandIns):
    """Mixin: data-parallel calls, handed on to the wrapped modules of this rank."""

    def _active_submodules(self) -> Iterator[nn.Module]:
        raise NotImplementedError

    def _active_ddp_modules(self) -> Iterator[Any]:
        raise NotImplementedError

    def language_stages(self) -> list[nn.Module]:
        """Wrapped modules that run after all others; none, unless the class knows some."""
        return []

    def _overlapping(self, option: str) -> list[Any]:
        """The DDP modules of this rank whose config has an overlap option on."""
        return [m for m in self._active_ddp_modules() if getattr(m.ddp_config, option)]

    @model_method
    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Gradients only accumulate inside: modules that reduce in the backward pass wait."""
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
        """A step begins: Transformer Engine's layers are to convert their weights to fp8 anew.

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

    def start_param_gathers(self) -> None:
        """Start all parameter gathers that are due, of modules whose forward waits for them.

        Every rank calls it before anything of a step runs, so replicas enter their gathers in one
        order and none waits for a replica whose batch leaves an encoder out. Stock starts a
        bucket's gather only when the forward pass has come to the bucket before it. Encoders come
        first, as in the forward pass.
        """
        for group in self._gathering():
            # Forward hooks only wait: whatever a rank runs starts no gather of its own.
            group.next_param_gather_bucket_group = None
            if not group.param_gather_dispatched:
                group.start_param_sync()

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
        stages = {id(stage) for stage in self.language_stages()}
        modules = self._overlapping("overlap_param_gather")
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
