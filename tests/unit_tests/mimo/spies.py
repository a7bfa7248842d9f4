# SPDX-License-Identifier: Apache-2.0
"""Stand-ins that note what is read of them and how they are called; strict ones refuse the rest."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch


@dataclass
class Watch:
    """What the stand-ins of one call have seen.

    Attributes:
        owner: the class whose methods the stand-in called ``self`` has.
        allowed: (stand-in, attribute) pairs that may be read; ``None``: all.
        reads: those that were read.
        calls: calls of replaceable parts: name, arguments, keyword arguments.
    """

    owner: type
    allowed: set[tuple[str, str]] | None = None
    reads: set[tuple[str, str]] = field(default_factory=set)
    calls: list[tuple[str, Any, Any]] = field(default_factory=list)

    def spy(self, name: str, **values: Any) -> Spy:
        """Make a stand-in; its functions are replaceable parts."""
        return Spy(name, self, values)


class Spy:
    """A stand-in with exactly the given attributes, and for ``self`` the methods of its owner."""

    def __init__(self, name: str, watch: Watch, values: dict[str, Any]) -> None:
        self.__dict__.update(_name=name, _watch=watch, _values=values)

    def __getattr__(self, attribute: str) -> Any:
        name, watch, values = (self.__dict__[key] for key in ("_name", "_watch", "_values"))
        refused = watch.allowed is not None and (name, attribute) not in watch.allowed
        method = None
        if name == "self":
            method = inspect.getattr_static(watch.owner, attribute, None)
        if refused or attribute.startswith("__") or (attribute not in values and method is None):
            raise AttributeError(f"the stand-in {name} has no {attribute}")
        watch.reads.add((name, attribute))
        if attribute not in values:
            return method.__get__(self, watch.owner) if hasattr(method, "__get__") else method
        value = values[attribute]
        return self._noted(attribute, value) if inspect.isfunction(value) else value

    def __setattr__(self, attribute: str, value: Any) -> None:
        self.__dict__["_values"][attribute] = value

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._noted("__call__", self.__dict__["_values"]["call"])(*args, **kwargs)

    def _noted(self, attribute: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            seen = (f"{self._name}.{attribute}", plain(args), plain(kwargs))
            self.__dict__["_watch"].calls.append(seen)
            return function(*args, **kwargs)

        return call


def plain(value: Any) -> Any:
    """Return a value that can be compared."""
    if torch.is_tensor(value):
        return ("tensor", tuple(value.shape), value.tolist())
    if isinstance(value, dict):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if isinstance(value, Spy):
        return f"the stand-in {value.__dict__['_name']}"
    if is_dataclass(value) and not isinstance(value, type):
        return {each.name: plain(getattr(value, each.name)) for each in fields(value)}
    if value is None or isinstance(value, int | float | str):
        return value
    return type(value).__name__
