# SPDX-License-Identifier: Apache-2.0
"""What a recipe says of some parameters: other learning rates, other weight decay."""

from __future__ import annotations

import math
from dataclasses import dataclass, field


@dataclass(frozen=True)
class ParameterGroup:
    """Settings of some parameters, in place of those of all others.

    Attributes:
        parameters: their names: a module, ``images.encoder``, ``images.projector``, a parameter's
            name, or a pattern.
        lr: peak learning rate.
        min_lr: the last one; None for the same share of the peak as elsewhere.
        weight_decay: of matrices; vectors have none, as elsewhere.
    """

    parameters: list[str] = field(default_factory=list)
    lr: float | None = None
    min_lr: float | None = None
    weight_decay: float | None = None

    def rates(self, lr: float, min_lr: float) -> tuple[float, float]:
        """Return its peak and last learning rate.

        Args:
            lr, min_lr: those of all other parameters.

        >>> ParameterGroup(["language"], lr=1e-3).rates(1e-4, 1e-5)
        (0.001, 0.0001)
        """
        peak = lr if self.lr is None else self.lr
        if self.min_lr is not None:
            return peak, self.min_lr
        return peak, min(peak, min_lr * (peak / lr) if lr > 0 else 0.0)

    def problem(self, lr: float, min_lr: float) -> str | None:
        """Return what is wrong with it, whatever the model; None if nothing is.

        Args:
            lr, min_lr: those of all other parameters.
        """
        if isinstance(self.parameters, str) or not self.parameters:
            return "parameters names none; give a list of names or patterns"
        given = {"lr": self.lr, "min_lr": self.min_lr, "weight_decay": self.weight_decay}
        values = {name: value for name, value in given.items() if value is not None}
        if not values:
            return f"nothing is set for {self.parameters}; set lr, min_lr or weight_decay"
        for name, value in values.items():
            if not math.isfinite(value) or value < 0:
                return f"{name}={value}; it must be a finite number from 0"
        peak, last = self.rates(lr, min_lr)
        if last > peak:
            return f"min_lr={last} is above lr={peak}; set it to at most that"
        return None
