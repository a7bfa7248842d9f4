# SPDX-License-Identifier: Apache-2.0
"""YAML and ``--set path.to.field=value`` into a recipe; misspelt fields are refused by name."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from mimo_colocated.launch.errors import JobError, did_you_mean
from mimo_colocated.train.recipe import Recipe

_ORDER = ("name", "job", "model", "layout", "data", "training", "evaluation", "lossy", "run")
"""Of what is printed; other fields follow."""


def shipped() -> dict[str, str]:
    """Return the recipes that ship: name -> YAML."""
    folder = resources.files("mimo_colocated.train") / "recipes"
    files = sorted(each.name for each in folder.iterdir() if each.name.endswith(".yaml"))
    return {name.removesuffix(".yaml"): (folder / name).read_text("utf-8") for name in files}


def describe_shipped() -> str:
    """Return a line per recipe that ships: its name, and the first line of its file."""
    found = shipped()
    width = max(len(name) for name in found)
    return "\n".join(
        f"{name:{width}}  {text.splitlines()[0].lstrip('# ')}" for name, text in found.items()
    )


def read_recipe(named: str, changes: Sequence[str] = (), lossy: str | None = None) -> Recipe:
    """Return the recipe of a name or a file, with fields set to other values.

    Args:
        named: one that ships, or the path of a YAML file.
        changes: ``path.to.field=value``; a value is YAML. Lists are reached by number.
        lossy: links that lose packets, in place of the recipe's: a preset's name, or the path of a
            YAML file with the fields of ``lossy``.

    Raises:
        JobError: no such recipe, a field that there is not, or a value of another type.
    """
    values = values_of(named)
    if lossy is not None:
        values["lossy"] = _links(lossy)
    recipe = recipe_from(named, values, changes)
    recipe.check()
    return recipe


def values_of(named: str) -> dict[str, Any]:
    """Return the fields of the recipe of a name or a file, as they are written.

    Args:
        named: one that ships, or the path of a YAML file.

    Raises:
        JobError: no such recipe, or no fields.
    """
    values = _yaml(named)
    if not isinstance(values, dict):
        raise JobError(f"{named} holds {type(values).__name__}, not the fields of a recipe")
    return values


def _yaml(named: str) -> Any:
    import yaml

    text = _text(named)
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise JobError(f"{named} is no YAML: {' '.join(str(error).split())}") from error


def changed(values: Mapping[str, Any], changes: Sequence[str]) -> dict[str, Any]:
    """Return fields with some set to other values.

    Args:
        values: the fields; they stay as they are.
        changes: as for :func:`read_recipe`.

    Raises:
        JobError: a change that names no field.
    """
    found = copy.deepcopy(dict(values))
    for path, value in map(_change, changes):
        _set(found, path, value)
    return found


def recipe_from(named: str, values: Mapping[str, Any], changes: Sequence[str]) -> Recipe:
    """Return the recipe of some fields, not checked yet.

    Args:
        named: what it is called in errors.
        values: its fields.
        changes: as for :func:`read_recipe`.

    Raises:
        JobError: a field that there is not, or a value of another type.
    """
    if "job" in values:
        raise JobError(
            f"{named} is a recipe of job {values['job']}, which brings its model and data; "
            f"`mimo train {named}` alone takes it"
        )
    found = changed(values, changes)
    for field in _fields(Recipe, found):
        if problem := _settle(field):
            raise JobError(f"{named}: {problem}")
    return _typed(named, found)


def as_yaml(recipe: Recipe) -> str:
    """Return the whole recipe as YAML, every field of it, in the order of those that ship."""
    return dumped(dataclasses.asdict(recipe))


def dumped(values: Mapping[str, Any]) -> str:
    """Return fields as YAML: model, layout and data first, then what is done with them."""
    import yaml

    order = {name: place for place, name in enumerate(_ORDER)}
    names = sorted(values, key=lambda name: order.get(name, len(order)))
    return yaml.safe_dump({name: values[name] for name in names}, sort_keys=False)


def parts_of(kind: Any) -> dict[str, Any]:
    """Return name -> dataclass of the fields that have fields of their own."""
    types = typing.get_type_hints(kind)
    return {name: each for name, each in types.items() if dataclasses.is_dataclass(each)}


def _text(named: str) -> str:
    path = Path(named).expanduser()
    if path.suffix in (".yaml", ".yml"):
        try:
            return path.read_text("utf-8")
        except OSError as error:
            raise JobError(f"{path} cannot be read: {error.strerror}") from error
    found = shipped()
    if named not in found:
        near = difflib.get_close_matches(named, found, 1)
        near = [name for name in found if name.startswith(named)] or near
        meant = f"; did you mean {' or '.join(near)}?" if near else ""
        raise JobError(
            f"no recipe is called {named!r}{meant} There are {', '.join(found)}, or give the path "
            "of a .yaml file"
        )
    return found[named]


def _links(named: str) -> dict[str, Any]:
    """Links as ``--lossy`` names them; a name is a preset, for all that sends over TP or a bridge.

    Raises:
        JobError: no such file, or it holds something else.
    """
    if Path(named).suffix not in (".yaml", ".yml"):
        return {"rules": [{"loss": named}]}
    values = _yaml(named)
    if not isinstance(values, dict) or "rules" not in values:
        raise JobError(f"{named} has no rules; docs/lossy.md shows such a file")
    return values


def _change(change: str) -> tuple[list[str], Any]:
    import yaml

    path, equals, value = change.partition("=")
    if not equals or not all(path.split(".")):
        raise JobError(f"--set {change!r} is not of the form path.to.field=value")
    try:
        return path.split("."), yaml.safe_load(value)
    except yaml.YAMLError as error:
        said = " ".join(str(error).split())
        raise JobError(f"{path}: {value!r} is no YAML: {said}") from error


def _set(values: Any, path: Sequence[str], value: Any) -> None:
    """Set a field; what is above it is made if it is not there."""
    *above, last = path
    at: Any = values
    for name in above:
        at = at[_number(at, name, path)] if isinstance(at, list) else at.setdefault(name, {})
        if not isinstance(at, (dict, list)):
            raise JobError(f"--set {'.'.join(path)}: {name} is a value and has no fields")
    key: Any = _number(at, last, path) if isinstance(at, list) else last
    at[key] = value


def _number(values: list[Any], name: str, path: Sequence[str]) -> int:
    if not name.isdecimal() or int(name) >= len(values):
        raise JobError(
            f"--set {'.'.join(path)}: {name!r} is no number of a list of {len(values)}, from 0"
        )
    return int(name)


@dataclass(frozen=True)
class _Field:
    """A field that is given, at any depth; its *kind* is ``None`` if there is none of that name."""

    values: dict[str, Any]
    name: str
    kind: Any
    path: str
    known: list[str]


def _fields(kind: Any, values: Any, path: str = "") -> Iterator[_Field]:
    """Fields as they are given; those of a field come after it."""
    if not isinstance(values, dict):
        return
    types = typing.get_type_hints(kind)
    for name, value in values.items():
        inner, below = types.get(name), f"{path}{name}."
        yield _Field(values, name, inner, path, list(types))
        if dataclasses.is_dataclass(inner):
            yield from _fields(inner, value, below)
        elif typing.get_origin(inner) is list and isinstance(value, list):
            (each,) = typing.get_args(inner)
            if dataclasses.is_dataclass(each):
                for number, one in enumerate(value):
                    yield from _fields(each, one, f"{below}{number}.")


def _settle(field: _Field) -> str | None:
    """Return what is wrong with a field's name, or with its being empty.

    YAML takes what is left empty for null: where a text belongs it is an empty text.
    """
    name, kind = field.name, field.kind
    if kind is None:
        return _no_field(str(name), field.path, field.known)
    if field.values[name] is not None or type(None) in typing.get_args(kind):
        return None
    if kind is str:
        field.values[name] = ""
        return None
    empty = "[] is none of it" if typing.get_origin(kind) is list else "give a value"
    return f"{field.path}{name} is null; {empty}, or leave it out for its default"


def _no_field(name: str, path: str, known: Sequence[str]) -> str:
    meant = did_you_mean(name, known, path)
    of = f" of {path.rstrip('.')}" if path else ""
    return f"{path}{name} is no field of a recipe; {meant}the fields{of} are {', '.join(known)}"


def _typed(named: str, values: Mapping[str, Any]) -> Recipe:
    """The recipe, its values checked against the fields' types by jsonargparse."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Recipe)
    try:
        found = parser.instantiate_classes(parser.parse_object(dict(values)))
    except Exception as error:  # jsonargparse has several kinds
        said = " ".join(str(error).split()).removeprefix("Parser ")
        raise JobError(f"{named}: {said}") from error
    return Recipe(**vars(found))
