# SPDX-License-Identifier: Apache-2.0
"""The gathered way: every rank of a language replica gets all rows, and cuts the fused sequence.

**Who enters the bridge.** All ranks of one language replica see the same ``input_ids``, so they
agree, without asking each other, on whether a modality has tokens in it. With tokens all of them
enter the modality's bridge, without tokens none does. A rank that could not enter raises, before
any collective of the bridge. The gather bridge wants the same number of rows of every sibling;
that too is a comparison of own rows with own tokens, so it costs no communication.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from megatron.core.models.mimo.comm.gather_bridge import ColocatedBridgeCommunicator
from megatron.core.models.mimo.comm.plan.routes import RoutePlan
from megatron.core.models.mimo.comm.plan.token_runs import count_mismatch
from megatron.core.models.mimo.config.role import MIMO_LANGUAGE_MODULE_KEY
from megatron.core.models.mimo.model.deepstack import DeepStack, LevelRows
from megatron.core.models.mimo.model.language_batch import LanguageBatch
from megatron.core.models.mimo.model.leaves import Leaves
from megatron.core.models.mimo.model.row_path import Runners
from megatron.core.models.mimo.partition.utils import Sharded
from mimo_colocated import phases


@dataclass(frozen=True, eq=False)
class GatheredRows:
    """Rows of one microbatch before they move.

    Attributes:
        batch: the language replica's, prepared.
        rows: modality -> this rank's encoder output ``(n, H)``.
        tokens: modality -> its tokens in the rank's language batch.
    """

    batch: LanguageBatch
    rows: dict[str, torch.Tensor]
    tokens: dict[str, int]


class GatheredPath:
    """The way over gather bridges, and of a model without bridges.

    Args:
        names: the modalities whose rows go this way; ``None``: all of the rank.
        runners: the rank's.
    """

    bridge_kind = ColocatedBridgeCommunicator
    takes_route_plans = False

    def __init__(self, names: list[str] | None, runners: Runners) -> None:
        self._some, self._runners = names, runners

    @staticmethod
    def make_bridge(config: Any, options: Any, **ends: Any) -> ColocatedBridgeCommunicator:
        """Make the bridge of a modality; all ranks of the grids call it.

        Args:
            config: the language model's.
            options: the ``MimoModelConfig``.
            ends: grids and names of both ends.
        """
        from megatron.core.models.mimo.model import base

        later = DeepStack.of(options).later_stages(ends["src_module_name"])
        further: dict[str, Any] = {"later_stages": later} if later else {}
        # Looked up where stock has the name, so that it can be replaced there.
        return base.ColocatedBridgeCommunicator(
            **ends, dim_mapping={"b": 0, "h": 1}, **further
        )

    @classmethod
    def build(
        cls, names: list[str], runners: Runners, options: Mapping[str, Any]
    ) -> GatheredPath:
        """Make the way for some modalities; for all of the rank's if there are no others."""
        alone = len(runners.modules.bridges) == len(names)
        return cls(None if alone else names, runners)

    @property
    def _deepstack(self) -> DeepStack:
        return self._runners.modules.deepstack

    @property
    def _names(self) -> list[str]:
        return list(self._runners.modules.encoders) if self._some is None else self._some

    @property
    def backward_per_microbatch(self) -> frozenset[str]:
        """All of them: each microbatch has moved by itself."""
        return frozenset(self._names)

    def plan(
        self,
        batch: LanguageBatch,
        modality_inputs: Mapping[str, Any] | None,
        route_plan: Mapping[str, RoutePlan] | None,
    ) -> GatheredRows:
        """Run the encoders that have inputs, see :meth:`.RowPath.plan`."""
        language = self._runners.language
        language.check_mask(batch)
        batch = language.prepared(batch)
        tokens = language.count_tokens(batch.input_ids)
        rows = self._runners.encoders.run_present(self._names, modality_inputs, tokens)
        bridges = self._runners.modules.bridges
        for name, encoded in rows.items():
            problem = self._deepstack.width_problem(name, encoded)
            if problem is not None:
                raise ValueError(problem)
            bridge = bridges.get((name, MIMO_LANGUAGE_MODULE_KEY))
            # Without one nobody waits; where the rows are placed it is said, too.
            if bridge is not None:
                _check_row_count(name, bridge, encoded.size(0), tokens[name])
        return GatheredRows(batch, rows, tokens)

    def move(self, planned: GatheredRows) -> dict[str, torch.Tensor]:
        """Return rows of all modalities, those with tokens in the batch over their bridge."""
        moved = self._moved(planned)
        phases.mark(phases.LANGUAGE_FORWARD)
        return moved

    def move_together(
        self, planned: Iterable[GatheredRows], leaves: Leaves
    ) -> list[dict[str, torch.Tensor]]:
        """Move each microbatch by itself, before the next one is planned."""
        found = []
        for each in planned:
            moved = self._moved(each)
            self._runners.language.token_positions.latest = None
            found.append({name: _whole(row, leaves) for name, row in moved.items()})
        return found

    def fuse(self, batch: LanguageBatch, moved: dict[str, torch.Tensor]) -> Sharded:
        """Fuse the whole sequence of the replica, then cut it."""
        language = self._runners.language
        elsewhere = [name for name in self._runners.modules.encoders if name not in self._names]
        main = {name: self._deepstack.main(name, rows) for name, rows in moved.items()}
        return language.cut(batch, language.fuse(batch, main, elsewhere))

    def levels(
        self, batch: LanguageBatch, moved: dict[str, torch.Tensor], layers: tuple[int, ...]
    ) -> LevelRows | None:
        """Spread levels over the whole sequence of the replica, then cut it like the text."""
        deepstack = self._deepstack
        rows = {
            name: deepstack.levels(name, row, range(row.size(1) // deepstack.width), layers)
            for name, row in moved.items()
            if row.size(0) and set(layers) & set(deepstack.layers.get(name, ()))
        }
        if not rows:
            return None
        language, ids = self._runners.language, self._runners.modules.special_token_ids
        spread = language.token_positions.find(batch.input_ids, ids).place(rows)
        # Labels and loss mask are cut with the text.
        bare = replace(batch, labels=None, loss_mask=None)
        cut, *_ = language.cut(bare, spread)
        assert cut is not None
        return LevelRows(cut.reshape(-1, cut.size(-1)), None)

    def exchange_problems(self, problems: Mapping[int, str], count: int) -> dict[int, str]:
        """Tell and hear, in the gather group of one modality after the other."""
        found = dict(problems)
        for name in self._names:
            bridge = self._runners.modules.bridge(name)
            if bridge is not None:
                found = bridge.hear(found, count)
        return found

    def _moved(self, planned: GatheredRows) -> dict[str, torch.Tensor]:
        rows, tokens, encoders = planned.rows, planned.tokens, self._runners.encoders
        moving = {name: row for name, row in rows.items() if tokens[name]}
        if self._runners.modules.bridges and moving:
            moving = self._runners.steps.bridge(moving)
        moved = {**rows, **moving}
        for name in self._names:
            absent = name not in moved and tokens.get(name) == 0
            if absent and encoders.needs_empty_rows(name):
                moved[name] = encoders.empty_rows(name)
        return moved


def _check_row_count(name: str, bridge: Any, rows: int, tokens: int) -> None:
    """Compare this encoder replica's rows with this language replica's tokens.

    Fan-in: ``scale`` encoder replicas bring the same number each. Fan-out: this encoder replica
    brings the rows of ``scale`` language replicas.

    Raises:
        ValueError: the bridge would deliver another number of rows than there are tokens.
    """
    scale = getattr(bridge, "scale", 1)
    if not isinstance(scale, int) or scale == 1:
        arriving, how = rows, ""
    elif bridge.is_fan_in():
        arriving = rows * scale
        how = f": {rows} on this rank, times the {scale} encoder replicas of a language replica"
    else:
        if rows % scale:
            return  # The bridge refuses this itself, with a better sentence.
        arriving = rows // scale
        how = f": {rows} on this rank, shared by {scale} language replicas"
    if arriving != tokens:
        advice = "; every replica must have the same number" if how else ""
        raise ValueError(count_mismatch(name, tokens, arriving) + how + advice)


def _whole(rows: torch.Tensor, leaves: Leaves) -> torch.Tensor:
    """All rows of a modality as one leaf."""
    (leaf,) = leaves.cut(rows, [torch.arange(rows.size(0), device=rows.device)], None)
    return leaf
