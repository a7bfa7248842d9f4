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


class DDPMethods:
    """Mixin: data-parallel calls, handed on to the wrapped modules of this rank."""

    def _active_submodules(self) -> Iterator[nn.Module]:
        raise NotImplementedError

    def _active_ddp_modules(self) -> Iterator[Any]:
        raise NotImplementedError

    def _overlapping(self, option: str) -> list[Any]:
        """The DDP modules of this rank whose config has an overlap option on."""
        return [m for m in self._active_ddp_modules() if getattr(m.ddp_config, option)]

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Gradients only accumulate inside: modules that reduce in the backward pass wait."""
        with ExitStack() as stack:
            for module in self._overlapping("overlap_grad_reduce"):
                stack.enter_context(module.no_sync())
            yield

    def start_grad_sync(self, *unused: Any) -> None:
        """Start the gradient reduction of modules that overlap it."""
        for module in self._overlapping("overlap_grad_reduce"):
            module.start_grad_sync()

    def zero_grad_buffer(self) -> None:
        """Forget the gradients of all modules of this rank, wrapped or not."""
        for module in self._active_submodules():
            if hasattr(module, "zero_grad_buffer"):
                module.zero_grad_buffer()
            else:
                module.zero_grad()

    def start_param_sync(
        self, *unused: Any, force_sync: bool = False, force_dispatch: bool = False
    ) -> None:
        """Start the parameter gather of modules that overlap it.

        Args:
            force_sync: wait for it.
            force_dispatch: start it even if the wrapper would wait for a forward pass.
        """
        for module in self._overlapping("overlap_param_gather"):
            module.start_param_sync(force_sync=force_sync, force_dispatch=force_dispatch)

    def enable_forward_pre_hook(self) -> None:
        """Forward passes wait for gathered parameters, in modules that overlap the gather."""
        for module in self._overlapping("overlap_param_gather"):
            module.enable_forward_pre_hook()

    def disable_forward_pre_hook(self, param_sync: bool = True) -> None:
        """Undo :meth:`enable_forward_pre_hook`; ``param_sync`` gathers the parameters now."""
        for module in self._overlapping("overlap_param_gather"):
            module.disable_forward_pre_hook(param_sync=param_sync)

    def free_overlap_buffers(self) -> None:
        """Release the gather buffers of modules that overlap the parameter gather.

        Megatron-Core 0.16 keeps none beyond the step, and its wrapper has no such method.
        """
        for module in self._overlapping("overlap_param_gather"):
            if hasattr(module, "free_overlap_buffers"):
                module.free_overlap_buffers()
