# SPDX-License-Identifier: Apache-2.0
"""``--dry-run``: layouts, groups, memory per rank and the exact torchrun line."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mimo_colocated.launch.errors import JobError, did_you_mean
from mimo_colocated.launch.layouts import LANGUAGE, Layout
from mimo_colocated.train.recipe import Recipe

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_SHOWN = 4
_MACHINE, _ROWS = "h100", 0.5


def check_model(recipe: Recipe, folder: Path) -> Mapping[str, Layout]:
    """Refuse layouts that the model cannot be cut into; return the layout of every module.

    Args:
        recipe: with the layouts.
        folder: of the model.

    Raises:
        JobError: what does not fit, with layouts that would.
    """
    from megatron.core.models.mimo.huggingface.fits import check_fits
    from mimo_colocated.cli import models

    language, named = recipe.language, recipe.encoders()
    with models.one_sentence():
        composite = models.described(folder)
        modalities = [part.modality for part in composite.encoders]
        unknown = sorted(named.keys() - set(modalities))
        if unknown:
            raise JobError(
                f"layout.encoders.{unknown[0]}: the model has no such modality; it has "
                f"{', '.join(modalities) or 'none'}"
            )
        encoders = {name: named.get(name, Layout(dp=language.size)) for name in modalities}
        layouts = {**encoders, LANGUAGE: language}
        cut = recipe.layout.sequence_parallel
        virtual = recipe.layout.virtual_stages
        check_fits(
            composite,
            layouts,
            sequence_parallel=cut,
            virtual_stages=virtual,
            torch_native=recipe.model.torch_native,
        )
    return layouts


def check_data(recipe: Recipe) -> None:
    """Refuse settings of data sets that their kinds do not have; nothing is opened.

    Args:
        recipe: with the data.

    Raises:
        JobError: the setting, with the nearest name, or one that is missing.
    """
    from megatron.core.models.mimo.data.sources import TOKENS, kind_of
    from megatron.core.models.mimo.data.token_files import TokenFiles

    for name in ("train", "held_out"):
        for number, part in enumerate(getattr(recipe.data, name)):
            where = f"data.{name}.{number}.settings"
            kind = TokenFiles if part.kind == TOKENS else kind_of(part.kind)
            known = inspect.signature(kind).parameters
            taken = [each for each in known if each != "vocabulary"]
            for setting in part.settings.keys() - set(taken):
                meant = did_you_mean(setting, taken)
                raise JobError(
                    f"{where}.{setting} is not known; {meant}{part.kind} takes {', '.join(taken)}"
                )
            for setting in taken:
                needed = known[setting].default is inspect.Parameter.empty
                if needed and setting not in part.settings:
                    raise JobError(f"{where}.{setting} is missing; {part.kind} data needs it")


def dry_run(recipe: Recipe, folder: Path, nodes: int, named: str) -> str:
    """Return what would run.

    Args:
        recipe: to run.
        folder: of the model.
        nodes: machines.
        named: the recipe's arguments on the command line.

    Raises:
        JobError: what does not fit; ranks that the nodes do not divide.
    """
    layouts = check_model(recipe, folder)
    return "\n".join(
        [
            *_layout_lines(layouts),
            *_group_lines(layouts),
            _memory_line(_candidate(recipe, layouts), *_planned(recipe, folder)),
            torchrun_line(recipe.language.size, nodes, named),
        ]
    )


def program_dry_run(options: Any, shapes: Any, work: Any, nodes: int, named: str) -> str:
    """Return what a program of its own would run.

    Args:
        options: of the program.
        shapes, work: of its model, and of a step.
        nodes: machines.
        named: the recipe's arguments on the command line.

    Raises:
        JobError: ranks that the nodes do not divide.
    """
    from megatron.core.models.mimo.memory.policy import EncoderMemory
    from megatron.core.models.mimo.plan.candidates import Candidate

    candidate = Candidate(
        options.language,
        options.encoders,
        options.micro_batches,
        options.virtual_stages,
        options.recompute,
        EncoderMemory(options.encoder_memory, options.projector_memory),
        options.bridge,
    )
    layouts = options.layouts.modules
    return "\n".join(
        [
            *_layout_lines(layouts),
            *_group_lines(layouts),
            _memory_line(candidate, shapes, work),
            torchrun_line(options.world_size, nodes, named),
        ]
    )


def torchrun_line(ranks: int, nodes: int, named: str) -> str:
    """Return the command that starts the ranks on each of the nodes.

    Raises:
        JobError: ranks that the nodes do not divide.
    """
    if nodes < 1 or ranks % nodes:
        fits = ", ".join(str(n) for n in range(1, ranks + 1) if ranks % n == 0)
        raise JobError(f"--nodes {nodes} does not divide the {ranks} ranks; {fits} would")
    start = f"torchrun --nproc-per-node {ranks // nodes}"
    if nodes == 1:
        return f"{start} -m mimo_colocated train {named}"
    meet = "--rdzv-backend c10d --rdzv-endpoint HOST_OF_NODE_0:29400 --rdzv-id mimo"
    return f"{start} --nnodes {nodes} {meet} -m mimo_colocated train {named}"


def _layout_lines(layouts: Mapping[str, Layout]) -> Iterator[str]:
    width = max(map(len, layouts))
    for name, layout in layouts.items():
        yield f"{name:{width}}  {layout}  {layout.size} ranks, {layout.dp} replicas"


def _group_lines(layouts: Mapping[str, Layout]) -> Iterator[str]:
    """The exchange groups of every bridge, the first of many."""
    from megatron.core.hyper_comm_grid import GridShape
    from megatron.core.models.mimo.comm.plan.routed_layout import RouteLayout

    language = layouts[LANGUAGE]
    axes = ("tp", "cp", "dp", "pp")
    dest = GridShape((language.tp, language.cp, language.dp, language.pp), axes)
    for name, layout in layouts.items():
        if name == LANGUAGE:
            continue
        source = GridShape((layout.tp, layout.cp, layout.dp, layout.pp), axes)
        found = RouteLayout.from_grids(source, dest)
        groups = [group.ranks.tolist() for group in found.groups()]
        more = f" and {len(groups) - _SHOWN} more" * (len(groups) > _SHOWN)
        shown = " ".join(str(group) for group in groups[:_SHOWN])
        yield f"{name} rows stay within the ranks {shown}{more}"


def _candidate(recipe: Recipe, layouts: Mapping[str, Layout]) -> Any:
    """The recipe's way to run a step, as the planner has it."""
    from megatron.core.models.mimo.plan.candidates import Candidate

    return Candidate(
        recipe.language,
        {name: at for name, at in layouts.items() if name != LANGUAGE},
        recipe.training.micro_batches,
        recipe.layout.virtual_stages,
        recipe.training.recompute,
    )


def _planned(recipe: Recipe, folder: Path) -> tuple[Any, Any]:
    """The model's sizes, and the fullest step: all samples as long as may be, half of them rows."""
    from megatron.core.models.mimo.huggingface.plan_shapes import composite_shapes
    from megatron.core.models.mimo.plan.shapes import Work
    from mimo_colocated.cli import models

    with models.one_sentence():
        shapes = composite_shapes(models.described(folder))
    data, names = recipe.data, list(shapes.encoders)
    model, groups = recipe.model, recipe.training.groups
    partly = model.freeze or model.lora.rank or groups
    work = Work(
        data.capacity if data.sequences else recipe.longest,
        data.sequences or recipe.training.global_batch_size,
        {name: _ROWS / len(names) for name in names},
        itemsize=_BYTES[recipe.model.dtype],
        trained=models.trained_of(folder, model.freeze, model.lora, groups) if partly else {},
    )
    return shapes, work


def _memory_line(candidate: Any, shapes: Any, work: Any) -> str:
    """The fullest rank by the formulas of ``mimo plan``, on the accelerator that it takes first."""
    from megatron.core.models.mimo.plan.footprint import rank_bytes
    from megatron.core.models.mimo.plan.machine import find_machine

    machine = find_machine(_MACHINE)
    found = rank_bytes(candidate, shapes, work, machine)
    parts = {name: size for name, size in vars(found).items() if size}
    said = ", ".join(f"{name} {_amount(size)}" for name, size in parts.items())
    return f"memory of the fullest rank, on {_MACHINE}: about {_amount(found.total)} ({said})"


def _amount(size: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            break
        size /= 1024
    return f"{size:.3g} {unit}"


