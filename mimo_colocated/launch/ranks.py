# SPDX-License-Identifier: Apache-2.0
"""What happens in each rank around the job: its signals, its phases, and its report if it fails."""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import faulthandler
import logging
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from mimo_colocated.launch import connection_notes
from mimo_colocated.launch.errors import Stopped
from mimo_colocated.launch.failures import Report, crash_log, explain, read_reports
from mimo_colocated.launch.launcher import (
    REPORTS_VARIABLE,
    Job,
    JobOptions,
    choose_backend,
    complain,
    count_gpus,
)

if TYPE_CHECKING:
    from mimo_colocated.launch.lost_ranks import RankWatch
    from mimo_colocated.launch.stopping import RankSignals

_SETTLE_S = 0.5  # a failing rank waits this long for the reports of the ranks that fail with it
_JOINING_S = 2.0  # beyond the timeout, joining the others has this long to notice a lost one

# Ends this rank, which the error says why; set in ranks. Its peers' errors are for the launcher.
_fail_this_rank: list[Callable[[Exception], NoReturn]] = []


def init_distributed(backend: str, timeout_s: int) -> None:
    """Join the default process group.

    Args:
        backend: of the group.
        timeout_s: seconds that a collective may wait; one that waits longer fails.
    """
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
        store, rank, world = next(torch.distributed.rendezvous("env://", timeout=timeout))
        # torchrun keeps its store when it starts ranks again, with addresses of the dead in it.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = torch.distributed.PrefixStore(f"attempt_{attempt}", store)
        torch.distributed.init_process_group(
            backend, store=store, rank=rank, world_size=world, timeout=timeout, device_id=device
        )


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


def run_rank(job: Job, argv: Sequence[str]) -> int:
    """Do a job's work as the rank that the environment names.

    Args:
        job: what to run.
        argv: command line after the script's name.

    Returns:
        0; a rank that ends in any other way does not return.
    """
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    ours = REPORTS_VARIABLE in os.environ
    if ours:
        end_with_the_launcher()
    _tell_of_crashes(rank)
    signals: Any = _signals(rank, world, stops=job.stops, prints=not ours)
    watch = signals.watch if signals else None
    out: Any = None  # the job's folder, when it is known

    def fail(error: Exception) -> NoReturn:
        connection_notes.show()
        if signals:
            signals.ends_by_itself()
        log = _write_traceback(out, rank, error)
        _settle(Report.of(rank, error, log, job.packages.hint), world, watch, prints=not ours)
        _exit_now(1)

    _fail_this_rank.append(fail)
    try:
        options = job.parse(argv, world)
        out = options.out
        backend = _rank_backend(job, options, world)
        if watch is not None:
            watch.start(out)
        job.work(options, backend, *([signals.requests] if job.stops else []))
        _leave()
    except SystemExit as stop:
        _exit_now(stop.code if isinstance(stop.code, int) else int(stop.code is not None))
    except Stopped as stop:
        _exit_now(signals.stopped(stop))
    except Exception as error:
        fail(error)
    return 0


def _tell_of_crashes(rank: int) -> None:
    """Let a fault inside a library leave where Python was: for the launcher, else on stderr."""
    folder = _report_folder() if REPORTS_VARIABLE in os.environ else None
    with contextlib.suppress(OSError, ValueError):  # a stderr that is no file
        file = open(crash_log(folder, rank), "w") if folder is not None else sys.stderr  # noqa: SIM115
        faulthandler.enable(file)


def _signals(rank: int, world: int, *, stops: bool, prints: bool) -> RankSignals | None:
    """This rank's signals; ``None`` without what they are made with, which is said later."""
    try:
        from mimo_colocated.launch.stopping import RankSignals
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
        from mimo_colocated.launch.lost_ranks import RankWatch

        return RankWatch(rank, folder) if folder is not None else None
    return None


def _exit_now(code: int) -> NoReturn:
    """End this rank; tearing down process groups would wait for ranks that are gone."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _rank_backend(job: Job, options: JobOptions, world: int) -> str:
    job.packages.check()
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    gpus = 0 if options.backend == "gloo" else count_gpus()
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
        complain(explain(world, {}, reports), 1, None)
        return
    from mimo_colocated.launch.lost_ranks import claim

    own = reports.keys() - {r.rank for r in reports.values() if r.kind == "peer"}
    reports = {**reports, **read_reports(watch.folder)}
    reasons = {rank for rank, report in reports.items() if report.kind != "peer"}
    # A rank with a reason of its own says it.
    if (reasons and not own) or not claim(watch.folder):
        return
    evidence = None if reasons else watch.evidence()
    complain(explain(world, {}, reports, evidence), 1, watch.dumps)


def _report_folder() -> Path | None:
    """A folder that all ranks of this machine share."""
    if REPORTS_VARIABLE in os.environ:
        return Path(os.environ[REPORTS_VARIABLE])
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


def hush() -> None:
    """Silence Megatron-Core's and PyTorch's notes, which come once per rank.

    Megatron-Core warns of optional packages, and the libraries have notes to their developers; what
    a user has to know comes as an error.
    """
    warnings.simplefilter("ignore")
    for name in ("megatron", "torch.utils.cpp_extension"):
        logging.getLogger(name).setLevel(logging.ERROR)


def end_with_the_launcher() -> None:
    """Let Ctrl-C and the launcher's death end this rank at once, even inside a collective."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if sys.platform == "linux":
        parent_death_signal = 1
        ctypes.CDLL(None).prctl(parent_death_signal, signal.SIGKILL)
