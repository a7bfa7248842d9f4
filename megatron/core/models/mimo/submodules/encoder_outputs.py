# SPDX-License-Identifier: Apache-2.0
"""What encoders and projections return, turned into rows; rows of several encoders in one order.

=============================  ==================================================================
an encoder returns             its rows are
=============================  ==================================================================
``(b, s, h)``, ``(n, h)``      all of it; ``b`` are the items
a mapping (``ModelOutput``)    its only tensor; ``last_hidden_state`` if that is ``(b, s, h)`` and
                               only a ``pooler_output`` ``(b, h)`` is beside it
a list of tensors              one ``(n_i, h)`` or ``(1, n_i, h)`` per item
a tuple                        its first tensor, as in stock, if the others cannot be rows
anything else                  refused, unless ``encoder_outputs`` says where they are
=============================  ==================================================================

An *item* is what an encoder encodes by itself: an image. A tuple of tensors that are alike in
their dims and width may be one tensor per item or one tensor and more; it is never guessed which.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron.core.models.mimo.comm.plan.token_runs import split_items

# In ``encoder_outputs``: the encoder returns a list or tuple of one tensor per item.
PER_ITEM = "per_item"
_MAIN, _POOLED = "last_hidden_state", "pooler_output"

# Rows of each item: so many of every one, or a function of the encoder's keyword arguments.
RowsPerItem = int | Callable[[Mapping[str, Any]], Sequence[int]]


class EncodedRows(list[torch.Tensor]):
    """Rows ``(n_i, h)`` of the encoders of one modality: a list that knows their items.

    Attributes:
        names: of the encoders.
        items: per encoder, the rows of each item; ``None`` where they are not known.
    """

    def __init__(
        self,
        rows: Sequence[torch.Tensor],
        names: Sequence[str],
        items: Sequence[list[int] | None],
    ) -> None:
        super().__init__(rows)
        self.names, self.items = list(names), list(items)

    def by_item(self) -> torch.Tensor:
        """Return the rows item by item, and within an item encoder by encoder: ``(sum n_i, h)``.

        So they do not depend on how a batch is cut over replicas.

        Raises:
            ValueError: the items of an encoder are not known; encoders differ in the number of
                items, or in width.
        """
        told = dict(zip(self.names, self.items, strict=True))
        unknown = [name for name, items in told.items() if items is None]
        if unknown:
            raise ValueError(
                f"Encoders {self.names} of one modality are put together item by item, as their "
                f"tokens stand, but {unknown} returned flat rows (n, h) of unknown items; return "
                "(b, s, h) or a list of one (n, h) tensor per item, or say in the spec how many "
                f"rows an item has: params={{'rows_per_item': {{'{unknown[0]}': ...}}}}"
            )
        counts = {name: len(items or ()) for name, items in told.items()}
        widths = {name: rows.size(-1) for name, rows in zip(self.names, self, strict=True)}
        for what, each in (("number of items", counts), ("width", widths)):
            if len(set(each.values())) > 1:
                raise ValueError(
                    f"Encoders of one modality must agree in the {what}, got {each}; encode the "
                    "same items with all of them, to one width, or make them modalities of their "
                    "own (rows_per_item in the spec says what an item is)"
                )
        parts = [rows.split(items) for rows, items in zip(self, self.items, strict=True)]
        pieces = [piece for item in zip(*parts, strict=True) for piece in item]
        return torch.cat(pieces or list(self))


@dataclass(frozen=True)
class EncoderOutput:
    """How the output of one encoder is read.

    Attributes:
        name: of the encoder.
        sequence_first: 3-D tensors are ``(s, b, h)``.
        where: ``None``, a field of the output, a place in it, or :data:`PER_ITEM`.
        rows_per_item: of outputs that do not tell.
        cp: (rank, size) of the CP ranks that have a part of each item; ``rows_per_item`` counts
            whole ones.
    """

    name: str
    sequence_first: bool = False
    where: str | int | None = None
    rows_per_item: RowsPerItem | None = None
    cp: tuple[int, int] = (0, 1)

    def rows(self, output: Any, inputs: Mapping[str, Any]) -> tuple[torch.Tensor, list[int] | None]:
        """Return the sample-major rows ``(n, h)`` and, where they are known, those of each item.

        Args:
            output: what the encoder returned.
            inputs: the keyword arguments that it was called with.

        Raises:
            ValueError: an output of another kind or shape; rows that ``rows_per_item`` does not
                fit.
        """
        found = self._find(output)
        if torch.is_tensor(found):
            rows, items = self._flat(found), None
            if found.ndim == 3:
                batch, length = (1, 0) if self.sequence_first else (0, 1)
                items = [found.size(length)] * found.size(batch)
        else:
            each = [self._one_item(tensor, output) for tensor in found]
            rows, items = torch.cat(each), [tensor.size(0) for tensor in each]
        return rows, items if self.rows_per_item is None else self._declared(len(rows), inputs)

    def _find(self, output: Any) -> torch.Tensor | list[torch.Tensor]:
        """The tensor, or the tensors by item, that hold the rows."""
        if self.where is not None:
            found = output if self.where == PER_ITEM else self._declared_part(output)
        elif isinstance(output, Mapping):
            found = self._main_of(output)
        elif isinstance(output, tuple):
            found = self._first_of(output)
        else:
            found = output
        if torch.is_tensor(found) and self.where != PER_ITEM:
            return found
        if (
            not isinstance(found, (list, tuple))
            or not found
            or not all(map(torch.is_tensor, found))
        ):
            at = "" if self.where is None else f" at {self.where!r} (encoder_outputs)"
            raise self._refusal(
                output,
                f"expected a tensor (b, s, h) or (n, h){at}, a mapping (ModelOutput) with one, or "
                "a list of one (n, h) tensor per item",
            )
        return list(found)

    def _declared_part(self, output: Any) -> Any:
        try:
            if isinstance(self.where, int) or isinstance(output, Mapping):
                return output[self.where]
            return getattr(output, str(self.where))
        except (AttributeError, IndexError, KeyError, TypeError):
            raise self._refusal(
                output, f"it has no {self.where!r}, which encoder_outputs names"
            ) from None

    def _main_of(self, output: Mapping[str, Any]) -> torch.Tensor:
        tensors = {key: value for key, value in output.items() if torch.is_tensor(value)}
        if len(tensors) == 1:
            return next(iter(tensors.values()))
        dims = {key: value.ndim for key, value in tensors.items()}
        if dims == {_MAIN: 3, _POOLED: 2}:
            return tensors[_MAIN]
        raise self._refusal(
            output,
            "say in the spec which field holds the rows: "
            f"params={{'encoder_outputs': {{'{self.name}': 'last_hidden_state'}}}}",
        )

    def _first_of(self, output: Any) -> Any:
        """Of ``(embeddings, more, ...)`` the embeddings, if that is what it must be."""
        if not (output and torch.is_tensor(output[0])):
            return output
        kinds = {(x.ndim, x.shape[-1:]) if torch.is_tensor(x) else None for x in output}
        if len(output) > 1 and len(kinds) == 1:
            raise self._refusal(
                output,
                "which may be one tensor per item, or the rows and more; say in the spec which: "
                f"params={{'encoder_outputs': {{'{self.name}': '{PER_ITEM}'}}}}, or 0 for the "
                "first, or return a list",
            )
        return output[0]

    def _flat(self, output: torch.Tensor) -> torch.Tensor:
        if output.ndim == 3:
            batch_first = output.transpose(0, 1) if self.sequence_first else output
            return batch_first.reshape(-1, output.size(-1))
        if output.ndim == 2 and not self.sequence_first:
            return output
        expected = "3D (s,b,h) tensor" if self.sequence_first else "3D (b,s,h) or 2D (b*s,h) tensor"
        raise ValueError(
            f"Encoder '{self.name}' output shape {tuple(output.shape)} is not supported. "
            f"Expected {expected}, got {output.ndim}D"
        )

    def _one_item(self, tensor: torch.Tensor, output: Any) -> torch.Tensor:
        if tensor.ndim == 3 and tensor.size(1 if self.sequence_first else 0) == 1:
            return tensor.flatten(0, 1)
        if tensor.ndim != 2:
            raise self._refusal(output, "expected one (n, h) tensor per item")
        return tensor

    def _declared(self, rows: int, inputs: Mapping[str, Any]) -> list[int]:
        per_item: Any = self.rows_per_item
        if callable(self.rows_per_item):
            items = [int(count) for count in per_item(inputs)]
        else:
            items = [per_item] * (rows // per_item)
        rank, size = self.cp
        if size > 1:
            items, whole = [len(split_items(count, size)[rank]) for count in items], items
            if sum(items) != rows:
                raise ValueError(
                    f"Encoder '{self.name}' returned {rows} rows on CP rank {rank} of {size}, "
                    f"whose parts of items of {whole} rows are {items}; cut each item as "
                    "split_items does"
                )
        if sum(items) != rows:
            raise ValueError(
                f"Encoder '{self.name}' returned {rows} rows, but rows_per_item gives {sum(items)} "
                f"of {len(items)} items; both must count the rows that this encoder returns"
            )
        return items

    def _refusal(self, output: Any, advice: str) -> ValueError:
        return ValueError(f"Encoder '{self.name}' returned {described(output)}; {advice}")


def projected(output: Any) -> torch.Tensor:
    """Return the value of a projection: a tensor, or Megatron's (output, bias) added up.

    Raises:
        ValueError: anything else.
    """
    if isinstance(output, tuple) and output and torch.is_tensor(output[0]):
        value, *more = output
        if not more or more == [None]:
            return value
        if len(more) == 1 and torch.is_tensor(more[0]) and more[0].shape == value.shape[-1:]:
            return value + more[0]
    if torch.is_tensor(output):
        return output
    raise ValueError(
        f"A projection returned {described(output)}; expected one tensor of rows, or Megatron's "
        "(output, bias) with a bias of the rows' width"
    )


def described(output: Any) -> str:
    """Say what came, for an error: ``a tuple (tensor (2, 4), dict)``."""
    if torch.is_tensor(output):
        return f"a tensor {tuple(output.shape)}"
    kind = type(output).__name__
    if isinstance(output, Mapping):
        return f"a {kind} ({', '.join(f'{key}: {_brief(x)}' for key, x in output.items())})"
    if isinstance(output, (list, tuple)):
        return f"a {kind} ({', '.join(map(_brief, output))})"
    return f"a {kind}"


def _brief(value: Any) -> str:
    return f"tensor {tuple(value.shape)}" if torch.is_tensor(value) else type(value).__name__
