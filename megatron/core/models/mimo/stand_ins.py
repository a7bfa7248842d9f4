# SPDX-License-Identifier: Apache-2.0
"""Methods that stock has, called on an object that is none of ours.

``MimoModel._forward_all_modules(stand_in, ...)`` works in stock on anything that has what the
method reads. Here a method reaches for helpers too that stock does not know; a stand-in is
completed by those of the class.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any, TypeVar, cast

from torch import nn

_Method = TypeVar("_Method", bound=Callable[..., Any])
_MARK, _MISSING = "_works_on_stand_ins", object()


class TakesStandIns:
    """Base of the classes that have such methods; their own objects are used as they are."""


class _Completed(TakesStandIns):
    """A stand-in for an object of ``owner``, completed by what only ``owner`` has.

    Helpers of ours are those of the class even where the stand-in would answer to any name, as a
    mock does. Private state of ours is kept here.
    """

    def __init__(self, stand_in: Any, owner: type) -> None:
        self.__dict__.update(_stand_in=stand_in, _owner=owner)

    def __getattr__(self, name: str) -> Any:
        stand_in, owner = self.__dict__["_stand_in"], self.__dict__["_owner"]
        found = inspect.getattr_static(owner, name, _MISSING)
        bound = hasattr(found, "__get__")
        helper = (bound or name.startswith("_")) and not hasattr(found, _MARK)
        helper = helper and not hasattr(nn.Module, name)
        if found is _MISSING or (not helper and hasattr(stand_in, name)):
            return getattr(stand_in, name)
        return found.__get__(self, owner) if bound else found

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            self.__dict__[name] = value
        else:
            setattr(self.__dict__["_stand_in"], name, value)


def on_stand_ins(module: str, owner: str) -> Callable[[_Method], _Method]:
    """Return a decorator for methods that are called on stand-ins for an object of a class.

    Args:
        module, owner: where the class is and its name; it is looked up when a stand-in comes.
    """

    def decorate(method: _Method) -> _Method:
        @functools.wraps(method)
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            if not isinstance(self, TakesStandIns):
                self = _Completed(self, getattr(importlib.import_module(module), owner))
            return method(self, *args, **kwargs)

        setattr(call, _MARK, True)
        return cast(_Method, call)

    return decorate


model_method = on_stand_ins("megatron.core.models.mimo.model.base", "MimoModel")
"""For the methods of ``MimoModel`` that stock has."""
