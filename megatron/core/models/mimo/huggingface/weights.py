# SPDX-License-Identifier: Apache-2.0
"""Which tensors a rank's parameters are made of, checked as a whole, then read piece by piece.

A rank reads what it holds and nothing else: of every tensor the runs of its own cut. So a model in
any layout comes out of one folder, with no communication but the agreement that all is well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.distributed.tensor import DTensor
from torch.nn import Module, Parameter

from megatron.core.models.mimo.huggingface.all_ranks import on_all_ranks
from megatron.core.models.mimo.huggingface.cuts import Heads, Run, Shard, Whole
from megatron.core.models.mimo.huggingface.folder import Described, FolderError, OpenFolder
from megatron.core.models.mimo.huggingface.tables import Source, Table
from megatron.core.models.mimo.torch_native.gathered import gathered as gathered_tensor
from megatron.core.models.mimo.training.agreement import gathered
from megatron.core.models.mimo.training.global_names import global_modules, join
from megatron.core.models.mimo.transformer.lora import is_adapters
from megatron.core.models.mimo.wrappers import unwrapped
from megatron.core.process_groups_config import ProcessGroupCollection


@dataclass(frozen=True)
class Part:
    """A module whose weights a folder has.

    Attributes:
        name: of the module, for messages.
        modules: this rank's pieces of it: one, or one per virtual stage; none on ranks without.
        table: its names and the folder's.
        groups: of its grid.
        heads: of its attention.
        drawn: prefixes of parameters that no folder has, which are drawn instead.
    """

    name: str
    modules: tuple[Module, ...]
    table: Table
    groups: ProcessGroupCollection
    heads: Heads
    drawn: tuple[str, ...] = ()


@dataclass(frozen=True)
class Held:
    """One parameter of this rank and where its elements are in a folder.

    Attributes:
        name: its global name, the module's first.
        parameter: itself.
        source: tensors and cut.
        shard: this rank's place among those that share it.
        heads: of its module.
        first_copy: no rank before this one holds the same elements.
    """

    name: str
    parameter: Parameter
    source: Source
    shard: Shard
    heads: Heads
    first_copy: bool

    def lengths(self, described: Mapping[str, Described]) -> list[int]:
        """Return the lengths of the sources along the cut's dim.

        Raises:
            FolderError: a source is missing.
        """
        missing = [name for name in self.source.names if name not in described]
        if missing:
            raise FolderError(f"{self.name} is made of {missing}, which the folder does not have")
        return [described[name].shape[self._dim_of(described[name])] for name in self.source.names]

    def runs(self, described: Mapping[str, Described]) -> list[Run]:
        """Return the runs that this rank holds."""
        return self.source.cut.runs(self.lengths(described), self.shard, self.heads)

    def _dim_of(self, described: Described) -> int:
        dim = self.source.cut.dim
        return len(described.shape) - 1 - dim if self.source.cut.transposed else dim

    def where(self, run: Run, described: Described) -> tuple[slice, ...]:
        """Return the slices of a run in its source."""
        dim = self._dim_of(described)
        return (*([slice(None)] * dim), slice(run.start, run.start + run.size))

    def view(self, run: Run, of: torch.Tensor | None = None) -> torch.Tensor:
        """Return the run's elements of the parameter, shaped as the source has them.

        Args:
            run: of this rank.
            of: a tensor of the parameter's shape to look at instead, such as its gradient.
        """
        own = self.parameter.detach() if of is None else of
        if own.dim():
            own = own.narrow(self.source.cut.dim, run.at, run.size)
        return own.t() if self.source.cut.transposed and own.dim() == 2 else own

    def problem(self, described: Mapping[str, Described]) -> str | None:
        """Return what keeps the parameter from being read, in a sentence; None if nothing does."""
        try:
            lengths = self.lengths(described)
            expected = list(self.parameter.shape)
            length = self.source.cut.length(lengths, self.shard, self.heads)
            runs = self.source.cut.runs(lengths, self.shard, self.heads)
        except ValueError as error:
            return f"{self.name}: {error}" if self.name not in str(error) else str(error)
        dim = self.source.cut.dim
        for name in self.source.names:
            shape = list(described[name].shape)
            if self.source.cut.transposed:
                shape.reverse()
            others = [size for at, size in enumerate(shape) if at != dim]
            if len(shape) != len(expected) or others != [
                size for at, size in enumerate(expected) if at != dim
            ]:
                return self._misshaped(name, described[name])
        if expected and length != expected[dim]:
            return self._misshaped(self.source.names[0], described[self.source.names[0]])
        for run in runs:
            name = self.source.names[run.source]
            if run.start + run.size > lengths[run.source]:
                return self._misshaped(name, described[name])
        return None

    def _misshaped(self, name: str, described: Described) -> str:
        return (
            f"'{name}' has shape {list(described.shape)}, which does not make {self.name}, "
            f"{list(self.parameter.shape)} on rank {self.shard.rank} of {self.shard.size}; the "
            "folder's config.json and its weights are not of one model"
        )


def held_by(parts: Iterable[Part]) -> Iterator[Held]:
    """Yield this rank's parameters that a folder has, adapters aside; shared ones come once.

    A ``DTensor`` of a torch-native module comes whole, on the first rank of its grid: all ranks of
    the module, which gather it, go through all of its parameters together.

    Raises:
        ValueError: the table has no line for a parameter.
    """
    seen: set[int] = set()
    for part in parts:
        for module in part.modules:
            for path, owner in global_modules(module):
                for key, parameter in owner.named_parameters(recurse=False):
                    name = join(path, key)
                    if is_adapters(name):
                        continue
                    if id(parameter) in seen or name.startswith(part.drawn or ("\0",)):
                        continue
                    seen.add(id(parameter))
                    held = _held(part, name, parameter)
                    if held.first_copy or not isinstance(parameter, DTensor):
                        yield held


def _held(part: Part, name: str, parameter: Parameter) -> Held:
    source = part.table.find(name)
    if source is None:
        raise ValueError(
            f"module '{part.name}' has a parameter {name} that its family's table does not name; "
            "add a line for it (docs/models.md)"
        )
    if isinstance(parameter, DTensor):
        # First of its grid, by all that cuts such a module; a module without CP may lack its group.
        cutting = (part.groups.tp, part.groups.cp, part.groups.dp)
        first = all(group is None or group.rank() == 0 for group in cutting)
        parameter = Parameter(gathered_tensor(parameter.detach()), requires_grad=False)
        return Held(join(part.name, name), parameter, source, Shard(), part.heads, first)
    expert = ".experts." in name
    groups = part.groups
    tp = groups.expt_tp if expert else groups.tp
    copies = (groups.expt_dp,) if expert else (groups.dp, groups.cp)
    first = all(group is None or group.rank() == 0 for group in copies)
    if isinstance(source.cut, Whole):
        # An expert's bias after its row-parallel layer, or a norm: the first TP rank's counts.
        first = first and (tp is None or tp.rank() == 0)
    shard = Shard() if tp is None else Shard(tp.rank(), tp.size())
    return Held(join(part.name, name), parameter, source, shard, part.heads, first)


def check(
    held: Sequence[Held], parts: Sequence[Part], folder: OpenFolder, *, headers_only: bool
) -> None:
    """Compare a model with a folder before any weight is read; all ranks call it together.

    Args:
        held: of this rank.
        parts: of the model, on every rank the same.
        folder: to read.
        headers_only: leave out whether tensors that are stored twice are alike.

    Raises:
        FolderError: the same on all ranks: tensors are missing, left over or of another shape, or
            cannot be read.
    """
    problems = [text for each in held if (text := each.problem(folder.tensors)) is not None]
    if not headers_only:
        # On all ranks, whatever this one has found.
        problems += on_all_ranks(
            lambda: [] if problems else list(_untied(held, parts, folder)), f"read {folder.path}"
        )
    used = sorted({name for each in held for name in each.source.names})
    told = gathered((problems[:1], used))
    wrong = [texts[0] for texts, _ in told if texts]
    if wrong:
        raise FolderError(f"{folder.path}: {wrong[0]}")
    everywhere = {name for _, names in told for name in names}
    alone = {name for part in parts for name in part.table.left_alone(folder.tensors)}
    surplus = [name for name in folder.tensors if name not in everywhere | alone]
    if surplus:
        more = f" and {len(surplus) - 3} more" if len(surplus) > 3 else ""
        raise FolderError(
            f"{folder.path} has tensors that the model has no place for: {surplus[:3]}{more}; "
            "config.json describes another model, or a part that is not supported"
        )


def _untied(held: Sequence[Held], parts: Sequence[Part], folder: OpenFolder) -> Iterator[str]:
    """What a folder stores twice and not alike, of the part that this rank reads."""
    again = {other: name for part in parts for name, other in part.table.repeated}
    for each in held:
        (name, *more) = each.source.names
        second = again.get(name)
        if more or second not in folder.tensors:
            continue
        for run in each.runs(folder.tensors):
            where = each.where(run, folder.tensors[name])
            same = folder.tensors[name].shape == folder.tensors[second].shape and torch.equal(
                folder.read(name, where), folder.read(second, where)
            )
            if not same:
                yield (
                    f"config.json ties the output layer to the embedding, but '{second}' is not "
                    f"'{name}'; set \"tie_word_embeddings\": false in config.json to keep both, or "
                    f"take '{second}' out of the folder"
                )
                return


def load(held: Iterable[Held], folder: OpenFolder, tick: Callable[[int], None]) -> None:
    """Read the weights of this rank; what the folder has in another dtype is cast.

    All ranks call it together: one that cannot read would leave the others in their next
    collective.

    Args:
        held: of this rank, checked.
        folder: to read.
        tick: told the bytes of each parameter.

    Raises:
        FolderError: the same on all ranks: one could not read a file, or has no room.
    """
    on_all_ranks(lambda: _read(held, folder, tick), f"load the weights of {folder.path}")


def _read(held: Iterable[Held], folder: OpenFolder, tick: Callable[[int], None]) -> None:
    with torch.no_grad():
        for each in held:
            runs = each.runs(folder.tensors)
            if sum(run.size for run in runs) < _length(each):
                each.parameter.zero_()  # rows of padding
            for run in runs:
                name = each.source.names[run.source]
                where = each.where(run, folder.tensors[name])
                each.view(run).copy_(folder.read(name, where))
            each.parameter._is_hf_initialized = True  # initial weights leave it alone
            tick(each.parameter.numel() * each.parameter.element_size())


def _length(held: Held) -> int:
    return held.parameter.shape[held.source.cut.dim] if held.parameter.dim() else 1


def bare(modules: Iterable[Module]) -> tuple[Module, ...]:
    """Return modules without their wrappers."""
    return tuple(unwrapped(module) for module in modules)
