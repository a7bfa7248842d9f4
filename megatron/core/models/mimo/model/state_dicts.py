# SPDX-License-Identifier: Apache-2.0
"""What a model saves and loads: the states of the modules of this rank."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from megatron.core.dist_checkpointing.utils import replace_prefix_for_sharding
from megatron.core.distributed import DistributedDataParallel
from megatron.core.models.mimo import compat
from megatron.core.models.mimo.model.stage_side import LANGUAGE_MODEL, VIRTUAL_STAGES
from megatron.core.models.mimo.stand_ins import TakesStandIns, model_method
from megatron.core.transformer.module import Float16Module


class StateDicts(TakesStandIns):
    """Mixin of :class:`MimoModel`: states, with and without the wrappers of its modules."""

    @model_method
    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: compat.ShardedOffsets = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """The distributed-checkpoint view of all modules of this rank.

        Each module's replicas are those of its own ``pg_collection``. As in stock, DDP and
        ``Float16Module`` add ``module.`` to the keys; other wrappers do not show in the names on
        the disk, and ``load_state_dict`` takes names with and without any of them. Where a module
        overlaps its parameter gather, the weights of the last step are gathered here first: all
        ranks call it together.

        Raises:
            ValueError: a module's ``pg_collection`` has no ``dp_cp`` group.
        """
        self.start_param_sync(force_sync=True)
        wrappers = (DistributedDataParallel, Float16Module)
        state: dict[str, Any] = {}
        for path, module in self._named_modules_of_rank():
            inner, _ = compat.peel(module, "", wrappers)
            groups = getattr(inner, "pg_collection", None)
            child = (f"{prefix}{path}.", module)
            part = compat.sharded_state_dict_of_children(
                [child], sharded_offsets, metadata, groups, path, wrappers
            )
            if path.startswith(f"{VIRTUAL_STAGES}."):
                # On disk there is one language model, whatever its stages.
                replace_prefix_for_sharding(part, f"{prefix}{path}.", f"{prefix}{LANGUAGE_MODEL}.")
            state.update(part)
        return state

    def _named_modules_of_rank(self) -> Iterator[tuple[str, nn.Module]]:
        """(path, module) of modalities, virtual stages and every other child, in child order."""
        for name, child in self.named_children():
            if name in ("modality_submodules", VIRTUAL_STAGES):
                yield from ((f"{name}.{key}", module) for key, module in child.named_children())
            else:
                yield name, child
