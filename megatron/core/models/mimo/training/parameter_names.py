# SPDX-License-Identifier: Apache-2.0
"""Parameters by name: which ones a pattern means, agreed by all ranks.

A parameter has several names, and a pattern may use any of them:

========================================================  =====================================
``language.decoder.layers.0.mlp.linear_fc1.weight``       its module's, and its global name in it
``images.encoder.transformer.final_layernorm.bias``       the same of an encoder or a projector
``language_model.model.layers.0.mlp.gate_proj.weight``    the tensor's in a Hugging Face folder
========================================================  =====================================

In a pattern ``*``, ``?`` and ``[abc]`` stand for what they do in file names, dots included. A name
that others begin with, up to a dot, means all of them: ``language``, ``images.encoder``.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from torch.nn import Module, Parameter

from megatron.core.models.mimo.training.agreement import gathered
from megatron.core.models.mimo.training.global_names import global_modules, join
from megatron.core.models.mimo.transformer.lora import is_adapters

_SHORT = re.compile(r"\.(encoder|input_projection)s\.[^.]+\.")
_PARTS = {"encoder": ".encoder.", "input_projection": ".projector."}
_NUMBER = re.compile(r"\.\d+(?=\.)")


class ParameterNameError(ValueError):
    """Names of parameters that cannot be what is meant; one sentence, the same on all ranks."""


@dataclass(frozen=True)
class Named:
    """A parameter of this rank and what it is called.

    Attributes:
        name: its module's name and its global name in it.
        parameter: itself.
        tensors: of a Hugging Face folder, of which it is made; none if that is not known.
    """

    name: str
    parameter: Parameter
    tensors: tuple[str, ...] = ()

    @property
    def own(self) -> tuple[str, str]:
        """Its name with and without what an encoder or a projector is called in its modality."""
        return self.name, _SHORT.sub(lambda found: _PARTS[found[1]], self.name, count=1)


def named_parameters(
    modules: Iterable[tuple[str, Module]],
    tensors: Callable[[str, str], tuple[str, ...]] = lambda _module, _name: (),
) -> list[Named]:
    """Return this rank's parameters with their names; one that is shared comes once.

    Args:
        modules: (name, module), bare or wrapped, such as ``iter_modules(model)``.
        tensors: the module's name and a parameter's global name in it -> the names of the tensors
            that it is made of.
    """
    found: dict[int, Named] = {}
    for module, root in modules:
        for path, owner in global_modules(root):
            for key, parameter in owner.named_parameters(recurse=False):
                name = join(path, key)
                each = Named(join(module, name), parameter, tensors(module, name))
                found.setdefault(id(parameter), each)
    return list(found.values())


def select(patterns: Sequence[str], named: Sequence[Named], where: str = "") -> list[set[int]]:
    """Return by pattern the ``id`` of this rank's parameters that it means.

    All ranks call it together with the same patterns.

    Args:
        patterns: as the module's docstring says.
        named: this rank's parameters.
        where: what errors begin with.

    Raises:
        ParameterNameError: the same on all ranks: a pattern means no parameter of any rank, or only
            a part of one that several tensors are joined in.
    """
    if not patterns:
        return []
    found, partly = [], ""
    for pattern in patterns:
        fits = re.compile(f"{fnmatch.translate(pattern)}|{fnmatch.translate(pattern + '.*')}").match
        own = set()
        for each in named:
            theirs = [name for name in each.tensors if fits(name)]
            if any(map(fits, each.own)) or (theirs and len(theirs) == len(each.tensors)):
                own.add(id(each.parameter))
            elif theirs and not partly:
                partly = (
                    f"{where}{pattern!r} means {theirs[0]} and not the rest of "
                    f"{', '.join(each.tensors)}, which are one weight here; name all of them"
                )
        found.append(own)
    told = gathered((partly, [bool(own) for own in found]))
    for sentence, _ in told:
        if sentence:
            raise ParameterNameError(sentence)
    for number, pattern in enumerate(patterns):
        if not any(matched[number] for _, matched in told):
            near = max(gathered(_nearest(pattern, named)))[1]
            raise ParameterNameError(
                f"{where}{pattern!r} names no parameter of the model; did you mean {near!r}?"
            )
    return found


def freeze(patterns: Sequence[str], named: Sequence[Named]) -> None:
    """Stop the training of the parameters that patterns mean; all ranks call it together.

    Args:
        patterns, named: as of :func:`select`.

    Raises:
        ParameterNameError: as of :func:`select`, or nothing is left to train.
    """
    for own in select(patterns, named):
        for each in named:
            if id(each.parameter) in own:
                each.parameter.requires_grad_(False)
    if patterns and not any(gathered(any(each.parameter.requires_grad for each in named))):
        raise ParameterNameError(f"{list(patterns)} leave nothing to train; take one out")


def frozen_parts(named: Iterable[Named]) -> set[str]:
    """Return what trains no parameter: modules, ``MODALITY.encoder``, ``MODALITY.projector``.

    All ranks call it together: a pipeline stage may be frozen where another one trains. Adapters
    are no parameters of theirs.

    Args:
        named: this rank's parameters.
    """
    trains: dict[str, bool] = {}
    for each in named:
        if is_adapters(each.name):
            continue
        module, _, rest = each.own[1].partition(".")
        part, _, _ = rest.partition(".")
        names = [module, f"{module}.{part}"] if part in ("encoder", "projector") else [module]
        for name in names:
            trains[name] = trains.get(name, False) or each.parameter.requires_grad
    told = {each for own in gathered(trains) for each in own.items()}
    return {name for name, any_of_it in told if not any_of_it and (name, True) not in told}


def adapted_modules(named: Iterable[Named]) -> set[str]:
    """Return the modules in which adapters train, on any rank; all of them call it together.

    Args:
        named: this rank's parameters.
    """
    own = {
        each.name.partition(".")[0]
        for each in named
        if is_adapters(each.name) and each.parameter.requires_grad
    }
    return set().union(*gathered(own))


def _nearest(pattern: str, named: Iterable[Named]) -> tuple[float, str]:
    """How alike, and the name most like the pattern; numbers of layers are ``*`` in it."""
    return max(
        (difflib.SequenceMatcher(None, pattern, name).ratio(), name)
        for name in ("", *_candidates(named))
    )


def _candidates(named: Iterable[Named]) -> set[str]:
    whole = {_NUMBER.sub(".*", name) for each in named for name in (*each.own, *each.tensors)}
    return {part for name in whole for part in _beginnings(name)}


def _beginnings(name: str) -> Iterator[str]:
    parts = name.split(".")
    return (".".join(parts[: count + 1]) for count in range(len(parts)))
