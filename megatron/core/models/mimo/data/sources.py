# SPDX-License-Identifier: Apache-2.0
"""Kinds of data sets by name; each has a length and is read by number, in any order."""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from megatron.core.models.mimo.data.conversation import Conversation

TOKENS = "tokens"
"""Kind of data that is tokens already: :class:`.token_files.TokenFiles`."""
KINDS = {
    "llava": ("llava_json", "LlavaJson"),
    "chat": ("chat_jsonl", "ChatJsonl"),
    "datasets": ("tables", "Tables"),
    "webdataset": ("tar_shards", "TarShards"),
    "energon": ("energon", "EnergonFolder"),
    "easy-vqa": ("easy_vqa", "EasyVqa"),
}
"""Name in a recipe -> file and class."""


class SourceError(RuntimeError):
    """A data set is not there, or not what it is said to be; one sentence."""


class Source(Protocol):
    """Samples by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int) -> Conversation:
        """Return a sample.

        Raises:
            SampleError: it is ``malformed``.
        """
        ...

    def fingerprint(self) -> str:
        """Return text that changes when the samples do."""
        ...


def open_source(kind: str, settings: Mapping[str, Any]) -> Source:
    """Open a data set.

    Args:
        kind: one of :data:`KINDS`.
        settings: arguments of its class.

    Raises:
        SourceError: the kind is not known, an argument is wrong, or it cannot be opened.
    """
    opened = kind_of(kind)
    try:
        return opened(**settings)
    except TypeError as error:
        raise SourceError(f"data of kind {kind!r} with {dict(settings)}: {error}") from error
    except OSError as error:
        reason = error.strerror or str(error)
        raise SourceError(f"{error.filename or kind} cannot be read: {reason}") from error


def kind_of(kind: str) -> Callable[..., Source]:
    """Return the class of a kind of data.

    Args:
        kind: one of :data:`KINDS`.

    Raises:
        SourceError: the kind is not known.
    """
    if kind not in KINDS:
        known = ", ".join([*KINDS, TOKENS])
        raise SourceError(f"{kind!r} is no kind of data; the kinds are {known}")
    file, name = KINDS[kind]
    return getattr(importlib.import_module(f"{__package__}.{file}"), name)


def fingerprint_of(paths: Iterable[Path], settings: Mapping[str, Any]) -> str:
    """Return text that changes when one of the files is written, or a setting is another.

    Args:
        paths: of the files.
        settings: JSON values, or paths.
    """
    said: list[Any] = [{name: str(value) for name, value in settings.items()}]
    for path in paths:
        known = path.stat()
        said.append([str(path.resolve()), known.st_size, known.st_mtime_ns, known.st_ctime_ns])
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16]
