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
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn, Protocol, TypeVar

from errors import JobError, one_sentence, require_packages
from failures import Exit, Reason, Report, explain, read_reports

_REPORTS = "DIGITS_REPORTS"  # set in the ranks that this launcher starts: where they report
_SETTLE_S = 0.5  # a failing rank waits this long for the reports of the ranks that fail with it


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
    job: Callable[[_Options, str], None],
    instead: Callable[[_Options, str], bool] = lambda *_: False,
) -> int:
    """Run ``job`` on every rank; call it as ``sys.exit(run(__file__, sys.argv[1:], ...))``.

    Args:
        script: file that the ranks run; it must end in this same call.
        argv: command line after the script's name.
        parse: from ``argv`` and the world size (None before ranks exist) to options; raises
            :class:`JobError`.
        job: what one rank does with the options and the backend's name.
        instead: does what needs no ranks, and says whether that was all.

    Returns:
        The exit code: 0, 2 for a wrong command line, 130 after Ctrl-C, else 1.
    """
    if "RANK" in os.environ:
        return _run_rank(argv, parse, job)
    try:
        options = parse(argv, None)
        require_packages()
        backend = choose_backend(options.backend, options.world_size, _gpus())
        if instead(options, backend):
            return 0
        return _launch(script, argv, options, backend)
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

    device = None
    if backend == "nccl":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    torch.distributed.init_process_group(
        backend, timeout=datetime.timedelta(seconds=timeout_s), device_id=device
    )


def _gpus() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _complain(reason: str | Reason, code: int) -> int:
    reason = Reason(reason) if isinstance(reason, str) else reason
    where = f"\nfull traceback: {reason.log}" if reason.log else ""
    print(f"error: {reason.sentence}{where}", file=sys.stderr, flush=True)
    return code


# --------------------------------------------------------------------------- the launcher's side


def _launch(script: str, argv: Sequence[str], options: JobOptions, backend: str) -> int:
    folder = Path(tempfile.mkdtemp(prefix="digits-"))
    try:
        with _rank_environment(folder, hide_gpus=backend == "gloo"):
            return _start_and_wait(script, argv, options.world_size, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _start_and_wait(script: str, argv: Sequence[str], world: int, folder: Path) -> int:
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=world,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
        monitor_interval=0.1,
        logs_specs=DefaultLogsSpecs(log_dir=str(folder)),
    )
    # The agent's own account of a failure is a page per rank; ours is one sentence.
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        elastic_launch(config, sys.executable)("-u", str(Path(script).resolve()), *argv)
    except ChildFailedError as error:
        exits = {
            rank: Exit(failure.exitcode, failure.timestamp)
            for rank, failure in error.failures.items()
        }
        reports = read_reports(folder)
        return _complain(explain(world, exits, reports), 1)
    except SignalException as stop:
        return _complain(f"stopped by {stop.sigval.name}; all ranks were ended", 128 + stop.sigval)
    except KeyboardInterrupt:
        return _complain("stopped by SIGINT; all ranks were ended", 128 + signal.SIGINT)
    return 0


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
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # gloo's notes on each lost connection
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
    job: Callable[[_Options, str], None],
) -> int:
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    ours = _REPORTS in os.environ
    if ours:
        _end_with_the_launcher()
        _report_foreign_sigterm(rank, Path(os.environ[_REPORTS]))
    out: Path | None = None
    try:
        options = parse(argv, world)
        out = options.out
        backend = _rank_backend(options, world)
        job(options, backend)
        _leave()
    except SystemExit as stop:
        _exit_now(stop.code if isinstance(stop.code, int) else int(stop.code is not None))
    except Exception as error:
        report = Report.of(rank, error, _write_traceback(out, rank))
        _settle(report, world, prints=not ours)
        _exit_now(1)
    return 0


def _exit_now(code: int) -> NoReturn:
    """End this rank; tearing down process groups would wait for ranks that are gone."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _rank_backend(options: JobOptions, world: int) -> str:
    require_packages()
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    backend = choose_backend(options.backend, local_ranks, _gpus())
    if backend == "gloo":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before anything asks CUDA for a device
    return backend


def _leave() -> None:
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _settle(report: Report, world: int, *, prints: bool) -> None:
    """Leave the report, and wait for others of the same failure; one rank prints (torchrun)."""
    folder = _report_folder()
    if folder is not None:
        with contextlib.suppress(OSError):
            report.write(folder)
    time.sleep(_SETTLE_S)
    if not prints:
        return
    reports = {report.rank: report, **(read_reports(folder) if folder is not None else {})}
    if report.rank == min(_reporters(reports)):
        _complain(explain(world, {}, reports), 1)


def _reporters(reports: dict[int, Report]) -> list[int]:
    own = [rank for rank, report in reports.items() if report.kind != "peer"]
    return own or list(reports)


def _report_folder() -> Path | None:
    """A folder that all ranks of this machine share."""
    if _REPORTS in os.environ:
        return Path(os.environ[_REPORTS])
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    return Path(error_file).parent.parent if error_file else None


def _write_traceback(out: Path | None, rank: int) -> str:
    """The current traceback into a file under ``out``; onto stderr if that cannot be written."""
    if out is None:
        return ""
    path = out / "errors" / f"rank_{rank}.log"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(traceback.format_exc())
    except OSError:
        traceback.print_exc()
        return ""
    return str(path)


def _end_with_the_launcher() -> None:
    """Ctrl-C and the launcher's death end this rank at once, even inside a collective."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if sys.platform == "linux":
        parent_death_signal = 1
        ctypes.CDLL(None).prctl(parent_death_signal, signal.SIGKILL)


def _report_foreign_sigterm(rank: int, folder: Path) -> None:
    """Report a SIGTERM that the launcher did not send: it is then the reason, not a consequence."""
    if not hasattr(signal, "sigwaitinfo"):
        return

    def wait() -> None:
        sender = signal.sigwaitinfo({signal.SIGTERM}).si_pid
        if sender != os.getppid():
            with contextlib.suppress(OSError):
                Report(rank, "signal", "ended by SIGTERM", "", time.time()).write(folder)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        os.kill(os.getpid(), signal.SIGTERM)

    # Blocked before the first thread starts, so that only the waiting thread receives it.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=wait, daemon=True, name="sigterm").start()
