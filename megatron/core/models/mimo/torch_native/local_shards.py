# SPDX-License-Identifier: Apache-2.0
"""What a rank holds of a sharded module, as plain tensors: optimizers and checkpoints take those.

Stock's optimizers, gradient norms and checkpoint files know plain tensors. A ``DTensor``'s local
part is one; :class:`LocalShards` gives each a parameter that shares its memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Shard

TP = "tp"


@dataclass(frozen=True)
class Place:
    """Where a rank's part of a tensor lies in it.

    Attributes:
        whole: shape of the tensor.
        offset, shape: of the part; a box.
        cuts: dim of a mesh -> its size, of those that cut the tensor.
        regular: all ranks' parts have one shape.
    """

    whole: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    cuts: dict[str, int]
    regular: bool

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Place:
        """Return the place of this rank's part of a tensor; a plain one is whole."""
        whole = tuple(tensor.shape)
        if not isinstance(tensor, DTensor):
            return cls(whole, (0,) * len(whole), whole, {}, True)
        mesh = tensor.device_mesh
        names = mesh.mesh_dim_names or ()
        offset, shape, regular, cuts = [0] * len(whole), list(whole), True, {}
        # TP cuts a tensor first, and FSDP each of its parts again.
        for axis in reversed(range(mesh.ndim)):
            placement: Any = tensor.placements[axis]
            if not _cuts(placement):
                continue
            size, dim = mesh.size(axis), placement.dim
            regular = regular and shape[dim] % size == 0
            each = -(-shape[dim] // size)
            start = min(mesh.get_local_rank(axis) * each, shape[dim])
            offset[dim], shape[dim] = offset[dim] + start, min(each, shape[dim] - start)
            cuts[names[axis]] = size
        return cls(whole, tuple(offset), tuple(shape), cuts, regular)

    def slices(self) -> tuple[slice, ...]:
        """Return the part as slices of the whole."""
        pairs = zip(self.offset, self.shape, strict=True)
        return tuple(slice(start, start + size) for start, size in pairs)

    def fragments(self) -> tuple[int, ...] | None:
        """Return the number of parts along each dim; None unless they are all alike."""
        if not self.regular or 0 in self.shape:
            return None
        return tuple(n // own for n, own in zip(self.whole, self.shape, strict=True))


def _cuts(placement: Any) -> bool:
    # The strided shards that FSDP makes of TP's are no Shard in every version of torch.
    return isinstance(placement, Shard) or type(placement).__name__ == "_StridedShard"


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """Return this rank's part of a tensor, in the same memory; a plain tensor as it is."""
    plain: Any = tensor.detach()
    return plain._local_tensor if isinstance(tensor, DTensor) else plain


class LocalShards(nn.Module):
    """A module's parameters as plain ones, under the module's names and in its memory.

    Each has ``main_grad``, its gradient in fp32 once gradients are final, and
    ``tensor_model_parallel``, whether TP ranks have other parts of it.

    Args:
        module: sharded.

    Attributes:
        places: name -> where the parameter's part lies.
        ddp_config: set by the owner; stock's optimizers read it.
    """

    ddp_config: Any = None

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.places: dict[str, Place] = {}
        self._of: dict[str, nn.Parameter] = {}
        for name, parameter in module.named_parameters():
            self._add(name, parameter)

    def _add(self, name: str, parameter: nn.Parameter) -> None:
        *path, key = name.split(".")
        owner: nn.Module = self
        for part in path:
            if part not in owner._modules:
                owner.add_module(part, nn.Module())
            owner = owner._modules[part]  # type: ignore[assignment]
        plain: Any = nn.Parameter(local_part(parameter), requires_grad=parameter.requires_grad)
        place = Place.of(parameter)
        if tuple(plain.shape) != place.shape:
            raise RuntimeError(
                f"{name}: this rank holds {tuple(plain.shape)} of {place.whole}, and its "
                f"placements {getattr(parameter, 'placements', None)} say {place.shape}; shard it "
                "with parallelize"
            )
        plain.tensor_model_parallel = TP in place.cuts
        owner.register_parameter(key, plain)
        self.places[name], self._of[name] = place, parameter

    def pairs(self) -> Iterator[tuple[str, nn.Parameter, Any]]:
        """Yield (name, the module's parameter, the plain one)."""
        for name, plain in self.named_parameters():
            yield name, self._of[name], plain

    def check_memory(self) -> None:
        """Make sure that the module's parameters are still in the memory that optimizers step.

        Raises:
            RuntimeError: one is not.
        """
        for name, parameter, plain in self.pairs():
            if plain.numel() and local_part(parameter).data_ptr() != plain.data_ptr():
                raise RuntimeError(
                    f"{name} was moved or cast after its module was sharded, and the optimizer "
                    "would step what it was before; call model.to(...) before "
                    "wrap_modules_with_ddp"
                )

    @torch.no_grad()
    def write(self, name: str, value: torch.Tensor) -> None:
        """Write a whole tensor, or this rank's part of it, into a parameter.

        Raises:
            ValueError: it has neither shape.
        """
        place, plain = self.places[name], self.get_parameter(name)
        if value.shape == place.whole:
            value = value[place.slices()]
        if value.shape != place.shape:
            raise ValueError(
                f"{name} is {place.whole}, of which this rank holds {place.shape}; got "
                f"{tuple(value.shape)}"
            )
        plain.copy_(value)
