# SPDX-License-Identifier: Apache-2.0
"""Microbatches whose encoders run later than those of the others of their step.

Where their rows go is compared before, with all ranks; then each rank encodes them when it has
nothing else to do, and starts one exchange for all of them. It waits for other ranks only when it
needs the rows.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from megatron.core.models.mimo.model.encoded import EncodedMicrobatch
from megatron.core.models.mimo.model.language_batch import LanguageBatch
from megatron.core.models.mimo.model.leaves import Leaves
from megatron.core.models.mimo.model.no_samples import without_items
from megatron.core.models.mimo.model.row_path import settled


class LaterMicrobatches:
    """The later microbatches of a step; all ranks make them with the same number.

    Args:
        path: of the rows, an :class:`.EncodesLater`.
        microbatches: as for ``MimoModel.encode_microbatches``, with plans of all modalities.
        leaves: of the whole step.
    """

    def __init__(
        self, path: Any, microbatches: Sequence[Mapping[str, Any]], leaves: Leaves
    ) -> None:
        self._path, self._leaves = path, leaves
        self._compared = deque(
            path.compare(
                LanguageBatch.of(batch),
                without_items(batch.get("modality_inputs")),
                batch["route_plan"],
            )
            for batch in microbatches
        )
        self._encoded: list[tuple[Any, Any]] = []
        self._moved: list[EncodedMicrobatch] | None = None

    def check(self) -> None:
        """Hear what all ranks said of the plans.

        Raises:
            ValueError: the same on every rank of an exchange group: they do not fit together.
        """
        self._path.connect()
        for each in self._compared:
            each.check()

    def encode(self, count: int) -> None:
        """Run the encoders on the next microbatches, at most so many; waits for no exchange."""
        for _ in range(min(count, len(self._compared))):
            compared = self._compared.popleft()
            self._encoded.append((compared, self._path.encode_compared(compared)))

    def send(self) -> None:
        """Start the exchange of all rows, once; every rank has encoded its own by then."""
        if self._moved is None:
            self.encode(len(self._compared))
            # Not as each is encoded: what the path is told then it may tell others with a fused
            # microbatch, and on some ranks only that is before the exchange.
            planned = [self._path.plan_compared(*each) for each in self._encoded]
            self._encoded = []
            moved = self._path.move_together(planned, self._leaves)
            self._moved = [EncodedMicrobatch(rows) for rows in moved]
            self._path.start_settling()

    def land(self) -> list[EncodedMicrobatch]:
        """Wait for the rows and return the microbatches, in their order."""
        self.send()
        self._leaves.land()
        return self._moved or []

    def settled(self) -> Any:
        """Return a context at whose end all ranks hear how the encoders did on each.

        Raises:
            ValueError: at the end, on every rank of an exchange group: one could not bring its
                rows.
        """
        return settled(self._path)
