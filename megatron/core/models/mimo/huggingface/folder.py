# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face model folder: configuration, tensors by name, and whatever else lies in it."""

from __future__ import annotations

import json
import math
import os
import struct
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# What other programs keep weights in, and what lists such files: stale beside new weights.
_WEIGHTS = frozenset(
    [".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".ot", ".tflite", ".onnx"]
    + [".onnx_data", ".gguf", ".ggml", ".npz", ".mlmodel"]
)
_INDICES = (".index.json", ".index.fp32.json")

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Safetensors' names of dtypes."""


@dataclass(frozen=True)
class Described:
    """A tensor of a folder, as its file's header has it.

    Attributes:
        file: its name.
        dtype: of the elements.
        shape: of the tensor.
        begin: byte of the file where it begins.
    """

    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int = 0

    @property
    def size(self) -> int:
        """Its bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


class FolderError(ValueError):
    """A folder that is not a whole model; the message says what to do."""


class OpenFolder(AbstractContextManager["OpenFolder"], ABC):
    """Where a model's weights are read, one folder or several as one; use it in ``with``.

    Attributes:
        path: of the folder, or of the language model's, for messages.
        config: what ``config.json`` holds, or will hold.
        tensors: name -> description, in the files' order.
        metadata: file -> what its header says beside the tensors.
        source: what opens it again.
    """

    path: Path
    config: dict[str, Any]
    tensors: dict[str, Described]
    metadata: dict[str, dict[str, str]]
    source: Any

    def __exit__(self, *ended: object) -> None:
        self.close()

    @property
    def files(self) -> dict[str, list[str]]:
        """File of weights -> names of its tensors, in its order."""
        found: dict[str, list[str]] = {}
        for name, described in self.tensors.items():
            found.setdefault(described.file, []).append(name)
        return found

    @property
    @abstractmethod
    def paths(self) -> list[Path]:
        """The folders' own."""

    @abstractmethod
    def close(self) -> None:
        """Close the files."""

    @abstractmethod
    def read(self, name: str, where: tuple[slice, ...] = ()) -> torch.Tensor:
        """Read a tensor, or a part of it; see :meth:`ModelFolder.read`."""

    @abstractmethod
    def index_metadata(self) -> dict[str, Any]:
        """Return what the index says beside the files of the tensors; nothing without an index."""

    @abstractmethod
    def others(self) -> dict[str, Path]:
        """Return what holds no weights: place in the folder -> file.

        Configurations, tokenizer, processor, chat template, and whatever else lies there.
        """


class ModelFolder(OpenFolder):
    """Reads one folder; parts of tensors, never whole files. Use it in ``with``.

    Args:
        path: of the folder: ``config.json`` beside ``model.safetensors``, or beside several files
            and their index.

    Raises:
        FolderError: no such folder, no ``config.json``, weights in another format, a file that is
            cut short, or one that the index names and is not there.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = self.source = Path(path)
        self.config: dict[str, Any] = self._json("config.json")
        self.tensors: dict[str, Described] = {}
        self.metadata: dict[str, dict[str, str]] = {}
        for file in self._weight_files():
            self.metadata[file], tensors = _read_header(self.path / file)
            self.tensors.update(tensors)
        self._open = ExitStack()
        self._handles: dict[str, BinaryIO] = {}

    def __enter__(self) -> ModelFolder:
        return self

    def close(self) -> None:
        """Close the files."""
        self._handles.clear()
        self._open.close()

    def read(self, name: str, where: tuple[slice, ...] = ()) -> torch.Tensor:
        """Read a tensor, or a part of it.

        The bytes go straight into the result: a file that is mapped instead stays in the process's
        memory, page by page, until it is closed.

        Args:
            name: of the tensor.
            where: slices of its first dims, all but the last of them whole; all of it without.

        Raises:
            FolderError: the file has become shorter, is gone or cannot be read.
        """
        described = self.tensors[name]
        dim = max(len(where) - 1, 0)
        shape = list(described.shape)
        length = shape[dim] if shape else 1
        start, stop, _ = where[dim].indices(length) if where and shape else (0, length, 1)
        inner = math.prod(shape[dim + 1 :]) * described.dtype.itemsize
        if shape:
            shape[dim] = stop - start
        found = torch.empty(shape, dtype=described.dtype)
        if not found.numel():
            return found
        into = memoryview(found.reshape(-1).view(torch.uint8).numpy())
        rows = math.prod(shape[:dim]) if stop - start < length else 1
        each, step = len(into) // rows, length * inner
        file = self._handle(described.file)
        for row in range(rows):
            file.seek(described.begin + row * step + start * inner)
            with _readable(self.path / described.file):
                got = file.readinto(into[row * each : (row + 1) * each])
            if got != each:
                raise FolderError(f"{self.path / described.file} was cut short while it was read")
        return found

    def _handle(self, file: str) -> BinaryIO:
        if file not in self._handles:
            with _readable(self.path / file):
                self._handles[file] = self._open.enter_context((self.path / file).open("rb"))
        return self._handles[file]

    @property
    def paths(self) -> list[Path]:
        """The folder's own, alone."""
        return [self.path]

    def index_metadata(self) -> dict[str, Any]:
        """Return what the index says beside the files of the tensors; nothing without an index."""
        return self._json(INDEX).get("metadata", {}) if (self.path / INDEX).is_file() else {}

    def others(self) -> dict[str, Path]:
        """Return what holds no weights; see :meth:`OpenFolder.others`."""
        found = {}
        for path in sorted(self.path.rglob("*")):
            inside = path.relative_to(self.path)
            hidden = any(part.startswith(".") for part in inside.parts)
            weights = path.suffix in _WEIGHTS or path.name.endswith(_INDICES)
            # A model within the folder would come along without its weights.
            within = [self.path / each for each in inside.parents[:-1]]
            nested = any((each / "config.json").is_file() for each in within)
            if path.is_file() and not hidden and not weights and not nested:
                found[inside.as_posix()] = path
        return found

    def _weight_files(self) -> Iterable[str]:
        if (self.path / INDEX).is_file():
            weight_map = self._json(INDEX).get("weight_map")
            if not isinstance(weight_map, dict):
                raise FolderError(f"{self.path / INDEX} has no weight_map; download it again")
            named = sorted(set(weight_map.values()))
            missing = [file for file in named if not (self.path / file).is_file()]
            if missing:
                raise FolderError(
                    f"{self.path}: {INDEX} names {missing}, which are not there; download the "
                    "folder again"
                )
            return named
        if (self.path / SINGLE).is_file():
            return [SINGLE]
        found = sorted(p.name for p in self.path.glob("*") if p.suffix in (".bin", ".pth", ".pt"))
        raise FolderError(
            f"{self.path} has neither {SINGLE} nor {INDEX}"
            + (f" but {found}: open it with transformers and save_pretrained it" if found else "")
        )

    def _json(self, file: str) -> dict[str, Any]:
        if not self.path.exists():
            raise FolderError(
                f"{self.path} does not exist; give a folder of this machine, as `hf download` makes"
            )
        if not (self.path / file).is_file():
            raise FolderError(
                f"{self.path} is not a Hugging Face model folder: it has no {file}"
            )
        try:
            with _readable(self.path / file):
                found = json.loads((self.path / file).read_text())
        except ValueError as error:
            raise FolderError(f"{self.path / file} is not JSON: {error}") from None
        if not isinstance(found, dict):
            raise FolderError(f"{self.path / file} is no JSON object")
        return found


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Name the file in the errors of the disk.

    Raises:
        FolderError: in their place.
    """
    try:
        yield
    except OSError as error:
        raise FolderError(f"{path} cannot be read: {error.strerror or error}") from error


def _read_header(path: Path) -> tuple[dict[str, str], dict[str, Described]]:
    """Return what a file says of itself, and its tensors in the order of their bytes.

    Raises:
        FolderError: the file is cut short or no safetensors file.
    """
    with _readable(path), path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = struct.unpack("<Q", file.read(8))[0] if size >= 8 else 0
        if not 2 <= length <= size - 8:
            raise FolderError(f"{path} is no whole safetensors file; download it again")
        text = file.read(length)
    try:
        header = json.loads(text)
        metadata = header.pop("__metadata__", {})
        entries = sorted(
            (start, stop, tuple(map(int, e["shape"])), str(e["dtype"]), name)
            for name, e in header.items()
            for start, stop in [map(int, e["data_offsets"])]  # neither more nor fewer
        )
        last = max((stop for _, stop, *_ in entries), default=0)
    except (ValueError, TypeError, KeyError, AttributeError):
        raise FolderError(f"{path} is no safetensors file; download it again") from None
    if 8 + length + last != size:
        raise FolderError(
            f"{path} has {size} bytes, its header tells of {8 + length + last}: it was cut short; "
            "download it again"
        )
    unknown = sorted({dtype for *_, dtype, _ in entries} - set(DTYPES))
    if unknown:
        raise FolderError(
            f"{path} holds {unknown}, which are not weights to train; save it in bfloat16, "
            "float16 or float32 first"
        )
    tensors = {
        name: Described(path.name, DTYPES[dtype], shape, 8 + length + start)
        for start, _, shape, dtype, name in entries
    }
    return metadata, tensors
