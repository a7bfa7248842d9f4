# SPDX-License-Identifier: Apache-2.0
"""Who reads a recipe's items: one rank of an encoder replica, for all its TP and CP ranks."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron.core.models.mimo.data.readers import (
    ImageReader,
    Reader,
    ReaderProcesses,
    Share,
    SoundReader,
    alone,
)
from megatron.core.models.mimo.data.shared_reads import SharedReads
from mimo_colocated.cli import models
from mimo_colocated.launch.layouts import Layout
from mimo_colocated.process_groups import make_groups

_SOUNDS = "audio"  # modality of what hears; any other sees


def readers_of(
    folder: Path,
    stack: contextlib.ExitStack,
    workers: int = 0,
    layouts: Mapping[str, Layout] | None = None,
) -> dict[str, Reader]:
    """Return modality -> what reads its items.

    Args:
        folder: of the model.
        stack: ends the processes.
        workers: processes that read; 0 reads here.
        layouts: modality -> layout of its encoder, where one is named.

    Raises:
        JobError: the folder is no whole model.
    """
    with models.one_sentence():
        parts = models.described(folder).encoders
    found: dict[str, Reader] = {}
    for part in parts:
        reader = _reader(part, folder)
        found[part.modality] = reader
        named = (layouts or {}).get(part.modality)
        # The first of its replica, see below.
        replica = 1 if named is None else named.tp * named.cp
        reads = int(os.environ["RANK"]) % replica == 0
        if workers and reads:
            processes = ReaderProcesses(reader, workers)
            stack.callback(processes.close)
            found[part.modality] = processes
    return found


def _reader(part: Any, folder: Path) -> Reader:
    from transformers import AutoFeatureExtractor, AutoImageProcessor

    if part.modality == _SOUNDS:
        return SoundReader(AutoFeatureExtractor.from_pretrained(folder), part.inputs)
    return ImageReader(AutoImageProcessor.from_pretrained(folder), part.inputs)


def shared_reads(built: Any) -> dict[str, Share]:
    """Return modality -> how ranks with the same items share what is read; all ranks call it.

    Args:
        built: the model.
    """
    found: dict[str, Share] = {}
    for part in built.composite.encoders:
        every = built.grids[part.modality].get_rank_enum(["tp", "cp"])
        if len(every[0]) == 1:
            found[part.modality] = alone
            continue
        group = make_groups(every, "gloo", group_desc=f"{part.modality} that are read once")
        assert group is not None
        found[part.modality] = SharedReads(group)
    return found
