# SPDX-License-Identifier: Apache-2.0
"""Who reads a recipe's items: one rank of each TP group of an encoder, for all of the group."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron.core.models.mimo.data.readers import (
    ImageReader,
    Reader,
    ReaderProcesses,
    Share,
    alone,
)
from megatron.core.models.mimo.data.shared_reads import SharedReads
from megatron.core.models.mimo.huggingface.all_ranks import gathered
from mimo_colocated.cli import models
from mimo_colocated.process_groups import make_groups
from mimo_colocated.train.recipe import Recipe


def readers_of(recipe: Recipe, folder: Path, stack: contextlib.ExitStack) -> dict[str, Reader]:
    """Return modality -> what reads its items, in processes if the recipe wants some.

    Args:
        recipe: to run.
        folder: of the model.
        stack: ends the processes.
    """
    with models.one_sentence():
        parts = models.described(folder).encoders
    if not parts:
        return {}
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(folder)
    layouts, rank = recipe.encoders(), int(os.environ["RANK"])
    found: dict[str, Reader] = {}
    for part in parts:
        reader = ImageReader(processor, part.inputs)
        found[part.modality] = reader
        named = layouts.get(part.modality)
        reads = named is None or rank % named.tp == 0  # the first of its TP group, see below
        if recipe.data.workers and reads:
            processes = ReaderProcesses(reader, recipe.data.workers)
            stack.callback(processes.close)
            found[part.modality] = processes
    return found


def shared_reads(built: Any) -> dict[str, Share]:
    """Return modality -> how ranks with the same items share what is read; all ranks call it.

    Args:
        built: the model.
    """
    found: dict[str, Share] = {}
    for part in built.composite.encoders:
        peers = tuple(dist.get_process_group_ranks(built.collections[part.modality].tp))
        every = [list(ranks) for ranks in sorted(set(gathered(peers)))]
        if len(peers) == 1:
            found[part.modality] = alone
            continue
        group = make_groups(every, "gloo", group_desc=f"{part.modality} that are read once")
        assert group is not None
        found[part.modality] = SharedReads(group)
    return found
