# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint says of itself, in one JSON file that carries its own digest."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

FORMAT = 1
MANIFEST = "mimo.json"
_DIGEST = "digest"


@dataclass(frozen=True)
class Manifest:
    """What ``mimo.json`` in a checkpoint says, readable without loading a tensor.

    Attributes:
        step: training steps done; also the position in the data.
        layouts: module name -> {"tp": …, "cp": …, "pp": …, "dp": …}.
        world_size: ranks that wrote the checkpoint.
        shapes: parameter name -> its global shape; identifies the model.
        extra: whatever the job adds (JSON values).
        files: name of every other file -> {"bytes": …, "sha256": …}, the digest None where it was
            not wanted; None in checkpoints that are older than digests.
        distributed_optimizer: whether the optimizer's state is that of the distributed one; None
            in older checkpoints.
        frozen: names of the weights that did not train, of which the optimizer has no state; None
            in older checkpoints.
        optimizer: fields of the OptimizerConfig, by name; None in older checkpoints.
    """

    step: int
    layouts: dict[str, dict[str, int]]
    world_size: int
    shapes: dict[str, list[int]]
    extra: dict[str, Any]
    files: dict[str, dict[str, Any]] | None = None
    distributed_optimizer: bool | None = None
    frozen: list[str] | None = None
    optimizer: dict[str, Any] | None = None
    format: int = FORMAT

    def to_json(self) -> str:
        """Return the file's text, with a digest of the rest among its entries."""
        entries = asdict(self)
        return json.dumps({**entries, _DIGEST: _digest(entries)})

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Read the file's text.

        Raises:
            ValueError: it is no JSON, or not what was written.
            TypeError: entries are missing or unknown.
        """
        entries = json.loads(text)
        if not isinstance(entries, dict):
            raise ValueError(f"its {MANIFEST} holds no entries")
        digest = entries.pop(_DIGEST, None)  # older checkpoints have none
        if digest is not None and digest != _digest(entries):
            raise ValueError(f"its {MANIFEST} is damaged: it is not what was written")
        manifest = cls(**entries)
        if not isinstance(manifest.shapes, dict):
            raise ValueError(f"its {MANIFEST} names no shapes")
        files = {} if manifest.files is None else manifest.files
        if not all({"bytes", "sha256"} <= set(saved) for saved in files.values()):
            raise ValueError(f"its {MANIFEST} does not say what its files hold")
        return manifest


def _digest(entries: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()
