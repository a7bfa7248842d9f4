# SPDX-License-Identifier: Apache-2.0
"""Routes of a batch, planned on the host with the batch: the model need not look at its tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch.distributed as dist

from megatron.core.models.mimo.comm.plan.batch_routes import plan_even_batch
from megatron.core.models.mimo.comm.plan.routes import RoutePlan
from megatron.core.models.mimo.comm.routed_bridge import RoutedBridge
from megatron.core.models.mimo.job.packing import padded_lengths
from megatron.core.models.mimo.model.base import MimoModel


class RoutePlans:
    """Plans routes; often tokens stand where they stood, and the last plan serves again.

    Args:
        model: whose bridges' routes are planned.
        multiple: that packed samples are padded to.

    Attributes:
        bridges: modality -> its routed bridge; nothing is planned for others, nor where encoders
            cut items over CP: rows of each item are not known here, so the bridge plans.
    """

    def __init__(self, model: MimoModel, multiple: int) -> None:
        bridges = getattr(model, "colocated_comms", {})
        self.bridges = {
            modality: bridge
            for (modality, _), bridge in bridges.items()
            if isinstance(bridge, RoutedBridge) and bridge.layout.src_cp_size == 1
        }
        self._multiple = multiple
        self._last: dict[str, tuple[np.ndarray, Any, RoutePlan]] = {}

    def of(
        self, tokens: Mapping[str, np.ndarray], lengths: np.ndarray | None
    ) -> dict[str, RoutePlan] | None:
        """Return modality -> this rank's way over the bridge; None without routed bridges.

        Args:
            tokens: modality -> where a microbatch has its tokens, all replicas' samples: bool
                ``(samples, S)``.
            lengths: tokens of all replicas' samples, int64 ``(samples,)``, if they are packed.
        """
        if not self.bridges:
            return None
        return {name: self.plan(name, tokens[name], lengths) for name in self.bridges}

    def plan(self, modality: str, tokens: np.ndarray, lengths: Any) -> RoutePlan:
        """Return one modality's; the arguments are as for :meth:`of`."""
        known = self._last.get(modality)
        if known and np.array_equal(known[0], tokens) and np.array_equal(known[1], lengths):
            return known[2]
        padded = None if lengths is None else padded_lengths(lengths, self._multiple)
        layout = self.bridges[modality].layout
        plan = plan_even_batch(layout, dist.get_rank(), tokens, packed=padded)
        self._last[modality] = (tokens, lengths, plan)
        return plan
