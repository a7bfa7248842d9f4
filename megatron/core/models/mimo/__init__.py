# SPDX-License-Identifier: Apache-2.0
"""Multimodal models on Megatron-Core: encoders and a language model with a layout each.

Importing this package is cheap: the public names below are resolved on first use (PEP 562), so
the pure-integer modules under it import without any model code, and stock Megatron-Core modules
that import ``MimoModel`` can be imported in any order.

On a machine without a CUDA device the import switches the CPU backend on, see
:mod:`megatron.core.models.mimo.cpu_backend`; where CUDA exists that module is never imported.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import torch

if not torch.cuda.is_available():
    from megatron.core.models.mimo import cpu_backend

    cpu_backend.enable()

if TYPE_CHECKING:
    from megatron.core.models.mimo.config.base_configs import MimoModelConfig
    from megatron.core.models.mimo.model.base import MimoModel
    from megatron.core.models.mimo.optimizer import MimoOptimizer, get_mimo_optimizer
    from megatron.core.models.mimo.submodules.audio import AudioModalitySubmodules
    from megatron.core.models.mimo.submodules.base import ModalitySubmodules
    from megatron.core.models.mimo.submodules.vision import VisionModalitySubmodules

__all__ = [
    "MimoModelConfig",
    "MimoModel",
    "MimoOptimizer",
    "get_mimo_optimizer",
    "ModalitySubmodules",
    "VisionModalitySubmodules",
    "AudioModalitySubmodules",
]

# Public name -> the module below this package that defines it.
_HOME = {
    "MimoModelConfig": "config.base_configs",
    "MimoModel": "model.base",
    "MimoOptimizer": "optimizer",
    "get_mimo_optimizer": "optimizer",
    "ModalitySubmodules": "submodules.base",
    "VisionModalitySubmodules": "submodules.vision",
    "AudioModalitySubmodules": "submodules.audio",
}


def __getattr__(name: str) -> Any:
    """Import a public name from its home module on first use.

    Raises:
        AttributeError: the name is not one of ``__all__``.
    """
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The module's own names and the public ones that are not loaded yet."""
    return sorted({*globals(), *__all__})
