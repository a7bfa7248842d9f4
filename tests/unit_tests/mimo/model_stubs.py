# SPDX-License-Identifier: Apache-2.0
"""Small modules with the interfaces that ``MimoModel`` needs, for tests without process groups."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from megatron.core.models.mimo import MimoModelConfig, VisionModalitySubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig

HIDDEN = 8
VOCABULARY = 50
IMAGE = 49
SOUND = 48


@dataclass
class StubGroup:
    """What is asked of a process group without communication."""

    ranks: int = 1
    this: int = 0

    def size(self) -> int:
        """Ranks of the group."""
        return self.ranks

    def rank(self) -> int:
        """This rank's place in it."""
        return self.this


@dataclass
class StubGrid:
    """What a model asks of a grid when it makes no process groups."""

    rank_offset: int = 0
    size: int = 1
    shape: list[int] = field(default_factory=list)
    dim_names: list[str] = field(default_factory=list)
    groups: dict[str, StubGroup] = field(default_factory=dict)

    def get_pg(self, dim: str) -> StubGroup:
        """The group of one dim; ``KeyError`` if the test did not give it."""
        return self.groups[dim]


class TextEmbedding(nn.Module):
    """Words plus positions: ``(b, s)`` -> ``(s, b, h)``."""

    def __init__(self, scatter: bool = False) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, HIDDEN)
        self.scatter_to_sequence_parallel = scatter

    def forward(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Embed; a position adds its number to every channel."""
        rows = self.words(input_ids)
        if position_ids is not None:
            rows = rows + position_ids.unsqueeze(-1)
        return rows.transpose(0, 1)


class StubLanguageModel(nn.Module):
    """Returns its input through one linear layer and remembers what it was called with."""

    def __init__(self, config: TransformerConfig, embedding: bool = True, **_: Any) -> None:
        super().__init__()
        self.config = config
        scatter = _.get("scatter_embedding_sequence_parallel", False)
        self.embedding = TextEmbedding(scatter) if embedding else None
        self.head = nn.Linear(HIDDEN, HIDDEN)
        self.called_with: dict[str, Any] = {}
        self.received: Any = None

    def set_input_tensor(self, tensor: Any) -> None:
        """Hidden states of the pipeline stage before."""
        self.received = tensor

    def forward(self, **inputs: Any) -> torch.Tensor:
        """Apply the head to ``decoder_input``, else to what the stage before sent."""
        self.called_with = inputs
        hidden = inputs["decoder_input"]
        return self.head(self.received if hidden is None else hidden)


class RowLinear(nn.Linear):
    """A linear layer whose rows do not depend on how many there are.

    Some CPUs choose another kernel for a product of other row counts, which rounds otherwise; then
    one rank with all rows and several with a part each would not agree to the last bit.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply row by row."""
        return (x.unsqueeze(-2) * self.weight).sum(dim=-1) + self.bias


class LinearEncoder(nn.Module):
    """``(b, s, 4)`` -> ``(b, s, 6)``."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = RowLinear(4, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Encode."""
        return self.layer(x)


def language_config(**overrides: Any) -> TransformerConfig:
    """The smallest transformer config."""
    return TransformerConfig(
        **{"num_layers": 1, "hidden_size": HIDDEN, "num_attention_heads": 2, **overrides}
    )


def modality_spec(submodules_class: type = VisionModalitySubmodules, **params: Any) -> ModuleSpec:
    """One linear encoder and a projection to the language model's width."""
    projection = ModuleSpec(module=RowLinear, params={"in_features": 6, "out_features": HIDDEN})
    return ModuleSpec(
        module=submodules_class,
        params=params,
        submodules={
            "encoders": {"linear": ModuleSpec(module=LinearEncoder)},
            "input_projections": [projection],
        },
    )


def mimo_config(
    config: TransformerConfig | None = None,
    modalities: dict[str, ModuleSpec] | None = None,
    language_params: dict[str, Any] | None = None,
    **overrides: Any,
) -> MimoModelConfig:
    """A config with an ``images`` modality and the stub language model."""
    specs = {"images": modality_spec()} if modalities is None else modalities
    params = {"config": config or language_config(), **(language_params or {})}
    ids = {"images": IMAGE, "sounds": SOUND}
    return MimoModelConfig(
        **{
            "language_model_spec": ModuleSpec(module=StubLanguageModel, params=params),
            "modality_submodules_spec": specs,
            "special_token_ids": {name: ids[name] for name in specs if name in ids},
            **overrides,
        }
    )
