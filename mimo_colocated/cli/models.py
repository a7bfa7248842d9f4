# SPDX-License-Identifier: Apache-2.0
"""The folder and the layouts of a command: what can be said of them before ranks start."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mimo_colocated.cli.options import CommandOptions
from mimo_colocated.launch.errors import JobError
from mimo_colocated.launch.layouts import LANGUAGE, Layout
from mimo_colocated.launch.lora import Lora
from mimo_colocated.launch.parameter_groups import ParameterGroup
from mimo_colocated.launch.ranks import hush
from mimo_colocated.launch.starts import CAN_FORK


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
    from megatron.core.models.mimo.training.parameter_names import ParameterNameError

    of_folders = (ExportError, FolderError, LayoutError, UnsupportedModelError)
    ours = (CheckpointError, ParameterNameError, *of_folders)
    try:
        yield
    except ours as error:
        raise JobError(str(error)) from error


def check_source(
    folder: Path, options: CommandOptions, torch_native: Collection[str]
) -> None:
    """Refuse a folder or layouts that a model cannot be built from; no weight is read.

    Args:
        folder: of the model.
        options: of the command.
        torch_native: modules that are transformers' own.

    Raises:
        JobError: the first reason.
    """
    from megatron.core.models.mimo.huggingface.fits import LayoutError, check_fits

    with one_sentence():
        composite = described(folder)
        flags = flag_of(composite)
        layouts = layouts_of(composite, options)
        try:
            check_fits(
                composite,
                layouts,
                sequence_parallel=sequence_parallel(options),
                torch_native=torch_native,
            )
        except LayoutError as error:
            text = str(error)
            for modality, flag in flags.items():
                text = text.replace(f"--{modality} ", f"--{flag} ")
                for axis in ("tp", "cp"):
                    text = text.replace(f"{modality} {axis}=", f"{flag} {axis}=")
            raise LayoutError(text) from error
    _check_headers(folder)


def _check_headers(folder: Path) -> None:
    """Compare a folder's tensors with its model.

    Raises:
        JobError: tensors are missing, left over or of another shape.
    """
    # Without an answer the ranks will say what is wrong.
    with contextlib.suppress(EOFError):
        apart(_compare_headers, folder)


def _compare_headers(folder: Path) -> None:
    from megatron.core.models.mimo.huggingface.build import check_headers

    check_headers(folder)


def trained_of(
    folder: Path, freeze: Sequence[str], lora: Lora, groups: Sequence[ParameterGroup]
) -> dict[str, Any]:
    """Return what of a folder's model trains, as the planner takes it, by modality and part.

    Args:
        folder: of the model.
        freeze, lora, groups: as a recipe has them.

    Raises:
        JobError: a name that means nothing, or nothing is left to train.
    """
    try:
        return apart(_count_trained, folder, freeze, lora, [each.parameters for each in groups])
    except EOFError:
        raise JobError(f"counting what of {folder} trains ended without an answer") from None


def _count_trained(
    folder: Path, freeze: Sequence[str], lora: Lora, groups: Sequence[Sequence[str]]
) -> dict[str, Any]:
    from megatron.core.models.mimo.huggingface.trained import trained_parts

    return trained_parts(folder, freeze, lora, groups)


def apart(call: Callable[..., Any], *arguments: Any) -> Any:
    """Return what a call returns in a process of one rank, which leaves nothing behind here.

    Args:
        call: a function of a module.
        arguments: its.

    Raises:
        JobError: as the call.
        EOFError: the process ended without an answer.
    """
    # CUDA, which the launcher may have asked for devices, does not survive a fork.
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") == ""
    context: Any = multiprocessing.get_context("fork" if hidden and CAN_FORK else "spawn")
    answer, told = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(call, arguments, told))
    process.start()
    told.close()
    words, found = answer.recv()
    process.join()
    if words:
        raise JobError(words)
    return found


def _answer(call: Callable[..., Any], arguments: Sequence[Any], told: Any) -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import torch.distributed as dist

    hush()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    words, found = "", None
    try:
        with one_sentence():
            found = call(*arguments)
    except JobError as error:
        words = str(error)
    told.send((words, found))
    dist.destroy_process_group()


def described(folder: Path) -> Any:
    """Return what the model in a folder is made of; its files are there and whole.

    Raises:
        UnsupportedModelError: its kind is not known.
        FolderError: it is no whole model.
    """
    from megatron.core.models.mimo.huggingface.composites import describe
    from megatron.core.models.mimo.huggingface.configuration import read_config
    from megatron.core.models.mimo.huggingface.folder import ModelFolder

    with ModelFolder(folder) as opened:
        return describe(read_config(opened.path))


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
    folder: Path,
    options: CommandOptions,
    *,
    dtype: str | None = None,
    torch_native: Collection[str] = (),
    packed: bool = False,
    weights: Any = None,
) -> Any:
    """Build the model on this rank, nothing of it to train; a bar shows how far it is.

    Args:
        folder: that it comes from.
        options: of the command.
        dtype: of the weights; the folder's by default.
        torch_native: modules that are transformers' own.
        packed: the language model takes packed sequences.
        weights: an earlier run's, in place of the folder's.
    """
    from megatron.core.models.mimo.huggingface.build import BuildOptions, from_folder
    from mimo_colocated.cli.progress import bar

    settings = BuildOptions(
        dtype=torch_dtype(dtype or folder_dtype(folder)),
        sequence_parallel=sequence_parallel(options),
        freeze=_freeze,
        torch_native=torch_native,
        packed=packed,
        weights=weights,
    )
    layouts = layouts_of(described(folder), options)
    with bar("reading") as tick:
        return from_folder(folder, layouts, settings, tick=tick)


def _freeze(model: Any) -> None:
    """No gradient buffers: nothing is trained."""
    model.requires_grad_(False)


def torch_dtype(name: str) -> Any:
    """Return torch's dtype of this name."""
    import torch

    return getattr(torch, name)


def folder_dtype(folder: Path) -> str:
    """Return the name of a dtype that holds all of a folder's weights as they are."""
    from megatron.core.models.mimo.huggingface.folder import ModelFolder

    with ModelFolder(folder) as opened:
        found = {str(each.dtype).removeprefix("torch.") for each in opened.tensors.values()}
    for half in ("bfloat16", "float16"):
        if {name for name in found if "float" in name} == {half}:
            return half
    return "float32"


def say(line: str) -> None:
    """Print on rank 0."""
    import torch.distributed as dist

    if dist.get_rank() == 0:
        print(line, flush=True)
