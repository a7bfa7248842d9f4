# SPDX-License-Identifier: Apache-2.0
"""Styles applied: parameters become ``DTensor``, and hooks bring a module's input where it must be.

| | parameters | input | output |
|---|---|---|---|
| column | rows split | whole, a DTensor | own features, plain |
| row | columns split, bias on each rank | own features, plain | cut along the sequence |
| vocabulary | rows split | whole ids, plain | cut along the sequence |
| logits | rows split | cut along the sequence | own vocabulary, a DTensor; or whole, plain |
| sequence | on each rank | cut along the sequence | the same |
| heads | on each rank | own heads, plain | own heads, plain |
| whole sequence | | cut along the sequence -> whole | |

A ``DTensor`` that is cut along the sequence knows the global length, which it need not share
evenly: gathering pads and crops. So no length is refused, and what reads ``hidden_states.shape``
reads the global one. Padding the batch to a multiple of TP instead changes what a tower without a
mask attends to, and needs positions and masks made anew.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from megatron.core.models.mimo.torch_native.plans import Style

_ROWS: dict[str, Placement] = {"weight": Shard(0), "bias": Shard(0)}
_COLUMNS: dict[str, Placement] = {"weight": Shard(1), "bias": Replicate()}
_EACH: dict[str, Placement] = {"weight": Replicate(), "bias": Replicate()}
_PARAMETERS = {
    Style.COLUMN: _ROWS,
    Style.ROW: _COLUMNS,
    Style.VOCABULARY: _ROWS,
    Style.LOGITS: _ROWS,
    Style.SEQUENCE: _EACH,
    Style.HEADS: _EACH,
}


@dataclass
class TensorParallel:
    """Applies styles over one mesh.

    Attributes:
        mesh: of one dim, the TP ranks.
        sequence_parallel: cut the residual stream along the sequence; else each rank has it whole.
        loss_parallel: logits stay split.
    """

    mesh: DeviceMesh
    sequence_parallel: bool
    loss_parallel: bool

    def __post_init__(self) -> None:
        # A tied weight is met twice and must stay one.
        self._distributed: dict[nn.Parameter, nn.Parameter] = {}
        self._stream: Placement = Shard(1) if self.sequence_parallel else Replicate()

    def apply(self, name: str, module: nn.Module, style: Style) -> None:
        """Split a module's own parameters and hook its input and output.

        Args:
            name: of the module, for messages.
            module: is changed.
            style: from a plan.
        """
        for kind, placement in _PARAMETERS.get(style, {}).items():
            parameter = module._parameters.get(kind)
            if parameter is not None:
                setattr(module, kind, self._split(parameter, placement))
        _HOOKS[style](self, name, module)

    def _split(self, parameter: nn.Parameter, placement: Placement) -> nn.Parameter:
        if parameter not in self._distributed:
            # Every rank has the same weights (checked before), so nothing is sent.
            data = distribute_tensor(parameter.data, self.mesh, [placement], src_data_rank=None)
            made = nn.Parameter(data)
            # Also of a frozen one, which may train later.
            made.register_post_accumulate_grad_hook(_place_gradient)
            made.requires_grad_(parameter.requires_grad)
            self._distributed[parameter] = made
        return self._distributed[parameter]

    def _take(self, name: str, module: nn.Module, plain: Placement, wanted: Placement) -> None:
        """Bring a module's first argument, whole or split like ``plain``, to ``wanted``."""
        argument = next(iter(inspect.signature(module.forward).parameters))
        self._take_argument(name, module, argument, plain, wanted)

    def _take_argument(
        self, name: str, module: nn.Module, argument: str, plain: Placement, wanted: Placement
    ) -> None:
        def bring(value: Any) -> Any:
            return self._bring(value, plain, wanted)

        hook = _argument_hook(name, module, argument, bring)
        module.register_forward_pre_hook(hook, with_kwargs=True)

    def _bring(self, value: Any, plain: Placement, wanted: Placement) -> Any:
        if not torch.is_tensor(value):
            return value
        if not isinstance(value, DTensor):
            value = DTensor.from_local(value, self.mesh, [plain], run_check=False)
        return value.redistribute(self.mesh, [wanted])

    def _give(self, module: nn.Module, wanted: Placement, local: bool) -> None:
        def after(_: nn.Module, args: Any, output: Any) -> Any:
            placed = output.redistribute(self.mesh, [wanted])
            return placed.to_local() if local else placed

        module.register_forward_hook(after)

    def _column(self, name: str, module: nn.Module) -> None:
        self._take(name, module, Replicate(), Replicate())
        self._give(module, Shard(-1), local=True)

    def _row(self, name: str, module: nn.Module) -> None:
        self._take(name, module, Shard(-1), Shard(-1))
        self._give(module, self._stream, local=False)

    def _vocabulary(self, name: str, module: nn.Module) -> None:
        self._take(name, module, Replicate(), Replicate())
        self._give(module, self._stream, local=False)

    def _logits(self, name: str, module: nn.Module) -> None:
        self._take(name, module, Replicate(), Replicate())
        wanted = Shard(2) if self.loss_parallel else Replicate()
        self._give(module, wanted, local=not self.loss_parallel)

    def _sequence(self, name: str, module: nn.Module) -> None:
        self._take(name, module, Replicate(), self._stream)

    def _heads(self, name: str, module: nn.Module) -> None:
        self._take(name, module, Shard(2), Shard(2))
        self._give(module, Shard(2), local=True)

    def _whole_sequence(self, name: str, module: nn.Module) -> None:
        self._take(name, module, Replicate(), Replicate())

    def _cut(self, name: str, module: nn.Module) -> None:
        self._take_argument(name, module, "inputs_embeds", Replicate(), self._stream)

    def _cut_and_join(self, name: str, module: nn.Module) -> None:
        self._cut(name, module)
        module.register_forward_hook(lambda _, args, output: joined(output, ()))

    def _replicated(self, name: str, module: nn.Module) -> None:
        """Leave a module as it is."""


_HOOKS: dict[Style, Callable[[TensorParallel, str, nn.Module], None]] = {
    Style.COLUMN: TensorParallel._column,
    Style.ROW: TensorParallel._row,
    Style.VOCABULARY: TensorParallel._vocabulary,
    Style.LOGITS: TensorParallel._logits,
    Style.SEQUENCE: TensorParallel._sequence,
    Style.HEADS: TensorParallel._heads,
    Style.WHOLE_SEQUENCE: TensorParallel._whole_sequence,
    Style.CUT: TensorParallel._cut,
    Style.CUT_AND_JOIN: TensorParallel._cut_and_join,
    Style.REPLICATED: TensorParallel._replicated,
}


def joined(output: Any, keep: tuple[str, ...]) -> Any:
    """Return a module's output with every ``DTensor`` whole and plain.

    Args:
        output: a tensor, or a tuple, list or mapping of such, also within one another.
        keep: keys of a mapping whose values stay.
    """
    if isinstance(output, DTensor):
        return output.redistribute(output.device_mesh, [Replicate()]).to_local()
    if isinstance(output, dict):  # ModelOutput is one
        for key in list(output):
            if key not in keep:
                output[key] = joined(output[key], ())
        return output
    if isinstance(output, (tuple, list)):
        made = [joined(each, ()) for each in output]
        return type(output)(*made) if hasattr(output, "_fields") else type(output)(made)
    return output


def _argument_hook(
    name: str, module: nn.Module, argument: str, bring: Callable[[Any], Any]
) -> Callable[..., Any]:
    """A hook that changes one argument, given by position or by keyword, and no other."""
    signature = inspect.signature(module.forward)
    position = list(signature.parameters).index(argument)

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        try:
            signature.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{name} ({type(module).__name__}): {error}") from None
        if position < len(args):
            return (*args[:position], bring(args[position]), *args[position + 1 :]), kwargs
        if argument in kwargs:
            kwargs = {**kwargs, argument: bring(kwargs[argument])}
        return args, kwargs

    return before


def _place_gradient(parameter: Any) -> None:
    """Bring a gradient to its parameter's placements.

    PyTorch leaves that of a whole parameter as each TP rank's part of a sum, and an untied
    vocabulary's whole on every TP rank.
    """
    gradient = parameter.grad
    if isinstance(gradient, DTensor) and gradient.placements != parameter.placements:
        parameter.grad = gradient.redistribute(parameter.device_mesh, parameter.placements)
