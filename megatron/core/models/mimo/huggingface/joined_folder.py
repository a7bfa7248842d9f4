# SPDX-License-Identifier: Apache-2.0
"""Folders of a model's parts, read as the one folder that the whole model will be."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from megatron.core.models.mimo.huggingface.folder import Described, ModelFolder, OpenFolder

_OWN = ("config.json", "README.md", "LICENSE", ".gitattributes")


@dataclass(frozen=True)
class FolderPart:
    """A folder whose tensors get other names.

    Attributes:
        path: of the folder.
        names: name there -> name in the whole model; tensors without are left out.
    """

    path: Path
    names: Mapping[str, str]


@dataclass(frozen=True)
class Folders:
    """Folders that make one model.

    Attributes:
        parts: the language model's first; its files' names are kept, the others' tensors join the
            last of them.
        config: of the whole model, as its ``config.json`` will be.
        drawn: tensors that no folder has -> their shapes.
    """

    parts: tuple[FolderPart, ...]
    config: Mapping[str, Any]
    drawn: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def open(self) -> JoinedFolder:
        """Open them, as ``ModelFolder(path)`` opens one."""
        return JoinedFolder(self)


class JoinedFolder(OpenFolder):
    """As :class:`.ModelFolder`, of several; use it in ``with``.

    Args:
        source: the folders.

    Attributes:
        tensors: name in the whole model -> description; what was drawn is among them, and cannot
            be read.

    Raises:
        FolderError: a folder is no whole model.
    """

    def __init__(self, source: Folders) -> None:
        self.source, self.config = source, dict(source.config)
        self._stack = ExitStack()
        self._folders = [self._stack.enter_context(ModelFolder(part.path)) for part in source.parts]
        self.path = self._folders[0].path
        self.metadata = self._folders[0].metadata
        self.tensors = {}
        self._places: dict[str, tuple[ModelFolder, str]] = {}
        last = list(self._folders[0].files)[-1]
        for part, folder in zip(source.parts, self._folders, strict=True):
            for name, described in folder.tensors.items():
                if name in part.names:
                    whole = part.names[name]
                    file = described.file if folder is self._folders[0] else last
                    self.tensors[whole] = replace(described, file=file)
                    self._places[whole] = folder, name
        dtype = next(iter(self._folders[0].tensors.values())).dtype
        for name, shape in source.drawn.items():
            self.tensors[name] = Described(last, dtype, shape)

    def __enter__(self) -> JoinedFolder:
        return self

    def close(self) -> None:
        """Close the files."""
        self._stack.close()

    def read(self, name: str, where: tuple[slice, ...] = ()) -> torch.Tensor:
        """Read a tensor, or a part of it; see :meth:`.ModelFolder.read`."""
        folder, own = self._places[name]
        return folder.read(own, where)

    @property
    def paths(self) -> list[Path]:
        """The folders' own."""
        return [folder.path for folder in self._folders]

    def index_metadata(self) -> dict[str, Any]:
        """Return what the index says beside the files of the tensors; a new one says nothing."""
        return {}

    def others(self) -> dict[str, Path]:
        """Return the files of all folders that are neither weights nor about one folder alone.

        Of files of one place, the language model's.
        """
        found: dict[str, Path] = {}
        for folder in self._folders:
            for place, path in folder.others().items():
                if place not in _OWN:
                    found.setdefault(place, path)
        return found
