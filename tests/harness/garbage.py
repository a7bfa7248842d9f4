# SPDX-License-Identifier: Apache-2.0
"""Collections of garbage: what they must end, and what they need not look at."""

from __future__ import annotations

import gc
import sys
from typing import Any

_ROTARY = "megatron.core.models.common.embeddings.rotary_pos_embedding"
_DISPATCHERS = "megatron.core.transformer.moe.token_dispatcher"


def end_threads_of_groups() -> None:
    """Drop the last references to destroyed groups; a gloo group's thread ends with them.

    Models refer to their groups in cycles, and Megatron-Core's rotary embedding caches its results
    under the module, which has a group. A process that builds model after model without this has
    thousands of threads, which take all cores.
    """
    rotary = sys.modules.get(_ROTARY)
    forward = getattr(getattr(rotary, "RotaryEmbedding", None), "forward", None)
    if hasattr(forward, "cache_clear"):
        forward.cache_clear()
    dispatcher = getattr(sys.modules.get(_DISPATCHERS), "MoETokenDispatcher", None)
    if dispatcher is not None:
        for each in gc.get_objects():
            if issubclass(type(each), dispatcher):
                _forget_graphs(vars(each))
    gc.collect()


def _forget_graphs(attributes: dict[str, Any]) -> None:
    for name, value in attributes.items():
        if getattr(value, "grad_fn", None) is not None:
            attributes[name] = value.detach()


def set_imports_aside() -> None:
    """Later collections leave out what is there now; call it when all modules are imported.

    PyTorch and what Megatron-Core imports leave so many objects that looking through them takes
    0.2 s of a core, and Megatron-Core's distributed optimizer collects at every save and load.
    """
    gc.collect()
    gc.freeze()
