# SPDX-License-Identifier: Apache-2.0
"""Lists of modules that are cut over TP, as checkpoints need them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from megatron.core.models.mimo import compat
from megatron.core.process_groups_config import ProcessGroupCollection


class ShardedModuleList(nn.ModuleList):
    """A list whose modules are saved one by one.

    Stock takes the tensors of a plain list for copies on every TP rank: a checkpoint would have the
    first rank's part of a cut weight and call it the whole.

    Args:
        modules: of the list.
        pg_collection: their process groups.
    """

    def __init__(self, modules: Iterable[nn.Module], pg_collection: ProcessGroupCollection) -> None:
        super().__init__(modules)
        self.pg_collection = pg_collection

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Return the distributed-checkpoint view of all modules."""
        children = [(f"{prefix}{number}.", each) for number, each in enumerate(self)]
        return compat.sharded_state_dict_of_children(
            children, sharded_offsets, metadata, self.pg_collection, type(self).__name__
        )
