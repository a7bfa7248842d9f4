# SPDX-License-Identifier: Apache-2.0
"""Start the ranks, run the job in each, and say in one sentence what went wrong.

Without torchrun, :func:`run` starts one process per rank of the layout on this machine (PyTorch's
elastic agent; no fixed port) and waits. Started by torchrun, it is one of the ranks already.
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import logging
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, TypeVar

import connection_notes
from errors import JobError, Stopped, one_sentence, require_packages
from failures import Exit, Reason, Report, explain, read_reports

if TYPE_CHECKING:  # not installed yet, perhaps: require_packages says so
    from lost_ranks import RankWatch
    from stopping import Forwarding, RankSignals


_REPORTS = "DIGITS_REPORTS"  # set in the ranks that this launcher starts: where they report
_SETTLE_S = 0.5  # a failing rank waits this long for the reports of the ranks that fail with it
_JOINING_S = 2.0  # beyond the timeout, joining the others has this long to notice a lost one

# Ends this rank, which the error says why; set in ranks. Its peers' errors are for the launcher.
_fail_this_rank: list[Callable[[Exception], NoReturn]] = []


class JobOptions(Protocol):
    """What the launcher needs to know of the job's options."""

    @property
    def world_size(self) -> int: ...  # noqa: D102
    @property
    def backend(self) -> str: ...  # noqa: D102
    @property
    def out(self) -> Path: ...  # noqa: D102


_Options = TypeVar("_Options", bound=JobOptions)


def run(
    script: str,
    argv: Sequence[str],
    parse: Callable[[Sequence[str], int | None], _Options],
    job: Callable[..., None],
    instead: Callable[[_Options, str], bool] = lambda *_: False,
    *,
    stops: bool = False,
) -> int:
    """Run ``job`` on every rank; call it as ``sys.exit(run(__file__, sys.argv[1:], ...))``.

    Args:
        script: file that the ranks run; it must end in this same call.
        argv: command line after the script's name.
        parse: from ``argv`` and the world size (None before ranks exist) to options; raises
            :class:`JobError`.
        job: what one rank does with the options and the backend's name.
        instead: does what needs no ranks, and says whether that was all.
        stops: ``job`` takes the rank's :class:`StopRequests`, too, and raises
            :class:`errors.Stopped` on all ranks when it was told to stop and has saved.

    Returns:
        The exit code: 0, 2 for a wrong command line, 75 for a job that was told to stop and has
        saved, 130 after Ctrl-C, 143 after SIGTERM (the second one, if ``stops``), else 1.
    """
    if "RANK" in os.environ:
        return _run_rank(argv, parse, job, stops=stops)
    try:
        options = parse(argv, None)
        require_packages()
        from stopping import Forwarding

        with contextlib.closing(Forwarding(stops)) as forwarding:
            backend = choose_backend(options.backend, options.world_size, _gpus())
            if instead(options, backend):
                return 0
            return _launch(script, argv, options, backend, forwarding)
    except JobError as error:
        return _complain(str(error), 2)
    except OSError as error:
        return _complain(one_sentence(error), 1)


def choose_backend(wanted: str, ranks: int, gpus: int) -> str:
    """The process groups' backend on one machine: a GPU per rank, or the CPU for all.

    Raises:
        JobError: when GPUs are asked for and there are fewer than ranks.
    """
    if wanted == "nccl" and gpus < ranks:
        raise JobError(
            f"--backend nccl needs a GPU per rank, but there are {ranks} ranks and {gpus} GPUs; "
            f"use --backend gloo{f' or layouts that span {gpus} ranks' if gpus else ''}"
        )
    return ("nccl" if gpus >= ranks else "gloo") if wanted == "auto" else wanted


def init_distributed(backend: str, timeout_s: int) -> None:
    """Join the default process group; a collective that waits longer than ``timeout_s`` fails."""
    import torch

    from mimo_colocated import phases

    device = None
    if backend == "nccl":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    timeout = datetime.timedelta(seconds=timeout_s)
    everyone = range(int(os.environ["WORLD_SIZE"]))
    waiting = phases.waiting("init_process_group", everyone, "default_pg")
    with waiting, _given_up_after(timeout_s + _JOINING_S):
        torch.distributed.init_process_group(backend, timeout=timeout, device_id=device)


@contextlib.contextmanager
def _given_up_after(seconds: float) -> Iterator[None]:
    """End this rank as one that waits for a lost one if what is within takes longer.

    A rank that is stopped while the ranks connect accepts connections and never answers. Gloo tries
    each several times, for the timeout each time, and cannot be interrupted.
    """

    def give_up() -> None:
        _fail_this_rank[-1](TimeoutError(f"Timed out after {seconds:g} s in init_process_group"))

    timer = threading.Timer(seconds, give_up) if _fail_this_rank else None
    if timer is not None:
        timer.daemon = True
        timer.start()
    try:
        yield
    finally:
        if timer is not None:
            timer.cancel()


def _gpus() -> int:
    import torch

    # Counted by the driver's library for management: ``is_available`` would start CUDA here, and
    # this process could not be told any more to leave its devices alone.
    return torch.cuda.device_count()


def _complain(reason: str | Reason, code: int, dumps: Path | None = None) -> int:
    reason = Reason(reason) if isinstance(reason, str) else reason
    where = f"\nfull traceback: {reason.log}" if reason.log else ""
    if dumps is not None:
        from lost_ranks import write_summary

        summary = write_summary(reason, dumps)
        where += f"\nwho waits for whom: {summary}" if summary else ""
    print(f"error: {reason.sentence}{where}", file=sys.stderr, flush=True)
    return code


# --------------------------------------------------------------------------- the launcher's side


def _launch(
    script: str, argv: Sequence[str], options: JobOptions, backend: str, forwarding: Forwarding
) -> int:
    folder = Path(tempfile.mkdtemp(prefix="digits-"))
    try:
        with _rank_environment(folder, hide_gpus=backend == "gloo"):
            return _start_and_wait(script, argv, options, folder, forwarding)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _start_and_wait(
    script: str, argv: Sequence[str], options: JobOptions, folder: Path, forwarding: Forwarding
) -> int:
    from lost_ranks import Reaper, dump_folder
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    from mimo_colocated.evidence import clear_dumps

    config, dumps, reaper = _config(options, folder), dump_folder(options.out), Reaper(folder)
    # The agent's own account of a failure is a page per rank; ours is one sentence.
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    with contextlib.suppress(OSError):
        clear_dumps(dumps)
    reaper.start()
    forwarding.into(folder)
    try:
        _run_ranks(config, script, argv)
    except ChildFailedError as error:
        reaper.close()
        told = forwarding.outcome({failure.exitcode for failure in error.failures.values()})
        if told is not None:
            return _complain(*told) if told[0] else told[1]
        return _complain(_reason(error, options.world_size, folder, dumps, reaper.fates), 1, dumps)
    except SignalException as stop:
        return _complain(f"stopped by {stop.sigval.name}; all ranks were ended", 128 + stop.sigval)
    except KeyboardInterrupt:
        return _complain("stopped by SIGINT; all ranks were ended", 128 + signal.SIGINT)
    return 0


def _config(options: JobOptions, folder: Path) -> Any:
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.launcher.api import LaunchConfig

    # SIGTERM is passed on to the ranks without a time limit (``stopping.py``). An older torch does
    # it itself, and kills them after 30 s.
    signals = {"signals_to_handle": "SIGINT,SIGHUP,SIGQUIT"}
    return LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=options.world_size,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
        monitor_interval=0.1,
        logs_specs=DefaultLogsSpecs(log_dir=str(folder)),
        **(signals if hasattr(LaunchConfig, "signals_to_handle") else {}),
    )


def _reason(
    error: Any, world_size: int, folder: Path, dumps: Path, fates: Mapping[int, str]
) -> Reason:
    """Why the ranks ended, by their exit codes and by what they left."""
    from lost_ranks import peers_gave_up

    from mimo_colocated.evidence import Evidence

    exits = {
        rank: Exit(failure.exitcode, failure.timestamp)
        for rank, failure in error.failures.items()
    }
    evidence = Evidence.read(folder, dumps, fates, peers_gave_up(folder))
    return explain(world_size, exits, read_reports(folder), evidence)


def _run_ranks(config: Any, script: str, argv: Sequence[str]) -> None:
    """Start the ranks and wait for them."""
    from torch.distributed.launcher.api import elastic_launch

    elastic_launch(config, sys.executable)("-u", str(Path(script).resolve()), *argv)


@contextlib.contextmanager
def _rank_environment(folder: Path, *, hide_gpus: bool) -> Iterator[None]:
    """What the ranks inherit; put back afterwards."""
    before = dict(os.environ)
    os.environ[_REPORTS] = str(folder)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # several ranks share the cores
    # Megatron-Core compiles its fused functions while it is imported, which takes seconds; without
    # a GPU they run uncompiled anyway.
    if hide_gpus:
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    # Gloo tells of each lost connection, on every rank; which rank is lost is said once.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL" if hide_gpus else "ERROR")
    if hide_gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


# ------------------------------------------------------------------------------ the ranks' side


def _run_rank(
    argv: Sequence[str],
    parse: Callable[[Sequence[str], int | None], _Options],
    job: Callable[..., None],
    *,
    stops: bool,
) -> int:
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    ours = _REPORTS in os.environ
    if ours:
        _end_with_the_launcher()
    signals = _signals(rank, world, stops=stops, prints=not ours)
    watch = signals.watch if signals else None
    out: Path | None = None

    def fail(error: Exception) -> NoReturn:
        connection_notes.show()
        if signals:
            signals.ends_by_itself()
        report = Report.of(rank, error, _write_traceback(out, rank, error))
        _settle(report, world, watch, prints=not ours)
        _exit_now(1)

    _fail_this_rank.append(fail)
    try:
        options = parse(argv, world)
        out = options.out
        backend = _rank_backend(options, world)
        if watch is not None:
            watch.start(out)
        job(options, backend, *([signals.requests] if stops else []))
        _leave()
    except SystemExit as stop:
        _exit_now(stop.code if isinstance(stop.code, int) else int(stop.code is not None))
    except Stopped as stop:
        _exit_now(signals.stopped(stop))
    except Exception as error:
        fail(error)
    return 0


def _signals(rank: int, world: int, *, stops: bool, prints: bool) -> RankSignals | None:
    """This rank's signals; ``None`` without what they are made with, which is said later."""
    try:
        from stopping import RankSignals
    except ImportError:
        return None

    def say() -> None:
        _say_once(world, {}, signals.watch)

    signals = RankSignals(rank, stops=stops, say=say if prints else None)
    signals.watch = _watch(rank)
    return signals


def _watch(rank: int) -> RankWatch | None:
    """What this rank leaves for the others; ``None`` without a launcher or what it is made with."""
    folder = _report_folder()
    with contextlib.suppress(ImportError, OSError):
        from lost_ranks import RankWatch

        return RankWatch(rank, folder) if folder is not None else None
    return None


def _exit_now(code: int) -> NoReturn:
    """End this rank; tearing down process groups would wait for ranks that are gone."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _rank_backend(options: JobOptions, world: int) -> str:
    require_packages()
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    gpus = 0 if options.backend == "gloo" else _gpus()
    backend = choose_backend(options.backend, local_ranks, gpus)
    if backend == "gloo":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before anything asks CUDA for a device
    return backend


def _leave() -> None:
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _settle(report: Report, world: int, watch: RankWatch | None, *, prints: bool) -> None:
    """Leave the report, and wait for others of the same failure; one rank prints (torchrun)."""
    folder = _report_folder()
    if folder is not None:
        with contextlib.suppress(OSError):
            report.write(folder)
    if watch is not None and report.kind == "peer":
        watch.save()
    time.sleep(_SETTLE_S)
    if prints:
        _say_once(world, {report.rank: report}, watch)


def _say_once(world: int, reports: dict[int, Report], watch: RankWatch | None) -> None:
    """Under torchrun: one rank of each host says why its ranks end."""
    if watch is None:
        _complain(explain(world, {}, reports), 1)
        return
    from lost_ranks import claim

    own = reports.keys() - {r.rank for r in reports.values() if r.kind == "peer"}
    reports = {**reports, **read_reports(watch.folder)}
    reasons = {rank for rank, report in reports.items() if report.kind != "peer"}
    # A rank with a reason of its own says it.
    if (reasons and not own) or not claim(watch.folder):
        return
    evidence = None if reasons else watch.evidence()
    _complain(explain(world, {}, reports, evidence), 1, watch.dumps)


def _report_folder() -> Path | None:
    """A folder that all ranks of this machine share."""
    if _REPORTS in os.environ:
        return Path(os.environ[_REPORTS])
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    return Path(error_file).parent.parent if error_file else None


def _write_traceback(out: Path | None, rank: int, error: BaseException) -> str:
    """An error's traceback into a file under ``out``; onto stderr if that cannot be written."""
    if out is None:
        return ""
    path = out / "errors" / f"rank_{rank}.log"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(traceback.format_exception(error)))
    except OSError:
        traceback.print_exception(error)
        return ""
    return str(path)


def _end_with_the_launcher() -> None:
    """Ctrl-C and the launcher's death end this rank at once, even inside a collective."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if sys.platform == "linux":
        parent_death_signal = 1
        ctypes.CDLL(None).prctl(parent_death_signal, signal.SIGKILL)
