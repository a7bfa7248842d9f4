# SPDX-License-Identifier: Apache-2.0
"""``mimo train RECIPE``: which recipe, what is set in it, on which ranks."""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mimo_colocated.cli.options import WHOLE, Parser
from mimo_colocated.launch import Job, JobError, Packages, hush, run
from mimo_colocated.launch.launcher import complain
from mimo_colocated.train import programs, reading
from mimo_colocated.train.profile_steps import Profile
from mimo_colocated.train.recipe import Recipe

if TYPE_CHECKING:
    from mimo_colocated.stop_requests import StopRequests

PACKAGES = Packages(
    {
        "torch": "torch",
        "megatron.core": "megatron-core",
        "transformers": "transformers",
        "safetensors": "safetensors",
        "jsonargparse": "jsonargparse",
        "yaml": "pyyaml",
        "tqdm": "tqdm",
        "PIL": "pillow",
        "matplotlib": "matplotlib",
    },
    "install what `mimo train` needs with: pip install 'megatron-mimo-colocated[train]'",
)
BOARD = Packages(
    {"tensorboard": "tensorboard"},
    "install it with: pip install 'megatron-mimo-colocated[train]', or set run.tensorboard=false",
)
"""What ``run.tensorboard`` needs, looked for before a rank starts."""
WANDB = Packages(
    {"wandb": "wandb"},
    "install it with: pip install 'megatron-mimo-colocated[wandb]', or leave run.wandb empty",
)
"""What ``run.wandb`` needs."""
DESCRIPTION = "Train a model by a recipe; RECIPE is the name of one that ships, or a .yaml file."


@dataclass(frozen=True)
class TrainCommand:
    """What was typed.

    Attributes:
        recipe: with what was set in it.
        named: its arguments, to be typed again.
        dry_run: say what would run, and end.
        nodes: machines, for the line that a dry run prints.
        fresh: start anew instead of resuming.
        profile: steps to record; None for none.
    """

    recipe: Recipe
    named: str
    dry_run: bool
    nodes: int
    fresh: bool
    profile: Profile | None

    @property
    def world_size(self) -> int:
        """Ranks that the layouts span."""
        return self.recipe.language.size

    @property
    def backend(self) -> str:
        """Of the process groups."""
        return self.recipe.run.backend

    @property
    def out(self) -> Path:
        """Folder of the run."""
        return Path(self.recipe.run.out)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    made = Parser(prog="mimo train", description=DESCRIPTION)
    made.add_argument("recipe", nargs="?", metavar="RECIPE", help="a name of --list, or a file")
    made.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="another value for a field, such as training.steps=10; may be given several times",
    )
    made.add_argument(
        "--lossy",
        metavar="LINKS",
        default=None,
        help="links that lose packets: a preset of docs/lossy.md, or a YAML file with rules",
    )
    made.add_argument("--list", action="store_true", help="the recipes that ship")
    made.add_argument("--print", action="store_true", help="the whole recipe, every field of it")
    made.add_argument(
        "--dry-run",
        action="store_true",
        help="layouts, groups, memory per rank and the torchrun line, and no training",
    )
    made.add_argument(
        "--nodes",
        type=WHOLE,
        default=1,
        help="machines, for the line that --dry-run prints",
    )
    made.add_argument(
        "--fresh", action="store_true", help="start anew; earlier results move to OUT/previous"
    )
    made.add_argument(
        "--profile",
        metavar="STEPS",
        default=None,
        help="write a trace of these steps, such as 10-12, to OUT/profile",
    )
    made.add_argument(
        "--profile-ranks",
        metavar="RANKS",
        default=None,
        help="ranks that do, such as 0,3, or all; without: rank 0",
    )
    return made


def main(argv: Sequence[str], script: str) -> int:
    """Run the command; ranks that it starts come through here, too.

    Args:
        argv: command line, from ``train`` on.
        script: what ranks run that are processes of their own.

    Returns:
        The exit code.
    """
    own = programs.find(argv, parser())
    if own is None:
        job = Job(
            script, _parse, _work, _instead, stops=True, packages=PACKAGES, prepare=_prepare
        )
        return run(job, argv)
    try:
        return run(programs.job_of(own, script, _typed_again(own)), argv)
    except JobError as error:
        return complain(str(error), 2, None)


def _parse(argv: Sequence[str], world: int | None) -> TrainCommand:
    if world is None:
        PACKAGES.check()
    given = parser().parse_args(list(argv[1:]))
    if given.list:
        print(reading.describe_shipped())
        raise SystemExit(0)
    if given.recipe is None:
        raise JobError("mimo train needs a RECIPE: a name that --list shows, or a .yaml file")
    recipe = reading.read_recipe(given.recipe, given.set, given.lossy)
    if recipe.run.tensorboard:
        BOARD.check()
    if recipe.run.wandb:
        WANDB.check()
    if given.print:
        print(reading.as_yaml(recipe), end="")
        raise SystemExit(0)
    if world not in (None, recipe.language.size):
        raise JobError(
            f"layout.language={recipe.language} spans {recipe.language.size} ranks, but the job "
            f"has {world}; set layout.language and layout.encoders for {world}, or start "
            f"{recipe.language.size}"
        )
    profile = _profile(given, recipe)
    named = _typed_again(given)
    if given.lossy is not None:
        named += f" --lossy {shlex.quote(given.lossy)}"
    if profile is not None:
        named += f" {profile.typed}"
    return TrainCommand(recipe, named, given.dry_run, given.nodes, given.fresh, profile)


def _typed_again(given: argparse.Namespace) -> str:
    return " ".join([given.recipe, *(f"--set {shlex.quote(change)}" for change in given.set)])


def _profile(given: argparse.Namespace, recipe: Recipe) -> Profile | None:
    if given.profile is None:
        if given.profile_ranks is not None:
            raise JobError("--profile-ranks is of --profile STEPS; give both, or neither")
        return None
    found = Profile.parse(given.profile, given.profile_ranks or "0")
    found.check(recipe.training.steps, recipe.language.size)
    return found


def _instead(options: TrainCommand, backend: str) -> bool:
    """What is wrong with the model or the layouts is said before a rank starts."""
    if backend == "gloo":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # as for the ranks, before Megatron looks
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    hush()
    from mimo_colocated.train import plan
    from mimo_colocated.train.makers import model_folder

    if options.recipe.lossy.rules:
        from mimo_colocated.train.lossy import spec_of

        spec_of(options.recipe.lossy)
    plan.check_data(options.recipe)
    folder = model_folder(options.recipe)
    if options.dry_run:
        print(plan.dry_run(options.recipe, folder, options.nodes, options.named))
        return True
    plan.check_model(options.recipe, folder)
    return False


def _prepare() -> None:
    hush()
    import mimo_colocated.train.job  # noqa: F401


def _work(options: TrainCommand, backend: str, requests: StopRequests) -> None:
    if options.dry_run:  # under torchrun
        if os.environ["RANK"] == "0":
            _instead(options, backend)
        return
    _prepare()
    from mimo_colocated.train.job import run_recipe

    run_recipe(
        options.recipe, backend, requests, fresh=options.fresh, profile=options.profile
    )
