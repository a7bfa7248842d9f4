# SPDX-License-Identifier: Apache-2.0
"""The encoders, decoders and projections of one modality."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from megatron.core.models.mimo import compat
from megatron.core.models.mimo.memory.activations import ActivationMemory
from megatron.core.models.mimo.memory.policy import EncoderMemory
from megatron.core.models.mimo.submodules.encoder_outputs import (
    EncodedRows,
    EncoderOutput,
    RowsPerItem,
    projected,
)
from megatron.core.models.mimo.wrappers import hide_in_states, unwrapped
from megatron.core.transformer.spec_utils import ModuleSpec, build_module

# What the three dims of an encoder's output may mean: (b, s, h), or (s, b, h).
OUTPUT_LAYOUTS = ("bsh", "sbh")


class ModalitySubmodules(ABC, nn.Module):
    """One modality: its encoders turn inputs into rows, its projection into language rows.

    **Row order.** A row is the embedding of one modality token. The rows that an encoder hands
    on are *sample-major*: all rows of sample 0, then those of sample 1, and so on, since they are
    put into the tokens of ``input_ids`` in reading order. A 3-D encoder output is taken as
    ``(b, s, h)``. An encoder that returns sequence-first ``(s, b, h)``, as Megatron's
    ``TransformerBlock`` does, says so in one of two ways, and is transposed here:

    * in the spec of the modality: ``params={"sequence_first_encoders": ["vit"]}``;
    * on its own class: ``output_layout = "sbh"`` (``"bsh"`` is the default).

    With more than one encoder they all encode the same *items* (images), and rows come item by
    item: those of ``encoders``' first one for item 0, of its second one for item 0, then item 1.
    Items are dim 0 of ``(b, s, h)``, or the tensors of a list. For flat rows ``(n, h)`` the spec
    says what an item is: ``params={"rows_per_item": {"vit": 16}}``, or a function of the encoder's
    keyword arguments that returns the rows of each item; with a count per *sample* from it, rows
    of a sample's images stand together.

    What an encoder may return, and where its rows are looked for, says
    :mod:`.encoder_outputs`; ``params={"encoder_outputs": {"vit": "pooler_output"}}`` names a field
    of the output, a number a place in a tuple, ``"per_item"`` a tuple of one tensor per item.

    **CP.** With ``cp`` in the modality's grid each of its encoders cuts its items' sequences over
    the grid's CP ranks and says so on its class: ``cuts_items = True``. It is called with the same
    inputs on all of them, and returns of each item, in order, the rows from ``n * r // cp`` to
    ``n * (r + 1) // cp`` on CP rank ``r``; ``rows_per_item`` is a function that counts ``n``.

    Args:
        encoders: name -> module; called with ``encoder_inputs[name]`` as keyword arguments.
        decoders: name -> module.
        input_projections: encoder width -> language width; the first one is used.
        output_projections: language width -> decoder width; the first one is used.
        is_first_stage: this rank holds the modality's first pipeline stage.
        is_last_stage: this rank holds its last one.
        pg_collection: the modality's process groups; ``dp_cp`` (and ``tp``) are used to save.
        sequence_first_encoders: names of encoders that return ``(s, b, h)``.
        encoder_outputs: encoder -> where its output has the rows, if that cannot be seen.
        rows_per_item: encoder -> rows of each item, if that cannot be seen.

    Attributes:
        activation_memory: what becomes of activations until backward; see :meth:`use_memory`.
        cp: (rank, size) of the CP ranks that the encoders cut their items over.

    Raises:
        TypeError: further keyword arguments.
        ValueError: a setting names an encoder that is not there, an encoder's ``output_layout``
            is unknown, or a number of ``rows_per_item`` is not positive.
    """

    def __init__(
        self,
        encoders: Mapping[str, nn.Module] | None = None,
        decoders: Mapping[str, nn.Module] | None = None,
        input_projections: Sequence[nn.Module] | None = None,
        output_projections: Sequence[nn.Module] | None = None,
        is_first_stage: bool = True,
        is_last_stage: bool = True,
        pg_collection: Any = None,
        sequence_first_encoders: Iterable[str] = (),
        encoder_outputs: Mapping[str, str | int] | None = None,
        rows_per_item: Mapping[str, RowsPerItem] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        if kwargs:
            raise TypeError(
                f"{type(self).__name__} got params {sorted(kwargs)} that it does not know; a class "
                "of your own takes what it adds out of them"
            )
        self.encoders = nn.ModuleDict(encoders or {})
        self.decoders = nn.ModuleDict(decoders or {})
        self.input_projections = nn.ModuleList(input_projections or [])
        self.output_projections = nn.ModuleList(output_projections or [])
        self.pg_collection = pg_collection
        self._is_first_stage = is_first_stage
        self._is_last_stage = is_last_stage
        self.sequence_first_encoders = self._resolve_layouts(sequence_first_encoders)
        self.encoder_outputs = dict(encoder_outputs or {})
        self.rows_per_item = dict(rows_per_item or {})
        self.cp = (0, 1)
        self._check_outputs()
        hide_in_states(self)
        self.use_memory(EncoderMemory())

    def use_memory(self, policy: EncoderMemory) -> None:
        """Choose what becomes of this modality's activations between forward and backward.

        Raises:
            ValueError: a part that the policy cannot be used with; a class with a ``forward`` of
                its own, which would not follow it.
        """
        if type(self).forward is not ModalitySubmodules.forward and policy != EncoderMemory():
            raise ValueError(
                f"{type(self).__name__} has a forward of its own, which does not follow "
                f"{policy}; leave forward to ModalitySubmodules, or keep the activations"
            )
        self.activation_memory = ActivationMemory(policy, self.encoders, self.input_projections)

    def cut_items(self, rank: int, size: int) -> None:
        """Take what the encoders return as a CP rank's part of each item.

        Args:
            rank, size: the place among the CP ranks of the modality's grid, and their number.

        Raises:
            ValueError: an encoder does not say that it cuts its items, or was built for another
                number of CP ranks; no function counts its whole items' rows.
        """
        for name, encoder in self.encoders.items():
            inner = unwrapped(encoder)
            if getattr(inner, "cuts_items", False) is not True:
                raise ValueError(
                    f"The grid has cp={size}, but encoder '{name}' ({type(inner).__name__}) does "
                    "not say that it cuts its items over CP (cuts_items = True on its class), so "
                    "every CP rank would encode all of them; give those ranks to dp or tp"
                )
            own = getattr(getattr(inner, "config", None), "context_parallel_size", size)
            if own != size:
                raise ValueError(
                    f"The grid has cp={size}, but encoder '{name}' was built with "
                    f"context_parallel_size={own}; they must be equal, change one of them"
                )
            if not callable(self.rows_per_item.get(name)):
                raise ValueError(
                    f"Encoder '{name}' cuts its items over cp={size}; say in the spec how many "
                    f"rows each whole item has, params={{'rows_per_item': {{'{name}': ...}}}} "
                    "with a function of its keyword arguments, got "
                    f"{self.rows_per_item.get(name)!r}"
                )
        self.cp = (rank, size)

    def whole_items(self, encoder_inputs: Mapping[str, Mapping[str, Any]]) -> list[int]:
        """Return the rows of whole items in the order of their tokens, of encoders that cut them.

        Args:
            encoder_inputs: as of :meth:`forward`.
        """
        counts = [
            rows(encoder_inputs[name])
            for name in self.encoders
            if callable(rows := self.rows_per_item[name])
        ]
        return [int(count) for item in zip(*counts, strict=True) for count in item]

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank holds the modality's first pipeline stage."""
        return self._is_first_stage

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank holds the modality's last pipeline stage."""
        return self._is_last_stage

    @classmethod
    def from_spec(
        cls, module_spec: ModuleSpec, is_first_stage: bool = True, is_last_stage: bool = True
    ) -> ModalitySubmodules:
        """Build a modality from its spec.

        ``module_spec.submodules`` holds the specs of ``encoders`` and ``decoders`` (by name) and
        of ``input_projections`` and ``output_projections`` (lists); ``module_spec.params`` are
        further keyword arguments of the class. Input projections are built on the last pipeline
        stage only, output projections on the first only.
        """
        specs: Any = module_spec.submodules or {}

        def named(kind: str) -> dict[str, nn.Module]:
            return {name: build_module(spec) for name, spec in specs.get(kind, {}).items()}

        def listed(kind: str, here: bool) -> list[nn.Module]:
            return [build_module(spec) for spec in specs.get(kind, [])] if here else []

        return cls(
            encoders=named("encoders"),
            decoders=named("decoders"),
            input_projections=listed("input_projections", is_last_stage),
            output_projections=listed("output_projections", is_first_stage),
            is_first_stage=is_first_stage,
            is_last_stage=is_last_stage,
            **(module_spec.params or {}),
        )

    def encode(self, encoders_data_batch: Mapping[str, Mapping[str, Any]]) -> list[torch.Tensor]:
        """Run every encoder; one tensor of sample-major rows ``(n, h)`` each.

        The list is an :class:`EncodedRows`, which knows the encoders' items.

        Args:
            encoders_data_batch: encoder name -> its keyword arguments.

        Raises:
            ValueError: inputs of an encoder are missing or of no encoder, or its output holds no
                rows.
        """
        if not encoders_data_batch:
            return []
        # Before the first encoder runs: its tensor-parallel peers raise here as well.
        for name in self.encoders:
            if name not in encoders_data_batch:
                raise ValueError(
                    f"No inputs found for encoder '{name}'; got inputs for "
                    f"{sorted(encoders_data_batch)}, and all of {list(self.encoders)} are needed"
                )
        unknown = sorted(set(encoders_data_batch) - set(self.encoders))
        if unknown:
            raise ValueError(
                f"Got inputs for {unknown}, but the encoders of {type(self).__name__} are "
                f"{list(self.encoders)}; leave out what nobody encodes"
            )
        found = [
            self._output_of(name).rows(
                encoder(**encoders_data_batch[name]), encoders_data_batch[name]
            )
            for name, encoder in self.encoders.items()
        ]
        rows, items = zip(*found, strict=True)
        return EncodedRows(rows, list(self.encoders), items)

    def combine_embeddings(self, embeddings: Sequence[torch.Tensor]) -> torch.Tensor:
        """Put the encoders' rows together: a list of ``(n_i, h)`` -> ``(sum n_i, h)``.

        Those of :meth:`encode` item by item; any other list, whose items nobody knows, is
        concatenated.

        Raises:
            ValueError: the list is empty; see :meth:`.EncodedRows.by_item`.
        """
        if not embeddings:
            raise ValueError("Cannot combine empty list of embeddings")
        if len(embeddings) == 1:
            return embeddings[0]
        if isinstance(embeddings, EncodedRows):
            return embeddings.by_item()
        return torch.cat(list(embeddings), dim=0)

    @abstractmethod
    def decode(self, embeddings: torch.Tensor, data_batch: dict[str, Any]) -> torch.Tensor:
        """Turn language-side embeddings into this modality's output."""

    def project_embeddings(
        self, embeddings: Sequence[torch.Tensor], is_input: bool = True
    ) -> torch.Tensor | None:
        """Combine the rows and project them: ``(n, h_encoder)`` -> ``(n, h_language)``.

        Without a projection the combined rows come back as they are.

        Args:
            embeddings: rows per encoder.
            is_input: use the input projection, else the output projection.
        """
        combined = self.combine_embeddings(embeddings)
        projections = self.input_projections if is_input else self.output_projections
        return projected(projections[0](combined)) if projections else combined

    def forward(
        self,
        encoder_inputs: Mapping[str, Mapping[str, Any]] | None = None,
        hidden_states: torch.Tensor | None = None,
    ) -> torch.Tensor | None:
        """Turn inputs, or rows of the stage before, into rows ``(n, h)``, at the end projected.

        Args:
            encoder_inputs: encoder name -> its keyword arguments; read on the first stage.
            hidden_states: rows ``(n, h)`` to use instead of encoding, on any stage.

        Returns:
            The rows, or ``None`` where there was nothing to encode.

        Raises:
            ValueError: both arguments are given.
        """
        if encoder_inputs is not None and hidden_states is not None:
            raise ValueError(
                "encoder_inputs and hidden_states are mutually exclusive: give inputs to encode "
                "or rows that are encoded already"
            )
        if hidden_states is not None:
            return self.activation_memory.run(None, self._project, hidden_states)
        if not (encoder_inputs and self.is_first_stage):
            return None

        def encode() -> torch.Tensor | None:
            rows = self.encode(encoder_inputs)
            self._refuse_unknown_order(rows)
            return self.combine_embeddings(rows) if rows else None

        return self.activation_memory.run(encode, self._project, None)

    def _project(self, rows: torch.Tensor | None) -> torch.Tensor | None:
        if rows is None or not self.is_last_stage:
            return rows
        return self.project_embeddings([rows])

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Return the distributed-checkpoint view of all children, with this modality's groups."""
        children = [
            (f"{prefix}{kind}.{name}.", module)
            for kind, container in self.named_children()
            for name, module in container.named_children()
        ]
        return compat.sharded_state_dict_of_children(
            children, sharded_offsets, metadata, self.pg_collection, type(self).__name__
        )

    def _resolve_layouts(self, sequence_first: Iterable[str]) -> frozenset[str]:
        """Names of the encoders that return ``(s, b, h)``, from the spec and their classes."""
        named = {sequence_first} if isinstance(sequence_first, str) else set(sequence_first)
        self._check_names("sequence_first_encoders", named)
        for name, encoder in self.encoders.items():
            layout = getattr(unwrapped(encoder), "output_layout", OUTPUT_LAYOUTS[0])
            if layout not in OUTPUT_LAYOUTS:
                raise ValueError(
                    f"output_layout of encoder '{name}' must be one of {OUTPUT_LAYOUTS}, "
                    f"got {layout!r}"
                )
            if layout == "sbh":
                named.add(name)
        return frozenset(named)

    def _check_outputs(self) -> None:
        self._check_names("encoder_outputs", self.encoder_outputs)
        self._check_names("rows_per_item", self.rows_per_item)
        for name, rows in self.rows_per_item.items():
            if not callable(rows) and not (isinstance(rows, int) and rows > 0):
                raise ValueError(
                    f"rows_per_item of encoder '{name}' must be a positive number or a function "
                    f"of the encoder's keyword arguments, got {rows!r}"
                )

    def _check_names(self, setting: str, names: Iterable[str]) -> None:
        unknown = set(names) - set(self.encoders)
        # A rank without encoders of its own has nothing to check the names against.
        if unknown and self.encoders:
            raise ValueError(
                f"{setting} names {sorted(unknown)}, but the encoders of "
                f"{type(self).__name__} are {sorted(self.encoders)}"
            )

    def _output_of(self, name: str) -> EncoderOutput:
        return EncoderOutput(
            name,
            sequence_first=name in self.sequence_first_encoders,
            where=self.encoder_outputs.get(name),
            rows_per_item=self.rows_per_item.get(name),
            cp=self.cp,
        )

    def _refuse_unknown_order(self, rows: Sequence[torch.Tensor]) -> None:
        """A class with an ``encode`` of its own, several encoders and the usual way to combine."""
        own = type(self).combine_embeddings is not ModalitySubmodules.combine_embeddings
        if len(rows) > 1 and not (own or isinstance(rows, EncodedRows)):
            raise ValueError(
                f"{type(self).__name__}.encode returned a {type(rows).__name__} of {len(rows)} "
                "tensors, which does not say which rows belong to one item; return EncodedRows "
                "(of submodules.encoder_outputs), or write combine_embeddings, too"
            )


class OneProjectionEach(ModalitySubmodules):
    """A modality that is only encoded, with at most one projection into language space.

    Attributes:
        data: what it encodes, in words.

    Raises:
        compat.ContractError: more than one input or output projection.
    """

    data: ClassVar[str]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for kind in ("input", "output"):
            count = len(getattr(self, f"{kind}_projections"))
            if count > 1:
                raise compat.ContractError(
                    f"{type(self).__name__} supports only one {kind} projection, got {count}"
                )

    def decode(self, embeddings: torch.Tensor, data_batch: dict[str, Any]) -> torch.Tensor:
        """Refuse: this project encodes data, it does not generate it.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(f"Decoding to {self.data} data is not implemented")
