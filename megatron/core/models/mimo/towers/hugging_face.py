# SPDX-License-Identifier: Apache-2.0
"""Any tower of transformers as it is, at TP 1: its output becomes rows.

What transformers' towers differ in is said once, in :class:`Rows`: which output, which hidden
states, how its dims stand, which rows come first and are no part of the image, which rows are
padding. The tower itself is transformers' own code with its own weights and names.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megatron.core.models.mimo.submodules.encoder_outputs import described

logger = logging.getLogger(__name__)

# Order of an output's dims -> what makes (items, rows, width) of it.
_ORDERS: dict[str, Callable[[Tensor], Tensor]] = {
    "bsh": lambda output: output,
    "sbh": lambda output: output.transpose(0, 1),
    "bchw": lambda output: output.flatten(2).transpose(1, 2),
    "bhwc": lambda output: output.flatten(1, 2),
    "nh": lambda output: output,
}


@dataclass(frozen=True)
class Rows:
    """What of a tower's output are its rows.

    Attributes:
        output: field of its ``ModelOutput``; not looked at with ``layers``.
        layers: hidden states as transformers counts them, 0 the embeddings, -1 the last; several
            stand side by side. None takes ``output``.
        first: first row of each item; 1 leaves out a class token.
        order: of the dims: ``"bsh"``, ``"sbh"``, feature maps ``"bchw"`` or ``"bhwc"``, or flat
            rows ``"nh"``.
        valid: which rows are real, ``(items, rows)``: the name of an input that says so, or a
            function of the inputs; None if all are. ``first`` counts in it as in the output.

    Raises:
        ValueError: an unknown order; flat rows with ``first`` or ``valid``.
    """

    output: str = "last_hidden_state"
    layers: int | tuple[int, ...] | None = None
    first: int = 0
    order: str = "bsh"
    valid: str | Callable[[Mapping[str, Any]], Tensor] | None = None

    def __post_init__(self) -> None:
        if self.order not in _ORDERS:
            raise ValueError(f"order must be one of {sorted(_ORDERS)}, got {self.order!r}")
        if self.order == "nh" and (self.first or self.valid is not None):
            raise ValueError(
                "flat rows (order='nh') do not say which item they are of, so first="
                f"{self.first!r} and valid={self.valid!r} cannot be applied; leave them out"
            )

    @property
    def depths(self) -> tuple[int, ...]:
        """The hidden states; none where a field of the output is taken."""
        if self.layers is None:
            return ()
        return (self.layers,) if isinstance(self.layers, int) else tuple(self.layers)

    def of(self, output: Any, inputs: Mapping[str, Any]) -> Tensor | list[Tensor]:
        """Return the rows of an output.

        Args:
            output: of the tower.
            inputs: that it was called with.

        Returns:
            ``(items, rows, width)``; with ``valid`` a tensor per item; flat rows as they are.

        Raises:
            ValueError: the output has no such field, hidden state or order; the mask has another
                shape.
        """
        rows = self._in_order(self._found(output))
        if self.valid is None:
            return rows[:, self.first :] if self.first else rows
        mask = self.valid(inputs) if callable(self.valid) else inputs.get(self.valid)
        if not torch.is_tensor(mask) or mask.shape != rows.shape[:2]:
            got = described(mask) if torch.is_tensor(mask) else f"a {type(mask).__name__}"
            raise ValueError(
                f"valid={self.valid!r} must say of each of {tuple(rows.shape[:2])} rows whether it "
                f"is real, got {got}"
            )
        real = mask.to(rows.device).bool()[:, self.first :]
        return [item[own] for item, own in zip(rows[:, self.first :], real, strict=True)]

    def _found(self, output: Any) -> Tensor:
        if not self.depths and torch.is_tensor(output):
            return output
        name = "hidden_states" if self.depths else self.output
        found = output.get(name) if isinstance(output, Mapping) else None
        if self.depths:
            states = found or ()
            if not all(-len(states) <= depth < len(states) for depth in self.depths):
                raise ValueError(
                    f"the tower has {len(states)} hidden states, the embeddings among them, and no "
                    f"layers={self.layers!r}"
                )
            return torch.cat([states[depth] for depth in self.depths], dim=self._width_dim)
        if not torch.is_tensor(found):
            raise ValueError(
                f"the tower returned {described(output)} without a tensor {name!r}; name the field "
                "of its rows: Rows(output=...)"
            )
        return found

    @property
    def _width_dim(self) -> int:
        return 1 if self.order == "bchw" else -1

    def _in_order(self, output: Tensor) -> Tensor:
        if output.ndim != len(self.order):
            fitting = sorted(order for order in _ORDERS if len(order) == output.ndim)
            raise ValueError(
                f"the tower returned a tensor {tuple(output.shape)}, which is not of order "
                f"{self.order!r}; say how its dims stand: Rows(order=...), one of {fitting}"
            )
        return _ORDERS[self.order](output)


@dataclass(frozen=True)
class ReadTower:
    """What was read of a source.

    Attributes:
        model: of transformers, with its weights.
        missing: names of weights that the folder lacks.
    """

    model: nn.Module
    missing: tuple[str, ...] = ()


class HuggingFaceEncoder(nn.Module):
    """A tower of transformers as an encoder of a modality; each rank has all of it.

    Parameters that no row depends on (a pooling head, layers above the chosen one) are found when
    it is built, from the gradients of one made-up item, and do not train. A tower that is frozen
    runs in eval mode, whatever mode the model is in.

    Args:
        source: a model folder, a configuration (weights are drawn), a tower, or what
            :func:`read_tower` made of one of them.
        rows: what of its output are the rows.
        tower_class: of transformers, such as ``CLIPVisionModel`` for the folder of a whole CLIP;
            ``AutoModel`` if None.
        part: name of the tower within the model of that class, such as ``"encoder"`` of Whisper.
        dtype: of the weights; None leaves them as they are in the source.
        gradient_checkpointing: compute activations again in backward, by transformers' own means.
        sample: inputs of one item for that look at the gradients; None makes images or spectra of
            the sizes that the tower's configuration has.

    Attributes:
        tower: the module.
        width: of a row.
        unused: names of parameters that no row depends on.

    Raises:
        ValueError: the folder lacks weights that rows depend on; no item can be made up.
    """

    def __init__(
        self,
        source: str | Path | nn.Module | ReadTower | Any,
        rows: Rows | None = None,
        *,
        tower_class: Any = None,
        part: str = "",
        dtype: torch.dtype | None = None,
        gradient_checkpointing: bool = False,
        sample: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.rows = rows or Rows()
        read = source if isinstance(source, ReadTower) else read_tower(source, tower_class, dtype)
        self.tower: Any = read.model.get_submodule(part)
        if gradient_checkpointing:
            self.tower.gradient_checkpointing_enable({"use_reentrant": False})
        own = {name.removeprefix(part and f"{part}.") for name in read.missing}
        self.width, self.unused = self._look(sample, own)
        self.eval()

    def forward(self, **inputs: Any) -> Tensor | list[Tensor]:
        """Run the tower; see :meth:`Rows.of` for what is returned and raised.

        Args:
            **inputs: of the tower; floating-point tensors are cast to its dtype.
        """
        trains = any(parameter.requires_grad for parameter in self.tower.parameters())
        mode = self.training and trains
        if self.tower.training is not mode:
            self.tower.train(mode)
        return self._run(inputs, self.rows)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the tower as transformers does, under its own names; one rank calls it.

        Args:
            folder: is made.
        """
        self.tower.save_pretrained(folder)

    def _run(self, inputs: Mapping[str, Any], rows: Rows) -> Tensor | list[Tensor]:
        dtype = next(self.tower.parameters()).dtype
        cast = {
            name: value.to(dtype) if _is_floating(value) else value
            for name, value in inputs.items()
        }
        more = {"output_hidden_states": True} if rows.depths else {}
        return rows.of(self.tower(**cast, **more), inputs)

    def _look(
        self, sample: Mapping[str, Tensor] | None, missing: set[str]
    ) -> tuple[int, list[str]]:
        """Width of a row, and the parameters that no row depends on, which stop training here."""
        self.tower.eval()
        device = next(self.tower.parameters()).device
        # Of a made-up item all rows count; nobody knows what a mask of it looks like.
        rows = self.rows if sample else replace(self.rows, valid=None)
        inputs = {name: x.to(device) for name, x in (sample or _made_up(self.tower)).items()}
        with torch.enable_grad():
            found = self._run(inputs, rows)
        each = [found] if torch.is_tensor(found) else found
        reached, named = _leaves(each), dict(self.tower.named_parameters())
        lacking = sorted(name for name in missing if named.get(name) in reached)
        if lacking:
            raise ValueError(
                f"the folder has no weights for {len(lacking)} parameters that the rows depend on, "
                f"among them {lacking[:3]}; tower_class= says of which class of transformers it is"
            )
        unused = [name for name, p in named.items() if p.requires_grad and p not in reached]
        for name in unused:
            named[name].requires_grad_(False)
        if unused:
            logger.info("no row of the tower depends on %s; they do not train", unused)
        return each[0].shape[-1], unused


def read_tower(source: Any, kind: Any, dtype: torch.dtype | None) -> ReadTower:
    """Return the model of a source, before anything is built around it.

    Args:
        source: as of :class:`HuggingFaceEncoder`.
        kind: its ``tower_class``.
        dtype: of the weights.
    """
    if isinstance(source, nn.Module):
        return ReadTower(source if dtype is None else source.to(dtype))
    if kind is None:
        from transformers import AutoModel as kind
    if isinstance(source, (str, Path)):
        made, told = kind.from_pretrained(str(source), dtype=dtype, output_loading_info=True)
        return ReadTower(made, tuple(told["missing_keys"]))
    make = getattr(kind, "from_config", None) or kind._from_config
    return ReadTower(make(source, dtype=dtype))


def _made_up(tower: nn.Module) -> dict[str, Tensor]:
    """One item of zeros, in the sizes of the tower's configuration.

    Raises:
        ValueError: it is neither an image nor a spectrum.
    """
    config: Any = getattr(tower, "config", None)
    name = getattr(tower, "main_input_name", None)
    if name == "pixel_values" and hasattr(config, "image_size"):
        side = config.image_size
        sides = (side, side) if isinstance(side, int) else tuple(side)
        return {name: torch.zeros(1, getattr(config, "num_channels", 3), *sides)}
    if hasattr(config, "num_mel_bins") and hasattr(config, "max_source_positions"):
        steps = 2 * config.max_source_positions
        return {"input_features": torch.zeros(1, config.num_mel_bins, steps)}
    raise ValueError(
        f"what a {type(tower).__name__} takes cannot be told from its configuration; give inputs "
        "of one item: sample={'pixel_values': ...}"
    )


def _leaves(outputs: list[Tensor]) -> set[Tensor]:
    """The parameters that outputs depend on."""
    found: set[Tensor] = set()
    seen: set[Any] = set()
    todo: list[Any] = [output.grad_fn for output in outputs]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(node.variable)
        todo += [following for following, _ in node.next_functions]
    return found


def _is_floating(value: Any) -> bool:
    return torch.is_tensor(value) and value.is_floating_point()
