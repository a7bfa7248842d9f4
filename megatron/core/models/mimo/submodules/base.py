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
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.utils import unwrap_model

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

    With more than one encoder their rows are concatenated in the order of ``encoders``.

    Args:
        encoders: name -> module; called with ``encoder_inputs[name]`` as keyword arguments.
        decoders: name -> module.
        input_projections: encoder width -> language width; the first one is used.
        output_projections: language width -> decoder width; the first one is used.
        is_first_stage: this rank holds the modality's first pipeline stage.
        is_last_stage: this rank holds its last one.
        pg_collection: the modality's process groups; ``dp_cp`` (and ``tp``) are used to save.
        sequence_first_encoders: names of encoders that return ``(s, b, h)``.

    Attributes:
        activation_memory: what becomes of activations until backward; see :meth:`use_memory`.

    Raises:
        ValueError: ``sequence_first_encoders`` names an encoder that is not there, or an
            encoder's ``output_layout`` is unknown.
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
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self.encoders = nn.ModuleDict(encoders or {})
        self.decoders = nn.ModuleDict(decoders or {})
        self.input_projections = nn.ModuleList(input_projections or [])
        self.output_projections = nn.ModuleList(output_projections or [])
        self.pg_collection = pg_collection
        self._is_first_stage = is_first_stage
        self._is_last_stage = is_last_stage
        self.sequence_first_encoders = self._resolve_layouts(sequence_first_encoders)
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
        specs = module_spec.submodules or {}

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

        Of an encoder that returns ``(embeddings, more, ...)`` the first entry is used.

        Args:
            encoders_data_batch: encoder name -> its keyword arguments.

        Raises:
            ValueError: inputs of an encoder are missing, or its output is neither 3-D nor 2-D.
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
        return [
            self._rows(name, encoder(**encoders_data_batch[name]))
            for name, encoder in self.encoders.items()
        ]

    def combine_embeddings(self, embeddings: Sequence[torch.Tensor]) -> torch.Tensor:
        """Concatenate the encoders' rows: a list of ``(n_i, h)`` -> ``(sum n_i, h)``.

        Raises:
            ValueError: the list is empty.
        """
        if not embeddings:
            raise ValueError("Cannot combine empty list of embeddings")
        return embeddings[0] if len(embeddings) == 1 else torch.cat(list(embeddings), dim=0)

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
        return _tensor_of(projections[0](combined)) if projections else combined

    def forward(
        self,
        encoder_inputs: Mapping[str, Mapping[str, Any]] | None = None,
        hidden_states: torch.Tensor | None = None,
    ) -> torch.Tensor | None:
        """Inputs (or rows from the stage before) -> rows ``(n, h)``, projected on the last stage.

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
        """The distributed-checkpoint view of all children, with this modality's groups."""
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
        unknown = named - set(self.encoders)
        # A rank without encoders of its own has nothing to check the names against.
        if unknown and self.encoders:
            raise ValueError(
                f"sequence_first_encoders names {sorted(unknown)}, but the encoders of "
                f"{type(self).__name__} are {sorted(self.encoders)}"
            )
        for name, encoder in self.encoders.items():
            layout = getattr(unwrap_model(encoder), "output_layout", OUTPUT_LAYOUTS[0])
            if layout not in OUTPUT_LAYOUTS:
                raise ValueError(
                    f"output_layout of encoder '{name}' must be one of {OUTPUT_LAYOUTS}, "
                    f"got {layout!r}"
                )
            if layout == "sbh":
                named.add(name)
        return frozenset(named)

    def _rows(self, name: str, output: Any) -> torch.Tensor:
        """One encoder's output -> sample-major rows ``(n, h)``."""
        if isinstance(output, tuple) and output and torch.is_tensor(output[0]):
            output = output[0]
        sequence_first = name in self.sequence_first_encoders
        if output.ndim == 3:
            batch_first = output.transpose(0, 1) if sequence_first else output
            return batch_first.reshape(-1, output.size(-1))
        if output.ndim == 2 and not sequence_first:
            return output
        expected = "3D (s,b,h) tensor" if sequence_first else "3D (b,s,h) or 2D (b*s,h) tensor"
        raise ValueError(
            f"Encoder '{name}' output shape {tuple(output.shape)} is not supported. "
            f"Expected {expected}, got {output.ndim}D"
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
        """Not available: this project encodes data, it does not generate it.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(f"Decoding to {self.data} data is not implemented")


def _tensor_of(output: Any) -> torch.Tensor:
    """The value of a projection, whether it returns a tensor or Megatron's (output, bias)."""
    if not isinstance(output, tuple):
        return output
    value, bias = output[0], output[1] if len(output) > 1 else None
    return value if bias is None else value + bias
