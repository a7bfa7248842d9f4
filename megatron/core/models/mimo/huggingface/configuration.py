# SPDX-License-Identifier: Apache-2.0
"""Transformers' configuration of a folder, and other values of its fields."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron.core.models.mimo.huggingface.family import UnsupportedModelError


def changed(config: Any, given: Mapping[str, Any]) -> Any:
    """Return transformers' configuration with other values of some of its fields.

    Raises:
        UnsupportedModelError: it has no such field.
    """
    unknown = sorted(set(given) - set(config.to_dict()))
    if unknown:
        raise UnsupportedModelError(
            f"{config.model_type}: config_fields names {unknown}, which its configuration does not "
            f"have; it has {sorted(config.to_dict())}"
        )
    for name, value in given.items():
        setattr(config, name, value)
    return config


def read_config(folder: Path) -> Any:
    """Return transformers' configuration of a folder; no code of the folder is run.

    Raises:
        UnsupportedModelError: transformers does not know its kind, or refuses what it says.
    """
    import transformers

    try:
        return transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # of many kinds: its own, and those of its checks of fields
        reason = " ".join(str(error).split())
        raise UnsupportedModelError(
            f"transformers {transformers.__version__} cannot read {folder}/config.json: "
            f"{reason[:300]}"
        ) from error
