# SPDX-License-Identifier: Apache-2.0
"""The folder and the layouts of a command: what can be said of them before ranks start."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mimo_colocated.cli.options import CommandOptions
from mimo_colocated.launch.errors import JobError
from mimo_colocated.launch.layouts import LANGUAGE, Layout


@contextlib.contextmanager
def one_sentence() -> Iterator[None]:
    """Show errors that are one sentence of ours without a traceback.

    Raises:
        JobError: in their place.
    """
    from megatron.core.models.mimo.checkpoint.errors import CheckpointError
    from megatron.core.models.mimo.huggingface.export import ExportError
    from megatron.core.models.mimo.huggingface.family import UnsupportedModelError
    from megatron.core.models.mimo.huggingface.fits import LayoutError
    from megatron.core.models.mimo.huggingface.folder import FolderError

    ours = (CheckpointError, ExportError, FolderError, LayoutError, UnsupportedModelError)
    try:
        yield
    except ours as error:
        raise JobError(str(error)) from error


def check_source(folder: Path, options: CommandOptions) -> None:
    """Refuse a folder or layouts that a model cannot be built from.

    Raises:
        JobError: the first reason.
    """
    from megatron.core.models.mimo.huggingface.fits import LayoutError, check_fits

    with one_sentence():
        composite = described(folder)
        flags = flag_of(composite)
        layouts = layouts_of(composite, options)
        try:
            check_fits(composite, layouts, sequence_parallel=sequence_parallel(options))
        except LayoutError as error:
            text = str(error)
            for modality, flag in flags.items():
                text = text.replace(f"--{modality} ", f"--{flag} ")
            raise LayoutError(text) from error


def described(folder: Path) -> Any:
    """Return what the model in a folder is made of; its files are there and whole.

    Raises:
        JobError: transformers does not know its kind.
    """
    from megatron.core.models.mimo.huggingface.build import read_config
    from megatron.core.models.mimo.huggingface.composites import describe
    from megatron.core.models.mimo.huggingface.folder import ModelFolder

    with ModelFolder(folder) as opened:
        try:
            config = read_config(opened.path)
        except (ValueError, KeyError, OSError) as error:
            kind = opened.config.get("model_type")
            raise JobError(
                f"{folder}: transformers cannot read its config.json (model_type {kind!r}): "
                f"{str(error).split('. ')[0]}"
            ) from error
    return describe(config)


def sequence_parallel(options: CommandOptions) -> bool:
    """Whether the language model cuts its sequence over TP: experts want it."""
    return options.language.tp > 1


def flag_of(composite: Any) -> dict[str, str]:
    """Return modality -> the option that gives its encoder a layout."""
    return {
        part.modality: "audio" if part.modality in ("audio", "sounds") else "vision"
        for part in composite.encoders
    }


def layouts_of(composite: Any, options: CommandOptions) -> Mapping[str, Layout]:
    """Return module -> layout; an encoder without one has a whole copy on every rank.

    Raises:
        JobError: an encoder is given a layout that the model does not have.
    """
    flags = flag_of(composite)
    surplus = [flag for flag in options.encoders if flag not in flags.values()]
    if surplus:
        has = ", ".join(f"--{flag}" for flag in [*flags.values(), LANGUAGE])
        raise JobError(
            f"--{surplus[0]} is given, but the model in {options.source} has no such part; it "
            f"takes {has}"
        )
    whole = Layout(dp=options.world_size)
    encoders = {name: options.encoders.get(flag, whole) for name, flag in flags.items()}
    return {**encoders, LANGUAGE: options.language}


def build(
    folder: Path, options: CommandOptions, *, load_weights: bool = True, dtype: str | None = None
) -> Any:
    """Build the model on this rank, nothing of it to train; a bar shows how far it is.

    Args:
        folder: that it comes from.
        options: of the command.
        load_weights: read them.
        dtype: of the weights; the folder's by default.
    """
    from megatron.core.models.mimo.huggingface.build import BuildOptions, from_folder
    from mimo_colocated.cli.progress import bar

    settings = BuildOptions(
        dtype=torch_dtype(dtype or folder_dtype(folder)),
        sequence_parallel=sequence_parallel(options),
        freeze=_freeze,
    )
    layouts = layouts_of(described(folder), options)
    with bar("reading") as tick:
        return from_folder(folder, layouts, settings, load_weights=load_weights, tick=tick)


def _freeze(model: Any) -> None:
    """No gradient buffers: nothing is trained."""
    model.requires_grad_(False)


def torch_dtype(name: str) -> Any:
    """Return torch's dtype of this name."""
    import torch

    return getattr(torch, name)


def folder_dtype(folder: Path) -> str:
    """Return the name of the dtype that most of a folder's weights have."""
    from megatron.core.models.mimo.huggingface.folder import ModelFolder

    sizes: dict[str, int] = {}
    with ModelFolder(folder) as opened:
        for described_tensor in opened.tensors.values():
            if described_tensor.dtype.is_floating_point:
                name = str(described_tensor.dtype).removeprefix("torch.")
                sizes[name] = sizes.get(name, 0) + described_tensor.size
    most = max(sizes, key=lambda name: sizes[name], default="float32")
    return most if most in ("bfloat16", "float16") else "float32"


def say(line: str) -> None:
    """Print on rank 0."""
    import torch.distributed as dist

    if dist.get_rank() == 0:
        print(line, flush=True)
