# SPDX-License-Identifier: Apache-2.0
"""How a family's modules are split: a declaration, no torch.distributed call."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum


class Style(Enum):
    """What happens at a module; the residual stream is cut along the sequence over TP.

    Attributes:
        COLUMN: a Linear whose output features are split; whole input, own features out.
        ROW: a Linear whose input features are split; its sum is scattered along the sequence.
        VOCABULARY: an Embedding whose rows are split; its sum is scattered along the sequence.
        LOGITS: the output layer, split by vocabulary; takes the whole sequence.
        SEQUENCE: works on its ranks' part of the sequence, such as a norm; weights on each rank.
        HEADS: works on its ranks' heads, ``(batch, sequence, heads, width)``, such as a norm of
            queries; weights on each rank.
        WHOLE_SEQUENCE: its input is gathered along the sequence: attention, MLP.
        CUT: takes ``inputs_embeds``, and cuts them along the sequence if they are whole.
        CUT_AND_JOIN: the same, and its output is whole again.
        REPLICATED: computes the same on each rank, from whole inputs.
    """

    COLUMN = "column"
    ROW = "row"
    VOCABULARY = "vocabulary"
    LOGITS = "logits"
    SEQUENCE = "sequence"
    HEADS = "heads"
    WHOLE_SEQUENCE = "whole sequence"
    CUT = "cut"
    CUT_AND_JOIN = "cut and join"
    REPLICATED = "replicated"


@dataclass(frozen=True)
class Plan:
    """A family's plan.

    Attributes:
        styles: name of a module -> its style; ``*`` stands for a number, "" for the base model.
            Names begin in the base model (``layers.0``, not ``model.layers.0``).
        blocks: name of the blocks, the units that FSDP gathers and recomputation repeats.
        divisible: fields of the configuration that TP must divide.
        outer: the same as ``styles`` for what stands beside the base model, such as ``lm_head``.
        optional: names that a model of the family may lack.
    """

    styles: Mapping[str, Style]
    blocks: str
    divisible: tuple[str, ...] = ("num_attention_heads", "intermediate_size")
    outer: Mapping[str, Style] = field(default_factory=dict)
    optional: frozenset[str] = frozenset()

    def under(self, prefix: str) -> dict[str, Style]:
        """Return all styles under names of the whole model, whose base model is at ``prefix``."""
        inner = {f"{prefix}.{name}".strip("."): style for name, style in self.styles.items()}
        return {**inner, **(self.outer if prefix else {})}


def matching(pattern: str, names: Iterable[str]) -> list[str]:
    """Return the names that a pattern stands for.

    >>> matching("layers.*.mlp", ["layers.0.mlp", "layers.10.mlp", "layers.0.mlp.up_proj"])
    ['layers.0.mlp', 'layers.10.mlp']
    """
    wanted = re.compile(re.escape(pattern).replace(r"\*", r"\d+"))
    return [name for name in names if wanted.fullmatch(name)]
