# SPDX-License-Identifier: Apache-2.0
"""The digits job's launcher: first the sentence for every kind of failure, then real processes.

The processes run a job of a few all-reduces on two to four ranks, so that what is tested is the
launcher and not a model.
"""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from errors import JobError, require_packages
from failures import Exit, Report, explain, read_reports
from launch import choose_backend

_MODULES = Path(__file__).parents[2] / "examples" / "mimo" / "digits"
_OTHERS = "; the other 7 ranks were ended"
_GLOO = "[x/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:30117"


def _exits(**codes: int) -> dict[int, Exit]:
    return {int(name[1:]): Exit(code, 100.0) for name, code in codes.items()}


def _report(rank: int, kind: str, message: str = "m", at: float = 100.0) -> dict[int, Report]:
    return {rank: Report(rank, kind, message, f"rank_{rank}.log", at)}


def _all(kind: str, ranks: range = range(8)) -> dict[int, Report]:
    return {rank: Report(rank, kind, "m", f"rank_{rank}.log", 100.0 + rank) for rank in ranks}


@pytest.mark.parametrize(
    ("exits", "reports", "sentence", "log"),
    [
        # Killed; its peers notice, and the launcher ends the rest.
        (
            _exits(r3=-9, r0=-15, r2=1, r4=1),
            {**_report(2, "peer", at=99.0), **_report(4, "peer", at=99.0)},
            "rank 3 was killed by SIGKILL" + _OTHERS,
            "",
        ),
        (_exits(r3=-11), {}, "rank 3 was killed by SIGSEGV" + _OTHERS, ""),
        (
            _exits(r3=-9, r5=-9),
            {},
            "ranks 3 and 5 were killed by SIGKILL; the other 6 ranks were ended",
            "",
        ),
        # A peer that hangs is killed by the launcher much later: a consequence.
        (
            {2: Exit(1, 100.0), 5: Exit(-9, 131.0)},
            _report(2, "error", "ValueError: no"),
            "rank 2 failed: ValueError: no" + _OTHERS,
            "rank_2.log",
        ),
        # An exception beats the peers that lose their connection, even if they are noticed first.
        (
            _exits(r2=1, r3=1),
            {**_report(2, "peer", at=98.0), **_report(3, "error", "ValueError: no", at=99.0)},
            "rank 3 failed: ValueError: no" + _OTHERS,
            "rank_3.log",
        ),
        # Two ranks fail in two ways: the first one counts.
        (
            _exits(r1=1, r6=1),
            {**_report(1, "error", "late", at=99.9), **_report(6, "error", "first", at=99.0)},
            "rank 6 failed: first" + _OTHERS,
            "rank_6.log",
        ),
        (_exits(r0=1), _all("job"), "m", "rank_0.log"),
        (_exits(r1=1), _all("job", range(1, 3)), "m", "rank_1.log"),
        (_exits(r0=1), _report(0, "job"), "m", "rank_0.log"),
        (_exits(r4=1), _report(4, "job"), "rank 4 failed: m" + _OTHERS, "rank_4.log"),
        (_exits(r0=1), _all("error"), "all 8 ranks failed: m", "rank_0.log"),
        (
            _exits(r3=-15, r0=-15),
            _report(3, "signal"),
            "rank 3 was ended by SIGTERM" + _OTHERS,
            "",
        ),
        (_exits(r3=7, r0=-15), {}, "rank 3 ended with exit code 7" + _OTHERS, ""),
        # Exit code 0, while the others still work.
        (
            _exits(r0=1, r1=-15, r2=-15, r4=-15, r5=-15, r6=-15, r7=-15),
            _report(0, "peer"),
            "rank 3 ended too early" + _OTHERS,
            "",
        ),
        # A rank hangs: all others wait for it until they give up.
        (
            _exits(r0=1, r1=1, r2=1, r3=-9, r4=1, r5=1, r6=1, r7=1) | {3: Exit(-9, 131.0)},
            {rank: report for rank, report in _all("peer").items() if rank != 3},
            "rank 3 stopped answering" + _OTHERS,
            "rank_0.log",
        ),
        (
            _exits(**{f"r{rank}": -15 for rank in range(1, 8)}, r0=1),
            _report(0, "peer"),
            "rank 0 waited in vain for another rank" + _OTHERS,
            "rank_0.log",
        ),
        (
            _exits(**{f"r{rank}": -15 for rank in range(8)}),
            {},
            "the ranks were ended by SIGTERM",
            "",
        ),
    ],
)
def test_the_first_failure_is_named(
    exits: dict[int, Exit], reports: dict[int, Report], sentence: str, log: str
) -> None:
    reason = explain(8, exits, reports)
    assert (reason.sentence, reason.log) == (sentence, log)


def test_one_and_two_ranks_are_counted_in_words() -> None:
    assert explain(1, {0: Exit(-9, 0.0)}, {}).sentence == "rank 0 was killed by SIGKILL"
    assert explain(1, {}, _report(0, "error")).sentence == "the only rank failed: m"
    assert explain(2, {}, _report(1, "error")).sentence == (
        "rank 1 failed: m; the other rank was ended"
    )


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (JobError("one sentence"), "job", r"one sentence$"),
        (RuntimeError(_GLOO), "peer", r"RuntimeError: .*Connection closed by peer"),
        (RuntimeError("Timed out waiting 60000ms"), "peer", r"RuntimeError: Timed out"),
        (ValueError("two\n  lines"), "error", r"ValueError: two lines$"),
        (ValueError("timeout must be positive"), "error", r"ValueError: timeout"),
        (KeyError(), "error", r"KeyError: no message$"),
        (OSError(errno.ENOSPC, "full", "a/b"), "error", r"the disk is full: the output .* to a/b;"),
        (ModuleNotFoundError("x", name="rich"), "error", r"the package is missing: rich; install"),
        (RuntimeError("x" * 999), "error", r"RuntimeError: x{380,}\.\.\.$"),
    ],
)
def test_reports_of_exceptions(error: Exception, kind: str, message: str, tmp_path: Path) -> None:
    report = Report.of(2, error, "rank_2.log")
    assert report.kind == kind
    assert re.match(message, report.message)
    assert "\n" not in report.message
    assert report.at == pytest.approx(time.time(), abs=60)
    report.write(tmp_path)
    assert read_reports(tmp_path) == {2: report}


@pytest.mark.parametrize(
    ("wanted", "gpus", "backend"),
    [("auto", 8, "nccl"), ("auto", 7, "gloo"), ("auto", 0, "gloo"), ("gloo", 8, "gloo")],
)
def test_nccl_needs_a_gpu_per_rank(wanted: str, gpus: int, backend: str) -> None:
    assert choose_backend(wanted, 8, gpus) == backend


def test_too_few_gpus_are_refused() -> None:
    assert choose_backend("nccl", 8, 8) == "nccl"
    with pytest.raises(JobError, match="8 ranks and 2 GPUs; use --backend gloo or layouts that"):
        choose_backend("nccl", 8, 2)
    with pytest.raises(JobError, match="8 ranks and 0 GPUs; use --backend gloo$"):
        choose_backend("nccl", 8, 0)


def test_missing_packages_are_named_together() -> None:
    require_packages({"os": "os", "os.path": "os"})
    with pytest.raises(JobError, match=r"the packages are missing: aa, bb; install .*\[examples\]"):
        require_packages({"no_such_aa": "aa", "os": "os", "no_such_bb.inner": "bb"})


# ------------------------------------------------------------------------------ real processes

_JOB = f"""
import os, signal, sys, time
from pathlib import Path
sys.path.insert(0, {str(_MODULES)!r})
from errors import JobError
from launch import init_distributed, run
from options import parse_options

def job(options, backend):
    import torch
    init_distributed(backend, options.timeout)
    rank, mode = torch.distributed.get_rank(), os.environ["MODE"]
    for step in range(3 if mode == "works" else 100000):
        torch.distributed.all_reduce(total := torch.ones(1))
        if step == 1 and rank == 0:
            print("running", int(total), backend, os.environ["OMP_NUM_THREADS"], flush=True)
        if step == 2:
            if mode == "everywhere":
                raise JobError("the checkpoint is of another model")
            if rank == 1 and mode == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if rank == 1 and mode == "raise":
                raise ValueError("no such thing")
        if mode == "waits":
            pid = Path(options.out / f"pid_{{rank}}")
            if not pid.exists():  # once: the test must not meet it half-written
                pid.write_text(str(os.getpid()))
            time.sleep(0.02)

sys.exit(run(__file__, sys.argv[1:], parse_options, job))
"""
_TWO_RANKS = ("--vision", "dp=2", "--language", "dp=2", "--timeout", "30")


def _environment(mode: str) -> dict[str, str]:
    dropped = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "OMP_NUM_THREADS")
    return {k: v for k, v in os.environ.items() if k not in dropped} | {"MODE": mode}


def _start(
    tmp_path: Path, mode: str, *arguments: str, before: tuple[str, ...] = ()
) -> subprocess.Popen[str]:
    script, out = tmp_path / "job.py", tmp_path / "out"
    script.write_text(_JOB)
    out.mkdir()
    return subprocess.Popen(
        [sys.executable, *before, str(script), *(arguments or _TWO_RANKS), "--out", str(out)],
        env=_environment(mode),
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A test run in the background ignores Ctrl-C, and its children would inherit that.
        preexec_fn=_listen_to_ctrl_c,
    )


def _listen_to_ctrl_c() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    try:
        output, errors = process.communicate(timeout=150)
    finally:
        process.kill()
    return process.returncode, output, errors


def test_the_ranks_run_and_find_each_other(tmp_path: Path) -> None:
    code, output, errors = _finish(_start(tmp_path, "works"))
    assert (code, output, errors) == (0, "running 2 gloo 1\n", "")


def test_a_wrong_layout_is_refused_before_anything_starts(tmp_path: Path) -> None:
    code, output, errors = _finish(_start(tmp_path, "works", "--vision", "dp=3"))
    assert (code, output) == (2, "")
    assert errors.startswith("error: vision tp=1,dp=3 spans 3 ranks, language tp=2,cp=2,dp=2 spans")
    assert errors.count("\n") == 1
    assert not list((tmp_path / "out").iterdir())


def test_a_killed_rank_is_named_and_the_others_end(tmp_path: Path) -> None:
    process = _start(tmp_path, "kill", "--vision", "dp=4", "--language", "dp=4")
    assert process.stdout is not None
    assert process.stdout.readline() == "running 4 gloo 1\n"
    start = time.monotonic()
    code, _, errors = _finish(process)
    assert time.monotonic() - start < 60
    assert code == 1
    assert errors == "error: rank 1 was killed by SIGKILL; the other 3 ranks were ended\n"


def test_an_exception_is_one_sentence_and_a_log(tmp_path: Path) -> None:
    code, _, errors = _finish(_start(tmp_path, "raise"))
    log = tmp_path / "out" / "errors" / "rank_1.log"
    assert code == 1
    assert errors == (
        "error: rank 1 failed: ValueError: no such thing; the other rank was ended\n"
        f"full traceback: {log}\n"
    )
    assert 'raise ValueError("no such thing")' in log.read_text()


def test_an_error_of_all_ranks_is_said_once(tmp_path: Path) -> None:
    code, _, errors = _finish(_start(tmp_path, "everywhere"))
    assert code == 1
    assert errors.splitlines()[0] == "error: the checkpoint is of another model"
    assert len(errors.splitlines()) == 2


def test_under_torchrun_too(tmp_path: Path) -> None:
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    code, _, errors = _finish(_start(tmp_path, "everywhere", before=torchrun))
    assert code == 1
    assert errors.count("error: the checkpoint is of another model") == 1


def _gone(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return True
    return state == "Z"


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_the_ranks_end_with_the_launcher(tmp_path: Path, sent: signal.Signals) -> None:
    process = _start(tmp_path, "waits")
    assert process.stdout is not None
    assert process.stdout.readline() == "running 2 gloo 1\n"
    pids = [int((tmp_path / "out" / f"pid_{rank}").read_text()) for rank in range(2)]
    process.send_signal(sent)
    code, _, errors = _finish(process)
    deadline = time.monotonic() + 20
    while not all(map(_gone, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert all(map(_gone, pids))
    if sent is signal.SIGINT:
        assert (code, errors) == (130, "error: stopped by SIGINT; all ranks were ended\n")
