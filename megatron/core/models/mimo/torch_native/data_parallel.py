# SPDX-License-Identifier: Apache-2.0
"""What stock's DDP wrapper is to Megatron's layers, for modules that PyTorch's own tools shard.

Gradients are summed over data ranks, never averaged, and end in fp32 as ``main_grad`` of
:class:`.LocalShards`. There are two ways, by what FSDP does with a module:

===============  =====================================  =================================
parameters       gradients over data ranks              who takes part
===============  =====================================  =================================
FSDP cuts them   summed by FSDP, block by block, in     every rank in every microbatch,
                 each microbatch's backward             as language models do
whole per rank   summed here, once, when the step ends  whoever has something to encode
===============  =====================================  =================================
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule

from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.distributed import TorchFullyShardedDataParallel
from megatron.core.distributed.data_parallel_base import _BaseDataParallel
from megatron.core.models.mimo.torch_native.local_shards import LocalShards, local_part
from megatron.core.models.mimo.torch_native.part import native_parts
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
)


class TorchNativeParallel(TorchFullyShardedDataParallel):
    """Shards the torch-native parts of a module and does for it what stock's DDP does.

    It is of stock's class for PyTorch's FSDP, so that stock takes it off as a wrapper.

    Args:
        config: the module's.
        ddp_config: of all modules; a copy without what is Megatron's own is kept.
        module: with weights as they are to be, and with what trains chosen.
        pg_collection: the module's groups.

    Raises:
        ValueError: Megatron's layers cut a weight over TP, too; or what :func:`.parallelize`
            refuses.

    Attributes:
        local_shards: what this rank holds, for optimizers and checkpoints.
    """

    def __init__(self, config: Any, ddp_config: Any, module: nn.Module, pg_collection: Any) -> None:
        _BaseDataParallel.__init__(self, config=config, module=module)
        self.ddp_config = copy(ddp_config)
        self.ddp_config.overlap_grad_reduce = False
        self.ddp_config.overlap_param_gather = False
        self.ddp_config.use_distributed_optimizer = False
        self.pg_collection = pg_collection
        _refuse_megatron_s_cuts(module, pg_collection.tp.size())
        for part in native_parts(module):
            part.shard()
        self.fsdp = any(isinstance(part, FSDPModule) for part in module.modules())
        shards = LocalShards(module)
        shards.ddp_config = self.ddp_config
        self._shards = (shards,)  # no child: its parameters are the module's
        if not self.fsdp:
            self._collect_gradients()
        self.register_load_state_dict_pre_hook(_load_shards)

    @property
    def local_shards(self) -> LocalShards:
        """What this rank holds, as plain parameters."""
        return self._shards[0]

    # -- gradients -------------------------------------------------------------------------

    def _collect_gradients(self) -> None:
        """Give every parameter that trains its part of one fp32 buffer, summed in one go."""
        trained = [pair for pair in self.local_shards.pairs() if pair[2].requires_grad]
        sizes = [plain.numel() for _, _, plain in trained]
        device = next((plain.device for _, _, plain in trained), None)
        self._buffer = torch.zeros(sum(sizes), dtype=torch.float32, device=device)
        for (_, parameter, plain), part in zip(trained, self._buffer.split(sizes), strict=True):
            plain.main_grad = part.view(plain.shape)
            parameter.register_post_accumulate_grad_hook(_taking(plain.main_grad))

    @torch.no_grad()
    def finish_grad_sync(self) -> None:
        """Bring gradients to their sum over data ranks; all ranks of the module call it.

        Raises:
            RuntimeError: the module was moved or cast after it was wrapped.
        """
        self.local_shards.check_memory()
        if not self.fsdp:
            if self.pg_collection.dp_cp.size() > 1:
                dist.all_reduce(self._buffer, group=self.pg_collection.dp_cp)
            return
        for _, parameter, plain in self.local_shards.pairs():
            if not plain.requires_grad:
                continue
            gradient = parameter.grad
            found = torch.zeros_like(plain) if gradient is None else local_part(gradient)
            plain.main_grad = found.float()

    @torch.no_grad()
    def scale_gradients(self, scaling_factor: float | torch.Tensor) -> None:
        """Multiply all gradients."""
        for plain in self.local_shards.parameters():
            if plain.requires_grad:
                plain.main_grad.mul_(scaling_factor)  # type: ignore[attr-defined]

    def zero_grad_buffer(self) -> None:
        """Forget all gradients."""
        self.module.zero_grad()
        if not self.fsdp:
            self._buffer.zero_()

    # -- checkpoints -----------------------------------------------------------------------

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return the state as modules do, of the wrapped module under ``module.``."""
        return nn.Module.state_dict(self, *args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Load whole tensors or this rank's parts of them."""
        return nn.Module.load_state_dict(self, state_dict, *args, **kwargs)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None
    ) -> dict[str, Any]:
        """Return the distributed-checkpoint view: this rank's part of every tensor.

        A tied weight is one tensor on the disk.

        Args:
            prefix: of all names.
            sharded_offsets: none: a torch-native module is no layer of a stack.
            metadata: how Megatron's modules save; not read.

        Raises:
            ValueError: offsets.
        """
        if sharded_offsets:
            raise ValueError(
                f"sharded_offsets={sharded_offsets}: a torch-native module is saved by itself, not "
                "as a layer of a stack; leave them out"
            )
        shards, state = self.local_shards, {}
        for name, _, plain in shards.pairs():
            state[f"{prefix}module.{name}"] = self._sharded(f"{prefix}module.{name}", plain, name)
        known = set(state)
        tied = {id(parameter): name for name, parameter, _ in shards.pairs()}
        for name, tensor in nn.Module.state_dict(self, keep_vars=True).items():
            if f"{prefix}{name}" in known or id(tensor) in tied:
                continue
            if not torch.is_tensor(tensor):  # Megatron's layers have an empty _extra_state
                continue
            state[f"{prefix}{name}"] = self._sharded(f"{prefix}{name}", tensor, None)
        return state

    def _sharded(self, key: str, data: torch.Tensor, name: str | None) -> ShardedTensor:
        """A parameter's entry, or with ``name`` None a buffer's, which all ranks have alike."""
        groups = self.pg_collection
        place = None if name is None else self.local_shards.places[name]
        cuts = {} if place is None else place.cuts
        whole = tuple(data.shape) if place is None else place.whole
        copies = (
            0 if "tp" in cuts else groups.tp.rank(),
            0 if "fsdp" in cuts else groups.dp_cp.rank(),
            int(0 in data.shape),  # a rank with nothing of it writes nothing
        )
        return ShardedTensor(
            key,
            data,
            data.dtype,
            tuple(data.shape),
            whole,
            (0,) * data.ndim if place is None else place.offset,
            (1,) * data.ndim if place is None else place.fragments(),
            copies,
        )


def _refuse_megatron_s_cuts(module: nn.Module, tp: int) -> None:
    """Refuse weights of which a TP rank holds a part that no ``DTensor`` tells of."""
    if tp == 1:
        return
    for path, owner in module.named_modules():
        cut = isinstance(owner, (ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding))
        for key, parameter in owner.named_parameters(recurse=False):
            if getattr(parameter, "tensor_model_parallel", False) or (cut and key == "weight"):
                raise ValueError(
                    f"{path}.{key} is cut over tp {tp} by Megatron's layers, beside a torch-native "
                    "part of the same module, which would be taken for whole; take a projector "
                    "that is whole on each rank, such as torch.nn.Linear, or tp 1"
                )


def _taking(main_grad: torch.Tensor) -> Any:
    """A hook that adds a microbatch's gradient to ``main_grad`` and drops it."""

    def take(parameter: nn.Parameter) -> None:
        assert parameter.grad is not None
        main_grad.add_(local_part(parameter.grad))
        parameter.grad = None

    return take


def _load_shards(module: Any, state: dict[str, Any], prefix: str, *_unused: Any) -> None:
    """Write what is loaded into this rank's parts, and leave the modules nothing to do."""
    shards, known = module.local_shards, {}
    for name, parameter, _ in shards.pairs():
        value = state.get(f"{prefix}module.{name}")
        if value is not None:
            if value is not parameter:
                shards.write(name, local_part(value))
            state[f"{prefix}module.{name}"] = parameter
            known[id(parameter)] = parameter
    for name, tensor in nn.Module.state_dict(module, keep_vars=True).items():
        if id(tensor) in known:  # also under the other name of a tied weight
            state[prefix + name] = known[id(tensor)]
