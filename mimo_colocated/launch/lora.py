# SPDX-License-Identifier: Apache-2.0
"""What a recipe says of LoRA: which linear layers get adapters, and how large they are."""

from __future__ import annotations

import fnmatch
import math
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Lora:
    """Low-rank changes of linear layers: ``W x + alpha / rank * B A x``, of which A and B train.

    Attributes:
        rank: rows of A, columns of B; 0 for no adapters.
        alpha: the change is multiplied by ``alpha / rank``.
        dropout: of what A sees, in training.
        targets: linear layers as transformers names them: the last parts of their names
            (``q_proj``), or patterns of whole names (``language_model.*.down_proj``).
    """

    rank: int = 0
    alpha: float = 16.0
    dropout: float = 0.0
    targets: list[str] = field(default_factory=list)

    @property
    def scale(self) -> float:
        """What the product of B and A is multiplied by."""
        return self.alpha / self.rank

    def problem(self) -> str | None:
        """Return what is wrong with it, whatever the model; None if nothing is."""
        if self.rank < 0:
            return f"rank={self.rank}; it must be at least 1, or 0 for no adapters"
        if not self.rank:
            more = [name for name in ("dropout", "targets") if getattr(self, name)]
            return f"{more[0]} is of adapters, and rank=0 has none; set rank" if more else None
        if isinstance(self.targets, str) or not self.targets:
            return "targets names none; give names of linear layers, such as [q_proj, v_proj]"
        if not math.isfinite(self.alpha) or self.alpha <= 0:
            return f"alpha={self.alpha}; it must be a finite number above 0"
        if not 0 <= self.dropout < 1:
            return f"dropout={self.dropout}; it must be from 0 to below 1"
        return None

    def hits(self, target: str, name: str) -> bool:
        """Return whether a target means the linear layer of this name.

        >>> Lora().hits("q_proj", "model.layers.0.self_attn.q_proj")
        True
        >>> Lora().hits("proj", "model.layers.0.self_attn.q_proj")
        False
        """
        return fnmatch.fnmatchcase(name, target) or fnmatch.fnmatchcase(name, f"*.{target}")
