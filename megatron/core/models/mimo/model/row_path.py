# SPDX-License-Identifier: Apache-2.0
"""The way of rows from the encoders into the language model's sequence: what each kind must do.

``plan`` runs the encoders and settles where their rows go, ``move`` sends them, ``fuse`` puts them
among the text and cuts. ``MimoModel`` chooses once per modality, by the kind of its bridge; nothing
else asks. To add a kind: a bridge, a class as :class:`RowPath`, and :func:`register_path`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from megatron.core.models.mimo.comm.plan.routes import RoutePlan
from megatron.core.models.mimo.model.deepstack import LevelRows
from megatron.core.models.mimo.model.encoder_runner import EncoderRunner
from megatron.core.models.mimo.model.language_batch import LanguageBatch
from megatron.core.models.mimo.model.language_runner import LanguageRunner
from megatron.core.models.mimo.model.leaves import Leaves
from megatron.core.models.mimo.model.rank_modules import RankModules
from megatron.core.models.mimo.model.replaceable import ReplaceableSteps
from megatron.core.models.mimo.partition.utils import Sharded


@dataclass(frozen=True)
class Runners:
    """What a path works with.

    Attributes:
        modules: the rank's.
        steps: the model's replaceable ones.
        encoders, language: run these.
    """

    modules: RankModules
    steps: ReplaceableSteps
    encoders: EncoderRunner
    language: LanguageRunner


class RowPath(Protocol):
    """The way of some modalities' rows.

    Attributes:
        takes_route_plans: whether ``route_plan`` of ``MimoModel.forward`` means anything to it.
        backward_per_microbatch: modalities whose encoders run backward once per microbatch of a
            step in stages; those of others once for all that moved together.
    """

    takes_route_plans: bool

    @property
    def backward_per_microbatch(self) -> frozenset[str]:
        """See above."""
        ...

    def plan(
        self,
        batch: LanguageBatch,
        modality_inputs: Mapping[str, Any] | None,
        route_plan: Mapping[str, RoutePlan] | None,
    ) -> Any:
        """Run the encoders on one microbatch and settle where their rows go; move nothing.

        Args:
            batch: the language replica's.
            modality_inputs, route_plan: as for ``MimoModel.forward``.

        Raises:
            ValueError: rows, tokens and plans do not fit; a batch that cannot be cut.
            RuntimeError: special tokens of a modality without inputs.
        """

    def move(self, planned: Any) -> Any:
        """Send the rows of what was planned; differentiable. The rows may still be on their way."""

    def move_together(self, planned: Iterable[Any], leaves: Leaves) -> list[Any]:
        """Send the rows of several microbatches; each gets its own as leaves.

        Args:
            planned: the microbatches, planned when they are taken from the iterable.
            leaves: cuts rows off from how they were made.
        """
        ...

    def fuse(self, batch: LanguageBatch, moved: Any) -> Sharded:
        """Put moved rows among the text and cut: embeddings, labels, loss mask, packing."""
        ...

    def levels(
        self, batch: LanguageBatch, moved: Any, layers: tuple[int, ...]
    ) -> LevelRows | None:
        """Levels that a part of the language model adds to this rank's positions; after ``fuse``.

        A kind of way without this method takes no modality with levels.

        Args:
            batch: the language replica's.
            moved: rows that moved.
            layers: of the part, with levels of any modality.

        Returns:
            ``None`` if the batch has no such rows.
        """

    def exchange_problems(self, problems: Mapping[int, str], count: int) -> dict[int, str]:
        """Tell why ranks cannot go on, and hear of others, before encoders run.

        Args:
            problems: rank -> why.
            count: of the microbatches that this rank is about to encode.
        """
        ...


@runtime_checkable
class Settles(Protocol):
    """A way that moves rows before all ranks know how the encoders did that made them."""

    def settle(self) -> None:
        """Hear how they did; the last call of a forward pass.

        Raises:
            ValueError: what was moved is not to be used; on all ranks that exchanged it.
        """

    def forget(self) -> None:
        """Drop what was to be heard, after an error."""


@runtime_checkable
class EncodesLater(Settles, Protocol):
    """A way that settles where rows go before the encoders that make them run.

    These may then run at a time of each rank's own: none waits for another one until the rows that
    :meth:`RowPath.move_together` sent off are needed.
    """

    def later_problem(self, route_plan: Mapping[str, RoutePlan] | None) -> str | None:
        """Return why that cannot be done with a microbatch, if it cannot."""

    def connect(self) -> None:
        """Let the first exchange of rows wait for no rank that is not there yet."""

    def compare(
        self,
        batch: LanguageBatch,
        modality_inputs: Mapping[str, Any] | None,
        route_plan: Mapping[str, RoutePlan],
    ) -> Any:
        """Start settling it, as for ``plan``; ``check`` of what comes back waits, and raises."""

    def encode_compared(self, compared: Any) -> Any:
        """Run the encoders, and tell nobody."""

    def plan_compared(self, compared: Any, encoded: Any) -> Any:
        """Return what is as of ``plan``, right before the rows are sent off."""

    def start_settling(self) -> None:
        """Start telling how they did, when the rows of several microbatches were sent off."""


@contextlib.contextmanager
def settled(path: RowPath) -> Iterator[None]:
    """Settle at the end of a block what moved in it, if the way has anything to settle."""
    if not isinstance(path, Settles):
        yield
        return
    try:
        yield
    except BaseException:
        path.forget()
        raise
    path.settle()


def levels_of(
    path: RowPath, language: LanguageRunner, stage: Any, batch: LanguageBatch, moved: Any
) -> LevelRows | None:
    """Return what the layers of a stage add; ``None`` for nothing."""
    layers = language.level_layers(stage)
    return path.levels(batch, moved, layers) if layers else None
