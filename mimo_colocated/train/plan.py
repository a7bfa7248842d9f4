# SPDX-License-Identifier: Apache-2.0
"""``--dry-run``: layouts, groups, memory per rank and the exact torchrun line."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

from mimo_colocated.launch.errors import JobError
from mimo_colocated.launch.layouts import LANGUAGE, Layout
from mimo_colocated.train.recipe import Recipe

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_SHOWN = 4


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
        check_fits(composite, layouts, sequence_parallel=recipe.layout.sequence_parallel)
    return layouts


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
            *_memory_lines(recipe, folder, layouts),
            torchrun_line(recipe.language.size, nodes, named),
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
    axes = (language.tp, language.cp, language.dp, language.pp)
    dest = GridShape(axes, ("tp", "cp", "dp", "pp"))
    for name, layout in layouts.items():
        if name == LANGUAGE:
            continue
        found = RouteLayout.from_grids(GridShape((layout.tp, layout.dp), ("tp", "dp")), dest)
        groups = [group.ranks.tolist() for group in found.groups()]
        more = f" and {len(groups) - _SHOWN} more" * (len(groups) > _SHOWN)
        shown = " ".join(str(group) for group in groups[:_SHOWN])
        yield f"{name} rows stay within the ranks {shown}{more}"


def _memory_lines(
    recipe: Recipe, folder: Path, layouts: Mapping[str, Layout]
) -> Iterator[str]:
    """Weights, gradients and optimizer state of a rank by the folder's tensors, no activations."""
    each = {
        name: parameters / (layouts[name].tp * layouts[name].pp)
        for name, parameters in _parameters(folder, layouts).items()
    }
    width = _BYTES[recipe.model.dtype]
    # Adapters are small.
    trains = {name: name not in recipe.model.freeze and not recipe.model.lora.rank for name in each}
    weights = sum(each.values()) * width
    gradients = sum(4 * count for name, count in each.items() if trains[name])
    # Two moments in float32, and a copy of the weights in it where they have less.
    state = 8 if width == 4 else 12
    optimizer = sum(
        state * count / (layouts[name].dp * layouts[name].cp)
        for name, count in each.items()
        if trains[name]
    )
    sizes = {"weights": weights, "gradients": gradients, "optimizer": optimizer}
    said = ", ".join(f"{name} {_amount(size)}" for name, size in sizes.items())
    yield f"memory per rank, without activations: about {_amount(sum(sizes.values()))} ({said})"


def _parameters(folder: Path, layouts: Mapping[str, Layout]) -> dict[str, int]:
    """Module -> parameters, by the folder's names."""
    from megatron.core.models.mimo.huggingface.folder import ModelFolder

    counts = dict.fromkeys(layouts, 0)
    encoders = [name for name in layouts if name != LANGUAGE]
    marks = ("vision_tower", "visual.", "audio_tower", "multi_modal_projector")
    with ModelFolder(folder) as opened:
        for name, described in opened.tensors.items():
            ours = encoders[0] if encoders and any(m in name for m in marks) else LANGUAGE
            counts[ours] += math.prod(described.shape)
    return counts


def _amount(size: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            break
        size /= 1024
    return f"{size:.3g} {unit}"


