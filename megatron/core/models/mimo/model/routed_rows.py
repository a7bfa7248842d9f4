# SPDX-License-Identifier: Apache-2.0
"""What the routed way knows of a microbatch, from its plans to the rows in their places."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from megatron.core.models.mimo.comm.exchange import Flight
from megatron.core.models.mimo.comm.plan.routes import RoutePlan
from megatron.core.models.mimo.comm.plan.token_runs import TokenRuns
from megatron.core.models.mimo.model.language_batch import LanguageBatch
from megatron.core.models.mimo.model.leaves import Pieces

# Rows by modality, who has a backward pass, whole items that CP cuts, what was raised.
Encoded = tuple[dict[str, torch.Tensor], set[str], dict[str, list[int]], Exception | None]


@dataclass(frozen=True, eq=False)
class PlannedRows:
    """What one microbatch brings to the routed bridges; by modality.

    Attributes:
        batch: the language replica's, prepared.
        rows: this rank's encoder output ``(n, H)``.
        plans: where the rows go.
        tokens: where the tokens of the rank's language replica stand.
        moving: the modalities whose exchange the rank enters.
    """

    batch: LanguageBatch
    rows: dict[str, torch.Tensor]
    plans: dict[str, RoutePlan]
    tokens: dict[str, TokenRuns]
    moving: list[str]


@dataclass(frozen=True, eq=False)
class LandedRows:
    """A modality's rows of one microbatch among those that move together.

    Attributes:
        pieces: a leaf ``(own, H)`` of each microbatch; no rows on later stages.
        number: of the microbatch among them.
        place: as of :class:`.RoutePlan`, on the device.
    """

    pieces: Pieces
    number: int
    place: torch.Tensor

    def arrive(self) -> torch.Tensor:
        """Return the rows; they have landed."""
        return self.pieces.leaves[self.number]


@dataclass(frozen=True, eq=False)
class RowsForPlaces:
    """One microbatch's rows for the places that this rank owns.

    Attributes:
        tokens: modality -> where its tokens stand in the rank's language batch.
        rows: modality -> its rows, for modalities that brought any.
        arrived: those whose levels are yet to be taken.
    """

    tokens: dict[str, TokenRuns]
    rows: Mapping[str, Flight] | Mapping[str, LandedRows]
    arrived: dict[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Known:
    """What the host knows of a language batch.

    Attributes:
        batch: prepared as far as it goes.
        tokens: where the tokens of each modality stand.
        seen: those that were looked at, bool ``(B, S)``; of plans made ahead not always.
        problem: why this rank cannot go on, if it cannot.
    """

    batch: LanguageBatch
    tokens: dict[str, TokenRuns]
    seen: dict[str, np.ndarray]
    problem: str | None


@dataclass(frozen=True, eq=False)
class ComparedMicrobatch:
    """A microbatch whose plans all ranks compare before its encoders run.

    Attributes:
        known: what the host knows of its language batch.
        modality_inputs, plans: what was given.
        announced: what its bridges were told, by modality.
    """

    known: Known
    modality_inputs: Mapping[str, Any] | None
    plans: dict[str, RoutePlan]
    announced: Mapping[str, Any]

    def check(self) -> None:
        """Wait for what all ranks say.

        Raises:
            ValueError: the same on every rank of an exchange group: plans do not fit together.
        """
        for _, _, comparison in self.announced.values():
            comparison.result()
