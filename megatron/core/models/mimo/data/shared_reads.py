# SPDX-License-Identifier: Apache-2.0
"""Items that several ranks encode are read by one of them, which hands on what it made of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron.core.models.mimo.data.readers import Inputs, Make, ReadError


class SharedReads:
    """Returns on all ranks of a group what is made on its first.

    All of them call it for the same items in the same order, from whatever thread; collectives of
    the training may run beside, so nothing else uses the group.

    Args:
        group: of the ranks that encode the same items; its tensors are on the host (gloo).
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self._first = dist.get_process_group_ranks(group)[0]
        self._reads = dist.get_rank() == self._first

    def __call__(self, make: Make) -> Inputs:
        """Return what the first rank made.

        Raises:
            ReadError: it could not, with the same sentence on all ranks.
        """
        made: Inputs = {}
        failed: Exception | None = None
        if self._reads:
            try:
                made = make()
            except Exception as error:  # of any kind: the others wait
                failed = error
        told: list[Any] = [None if failed is None else _words(failed), _shapes(made)]
        dist.broadcast_object_list(told, self._first, self._group)
        words, shapes = told
        if words is not None:
            raise ReadError(words) from failed
        return {name: self._handed_on(made.get(name), *shape) for name, shape in shapes.items()}

    def _handed_on(
        self, own: np.ndarray | None, dtype: np.dtype, shape: tuple[int, ...]
    ) -> np.ndarray:
        found = np.empty(shape, dtype) if own is None else np.require(own, None, ["C", "W"])
        # As bytes: gloo does not know all of NumPy's types.
        content = torch.from_numpy(found.reshape(-1).view(np.uint8))
        if len(content):
            dist.broadcast(content, self._first, self._group)
        return found


def _shapes(made: Inputs) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
    return {name: (value.dtype, value.shape) for name, value in made.items()}


def _words(error: Exception) -> str:
    return str(error) if isinstance(error, ReadError) else f"{type(error).__name__}: {error}"
