# SPDX-License-Identifier: Apache-2.0
"""The declarative table of a family: Megatron's names, Hugging Face's names, kind of cut.

``{}`` in a pattern stands for a number, or for several in order: of the layer, then of the expert.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from megatron.core.models.mimo.huggingface.cuts import Cut


@dataclass(frozen=True)
class Line:
    """One kind of parameter.

    Attributes:
        ours: pattern of its global name in the Megatron module.
        theirs: patterns of the tensors that it is made of, in the order of the cut's sources.
        cut: how.
    """

    ours: str
    theirs: tuple[str, ...]
    cut: Cut

    def __post_init__(self) -> None:
        if len(self.theirs) != self.cut.sources:
            raise ValueError(
                f"{self.ours}: {type(self.cut).__name__} is made of {self.cut.sources} tensors, "
                f"got {list(self.theirs)}"
            )
        counts = {pattern.count("{}") for pattern in (self.ours, *self.theirs)}
        if len(counts) > 1:
            raise ValueError(f"{self.ours} and {list(self.theirs)} differ in their number of {{}}")

    def numbers(self, name: str) -> tuple[str, ...] | None:
        """Return the numbers in ``name`` where its pattern has ``{}``; None if it is another's."""
        found = _expression(self.ours).fullmatch(name)
        return found and found.groups()


def line(ours: str, theirs: str | Sequence[str], cut: Cut) -> Line:
    """Make a :class:`Line`; one source needs no list."""
    return Line(ours, (theirs,) if isinstance(theirs, str) else tuple(theirs), cut)


@functools.lru_cache(maxsize=4096)
def _expression(pattern: str) -> re.Pattern[str]:
    escaped = re.escape(pattern).replace(re.escape("{}"), r"(\d+)")
    return re.compile(escaped.replace(re.escape("*"), ".*"))


@dataclass(frozen=True)
class Source:
    """Where one Megatron parameter's elements are in a folder.

    Attributes:
        names: of the tensors.
        cut: how they make the parameter.
    """

    names: tuple[str, ...]
    cut: Cut


@dataclass(frozen=True)
class Table:
    """Lines of a module, and what of a folder is left alone.

    Attributes:
        lines: in any order; the first that fits a name counts.
        unused: patterns of tensors that a folder may have and the module does not: buffers that are
            computed, layers that are not used. ``*`` stands for anything. An export copies them.
        repeated: (name, other name): a folder may store the second tensor once more under the
            first; an export writes it anew, so that the two never differ.
    """

    lines: tuple[Line, ...]
    unused: tuple[str, ...] = ()
    repeated: tuple[tuple[str, str], ...] = ()

    def find(self, name: str) -> Source | None:
        """Return what the parameter with this global name is made of; None if no line has it."""
        for each in self.lines:
            numbers = each.numbers(name)
            if numbers is not None:
                return Source(tuple(p.format(*numbers) for p in each.theirs), each.cut)
        return None

    def at(self, place: str) -> Table:
        """Return the table of a module that is called ``place`` within a larger one."""
        return replace(
            self, lines=tuple(replace(each, ours=place + each.ours) for each in self.lines)
        )

    def spelled(self, spelling: Mapping[str, str]) -> Table:
        """Return the table with another spelling of Hugging Face's names.

        Args:
            spelling: prefix of names in this table -> prefix in a folder.
        """

        def spell(name: str) -> str:
            for prefix, other in spelling.items():
                if name.startswith(prefix):
                    return other + name.removeprefix(prefix)
            return name

        lines = tuple(replace(each, theirs=tuple(map(spell, each.theirs))) for each in self.lines)
        repeated = tuple((spell(name), spell(other)) for name, other in self.repeated)
        return Table(lines, tuple(map(spell, self.unused)), repeated)

    def __add__(self, other: Table) -> Table:
        return Table(
            self.lines + other.lines, self.unused + other.unused, self.repeated + other.repeated
        )

    def left_alone(self, names: Iterable[str]) -> set[str]:
        """Return those names that ``unused`` or ``repeated`` covers."""
        expressions = [_expression(pattern) for pattern in self._aside]
        return {name for name in names if any(e.fullmatch(name) for e in expressions)}

    @property
    def _aside(self) -> tuple[str, ...]:
        return (*self.unused, *(name for name, _ in self.repeated))

    def names_in(self, names: Iterable[str]) -> int:
        """Count the names that a line or ``unused`` covers."""
        patterns = {pattern for each in self.lines for pattern in each.theirs}
        expressions = [_expression(pattern) for pattern in (*patterns, *self._aside)]
        return sum(any(e.fullmatch(name) for e in expressions) for name in names)


def best_spelled(
    table: Table, spellings: Iterable[Mapping[str, str]], names: Collection[str]
) -> Table:
    """Return the table in the spelling that covers most of a folder's names.

    Args:
        table: of a module.
        spellings: as of :meth:`Table.spelled`; of equally good ones the first.
        names: of the folder's tensors.
    """
    return max((table.spelled(spelling) for spelling in spellings), key=lambda t: t.names_in(names))
