# SPDX-License-Identifier: Apache-2.0
"""``mimo COMMAND ...``: which command, on which ranks."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any

from mimo_colocated.cli.options import ALONE, COMMANDS, CommandOptions, parser_of, read
from mimo_colocated.launch import Job, JobError, Packages, hush, init_distributed, run
from mimo_colocated.launch.errors import one_sentence
from mimo_colocated.launch.launcher import complain

PACKAGES = Packages(
    {
        "torch": "torch",
        "megatron.core": "megatron-core",
        "transformers": "transformers",
        "safetensors": "safetensors",
        "jsonargparse": "jsonargparse",
        "tqdm": "tqdm",
    },
    "install what `mimo` needs with: pip install 'megatron-mimo-colocated[cli]'",
)
_OF_DATA = ("eval", "generate")
"""Commands that read data, and need what `mimo train` needs."""
STUDY_PACKAGES = Packages(
    {
        "studies": "studies",
        "campaigns": "campaigns",
        "transformers": "transformers",
        "sklearn": "scikit-learn",
        "matplotlib": "matplotlib",
        "rich": "rich",
    },
    "`mimo study` runs in a checkout of the project, with: pip install -e '.[train,examples]'",
)
_USAGE = """usage: mimo COMMAND ...

  import   a Hugging Face folder -> a checkpoint to train from, in any layout
  export   a checkpoint of any layout -> a Hugging Face folder
  check    logits of a folder's model here, in any layout, against transformers'
  eval     loss and exact match of a run's model, or a folder's, on held-out data
  generate answer a question about images, or about none
  calibrate  products, copies and collectives of this machine, for plan
  plan     time and memory of all pairs of layouts, before anything runs
  draw     a picture of which rank holds what
  train    a recipe: data, model, layouts -> a trained model
  report   a run of train -> a page with its curves, layouts, time, samples and answers
  study    a grid of runs: `mimo study lossy`, what training tolerates when packets are lost
  doctor   what this machine has, and what to do about what it lacks

`mimo COMMAND --help` lists the options."""


def main(argv: Sequence[str]) -> int:
    """Run a command; ranks that it starts come through here, too.

    Args:
        argv: command line after ``mimo``.

    Returns:
        The exit code: 0, 1 if it failed or a check did, 2 for a wrong command line.
    """
    if not argv or argv[0] in ("-h", "--help"):
        print(_USAGE)
        return 0 if argv else 2
    if argv[0] == "doctor":
        return _doctor(argv[1:])
    if list(argv[:2]) == ["plan", "--calibrate"]:
        argv = ["calibrate", *argv[2:]]
    if argv[0] == "study":
        return _study(argv[1:])
    if argv[0] in ALONE:
        return _alone(argv)
    script = os.path.join(os.path.dirname(__file__), "__main__.py")
    if argv[0] == "train":
        return _train(argv, script)
    if argv[0] not in COMMANDS:
        known = ", ".join([*COMMANDS, *ALONE, "train", "study", "doctor"])
        return complain(f"{argv[0]!r} is no command; the commands are {known}", 2, None)
    packages = _packages(argv[0])
    prepare = _prepare_data if argv[0] in _OF_DATA else _prepare
    job = Job(script, _parse, _work, _check_first, packages=packages, prepare=prepare)
    return run(job, argv)


def console() -> int:
    """Run the command line of this process: the console script."""
    return main(sys.argv[1:])


def _doctor(argv: Sequence[str]) -> int:
    from mimo_colocated.cli import doctor

    try:
        return doctor.run(argv)
    except JobError as error:
        return complain(str(error), 2, None)


def _study(argv: Sequence[str]) -> int:
    """Run a study; it is no part of what is installed, so this needs a checkout."""
    if not argv or argv[0] != "lossy":
        given = repr(argv[0]) if argv else "none"
        said = f"mimo study needs the name of a study, got {given}; there is lossy"
        return complain(said, 2, None)
    try:
        STUDY_PACKAGES.check()
    except JobError as error:
        return complain(str(error), 2, None)
    from campaigns.command import main as run_campaign
    from studies.lossy.campaign import LossyStudy

    return run_campaign(LossyStudy(), argv[1:])


def _alone(argv: Sequence[str]) -> int:
    """Run a command that starts no ranks and needs no accelerator."""
    try:
        PACKAGES.check()
        options = parser_of(argv[0]).parse_args(list(argv[1:]))
        hush()
        importlib.import_module(f"mimo_colocated.cli.{ALONE[argv[0]]}").run(options)
    except JobError as error:
        return complain(str(error), 2, None)
    except OSError as error:
        return complain(one_sentence(error, PACKAGES.hint), 1, None)
    return 0


def _train(argv: Sequence[str], script: str) -> int:
    from mimo_colocated.train import command

    return command.main(argv, script)


def _packages(command: str) -> Packages:
    if command not in _OF_DATA:
        return PACKAGES
    from mimo_colocated.train.command import PACKAGES as OF_DATA

    return OF_DATA


def _parse(argv: Sequence[str], world: int | None) -> CommandOptions:
    if world is None:
        _packages(argv[0]).check()  # the library that reads the options is one of them
    options = read(argv[0], argv[1:])
    if world not in (None, options.world_size):
        if argv[0] == "calibrate":
            raise JobError(f"--ranks is {options.world_size}, but the job has {world}")
        raise JobError(
            f"--language {options.language} spans {options.world_size} ranks, but the job has "
            f"{world}"
        )
    return options


def _check_first(options: CommandOptions, backend: str) -> bool:
    """What is wrong with the folder or the layouts is said before a rank starts."""
    if backend == "gloo":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # as for the ranks, before Megatron looks
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    hush()
    _command(options).check_first(options)
    return False


def _prepare() -> None:
    hush()
    import megatron.core.models.mimo.huggingface.export  # noqa: F401


def _prepare_data() -> None:
    _prepare()
    import mimo_colocated.train.evaluation  # noqa: F401


def _work(options: CommandOptions, backend: str) -> None:
    _prepare()
    from mimo_colocated.launch import connection_notes

    with contextlib.ExitStack() as stack:
        stack.enter_context(connection_notes.held_back())
        init_distributed(backend, options.timeout)
    _command(options).work(options)


def _command(options: CommandOptions) -> Any:
    """The module of a command: ``check_first`` before ranks start, ``work`` on each."""
    return importlib.import_module(f"mimo_colocated.cli.{COMMANDS[options.command]}")
