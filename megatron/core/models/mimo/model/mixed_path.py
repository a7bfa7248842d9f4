# SPDX-License-Identifier: Apache-2.0
"""Modalities of one model over bridges of different kinds: the ways one after the other."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from megatron.core.models.mimo.comm.plan.routes import RoutePlan
from megatron.core.models.mimo.comm.plan_guard import problem_of
from megatron.core.models.mimo.model.deepstack import LevelRows
from megatron.core.models.mimo.model.gathered_path import GatheredPath, GatheredRows
from megatron.core.models.mimo.model.language_batch import LanguageBatch
from megatron.core.models.mimo.model.leaves import Leaves
from megatron.core.models.mimo.model.routed_path import PlannedRows, RoutedPath
from megatron.core.models.mimo.partition.utils import Sharded


@dataclass(frozen=True, eq=False)
class MixedRows:
    """What each way planned, with the prepared batch."""

    batch: LanguageBatch
    gathered: GatheredRows
    routed: PlannedRows


class MixedPath:
    """Some modalities over gather bridges, the others over routed ones.

    The sequence is fused and cut with the gathered rows, zeros in the places of the routed ones;
    these are put in afterwards.

    Args:
        gathered, routed: the two ways.
    """

    takes_route_plans = True

    def __init__(self, gathered: GatheredPath, routed: RoutedPath) -> None:
        self._gathered, self._routed = gathered, routed
        self.input_balances = routed.input_balances

    @property
    def backward_per_microbatch(self) -> frozenset[str]:
        """Those of the gathered way."""
        return self._gathered.backward_per_microbatch

    def plan(
        self,
        batch: LanguageBatch,
        modality_inputs: Mapping[str, Any] | None,
        route_plan: Mapping[str, RoutePlan] | None,
    ) -> MixedRows:
        """Plan both ways; who shares a routed exchange group hears why the other one failed."""
        gathered: Any = None
        failure = None
        try:
            gathered = self._gathered.plan(batch, modality_inputs, None)
        except (ValueError, RuntimeError) as error:
            failure = error
            problem = problem_of(error, "the gathered modalities")
            if problem is None:
                raise
            batch = replace(batch, problem=batch.problem or problem)
        routed = self._routed.plan(batch, modality_inputs, route_plan)
        if failure is not None:
            raise failure
        return MixedRows(gathered.batch, gathered, routed)

    def move(self, planned: MixedRows) -> tuple[Any, Any]:
        """Move both ways."""
        return self._gathered.move(planned.gathered), self._routed.move(planned.routed)

    def move_together(
        self, planned: Iterable[MixedRows], leaves: Leaves
    ) -> list[tuple[Any, Any]]:
        """Move both ways: the routed rows of all microbatches after the gathered ones of all."""
        planned = list(planned)
        gathered = self._gathered.move_together([each.gathered for each in planned], leaves)
        routed = self._routed.move_together([each.routed for each in planned], leaves)
        return list(zip(gathered, routed, strict=True))

    def fuse(self, batch: LanguageBatch, moved: tuple[Any, Any]) -> Sharded:
        """Fuse and cut with the gathered rows, then put the routed ones in."""
        return self._routed.put_into(self._gathered.fuse(batch, moved[0]), moved[1])

    def levels(
        self, batch: LanguageBatch, moved: tuple[Any, Any], layers: tuple[int, ...]
    ) -> LevelRows | None:
        """Return the levels of both ways as one."""
        found = [
            path.levels(batch, rows, layers)
            for path, rows in zip((self._gathered, self._routed), moved, strict=True)
        ]
        return LevelRows.joined([each for each in found if each is not None])

    def settle(self) -> None:
        """Hear how the routed modalities' encoders did."""
        self._routed.settle()

    def forget(self) -> None:
        """Drop what was to be heard of the routed modalities."""
        self._routed.forget()

    def exchange_problems(self, problems: Mapping[int, str], count: int) -> dict[int, str]:
        """Tell and hear over both kinds of bridges."""
        found = self._gathered.exchange_problems(problems, count)
        return self._routed.exchange_problems(found, count)
