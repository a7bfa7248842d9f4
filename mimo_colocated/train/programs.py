# SPDX-License-Identifier: Apache-2.0
"""Recipes of jobs that bring a model and data of their own, such as the digits example.

Their fields are the options of the job's own command line, each where recipes have a field of that
name: ``training.steps``, ``layout.language``; others below ``options``, layouts of encoders below
``layout.encoders``. What starts is that program, so `mimo train digits` is `make train`.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import os
import re
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mimo_colocated
from mimo_colocated.launch.errors import JobError, Stopped, did_you_mean
from mimo_colocated.launch.launcher import Job
from mimo_colocated.train import reading
from mimo_colocated.train.recipe import Recipe

PROGRAMS = {"digits": "examples.mimo.digits"}
"""Name in a recipe -> the package of its program: ``train.JOB`` is what is launched, ``options``
has ``Options``, and ``ITEMS`` of every encoder."""
_NOT_FIELDS = ("nproc", "fresh", "memory_plan")
"""Options of a job that are no fields: they are of one start, not of the run."""
_OTHERS = "options"


def program_of(values: Mapping[str, Any]) -> str:
    """Return the name of a recipe's program; empty if its fields are those of recipes."""
    return str(values.get("job", ""))


def _imported(name: str, module: str) -> Any:
    """A module of the program, out of the checkout or of the wheel."""
    if name not in PROGRAMS:
        raise JobError(f"job={name!r} is not known; known are {', '.join(PROGRAMS)}")
    package = Path(mimo_colocated.__file__).resolve().parent
    shipped = package / "_examples"
    root = str(shipped if shipped.is_dir() else package.parent)
    if root not in sys.path:
        sys.path.insert(0, root)
    try:
        return importlib.import_module(f"{PROGRAMS[name]}.{module}")
    except ImportError as error:
        raise JobError(
            f"the program of job {name} cannot be imported from {root}: {error}; another package "
            "may have its name"
        ) from error


@dataclass(frozen=True)
class Program:
    """A recipe of a job that is a program of its own.

    Attributes:
        named: the recipe, as it was named.
        values: its fields, as the file and ``--set`` have them.
    """

    named: str
    values: Mapping[str, Any]

    def module(self, name: str) -> Any:
        """Return a module of the program.

        Raises:
            JobError: there is no such program.
        """
        return _imported(program_of(self.values), name)

    @property
    def job(self) -> Job:
        """The program as it is launched."""
        return self.module("train").JOB

    # ---- fields ---------------------------------------------------------------------------

    @property
    def fields(self) -> dict[str, dataclasses.Field[Any]]:
        """Path -> the job's option."""
        module = self.module("options")
        options = dataclasses.fields(module.Options)
        return {
            _path(each.name, module.ITEMS): each for each in options if each.name not in _NOT_FIELDS
        }

    def given(self) -> dict[str, Any]:
        """Return path -> value of the fields that are set.

        Raises:
            JobError: a field that there is not, with the nearest.
        """
        known = self.fields
        found = {}
        for path, value in _leaves(self.values, ""):
            if path in ("name", "job"):
                continue
            if path not in known:
                meant = did_you_mean(path, known)
                raise JobError(
                    f"{self.named}: {path} is no field of a recipe of job "
                    f"{program_of(self.values)}; {meant}the fields are {', '.join(known)}"
                )
            found[path] = value
        return found

    def arguments(self) -> list[str]:
        """Return the job's command line.

        Raises:
            JobError: as :meth:`given`; a value that is no value of an option.
        """
        known, found = self.fields, []
        for path, value in self.given().items():
            flag = known[path].name.replace("_", "-")
            if isinstance(value, bool) and isinstance(known[path].default, bool):
                found.append(f"--{flag}" if value else f"--no-{flag}")
            elif isinstance(value, list):
                found.append(f"--{flag}={'+'.join(map(str, value))}")
            elif isinstance(value, (str, int, float)) and not isinstance(value, bool):
                found.append(f"--{flag}={value}")
            elif value is not None:
                raise JobError(f"{self.named}: {path}={value!r} is no value of this field")
        return found

    def options(self, more: Sequence[str], world: int | None) -> Any:
        """Return the job's options, checked.

        Args:
            more: of the job's command line.
            world: ranks already started, or None.

        Raises:
            JobError: what does not fit, by the fields' names.
        """
        flags = {each.name.replace("_", "-"): path for path, each in self.fields.items()}

        def field(found: re.Match[str]) -> str:
            path = flags.get(found[1].removeprefix("no-"))
            return found[0] if path is None else path + ("=" if found[2] else "")

        try:
            return self.job.parse([*self.arguments(), *more], world)
        except JobError as error:
            said = re.sub(r"--([a-z][a-z-]*)( (?=[a-z]+=\d))?", field, str(error))
            said = said.replace("--help lists all options", "--print shows all fields")
            raise JobError(f"{self.named}: {said}") from error

    def as_yaml(self) -> str:
        """Return the whole recipe as YAML, every field of it.

        Raises:
            JobError: as :meth:`options`.
        """
        values = self.options([], None).as_dict()
        whole: dict[str, Any] = {"name": self.values.get("name", self.named)}
        whole["job"] = program_of(self.values)
        for path, each in self.fields.items():
            at, (*above, last) = whole, path.split(".")
            for name in above:
                at = at.setdefault(name, {})
            at[last] = values[each.name]
        return reading.dumped(whole)


def _path(name: str, encoders: Collection[str]) -> str:
    """Where an option stands in a recipe."""
    if name in encoders:
        return f"layout.encoders.{name}"
    for section, kind in reading.parts_of(Recipe).items():
        if name in {each.name for each in dataclasses.fields(kind)}:
            return f"{section}.{name}"
    return f"{_OTHERS}.{name}"


def _leaves(values: Mapping[str, Any], above: str) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        path = f"{above}{name}"
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{path}.")
        else:
            yield path, value


# ---- how it starts ------------------------------------------------------------------------


def find(argv: Sequence[str], parser: argparse.ArgumentParser) -> argparse.Namespace | None:
    """Return the command line, with its program, if its recipe is one of a program.

    Args:
        argv: command line, from ``train`` on.
        parser: of it.
    """
    # What is wrong is said where a recipe of fields is read, by the rank or the launcher.
    with contextlib.suppress(JobError, ImportError):
        given = parser.parse_args(list(argv[1:]))
        if given.recipe is not None and not given.list:
            given.program = Program(
                given.recipe, reading.changed(reading.values_of(given.recipe), given.set)
            )
            return given if program_of(given.program.values) else None
    return None


def job_of(given: argparse.Namespace, script: str, named: str) -> Job:
    """Return what is launched.

    Args:
        given: the command line, with its program.
        script: what ranks run that are processes of their own.
        named: the recipe's arguments, to be typed again.

    Raises:
        JobError: an option that such a program does not have.
    """
    program: Program = given.program
    job = program.job
    for flag in ("lossy", "profile", "profile_ranks"):
        if getattr(given, flag) is not None:
            raise JobError(
                f"--{flag.replace('_', '-')} is not for {given.recipe}, which is a program of its "
                "own; leave it out, or take another recipe (mimo train --list)"
            )

    def parse(_argv: Sequence[str], world: int | None) -> Any:
        options = program.options(["--fresh"] * given.fresh, world)
        if given.print:
            print(program.as_yaml(), end="")
            raise SystemExit(0)
        return options

    def instead(options: Any, _backend: str) -> bool:
        if not given.dry_run:
            return False
        from mimo_colocated.launch.ranks import hush
        from mimo_colocated.train.plan import program_dry_run

        hush()
        shapes, work = program.module("memory_plan").planned(options)
        print(program_dry_run(options, shapes, work, given.nodes, named))
        return True

    def work(options: Any, backend: str, requests: Any) -> None:
        if given.dry_run:  # under torchrun
            if os.environ["RANK"] == "0":
                instead(options, backend)
            return
        try:
            job.work(options, backend, requests)
        except Stopped:
            _record(program, options)
            raise
        _record(program, options)

    return dataclasses.replace(job, script=script, parse=parse, work=work, instead=instead)


def _record(program: Program, options: Any) -> None:
    from mimo_colocated.train.record import write_record

    axes = ("tp", "cp", "pp", "dp")
    modules = options.layouts.modules.items()
    layouts = {name: {axis: getattr(at, axis) for axis in axes} for name, at in modules}
    write_record(options.out, program.as_yaml(), {"layouts": layouts})
