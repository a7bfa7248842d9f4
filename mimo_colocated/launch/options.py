# SPDX-License-Identifier: Apache-2.0
"""Options of a job: the fields of one frozen dataclass, parsed by argparse.

Each field is made by :func:`option` or :func:`switch`; :func:`parse` reads the command line into
the dataclass and says in one sentence what does not fit. Parsers such as :func:`whole` check while
they read, before a process is started or a file is touched.

    @dataclass(frozen=True)
    class Options:
        steps: int = option(600, "training steps", whole(1))
        fresh: bool = switch(False, "start anew instead of resuming")

    options = parse(Options, sys.argv[1:], prog="train.py", description="Train a model.")
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, TypeVar, cast

from mimo_colocated.launch.errors import JobError

_Options = TypeVar("_Options")


def option(default: Any, text: str, read: Callable[[str], Any], *choices: str) -> Any:
    """Return a field that takes a value.

    Args:
        default: the value if the option is not given.
        text: for ``--help``.
        read: from text to the value; raises ``argparse.ArgumentTypeError`` or :class:`JobError`.
        choices: the only values, if any are named.
    """
    extra = {"help": text, "type": read, "choices": choices or None}
    return dataclasses.field(default=default, metadata=extra)


def switch(default: bool, text: str) -> Any:
    """Return a field that is switched on by ``--name`` and off by ``--no-name``."""
    return dataclasses.field(default=default, metadata={"help": text})


def whole(low: int) -> Callable[[str], int]:
    """Return a parser of whole numbers from ``low``; it raises ``argparse.ArgumentTypeError``."""

    def read(text: str) -> int:
        if not (text.isascii() and text.isdecimal() and low <= int(text) < 2**31):
            raise argparse.ArgumentTypeError(
                f"must be a whole number from {low} to {2**31 - 1}, got {text!r}"
            )
        return int(text)

    return read


def real(low: float, *, low_included: bool) -> Callable[[str], float]:
    """Return a parser of finite numbers above ``low``; it raises ``argparse.ArgumentTypeError``."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or value < low or (value == low and not low_included):
            bound = f"{'at least' if low_included else 'above'} {low:g}"
            raise argparse.ArgumentTypeError(f"must be a number {bound}, got {text!r}")
        return value

    return read


def share(text: str) -> float:
    """Read a number from 0 to below 1.

    Raises:
        argparse.ArgumentTypeError: for any other.
    """
    value = real(0.0, low_included=True)(text)
    if value >= 1.0:
        raise argparse.ArgumentTypeError(f"must be a number from 0 to below 1, got {text!r}")
    return value


def part(text: str) -> float:
    """Read a number above 0, to 1.

    Raises:
        argparse.ArgumentTypeError: for any other.
    """
    value = real(0.0, low_included=False)(text)
    if value > 1.0:
        raise argparse.ArgumentTypeError(f"must be a number above 0, to 1, got {text!r}")
    return value


@dataclasses.dataclass(frozen=True)
class Number:
    """Read an option from text or a number: jsonargparse checks defaults, and YAML has numbers.

    Its ``--help`` names a type by ``str``, which of a function is an address.

    Attributes:
        read_text: one of the parsers above.
        said: what it takes, in words.
    """

    read_text: Callable[[str], Any]
    said: str

    def __call__(self, value: Any) -> Any:
        """Return the value; raise ``argparse.ArgumentTypeError`` as the parser does."""
        return self.read_text(str(value))

    def __str__(self) -> str:
        return self.said


def parse(
    options: type[_Options],
    argv: Sequence[str],
    *,
    prog: str,
    description: str,
    metavars: Mapping[str, str] | None = None,
) -> _Options:
    """Read a command line.

    Args:
        options: dataclass whose fields :func:`option` and :func:`switch` made.
        argv: the arguments after the script's name.
        prog: the script's name.
        description: for ``--help``.
        metavars: field -> what ``--help`` shows for its value.

    Raises:
        JobError: for a wrong option.
        SystemExit: after ``--help``.
    """
    parser = _Parser(
        prog=prog,
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    for item in dataclasses.fields(cast(Any, options)):
        extra = dict(item.metadata)
        if isinstance(item.default, bool):
            extra["action"] = argparse.BooleanOptionalAction
        elif metavars and item.name in metavars:
            extra["metavar"] = metavars[item.name]
        parser.add_argument(f"--{item.name.replace('_', '-')}", default=item.default, **extra)
    return options(**vars(parser.parse_args(list(argv))))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise JobError(f"{message.removeprefix('argument ')}; --help lists all options")
