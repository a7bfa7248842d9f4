# SPDX-License-Identifier: Apache-2.0
"""The installed Megatron-Core's own MIMO and grid, beside ours: what there is, how it is called.

Each stock file is loaded under a private name, so that ours keep theirs. What a stock file imports
of its own package is ours, as in any program that runs with this project.
"""

from __future__ import annotations

import enum
import importlib
import importlib.metadata
import importlib.util
import inspect
import sys
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

PACKAGE, GRID = "megatron.core.models.mimo", "megatron.core.hyper_comm_grid"
VERSION = importlib.metadata.version("megatron-core")
_CORE = Path(str(importlib.metadata.distribution("megatron-core").locate_file("megatron/core")))


def stock_files() -> dict[str, Path]:
    """Return module name -> file of the installed distribution."""
    root = _CORE / "models" / "mimo"
    found = {GRID: _CORE / "hyper_comm_grid.py"}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join([PACKAGE, *[part for part in parts if part != "__init__"]])] = path
    return found


@cache
def stock_module(name: str) -> ModuleType:
    """Return the stock module that has this name where this project is not installed."""
    spec = importlib.util.spec_from_file_location(f"stock.{name}", stock_files()[name])
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        spec.loader.exec_module(module)
    return module


def our_module(name: str) -> ModuleType | None:
    """Return our module of that name; ``None`` if there is none."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if not name.startswith(error.name or " "):
            raise
        return None


def definitions() -> Iterator[tuple[str, Any, Any]]:
    """Yield (name, stock's, ours or ``None``) of all that stock's modules and classes define."""
    for module_name in stock_files():
        stock, ours = stock_module(module_name), our_module(module_name)
        for name, value in _defined_in(stock):
            mine = getattr(ours, name, None)
            yield f"{module_name}.{name}", value, mine
            if isinstance(value, type) and not issubclass(value, enum.Enum):
                for member, theirs in vars(value).items():
                    if _is_callable_member(member, theirs):
                        yield f"{module_name}.{name}.{member}", theirs, _member(mine, member)


def _defined_in(module: ModuleType) -> Iterator[tuple[str, Any]]:
    for name, value in vars(module).items():
        here = getattr(value, "__module__", None) == module.__name__
        if here and isinstance(value, type | FunctionType):
            yield name, value


def _member(owner: type | None, name: str) -> Any:
    """Return a member; not one that only hands on what it is given, but what gets it."""
    for each in getattr(owner, "__mro__", ()):
        found = vars(each).get(name)
        if found is not None:
            kinds = [p.kind for p in _signature(found)] if isinstance(found, FunctionType) else []
            if kinds[1:] != [inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD]:
                return found
    return None


def _is_callable_member(name: str, value: Any) -> bool:
    kinds = (FunctionType, classmethod, staticmethod, property)
    return isinstance(value, kinds) and (not name.startswith("__") or name == "__init__")


def differences(stock: Any, ours: Any) -> list[str]:
    """Return why calls that stock's function or class accepts would not work on ours."""
    if ours is None:
        return ["there is none"]
    if isinstance(stock, type):
        # Its __init__ is compared like any method.
        return [] if isinstance(ours, type) else [f"a {type(ours).__name__}, not a class"]
    if isinstance(stock, property) or isinstance(ours, property):
        return [] if type(stock) is type(ours) else ["a property is one of the two"]
    for kind in (classmethod, staticmethod):
        if isinstance(stock, kind) != isinstance(ours, kind):
            return [f"a {kind.__name__} is one of the two"]
    return _signature_differences(_signature(stock), _signature(ours))


def _signature(value: Any) -> list[inspect.Parameter]:
    function = getattr(value, "__func__", value)
    return list(inspect.signature(function).parameters.values())


def _signature_differences(
    stock: list[inspect.Parameter], ours: list[inspect.Parameter]
) -> list[str]:
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    places = [each.name for each in ours if each.kind in positional]
    named = {each.name: each for each in ours}
    rest = {each.kind for each in ours}
    found = []
    for place, each in enumerate(stock):
        if each.kind in (each.VAR_POSITIONAL, each.VAR_KEYWORD):
            if each.kind not in rest:
                found.append(f"*{each.name} is missing")
            continue
        mine = named.get(each.name)
        if mine is None:
            found.append(f"{each.name} is missing")
            continue
        if each.kind in positional and places[place : place + 1] != [each.name]:
            found.append(f"{each.name} is not at place {place}")
        default = each.default
        if default is not each.empty and not _same_default(default, mine.default):
            found.append(f"{each.name} is {mine.default!r} by default, not {default!r}")
    known = {each.name for each in stock}
    for each in ours:
        optional = each.default is not each.empty or each.kind in (
            each.VAR_POSITIONAL,
            each.VAR_KEYWORD,
        )
        if each.name not in known and not optional:
            found.append(f"{each.name} is needed")
    return found


def _same_default(stock: Any, ours: Any) -> bool:
    # Enums of the two are different classes; a dataclass's factory has a marker for a default.
    if isinstance(stock, enum.Enum) or repr(stock) == "<factory>":
        return repr(stock) == repr(ours)
    return stock == ours
