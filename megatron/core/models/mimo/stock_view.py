# SPDX-License-Identifier: Apache-2.0
"""Gives stock Megatron's modules their own view of other modules; everybody else sees no change.

Nothing outside Megatron's modules is ever replaced: no function of torch, no method of a tensor.
``StockView`` changes three things *inside* the modules whose names begin with ``STOCK``:

- names of their namespaces: where ``torch`` stood, a ``View`` of it stands, which answers with
  replacements for some names and with the real module's current attributes for all others;
- method calls in their functions: ``x.method(…)`` becomes ``function(x, …)`` for the chosen
  calls, in the function's code, since methods belong to types that all code shares;
- functions that they compiled while they were imported: the plain functions again.

Modules that are loaded already are changed at once, later ones as soon as they are loaded.
"""

from __future__ import annotations

import ast
import importlib.abc
import importlib.machinery
import re
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

STOCK = ("megatron.core.", "megatron.training.")


def is_stock(name: str) -> bool:
    """Return whether a module of this name is Megatron's."""
    return f"{name}.".startswith(STOCK)


# A module's own names; ``View.__dict__`` answers with more than these.
_own_names = vars(types.ModuleType)["__dict__"].__get__


class View(types.ModuleType):
    """A module with some names replaced; every other name is the real module's at that moment.

    Assignments to the other names reach the real module. ``__dict__`` has all names: tools that
    patch a name look there for what they have to put back.
    """

    def __init__(self, real: types.ModuleType) -> None:
        super().__init__(real.__name__)
        _own_names(self).clear()
        _own_names(self)["_real"] = real

    @property
    def __dict__(self) -> dict[str, Any]:
        own = _own_names(self)
        return {**vars(own["_real"]), **own}

    def __getattr__(self, name: str) -> Any:
        return getattr(_own_names(self)["_real"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        own = _own_names(self)
        if name in own:
            own[name] = value
        else:
            setattr(own["_real"], name, value)

    def __delattr__(self, name: str) -> None:
        delattr(_own_names(self)["_real"], name)

    def __dir__(self) -> list[str]:
        return dir(_own_names(self)["_real"])

    def show(self, name: str, value: Any) -> None:
        """Answer with ``value`` where ``name`` is asked for."""
        _own_names(self)[name] = value


@dataclass(frozen=True)
class MethodCall:
    """Method calls that stock's functions make and that ``function`` answers in their place.

    Attributes:
        pattern: what a source file contains that may have such calls; only those are parsed.
        asks: whether one call of the method is meant.
        name: of the method.
        function: is called with the object in front of the call's own arguments.
    """

    pattern: str
    asks: Callable[[ast.Call], bool]
    name: str
    function: Callable[..., Any]


@dataclass
class StockView(importlib.abc.MetaPathFinder):
    """What stock's modules see in place of what everybody else sees.

    Attributes:
        names: (original, replacement) of values that stand in the modules' namespaces.
        methods: method calls that are answered by functions.
        leave: names of modules that stay as they are.
    """

    names: Sequence[tuple[Any, Any]]
    methods: Sequence[MethodCall]
    leave: frozenset[str]
    _replaced: dict[int, Any] = field(init=False)

    def __post_init__(self) -> None:
        self._replaced = {id(original): value for original, value in self.names}

    def install(self) -> None:
        """Change the modules that are loaded, and each later one once it has been executed."""
        for name, module in list(sys.modules.items()):
            if is_stock(name) and isinstance(module, types.ModuleType):
                self.change(module)
        sys.meta_path.insert(0, self)

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        """Return what the other finders find, with a loader that changes the module at the end."""
        if not is_stock(fullname):
            return None
        others = (f for f in sys.meta_path if f is not self and hasattr(f, "find_spec"))
        specs = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is not None and hasattr(spec.loader, "exec_module"):
            self._change_after(spec)
        return spec

    def _change_after(self, spec: Any) -> None:
        execute = spec.loader.exec_module

        def exec_module(module: types.ModuleType) -> None:
            execute(module)
            self.change(module)

        spec.loader.exec_module = exec_module

    def change(self, module: types.ModuleType) -> None:
        """Change the namespace and the functions of one module; twice is as good as once."""
        if module.__name__ in self.leave:
            return
        for space in (module, *_classes(module)):
            for name, value in list(vars(space).items()):
                compiled = vars(value) if isinstance(value, types.FunctionType) else {}
                plain = compiled.get("_torchdynamo_orig_callable")
                if plain is not None and is_stock(plain.__module__):
                    setattr(space, name, plain)
        for name, value in list(vars(module).items()):
            if id(value) in self._replaced:
                vars(module)[name] = self._replaced[id(value)]
        self._answer_method_calls(module)

    def _answer_method_calls(self, module: types.ModuleType) -> None:
        loader: Any = getattr(module, "__loader__", None)
        source = loader.get_source(module.__name__) if hasattr(loader, "get_source") else None
        source = source or ""
        methods = [m for m in self.methods if re.search(m.pattern, source)]
        if not methods:
            return
        calls = _Calls(methods)
        tree = ast.fix_missing_locations(calls.visit(ast.parse(source)))
        vars(module).update(calls.used)
        whole = compile(tree, str(module.__file__), "exec", dont_inherit=True)
        codes = {(code.co_name, code.co_firstlineno): code for code in _codes(whole)}
        for function in _functions(module):
            old = function.__code__
            new = codes.get((old.co_name, old.co_firstlineno), old)
            if new != old:
                function.__code__ = new


class _Calls(ast.NodeTransformer):
    """Turns ``x.method(…)`` into ``function(x, …)``; ``used`` holds the functions by new name."""

    def __init__(self, methods: Sequence[MethodCall]) -> None:
        self.methods = methods
        self.used: dict[str, Callable[..., Any]] = {}

    def visit_Call(self, call: ast.Call) -> ast.Call:
        self.generic_visit(call)
        if not isinstance(call.func, ast.Attribute):
            return call
        for method in self.methods:
            if call.func.attr == method.name and method.asks(call):
                name = f"_in_view_{method.name}"
                self.used[name] = method.function
                function = ast.Name(id=name, ctx=ast.Load())
                changed = ast.Call(function, [call.func.value, *call.args], call.keywords)
                return ast.copy_location(changed, call)
        return call


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """The code objects of all functions in ``code``."""
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield constant
            yield from _codes(constant)


def _classes(module: types.ModuleType) -> list[type]:
    """The classes that the module defines, with those inside of them."""
    found: list[type] = []
    spaces: list[Any] = [module]
    while spaces:
        own = [
            value
            for value in vars(spaces.pop()).values()
            if isinstance(value, type) and value.__module__ == module.__name__
        ]
        new = [cls for cls in own if not any(cls is known for known in found)]
        found += new
        spaces += new
    return found


def _functions(module: types.ModuleType) -> list[types.FunctionType]:
    """The functions that the module's file defines, also those inside decorators' wrappers."""
    found: dict[int, types.FunctionType] = {}
    seen: set[int] = set()
    left = [value for space in (module, *_classes(module)) for value in vars(space).values()]
    while left:
        value = left.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        left += _behind(value)
        is_function = isinstance(value, types.FunctionType)
        if is_function and value.__code__.co_filename == module.__file__:
            found[id(value)] = value
    return list(found.values())


def _behind(value: Any) -> list[Any]:
    """What a descriptor, a wrapper or a closure holds."""
    if isinstance(value, staticmethod | classmethod):
        return [value.__func__]
    if isinstance(value, property):
        return [value.fget, value.fset, value.fdel]
    if not isinstance(value, types.FunctionType):
        return []
    held = [getattr(value, "__wrapped__", None)]
    for cell in value.__closure__ or ():
        try:
            held.append(cell.cell_contents)
        except ValueError:  # not filled yet
            continue
    return held
