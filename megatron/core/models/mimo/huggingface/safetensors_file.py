# SPDX-License-Identifier: Apache-2.0
"""Write a safetensors file tensor by tensor.

``safetensors.torch.save_file`` takes all tensors of a file at once; a file of 5 GB would need them
in memory together. The format is a header (its length as 8 bytes, then JSON padded to a multiple of
8 with blanks) and the bytes of the tensors, one after the other.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path

import torch

from megatron.core.models.mimo.huggingface.folder import DTYPES, Described

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class SafetensorsFile:
    """One file, being written.

    Args:
        path: of the file.
        tensors: name -> description, in the order in which they will be written.
        metadata: of the header.

    Raises:
        OSError: it cannot be written.
    """

    def __init__(
        self, path: Path, tensors: Mapping[str, Described], metadata: Mapping[str, str]
    ) -> None:
        self._file = path.open("wb")
        self._expected = list(tensors.values())
        header = header_of(tensors, metadata)
        self._file.write(struct.pack("<Q", len(header)))
        self._file.write(header)

    def write(self, tensor: torch.Tensor) -> None:
        """Write the next tensor; it is contiguous and in host memory.

        Raises:
            ValueError: it is not the next one's dtype and shape.
            OSError: it cannot be written.
        """
        expected = self._expected.pop(0)
        if (tensor.dtype, tuple(tensor.shape)) != (expected.dtype, tuple(expected.shape)):
            raise ValueError(f"{tensor.dtype} {list(tensor.shape)} instead of {expected}")
        if tensor.numel():
            self._file.write(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))

    def close(self) -> None:
        """Hand everything to the system.

        Raises:
            OSError: it cannot be written.
        """
        self._file.close()


def header_of(tensors: Mapping[str, Described], metadata: Mapping[str, str]) -> bytes:
    """Return a file's header without its length.

    Args:
        tensors: name -> description, in the order of their bytes.
        metadata: what it says beside the tensors.
    """
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, described in tensors.items():
        begin, end = end, end + described.size
        entries[name] = {
            "dtype": _NAMES[described.dtype],
            "shape": list(described.shape),
            "data_offsets": [begin, end],
        }
    header = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    return header + b" " * (-len(header) % 8)
