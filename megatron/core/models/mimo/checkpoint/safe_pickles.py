# SPDX-License-Identifier: Apache-2.0
"""Refuses checkpoints that would execute code when they are loaded.

Stock loaders unpickle: ``.metadata`` with ``pickle.load``, the objects inside the ``.distcp``
files with ``torch.load(weights_only=False)``. A pickle is a program, and whoever can write one of
these files can run what they like in the training job. So the pickles are run beforehand where
they can do nothing, and only what passes is left to the stock loader:

====================  =========================================================================
``.metadata``         unpickled with an inert stand-in for each of the few classes that such a
                      file needs; any other name ends it. The stand-ins also say where in which
                      file the objects lie.
objects, common.pt    ``torch.load(weights_only=True)``, whose names PyTorch and Megatron-Core
                      allow (``torch.serialization.add_safe_globals`` adds to them)
tensors               nothing: stock reads them with ``weights_only=True`` itself
``metadata.json``     the format must be the one whose files are checked here
====================  =========================================================================

Not covered is what a module unpickles itself out of its own state: Transformer Engine does so
with the ``_extra_state`` of FP8 layers.

Cost: ``.metadata`` is read twice instead of once; of the objects (kilobytes each) a rank reads its
share.
"""

from __future__ import annotations

import io
import json
import pickle
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

_FORMAT = {"sharded_backend": "torch_dist", "common_backend": "torch"}
_CHECKPOINT = "torch.distributed.checkpoint"
_NEEDED = {
    f"{_CHECKPOINT}.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    f"{_CHECKPOINT}.filesystem": {"_StorageInfo"},
    # The plans of all ranks, which Megatron-Core keeps along to save faster the next time.
    f"{_CHECKPOINT}.planner": {
        "BytesIOWriteData",
        "SavePlan",
        "TensorWriteData",
        "WriteItem",
        "WriteItemType",
    },
    "megatron.core.dist_checkpointing.strategies.torch": {"MCoreMetadata", "MCoreSavePlan"},
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "pathlib": {"PosixPath"},
    "pathlib._local": {"PosixPath"},
}
_ROOTS = {"Metadata", "MCoreMetadata"}
_ZIP = b"PK\x03\x04"


class UnsafeFile(OSError):
    """A file of a checkpoint would run code when loaded, or is none of a checkpoint's at all."""


@dataclass(frozen=True)
class StoredObject:
    """Where a pickled object lies.

    Attributes:
        key: its name in the checkpoint.
        file: name of its file in the checkpoint's folder.
        offset, length: of its bytes in that file.
    """

    key: str
    file: str
    offset: int
    length: int


class _Inert:
    """Stands for an object of a needed class: keeps its state and does nothing.

    ``pickle`` builds real objects in just these ways: called or ``__new__`` with arguments, then
    given a state. State for the class itself, which would change it, fails here for want of
    ``self``, as it should.
    """

    name = ""
    arguments: tuple[Any, ...]
    state: Any

    def __new__(cls, *args: Any, **kwargs: Any) -> _Inert:
        made = object.__new__(cls)
        made.arguments = (args, kwargs)
        made.state = {}
        return made

    def __setstate__(self, state: Any) -> None:
        # As pickle does it: a second state adds to the first, later changes of it are not seen.
        self.state = {**self.state, **state} if isinstance(state, dict) else {None: state}

    def fields(self) -> dict[str, Any]:
        """State of a plain dataclass.

        Raises:
            UnsafeFile: it was built in a way that pickle never chooses for one.
        """
        if self.arguments != ((), {}) or not all(isinstance(key, str) for key in self.state):
            raise UnsafeFile(f"it builds {self.name} in a way that no writer does")
        return self.state


class _Rehearsal(pickle.Unpickler):
    """Runs a pickle with stand-ins for the needed names."""

    def __init__(self, file: io.BufferedIOBase) -> None:
        super().__init__(file)
        self._made: dict[tuple[str, str], Any] = {}

    def find_class(self, module: str, name: str) -> Any:
        """The stand-in of a name.

        Raises:
            UnsafeFile: the name is not among those needed.
        """
        if (module, name) not in self._made:
            self._made[module, name] = self._stand_in(module, name)
        return self._made[module, name]

    @staticmethod
    def _stand_in(module: str, name: str) -> Any:
        kind = type(name, (_Inert,), {"name": name})
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return kind()  # a value: calling it fails, as it does with a dtype
        if name in _NEEDED.get(module, ()):
            return kind
        raise UnsafeFile(f"it names {module}.{name}, which is no part of a checkpoint")


def rehearse_metadata(path: Path) -> list[StoredObject]:
    """Run ``.metadata`` without consequences; returns the objects that loading would unpickle.

    Args:
        path: of the file ``.metadata``.

    Raises:
        UnsafeFile: it would do anything but describe tensors and objects of its own folder.
    """
    try:
        with path.open("rb") as file:
            root = _Rehearsal(file).load()
        if not isinstance(root, _Inert) or root.name not in _ROOTS:
            raise UnsafeFile("it holds something else")
        return list(_objects(root.fields()))
    except UnsafeFile as error:
        reason = str(error)
    except Exception as error:  # a broken pickle fails in any way it likes
        reason = f"{type(error).__name__}: {error}"
    raise UnsafeFile(
        f"{path} is not loaded, it is not the metadata of a checkpoint ({reason})"
    ) from None


def _objects(metadata: dict[str, Any]) -> Iterator[StoredObject]:
    described, stored = metadata["state_dict_metadata"], metadata["storage_data"]
    for index, place in stored.items():
        key, where = index.fields()["fqn"], place.fields()
        file, offset, length = where["relative_path"], where["offset"], where["length"]
        if not isinstance(file, str) or file != Path(file).name or file in ("", ".", ".."):
            raise UnsafeFile(f"it sends the reader to {file!r}, outside its folder")
        if type(offset) is not int or type(length) is not int or min(offset, length) < 0:
            raise UnsafeFile(f"it sends the reader to bytes {offset!r} + {length!r} of {file}")
        if where.get("transform_descriptors"):
            raise UnsafeFile(f"it has {file} transformed, which is not supported")
        # Whatever is not described as a tensor is unpickled, whatever it is described as.
        if getattr(described.get(key), "name", None) != "TensorStorageMetadata":
            yield StoredObject(str(key), file, offset, length)


def check_object(folder: Path, stored: StoredObject) -> None:
    """Unpickle an object with PyTorch's restricted unpickler.

    Raises:
        UnsafeFile: that refuses it.
    """
    path = folder / stored.file
    with path.open("rb") as file:
        file.seek(stored.offset)
        content = file.read(stored.length)
    _check_pickle(content, f"{path} ('{stored.key}')")


def check_common(path: Path) -> None:
    """Check ``common.pt`` likewise, which checkpoints of Megatron-Core 0.16 have."""
    _check_pickle(path.read_bytes(), str(path))


def check_format(path: Path) -> None:
    """Make sure that ``metadata.json`` chooses the loader whose files are checked here.

    Raises:
        UnsafeFile: it does not.
    """
    try:
        entries = dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise UnsafeFile(f"{path} is not loaded ({error})") from None
    for name, wanted in _FORMAT.items():
        if entries.get(name, wanted) != wanted:
            raise UnsafeFile(
                f"{path} is not loaded: its {name} is {entries[name]!r}, supported is {wanted!r}"
            )


def _check_pickle(content: bytes, what: str) -> None:
    if not content.startswith(_ZIP):
        raise UnsafeFile(f"{what} is not loaded, it is not what torch.save writes")
    try:
        torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # as many kinds as there are ways to be broken
        raise UnsafeFile(f"{what} is not loaded, {_refusal(error)}") from None


def _refusal(error: Exception) -> str:
    """PyTorch's page-long refusal in a few words."""
    found = re.search(r"GLOBAL ([\w.]+)", str(error))
    if found:
        return (
            f"it names {found[1]}, which no checkpoint needs (if you do and trust the file: "
            "torch.serialization.add_safe_globals)"
        )
    first = next(iter(str(error).strip().splitlines()), "")
    return f"PyTorch refuses it ({type(error).__name__}: {first[:200]})"


def check(folder: Path, rank: int, world_size: int) -> None:
    """Check this rank's share of what loading a checkpoint would unpickle.

    Every rank reads ``.metadata``; of the objects it takes each ``world_size``-th.

    Args:
        folder: of the checkpoint.
        rank, world_size: of all that check together.

    Raises:
        UnsafeFile: something would run code, or is broken; the message names the file.
        OSError: a file cannot be read.
    """
    for path in folder.glob("*.metadata"):
        if path.name != ".metadata":  # read where .metadata cannot be: a rank's own, of PyTorch
            raise UnsafeFile(f"{path} is not loaded, metadata belongs in .metadata")
    check_format(folder / "metadata.json")
    for stored in rehearse_metadata(folder / ".metadata")[rank::world_size]:
        check_object(folder, stored)
    if rank == 0 and (folder / "common.pt").exists():
        check_common(folder / "common.pt")
