# SPDX-License-Identifier: Apache-2.0
"""``mimo plan``: which layouts to train in, before anything runs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mimo_colocated.cli.options import ENCODERS
from mimo_colocated.launch.errors import JobError, write_atomically
from mimo_colocated.launch.layouts import LANGUAGE, Layout

_HALF = 0.5
# Where neither the command line nor a recipe says.
_SEQUENCE, _SAMPLES = 8192, 8
_ITEM_TOKENS = 1024


def run(options: Any) -> None:
    """Print the table, and write what else is asked for.

    Args:
        options: of ``mimo plan``.

    Raises:
        JobError: what is wrong with the options, the folder or the file of shapes.
    """
    from megatron.core.models.mimo.plan.candidates import Search
    from megatron.core.models.mimo.plan.estimates import plan
    from megatron.core.models.mimo.plan.machine import find_machine
    from mimo_colocated.cli import plan_table

    _check_outputs(options)
    recipe: Any = None
    flags: dict[str, str] = {}
    trained: dict[str, Any] = {}
    if options.recipe is not None:
        recipe, flags, trained = _with_recipe(options)
    elif options.source is None or options.write_recipe is not None:
        raise JobError(
            "--write-recipe needs --recipe" if options.source else
            "give a Hugging Face folder, a file of shapes, or --recipe"
        )  # fmt: skip
    shapes = read_shapes(Path(options.source).expanduser(), options.item_tokens)
    if recipe:
        shapes = _of_recipe(shapes, recipe, flags)
    try:
        work = replace(work_of(shapes, options), trained=trained)
        machine = find_machine(options.gpu)
        search = Search(
            options.gpus,
            machine.node,
            _numbers("--replica-samples", options.replica_samples),
            # In a recipe encoders keep what they keep.
            encoder_memory=("keep",) if recipe else _policies(options.encoder_memory),
            bridge=options.bridge,
            encoder_cp=_encoder_cp(options.encoder_cp, shapes),
        )
        if options.why is not None:
            print(_explain(options.why, (shapes, work, machine, search)))
            return
        found = plan(shapes, work, machine, search)
    except ValueError as error:
        raise JobError(str(error)) from error
    print(plan_table.text(found, shapes, work, options.top))
    if options.json is not None:
        _write_json(Path(options.json), found, machine, (shapes, work), options.top)
    if options.picture is not None:
        _picture(Path(options.picture), found, options.top)
    if options.write_recipe is not None:
        if not found.colocated:
            raise JobError("--write-recipe has nothing to write: no pair of layouts fits")
        from mimo_colocated.cli.planned_recipe import write_recipe

        path = Path(options.write_recipe).expanduser()
        row = write_recipe(path, recipe, [each.candidate for each in found.colocated], flags, work)
        print(f"row {row} is in {path}")


def _with_recipe(options: Any) -> tuple[Any, dict[str, str], dict[str, Any]]:
    """The recipe, its encoders' options, what trains; fills in what the command line leaves out.

    Raises:
        JobError: a source beside it, no such recipe, or one that names what the model has not.
    """
    from megatron.core.models.mimo.huggingface.composites import describe
    from megatron.core.models.mimo.huggingface.configuration import read_config
    from mimo_colocated.cli.models import flag_of, one_sentence
    from mimo_colocated.cli.planned_recipe import open_recipe, options_of, trained_in

    if options.source is not None:
        raise JobError(f"--recipe names its model; leave out {options.source}")
    if options.encoder_memory is not None or options.bridge != "routed":
        given = "--bridge gather" if options.bridge != "routed" else "--encoder-memory"
        raise JobError(
            f"{given} is nothing that a recipe can say; leave it out, or plan the model's folder"
        )
    recipe, folder = open_recipe(options.recipe)
    with one_sentence():
        flags = flag_of(describe(read_config(folder)))
    options.source = str(folder)
    for name, value in options_of(recipe).items():
        if getattr(options, name, None) is None:
            setattr(options, name, value)
    return recipe, flags, trained_in(recipe, folder, flags)


def _check_outputs(options: Any) -> None:
    """Refuse files that would not be written, or not as asked for.

    Raises:
        JobError: ``--why`` beside them, or a picture of another kind.
    """
    names = ("json", "picture", "write_recipe")
    given = [name for name in names if getattr(options, name) is not None]
    if options.why is not None and given:
        option = f"--{given[0].replace('_', '-')}"
        raise JobError(f"--why explains one pair and writes nothing; leave out {option}")
    if options.picture is not None and Path(options.picture).suffix not in (".png", ".svg"):
        raise JobError(f"--picture {options.picture} must end in .png or .svg")


def _policies(text: str | None) -> tuple[str, ...]:
    from megatron.core.models.mimo.memory.policy import POLICIES

    return POLICIES if text is None else tuple(text.split(","))


def read_shapes(source: Path, item_tokens: int | None) -> Any:
    """Return the shapes of a Hugging Face folder or of a YAML file.

    Encoders of a folder get the names that the command line gives them, ``vision`` and ``audio``.

    Args:
        source: folder or file.
        item_tokens: of an image, where the model takes any size.

    Raises:
        JobError: it is neither, or its content is not understood.
    """
    from megatron.core.models.mimo.plan.shapes import shapes_from
    from mimo_colocated.cli.models import flag_of, one_sentence

    if source.is_file():
        if item_tokens is not None:
            raise JobError(f"--item-tokens {item_tokens}: {source} has the tokens of its items")
        try:
            return shapes_from(_yaml(source))
        except ValueError as error:
            raise JobError(f"{source}: {error}") from error
    if not (source / "config.json").is_file():
        raise JobError(
            f"{source} is neither a file of shapes nor a folder with config.json; give one of them"
        )
    with one_sentence():
        from megatron.core.models.mimo.huggingface.composites import describe
        from megatron.core.models.mimo.huggingface.configuration import read_config
        from megatron.core.models.mimo.huggingface.plan_shapes import composite_shapes

        composite = describe(read_config(source))
        shapes = composite_shapes(composite, _ITEM_TOKENS if item_tokens is None else item_tokens)
    flags = flag_of(composite)
    return replace(shapes, encoders={flags[n]: each for n, each in shapes.encoders.items()})


def _yaml(source: Path) -> Any:
    """What a YAML or JSON file holds.

    Raises:
        ValueError: it is no YAML.
    """
    import yaml

    try:
        return yaml.safe_load(source.read_text("utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"no YAML: {' '.join(str(error).split())}") from None


def _of_recipe(shapes: Any, recipe: Any, flags: Mapping[str, str]) -> Any:
    """The shapes with torch-native encoders, which take whole items."""
    whole = {flags[name] for name in recipe.model.torch_native if name in flags}
    encoders = {
        name: replace(each, cuts_items=each.cuts_items and name not in whole)
        for name, each in shapes.encoders.items()
    }
    return replace(shapes, encoders=encoders)


def work_of(shapes: Any, options: Any) -> Any:
    """Return the step that the options describe.

    Args:
        shapes: of the model.
        options: of ``mimo plan``.

    Raises:
        JobError: a share or a frozen module that the model does not have.
        ValueError: shares that are more than a whole.
    """
    from megatron.core.models.mimo.plan.shapes import Work

    names = list(shapes.encoders)
    given = {name: getattr(options, f"{name}_share") for name in ENCODERS}
    shares = {name: value for name, value in given.items() if value is not None}
    frozen = options.frozen.split("+") if options.frozen else []
    for what, asked, known in (
        ("-share", shares, names),
        ("frozen", frozen, [*names, LANGUAGE]),
    ):
        unknown = [name for name in asked if name not in known]
        if unknown:
            option = f"--{unknown[0]}-share" if what == "-share" else f"--frozen {options.frozen}"
            raise JobError(f"{option}: the model has {', '.join(known)}, no {unknown[0]}")
    usual = _HALF / max(1, len(names))
    return Work(
        options.seq or _SEQUENCE,
        options.global_batch or _SAMPLES,
        {name: shares.get(name, usual) for name in names},
        itemsize=getattr(options, "itemsize", 2),
        frozen_modules=frozenset(frozen),
    )


def _numbers(option: str, text: str) -> tuple[int, ...]:
    parts = str(text).split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise JobError(f"{option} takes whole numbers from 1, as in 1,2, got {text!r}")
    return tuple(int(part) for part in parts)


def _encoder_cp(text: str | None, shapes: Any) -> tuple[int, ...]:
    """CP sizes of encoders to try."""
    if text is None:
        return (1,)
    found = _numbers("--encoder-cp", text)
    if not any(shape.cuts_items for shape in shapes.encoders.values()) and max(found) > 1:
        raise JobError(
            f"--encoder-cp {text}: no encoder of the model cuts its items over CP "
            f"({', '.join(shapes.encoders) or 'it has none'}); leave it out"
        )
    return found


def _explain(text: str, what: tuple[Any, Any, Any, Any]) -> str:
    """Words for ``--why``; where nothing can run, why this pair cannot."""
    from megatron.core.models.mimo.plan.estimates import plan
    from megatron.core.models.mimo.plan.why import variants, why

    shapes, work, machine, search = what
    names = list(shapes.encoders)
    *encoders, language = text.split("/")
    if len(encoders) not in (0, len(names)):
        raise JobError(
            f"--why {text!r} has {len(encoders)} encoders, the model has {len(names)} "
            f"({', '.join(names)}); give each a layout before the language model's, or none"
        )
    layout = Layout.parse(language, LANGUAGE)
    layouts = {n: Layout.parse(each, n) for n, each in zip(names, encoders, strict=False)}
    if layout.size != search.ranks:
        raise JobError(f"--why {text!r} spans {layout.size} ranks, --gpus is {search.ranks}")
    try:
        best = next(iter(plan(shapes, work, machine, search).colocated), None)
    except ValueError:
        best = None
    return why(variants(layout, layouts, work, search), shapes, work, machine, search, best)


def _write_json(path: Path, found: Any, machine: Any, what: tuple[Any, Any], top: int) -> None:
    """Write all estimates; those of the table with what their bridges move, which takes longer."""
    from dataclasses import asdict

    from mimo_colocated.cli.plan_table import bridges

    def row(number: int, each: Any) -> dict[str, Any]:
        if number >= top:
            return each.to_dict()
        moved, uneven = bridges(each, *what)
        return {**each.to_dict(), "bridge_moved": moved, "encoder_spread": uneven}

    content = {
        "machine": asdict(machine),
        "gain": found.gain,
        "colocated": [row(*each) for each in enumerate(found.colocated)],
        "homogeneous": [row(*each) for each in enumerate(found.homogeneous)],
        "rejected": len(found.rejected),
    }
    text = json.dumps(content, indent=1) + "\n"
    write_atomically(path, text.encode(), "the estimates")


def _picture(path: Path, found: Any, top: int) -> None:
    """Bars of the table's rows.

    Raises:
        JobError: matplotlib is missing.
    """
    try:
        from megatron.core.models.mimo.job.plan_picture import plot_estimates
    except ModuleNotFoundError as error:
        raise JobError(f"--picture needs {error.name}; install it with pip") from None
    rows: Sequence[Any] = [*found.colocated[:top], *found.homogeneous[:1]]
    if not rows:
        raise JobError("--picture has nothing to draw: no pair of layouts fits")
    plot_estimates(path, rows, "predicted time of a step and memory of the fullest rank")
