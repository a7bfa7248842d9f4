# SPDX-License-Identifier: Apache-2.0
"""From a model in any layout back to a Hugging Face folder, tensor by tensor.

Every rank goes through the tensors in one order. Of each tensor the ranks that hold a part send it
to the rank that writes the tensor's file, point to point; files go to the ranks in turn. So nobody
waits for what another rank does not do, and no rank has more of other ranks' weights in memory
than one tensor, and the part of it that is on its way.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron.core.models.mimo.checkpoint.errors import (
    CheckpointError,
    alone,
    on_rank_0,
    together,
)
from megatron.core.models.mimo.checkpoint.history import fsync
from megatron.core.models.mimo.checkpoint.shared_folder import check_shared
from megatron.core.models.mimo.huggingface.all_ranks import on_all_ranks
from megatron.core.models.mimo.huggingface.build import ImportedModel
from megatron.core.models.mimo.huggingface.folder import (
    INDEX,
    SINGLE,
    Described,
    FolderError,
    ModelFolder,
    OpenFolder,
)
from megatron.core.models.mimo.huggingface.joined_folder import Folders
from megatron.core.models.mimo.huggingface.pieces import Piece, Planned, plan
from megatron.core.models.mimo.huggingface.safetensors_file import SafetensorsFile
from megatron.core.models.mimo.huggingface.target import Target, TargetError
from megatron.core.models.mimo.huggingface.weights import Held, held_by
from megatron.core.models.mimo.training.agreement import gathered


class ExportError(RuntimeError):
    """A folder cannot be written; one sentence, the same on all ranks."""


def to_folder(
    built: ImportedModel,
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    max_file_bytes: int | None = None,
    overwrite: bool = False,
    tick: Callable[[int], None] = lambda _size: None,
) -> None:
    """Write a model as a Hugging Face folder; every rank calls it together.

    Tensors have the names, dtypes, shapes and files that they have in the folder that the model
    came from. What the model has no place for is copied from there, as are tokenizer, processor,
    generation config and chat template. The folder appears when it is whole.

    Args:
        built: the model, as :func:`from_folder` made it.
        folder: to write; all ranks see the folder that it is in.
        dtype: of the weights, in place of the source folder's.
        max_file_bytes: begin a new file when one would become larger than this; None for the files
            of the source folder.
        overwrite: replace a model that is there, when the new one is whole.
        tick: told the bytes of each tensor that is done on this rank.

    Raises:
        ExportError: the folder is taken, not all ranks see it, or it cannot be written; nothing is
            left behind.
        FolderError: the model does not have all of a tensor.
    """
    with _opened(built.source) as source, _as_export_errors():
        target = Target(folder, overwrite=overwrite, source=source)
        rank, writing = dist.get_rank(), f"write {target.folder}"
        _refuse(gathered(_taken(target) if rank == 0 else None)[0])
        check_shared(target.folder.parent, "a model's files")
        built.model.start_param_sync(force_sync=True)  # of the last step, still on their way
        held = on_all_ranks(lambda: list(held_by(built.parts)), "name its parameters")
        planned = plan(held, built.parts, _outline(source, max_file_bytes), dtype)
        size = sum(tensor.described.size for tensor in planned)
        try:
            on_rank_0(lambda: target.begin(size), writing)
            transfer = _Transfer(source, target.partial, held, built)
            together(lambda: transfer.run(planned, tick), writing)
            alone(transfer.finish, writing)
            config = _with_dtype({**source.config, **built.config_fields}, dtype)
            on_rank_0(lambda: _complete(source, target, planned, config), writing)
        finally:
            target.abandon()


@contextmanager
def _as_export_errors() -> Iterator[None]:
    try:
        yield
    except CheckpointError as error:
        raise ExportError(str(error)) from error


@contextmanager
def _opened(source: Path | Folders) -> Iterator[OpenFolder]:
    """The source folder, or folders, if every rank can open it."""
    found: list[OpenFolder] = []

    def opening() -> None:
        found.append(source.open() if isinstance(source, Folders) else ModelFolder(source))

    with _as_export_errors():
        alone(opening, "open the folder that the model came from")
    with found[0] as opened:
        yield opened


def _taken(target: Target) -> str | None:
    try:
        target.check()
    except TargetError as error:
        return str(error)
    return None


def _refuse(problem: str | None) -> None:
    if problem is not None:
        raise ExportError(problem)


def _outline(source: OpenFolder, limit: int | None) -> dict[str, Described]:
    """The tensors to be, with the files that they go to."""
    if limit is None:
        return source.tensors
    files: list[list[str]] = [[]]
    room = limit
    for name, described in source.tensors.items():
        if files[-1] and described.size > room:
            files.append([])
            room = limit
        files[-1].append(name)
        room -= described.size
    count = len(files)
    names = [f"model-{n + 1:05d}-of-{count:05d}.safetensors" for n in range(count)]
    at = {name: file for file, own in zip(names, files, strict=True) for name in own}
    if count == 1:
        at = dict.fromkeys(at, SINGLE)
    return {name: replace(source.tensors[name], file=file) for name, file in at.items()}


def by_file(planned: Sequence[Planned]) -> dict[str, list[Planned]]:
    """Return file -> its tensors in the order of their bytes.

    Wide elements come first, as safetensors has them, so that all are aligned.
    """
    files: dict[str, list[Planned]] = {}
    for tensor in planned:
        files.setdefault(tensor.described.file, []).append(tensor)
    for tensors in files.values():
        tensors.sort(key=lambda tensor: -tensor.described.dtype.itemsize)
    return files


class _Transfer:
    """This rank's part in sending and writing.

    A file that cannot be written is not written any further, but its tensors still arrive: the
    ranks that send them must not wait.
    """

    def __init__(
        self,
        source: OpenFolder,
        folder: Path,
        held: list[Held],
        built: ImportedModel,
    ) -> None:
        self._source, self._folder, self._held = source, folder, held
        self._rank, self._world = dist.get_rank(), dist.get_world_size()
        # The groups' device: where parameters are.
        self._device = next(built.model.parameters()).device
        self._written: list[Path] = []
        self._problem: Exception | None = None

    def run(self, planned: Sequence[Planned], tick: Callable[[int], None]) -> None:
        """Go through all tensors; all ranks do, in the same order."""
        for number, (file, tensors) in enumerate(by_file(planned).items()):
            writer = number % self._world
            out = self._begin(file, tensors) if writer == self._rank else None
            for tensor in tensors:
                whole = self._assembled(tensor, writer)
                if out is not None and whole is not None:
                    self._try(lambda out=out, whole=whole: out.write(whole))
                del whole
                tick(tensor.described.size)
            if out is not None:
                self._try(out.close)

    def finish(self) -> None:
        """Have this rank's files on the disk.

        Raises:
            OSError: one could not be written.
            FolderError: what was to be copied could not be read.
        """
        for path in self._written:
            self._try(lambda path=path: fsync(path))
        if self._problem is not None:
            raise self._problem

    def _begin(self, file: str, tensors: Sequence[Planned]) -> SafetensorsFile | None:
        path = self._folder / file
        metadata = {"format": "pt", **self._source.metadata.get(file, {})}
        made: list[SafetensorsFile] = []
        described = {tensor.name: tensor.described for tensor in tensors}
        self._try(lambda: made.append(SafetensorsFile(path, described, metadata)))
        self._written.append(path)
        return made[0] if made else None

    def _try(self, action: Callable[[], object]) -> None:
        """Do it unless something failed before; remember what fails first."""
        if self._problem is None:
            try:
                action()
            except (OSError, FolderError) as error:
                self._problem = error

    def _assembled(self, tensor: Planned, writer: int) -> torch.Tensor | None:
        """The whole tensor on the rank that writes it; what this rank has of it is sent there."""
        mine = writer == self._rank
        if not tensor.pieces:
            return self._copied(tensor.name) if mine else None
        described = tensor.described
        whole = torch.empty(described.shape, dtype=described.dtype) if mine else None
        for piece in tensor.pieces:
            if piece.rank == self._rank:
                own = self._held[piece.held].view(piece.run)
                if whole is not None:
                    whole[piece.where()].copy_(own)
                else:
                    dist.send(_bytes(own.to(described.dtype).contiguous()), writer)
            elif whole is not None:
                whole[piece.where()].copy_(self._received(piece, described))
        return whole

    def _copied(self, name: str) -> torch.Tensor | None:
        found: list[torch.Tensor] = []
        self._try(lambda: found.append(self._source.read(name)))
        return found[0] if found else None

    def _received(self, piece: Piece, described: Described) -> torch.Tensor:
        shape = piece.shape(described)
        part = torch.empty(shape, dtype=described.dtype, device=self._device)
        dist.recv(_bytes(part), piece.rank)
        return part


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as bytes: backends send them whatever they make of the dtype."""
    return tensor.reshape(-1).view(torch.uint8)


def _complete(
    source: OpenFolder,
    target: Target,
    planned: Sequence[Planned],
    config: Mapping[str, Any],
) -> None:
    """What one rank adds when all tensors are on the disk."""
    for place, path in source.others().items():
        copy = target.partial / place
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
        fsync(copy)
    own = target.partial / "config.json"
    if not own.exists() or config != source.config:
        _write_json(own, config)
    files = by_file(planned)
    if list(files) != [SINGLE]:
        _write_json(target.partial / INDEX, _index(source, files))
    target.publish()


def _index(source: OpenFolder, files: Mapping[str, Sequence[Planned]]) -> dict[str, Any]:
    weight_map = {tensor.name: file for file, tensors in files.items() for tensor in tensors}
    sizes = (tensor.described.size for tensors in files.values() for tensor in tensors)
    metadata = {**source.index_metadata(), "total_size": sum(sizes)}
    return {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}


def _with_dtype(config: Mapping[str, Any], dtype: torch.dtype | None) -> dict[str, Any]:
    """The configuration with another dtype, if there is one, wherever it names one."""
    if dtype is None:
        return dict(config)
    name = str(dtype).removeprefix("torch.")
    changed = {}
    for key, value in config.items():
        if isinstance(value, dict):
            value = _with_dtype(value, dtype)
        elif key in ("dtype", "torch_dtype") and value is not None:
            value = name
        changed[key] = value
    return changed


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    fsync(path)
