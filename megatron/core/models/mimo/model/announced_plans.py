# SPDX-License-Identifier: Apache-2.0
"""Plans that were made ahead are compared while the encoders run, not when the rows are there.

What an encoder brings is known before it runs: as many rows as planned, of the language model's
width and dtype. A rank whose encoder fails after that goes on with zeros, so that nobody waits for
it in the exchange or in the language model, and says so in a second message that is on its way
while the language model runs. At the end of the forward pass all ranks of the exchange group raise
what any of them said. Neither message is waited for before it had that time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from megatron.core.models.mimo.comm.plan.routes import RoutePlan
from megatron.core.models.mimo.comm.routed_bridge import RoutedBridge
from megatron.core.models.mimo.model.input_checks import inputs_problem, plan_problem
from megatron.core.models.mimo.model.language_batch import LanguageBatch
from megatron.core.models.mimo.model.row_path import Runners


class AnnouncedPlans:
    """The messages before and after the encoders of a rank's routed modalities.

    Args:
        bridges: by modality.
        runners: the rank's.

    Attributes:
        failure: what this rank's encoders raised in this forward pass.
    """

    def __init__(self, bridges: Mapping[str, RoutedBridge], runners: Runners) -> None:
        self._bridges, self._runners = bridges, runners
        self.failure: Exception | None = None

    def announce(
        self,
        batch: LanguageBatch,
        modality_inputs: Mapping[str, Any] | None,
        plans: Mapping[str, RoutePlan],
        problem: str | None,
        seen: Mapping[str, np.ndarray],
    ) -> None:
        """Start comparing the plans, if all modalities have one.

        Args:
            batch: the language replica's.
            modality_inputs, plans: of the microbatch.
            problem: why this rank cannot go on.
            seen: where tokens stand, of modalities whose plan is to be compared with that.
        """
        deepstack = self._runners.modules.deepstack
        # What stands in for a model does not say how wide it is.
        if not deepstack.width or any(name not in plans for name in self._bridges):
            return
        dtype = self._runners.language.embedding_dtype()
        for name, bridge in self._bridges.items():
            like = torch.empty((0, deepstack.row_width(name)), dtype=dtype)
            why_not = problem or self.problem(name, batch, modality_inputs, plans, seen)
            bridge.announce(plans[name], like, why_not)

    def problem(
        self,
        name: str,
        batch: LanguageBatch,
        modality_inputs: Mapping[str, Any] | None,
        plans: Mapping[str, RoutePlan],
        seen: Mapping[str, np.ndarray],
    ) -> str | None:
        """Return what is wrong with a modality, whatever its encoder brings."""
        ids = self._runners.modules.special_token_ids
        return inputs_problem(name, modality_inputs, ids) or plan_problem(
            name, plans.get(name), batch, self._bridges[name], seen.get(name)
        )

    def start_settling(self) -> None:
        """Start telling how the encoders did; all ranks call it."""
        for bridge in self._bridges.values():
            bridge.start_settling()

    def settle(self) -> None:
        """Hear how they did on all ranks; all ranks call it.

        Raises:
            ValueError: on every rank of an exchange group, if one of them could not bring its
                rows, or they need a gradient on some of them only.
        """
        failure, self.failure = self.failure, None
        errors = []
        # Groups differ between modalities: all are heard before anything is raised.
        for bridge in self._bridges.values():
            try:
                bridge.settle()
            except ValueError as error:
                errors.append(error)
        if errors:
            raise errors[0] from failure

    def forget(self) -> None:
        """Drop what was to be heard, after an error."""
        self.failure = None
        for bridge in self._bridges.values():
            bridge.forget_unsettled()
