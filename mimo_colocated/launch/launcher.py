# SPDX-License-Identifier: Apache-2.0
"""The process that a user starts: check, start the ranks, wait, say what went wrong.

Without torchrun, :func:`run` starts one process per rank of the layout on this machine (no fixed
port) and waits. Started by torchrun, or by srun as one of several tasks, it is one of the ranks.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from mimo_colocated.launch.errors import JobError, Packages, one_sentence
from mimo_colocated.launch.failures import Exit, Reason, crash_log, explain, read_reports
from mimo_colocated.launch.slurm import become_rank

if TYPE_CHECKING:
    from mimo_colocated.launch.stopping import Forwarding

REPORTS_VARIABLE = "MIMO_LAUNCH_REPORTS"
"""Set in ranks that the launcher starts: the folder where they report."""
# Gloo tells of each lost connection, on every rank; which rank is lost is said once.
_QUIET = "FATAL"


class JobOptions(Protocol):
    """What the launcher needs to know of a job's options."""

    @property
    def world_size(self) -> int: ...  # noqa: D102
    @property
    def backend(self) -> str: ...  # noqa: D102
    @property
    def out(self) -> Path: ...  # noqa: D102


Options = TypeVar("Options", bound=JobOptions)


def _nothing(_options: JobOptions, _backend: str) -> bool:
    return False


@dataclass(frozen=True)
class Job(Generic[Options]):
    """What is launched.

    Attributes:
        script: file that the ranks run; it must end in the same call of :func:`run`.
        parse: from the arguments and the world size (None before ranks exist) to options; raises
            :class:`JobError`.
        work: what one rank does with the options and the backend's name.
        instead: does what needs no ranks, and returns whether that was all.
        stops: ``work`` takes the rank's :class:`StopRequests`, too, and raises :class:`Stopped` on
            all ranks when it was told to stop and has saved.
        packages: what the job cannot do without.
        prepare: imports what ``work`` imports. Ranks on the CPU are forked from a process that has
            done it once.
    """

    script: str
    parse: Callable[[Sequence[str], int | None], Options]
    work: Callable[..., None]
    instead: Callable[[Options, str], bool] = _nothing
    stops: bool = False
    packages: Packages = field(default_factory=Packages)
    prepare: Callable[[], object] | None = None


def run(job: Job, argv: Sequence[str]) -> int:
    """Run a job on every rank; call it as ``sys.exit(run(Job(__file__, ...), sys.argv[1:]))``.

    Args:
        job: what to run.
        argv: command line after the script's name.

    Returns:
        The exit code: 0, 2 for a wrong command line, 75 for a job that was told to stop and has
        saved, 130 after Ctrl-C, 143 after SIGTERM (the second one, if the job stops), else 1.
    """
    try:
        become_rank()
    except JobError as error:
        return complain(str(error), 2, None)
    if "RANK" in os.environ:
        from mimo_colocated.launch.ranks import run_rank

        return run_rank(job, argv)
    try:
        options = job.parse(argv, None)
        job.packages.check()
        from mimo_colocated.launch.stopping import Forwarding

        with contextlib.closing(Forwarding(job.stops)) as forwarding, _environment() as before:
            backend = choose_backend(options.backend, options.world_size, count_gpus())
            if job.instead(options, backend):
                return 0
            _set_for_ranks(backend, before)
            return _launch(job, argv, options, backend, forwarding)
    except JobError as error:
        return complain(str(error), 2, None)
    except OSError as error:
        return complain(one_sentence(error, job.packages.hint), 1, None)


def choose_backend(wanted: str, ranks: int, gpus: int) -> str:
    """Return the process groups' backend on one machine: a GPU per rank, or the CPU for all.

    Args:
        wanted: ``"auto"``, or the backend itself.
        ranks: of this machine.
        gpus: that it has.

    Raises:
        JobError: when GPUs are asked for and there are fewer than ranks.
    """
    if wanted == "nccl" and gpus < ranks:
        raise JobError(
            f"--backend nccl needs a GPU per rank, but there are {ranks} ranks and {gpus} GPUs; "
            f"use --backend gloo{f' or layouts that span {gpus} ranks' if gpus else ''}"
        )
    return ("nccl" if gpus >= ranks else "gloo") if wanted == "auto" else wanted


def count_gpus() -> int:
    """Return the number of GPUs without starting CUDA."""
    import torch

    # Counted by the driver's library for management: ``is_available`` would start CUDA here, and
    # this process could not be told any more to leave its devices alone.
    return torch.cuda.device_count()


def complain(reason: str | Reason, code: int, dumps: Path | None) -> int:
    """Print an error for the user, and return ``code``.

    Args:
        reason: one sentence, or why a job failed.
        code: the exit code.
        dumps: folder of the flight recorder's dumps, if there are any; who waits for whom is
            written beside them.
    """
    reason = Reason(reason) if isinstance(reason, str) else reason
    where = f"\nfull traceback: {reason.log}" if reason.log else ""
    if dumps is not None:
        from mimo_colocated.launch.lost_ranks import write_summary

        summary = write_summary(reason, dumps)
        where += f"\nwho waits for whom: {summary}" if summary else ""
    print(f"error: {reason.sentence}{where}", file=sys.stderr, flush=True)
    return code


def _launch(
    job: Job, argv: Sequence[str], options: JobOptions, backend: str, forwarding: Forwarding
) -> int:
    folder = Path(tempfile.mkdtemp(prefix="launch-"))
    os.environ[REPORTS_VARIABLE] = str(folder)
    try:
        return _start_and_wait(job, argv, options, folder, forwarding, forked=backend == "gloo")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _start_and_wait(
    job: Job,
    argv: Sequence[str],
    options: JobOptions,
    folder: Path,
    forwarding: Forwarding,
    *,
    forked: bool,
) -> int:
    from mimo_colocated.forensics.evidence import clear_dumps
    from mimo_colocated.launch import starts
    from mimo_colocated.launch.lost_ranks import Reaper, dump_folder

    dumps, reaper, there = dump_folder(options.out), Reaper(folder), options.out.exists()
    start = starts.fork_ranks if forked and starts.CAN_FORK else starts.start_scripts
    with contextlib.suppress(OSError):
        clear_dumps(dumps)
    reaper.start()
    forwarding.into(folder)
    try:
        exits = start(job, argv, options.world_size, folder)
    except starts.Interrupted as stop:
        return complain(f"stopped by {stop.sent.name}; all ranks were ended", 128 + stop.sent, None)
    finally:
        reaper.close()
    if not exits:
        for empty in (dumps, dumps.parent, *([] if there else [options.out])):
            with contextlib.suppress(OSError):
                empty.rmdir()
        return 0
    told = forwarding.outcome({end.code for end in exits.values()})
    if told is not None:
        return complain(*told, None) if told[0] else told[1]
    reason = _reason(exits, options.world_size, folder, dumps, reaper.fates)
    return complain(_with_stacks(reason, exits, folder, options.out), 1, dumps)


def _reason(
    exits: Mapping[int, Exit], world_size: int, folder: Path, dumps: Path, fates: Mapping[int, str]
) -> Reason:
    """Return why the ranks ended, by their exit codes and by what they left."""
    from mimo_colocated.forensics.evidence import Evidence
    from mimo_colocated.launch.lost_ranks import peers_gave_up

    evidence = Evidence.read(folder, dumps, fates, peers_gave_up(folder))
    return explain(world_size, exits, read_reports(folder), evidence)


def _with_stacks(reason: Reason, exits: Mapping[int, Exit], folder: Path, out: Path) -> Reason:
    """Keep where Python was in ranks that a fault inside a library ended, and name the first."""
    kept = []
    for rank in sorted(exits, key=lambda rank: exits[rank].at):
        with contextlib.suppress(OSError):
            stacks = crash_log(folder, rank).read_text()
            if stacks:
                path = out / "errors" / f"rank_{rank}.log"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(stacks)
                kept.append(str(path))
    return reason if reason.log or not kept else dataclasses.replace(reason, log=kept[0])


@contextlib.contextmanager
def _environment() -> Iterator[Mapping[str, str]]:
    """Yield the environment, set what ranks inherit before torch is imported, and put it back."""
    before = dict(os.environ)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # several ranks share the cores
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", _QUIET)
    try:
        yield before
    finally:
        os.environ.clear()
        os.environ.update(before)


def _set_for_ranks(backend: str, before: Mapping[str, str]) -> None:
    if backend == "nccl":
        os.environ["TORCH_CPP_LOG_LEVEL"] = before.get("TORCH_CPP_LOG_LEVEL", "ERROR")
        return
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    # Megatron-Core compiles its fused functions while it is imported, which takes seconds; without
    # a GPU they run uncompiled anyway.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
