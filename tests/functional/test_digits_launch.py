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
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.launcher import api

from examples.mimo.digits import INSTALL_HINT
from examples.mimo.digits.options import parse_options
from mimo_colocated.forensics.evidence import STOPPED, Evidence
from mimo_colocated.launch import (
    Job,
    JobError,
    Packages,
    choose_backend,
    connection_notes,
    ranks,
    starts,
)
from mimo_colocated.launch.failures import Exit, Report, explain, read_reports
from mimo_colocated.phases import Place

_ROOT = Path(__file__).parents[2]
_OTHERS = "; the other 7 ranks were ended"
_GLOO = "[x/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:30117"
_REFUSED = "[x/gloo/transport/tcp/debug_logger.cc:9] ERROR failed to connect, willRetry=1"


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
        # So it is where the report is all that is known of that moment, up to ten seconds.
        *(
            ({5: Exit(-9, at)}, _report(2, "error", "ValueError: no"), sentence + _OTHERS, log)
            for at, sentence, log in (
                (110.0, "rank 5 was killed by SIGKILL", ""),
                (110.5, "rank 2 failed: ValueError: no", "rank_2.log"),
                (131.0, "rank 2 failed: ValueError: no", "rank_2.log"),
            )
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


_GROUP = {"process_group": ("7", "cp"), "profiling_name": "gloo:all_gather"}
_CALL = {**_GROUP, "collective_seq_id": 17, "time_created_ns": 1, "retired": False}
_DUMP = {"entries": [_CALL], "pg_config": {"7": {"desc": "cp", "ranks": "[0, 3]"}}}
_EVIDENCE = Evidence(
    places={
        0: Place(0, step=2, phase="language forward"),
        3: Place(3, step=2, phase="bridge forward"),
    },
    dumps={0: _DUMP},
)
_WAITED = (
    " in the phase 'bridge forward' of step 2; rank 0 waited for it in all_gather #17 of the group "
    "cp [0, 3]" + _OTHERS
)


def test_a_rank_that_hangs_while_the_ranks_connect_has_not_ended_early() -> None:
    """It runs until it is told to end, and saves a dump when its peers give up."""
    exits = _exits(**{f"r{rank}": 1 for rank in range(7)})
    reports = {rank: report for rank, report in _all("peer").items() if rank != 7}
    place = Place(7, step=0, phase="start")
    evidence = Evidence({7: place}, {7: {"entries": [], "pg_config": {}}}, {}, frozenset(range(7)))
    sentence = explain(8, exits, reports, evidence).sentence
    assert sentence.startswith("rank 7 stopped answering in the phase 'start'"), sentence


@pytest.mark.parametrize(
    ("exits", "reports", "fates", "sentence", "log"),
    [
        (_exits(r3=-9), {}, {}, "rank 3 was killed by SIGKILL" + _WAITED, ""),
        # The launcher had to kill it, since it was stopped; that is no reason.
        (
            _exits(r3=-9, r0=1),
            _report(0, "peer"),
            {3: STOPPED},
            "rank 3 was stopped (SIGSTOP)" + _WAITED,
            "",
        ),
        # NCCL's watchdog aborted those that waited.
        (
            _exits(r0=-6, r1=-6, r2=-15, r3=-9),
            {},
            {3: STOPPED},
            "rank 3 was stopped (SIGSTOP)" + _WAITED,
            "",
        ),
        (_exits(r0=-6, r3=-9), {}, {}, "rank 3 was killed by SIGKILL" + _WAITED, ""),
        (_exits(r3=-6), {}, {}, "rank 3 was killed by SIGABRT" + _WAITED, ""),
        # Under torchrun nobody tells exit codes.
        ({}, _report(0, "peer"), {3: "died"}, "rank 3 died" + _WAITED, ""),
        # It runs, in no collective, and ends when it is told to.
        (
            _exits(r0=1, **{f"r{rank}": -15 for rank in range(1, 8)}),
            _report(0, "peer"),
            {},
            "rank 3 stopped answering" + _WAITED,
            "rank_0.log",
        ),
        # A rank that says itself why it failed needs no evidence, whoever hangs after that.
        (
            _exits(r2=1, r3=-9),
            _report(2, "error", "ValueError: no"),
            {3: "stopped answering"},
            "rank 2 failed: ValueError: no" + _OTHERS,
            "rank_2.log",
        ),
        (
            _exits(r0=-6, r2=1),
            _report(2, "error", "ValueError: no"),
            {},
            "rank 2 failed: ValueError: no" + _OTHERS,
            "rank_2.log",
        ),
    ],
)
def test_lost_ranks_are_named_with_phase_and_collective(
    exits: dict[int, Exit],
    reports: dict[int, Report],
    fates: dict[int, str],
    sentence: str,
    log: str,
) -> None:
    # Of a rank that only stopped answering there is a dump, in which it has entered nothing.
    idle = {**_DUMP, "entries": [{**_CALL, "collective_seq_id": 16, "retired": True}]}
    dumps = {0: _DUMP, **({3: idle} if "stopped answering" in sentence else {})}
    reason = explain(8, exits, reports, replace(_EVIDENCE, fates=fates, dumps=dumps))
    assert (reason.sentence, reason.log) == (sentence, log)
    assert (reason.waits is None) == sentence.startswith("rank 2 failed")


def test_one_and_two_ranks_are_counted_in_words() -> None:
    assert explain(1, {0: Exit(-9, 0.0)}, {}).sentence == "rank 0 was killed by SIGKILL"
    assert explain(1, {0: Exit(-40, 0.0)}, {}).sentence == "rank 0 was killed by signal 40"
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
        (ConnectionResetError(104, "Connection reset by peer"), "peer", r"ConnectionResetError: "),
        (ValueError("two\n  lines"), "error", r"ValueError: two lines$"),
        (ValueError("timeout must be positive"), "error", r"ValueError: timeout"),
        (KeyError(), "error", r"KeyError: no message$"),
        (OSError(errno.ENOSPC, "full", "a/b"), "error", r"the disk is full: the output .* to a/b;"),
        (ModuleNotFoundError("x", name="rich"), "error", r"the package is missing: rich; install"),
        (RuntimeError("x" * 999), "error", r"RuntimeError: x{380,}\.\.\.$"),
    ],
)
def test_reports_of_exceptions(error: Exception, kind: str, message: str, tmp_path: Path) -> None:
    report = Report.of(2, error, "rank_2.log", INSTALL_HINT)
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


@pytest.mark.parametrize("wanted", ["auto", "gloo"])
def test_cuda_is_not_started_before_its_devices_are_hidden(wanted: str, monkeypatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    started = []
    seen = lambda: started.append(os.environ["CUDA_VISIBLE_DEVICES"])  # noqa: E731
    monkeypatch.setattr(torch.cuda, "is_available", seen)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    options = parse_options(["--backend", wanted])
    assert ranks._rank_backend(Job("", parse_options, print), options, 8) == "gloo"
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
    assert started == []


def test_too_few_gpus_are_refused() -> None:
    assert choose_backend("nccl", 8, 8) == "nccl"
    with pytest.raises(JobError, match="8 ranks and 2 GPUs; use --backend gloo or layouts that"):
        choose_backend("nccl", 8, 2)
    with pytest.raises(JobError, match="8 ranks and 0 GPUs; use --backend gloo$"):
        choose_backend("nccl", 8, 0)


def test_missing_packages_are_named_together() -> None:
    Packages({"os": "os", "os.path": "os"}).check()
    wanted = Packages({"no_such_aa": "aa", "os": "os", "no_such_bb.inner": "bb"}, INSTALL_HINT)
    try:
        wanted.check()
        said = "nothing"
    except Exception as error:
        said = repr(error)
    assert re.match(r"JobError\(.the packages are missing: aa, bb; install .*\[examples\]", said)
    with pytest.raises(JobError, match=r"the package is missing: aa; install it with pip$"):
        Packages({"no_such_aa": "aa"}).check()


# ------------------------------------------------------------------------------ real processes

_JOB = f"""
import os, signal, sys, time
from pathlib import Path
sys.path.insert(0, {str(_ROOT)!r})
from examples.mimo.digits.options import parse_options
from mimo_colocated import phases
from mimo_colocated.launch import Job, JobError, Stopped, init_distributed, run, starts

def job(options, backend, requests=None):
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
            if rank == 1 and mode in ("SIGKILL", "SIGSTOP", "SIGSEGV"):
                phases.mark("lesson")
                os.kill(os.getpid(), getattr(signal, mode))
            if rank == 1 and mode == "raise":
                raise ValueError("no such thing")
        if mode == "waits":
            pid = Path(options.out / f"pid_{{rank}}")
            if not pid.exists():  # once: the test must not meet it half-written
                pid.write_text(str(os.getpid()))
            time.sleep(0.02)
        if requests is not None and (told := requests.agreed()):
            if mode == "stuck":
                time.sleep(600)
            time.sleep(1)  # to save takes time
            (options.out / f"saved_{{rank}}").write_text(str(step))
            raise Stopped(f"{{told.name}} after {{step}}")

def prepare():
    with open("prepared", "a") as file:
        file.write("once")
    # A collective that fails imports it, which takes seconds; Megatron-Core has done so.
    if os.environ["MODE"].startswith("SIG"):
        import torch._dynamo

starts.CAN_FORK = "SCRIPTS" not in os.environ
stops = os.environ["MODE"] in ("stops", "stuck")
if __name__ == "__main__":
    sys.exit(run(Job(__file__, parse_options, job, stops=stops, prepare=prepare), sys.argv[1:]))
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
    assert not list((tmp_path / "out").iterdir())  # no empty folder for what did not go wrong
    assert (tmp_path / "prepared").read_text() == "once"


@pytest.mark.parametrize("mode", ["works", "raise", "SIGKILL"])
def test_ranks_that_are_not_forked_run_their_script(mode: str, tmp_path: Path, monkeypatch) -> None:
    """As with GPUs."""
    monkeypatch.setenv("SCRIPTS", "1")
    code, output, errors = _finish(_start(tmp_path, mode))
    assert output == "running 2 gloo 1\n"
    said = {
        "works": "",
        "raise": "error: rank 1 failed: ValueError: no such thing; the other rank was ended\n",
        # With all cores in use the other one need not have come to wait for it.
        "SIGKILL": r"error: rank 1 was killed by SIGKILL in the phase 'lesson'; "
        "(rank 0 waited for it in|no rank was waiting for it yet;)",
    }[mode]
    assert code == int(mode != "works")
    assert re.match(said, errors)
    assert bool(errors) == (mode != "works")
    assert not (tmp_path / "prepared").exists()


def test_a_wrong_layout_is_refused_before_anything_starts(tmp_path: Path) -> None:
    code, output, errors = _finish(_start(tmp_path, "works", "--vision", "dp=3"))
    assert (code, output) == (2, "")
    assert errors.startswith("error: vision tp=1,dp=3 spans 3 ranks, language tp=2,cp=2,dp=2 spans")
    assert errors.count("\n") == 1
    assert not list((tmp_path / "out").iterdir())


def test_a_killed_rank_is_named_and_the_others_end(tmp_path: Path) -> None:
    process = _start(tmp_path, "SIGKILL", "--vision", "dp=4", "--language", "dp=4")
    assert process.stdout is not None
    assert process.stdout.readline() == "running 4 gloo 1\n"
    start = time.monotonic()
    code, _, errors = _finish(process)
    assert time.monotonic() - start < 60
    assert code == 1
    summary = tmp_path / "out" / "errors" / "flight_recorder" / "summary.txt"
    said = re.fullmatch(
        r"error: (rank 1 was killed by SIGKILL in the phase 'lesson'; ranks? [\d, and-]+ waited "
        r"for it in all_reduce #\d of all ranks; the other 3 ranks were ended)\n"
        rf"{_WHERE}{summary}\n",
        errors,
    )
    assert said, errors
    assert summary.read_text().startswith(
        f"{said[1]}.\n\nRank 1 was killed by SIGKILL in the phase 'lesson'.\n\nWaiting for it:\n"
    )
    assert sorted(path.name for path in summary.parent.iterdir()) == [
        *("rank_0", "rank_2", "rank_3", "summary.txt")
    ]


_WHERE = "who waits for whom: "


def test_a_stopped_rank_is_named_and_does_not_stay(tmp_path: Path) -> None:
    stalls = ("--vision", "dp=2", "--language", "dp=2", "--timeout", "15")
    process = _start(tmp_path, "SIGSTOP", *stalls)
    assert process.stdout is not None
    assert process.stdout.readline() == "running 2 gloo 1\n"
    ranks = psutil.Process(process.pid).children(recursive=True)
    start = time.monotonic()
    code, _, errors = _finish(process)
    assert 10 < time.monotonic() - start < 60
    assert code == 1
    assert re.fullmatch(
        r"error: rank 1 was stopped \(SIGSTOP\) in the phase 'lesson'; rank 0 waited for it in "
        rf"all_reduce #\d of all ranks; the other rank was ended\n{_WHERE}.*/summary.txt\n",
        errors,
    ), errors
    assert len(ranks) >= 2
    assert all(_gone(rank.pid) for rank in ranks)


@pytest.mark.parametrize("fault", ["SIGKILL", "SIGSTOP"])
def test_a_lost_rank_under_torchrun(tmp_path: Path, fault: str) -> None:
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    stalls = ("--vision", "dp=2", "--language", "dp=2", "--timeout", "15")
    code, _, errors = _finish(_start(tmp_path, fault, *stalls, before=torchrun))
    fate = {"SIGKILL": "died", "SIGSTOP": "was stopped (SIGSTOP)"}[fault]
    assert code == 1
    said = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert len(said) == 1, errors
    assert said[0].startswith(
        f"error: rank 1 {fate} in the phase 'lesson'; rank 0 waited for it in all_reduce #"
    ), errors
    summary = tmp_path / "out" / "errors" / "flight_recorder" / "summary.txt"
    assert f"Rank 1 {fate} in the phase 'lesson'." in summary.read_text()


@pytest.mark.parametrize("scripts", [False, True])
def test_a_fault_inside_a_library_leaves_where_python_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scripts: bool
) -> None:
    if scripts:
        monkeypatch.setenv("SCRIPTS", "1")
    code, _, errors = _finish(_start(tmp_path, "SIGSEGV"))
    log = tmp_path / "out" / "errors" / "rank_1.log"
    assert code == 1
    assert errors.startswith("error: rank 1 was killed by SIGSEGV in the phase 'lesson'; ")
    assert f"full traceback: {log}\n" in errors
    told = log.read_text()
    assert told.startswith("Fatal Python error: Segmentation fault")
    assert f'File "{tmp_path / "job.py"}", line' in told


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


@pytest.mark.parametrize(
    ("sent", "to"),
    [
        (signal.SIGTERM, "launcher"),
        (signal.SIGTERM, "launcher before its ranks are there"),
        (signal.SIGUSR1, "rank"),
        (signal.SIGTERM, "everyone"),  # as Slurm does; the launcher passes its own on
    ],
)
def test_a_job_that_is_told_to_stop_saves_on_all_ranks(
    tmp_path: Path, sent: signal.Signals, to: str
) -> None:
    process = _start(tmp_path, "stops")
    launcher = psutil.Process(process.pid)
    if "before" in to:
        _wait_until(lambda: "torch" in Path(f"/proc/{process.pid}/maps").read_text())
    else:
        assert process.stdout.readline() == "running 2 gloo 1\n"
    ranks = launcher.children()
    for each in {"rank": ranks[1:], "everyone": [*ranks, launcher]}.get(to, [launcher]):
        each.send_signal(sent)
    code, output, errors = _finish(process)
    assert (code, errors) == (75, "")
    saved = [(tmp_path / "out" / f"saved_{rank}").read_text() for rank in range(2)]
    assert saved[0] == saved[1]
    assert output.splitlines()[-1] == f"{sent.name} after {saved[0]}"
    assert all(_gone(rank.pid) for rank in ranks)


def test_a_second_sigterm_ends_all_ranks_at_once(tmp_path: Path) -> None:
    process = _start(tmp_path, "stuck")
    assert process.stdout.readline() == "running 2 gloo 1\n"
    ranks = psutil.Process(process.pid).children()
    process.send_signal(signal.SIGTERM)
    time.sleep(2.5)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    code, _, errors = _finish(process)
    assert (code, errors) == (143, "error: stopped by a second SIGTERM; all ranks were ended\n")
    assert all(_gone(rank.pid) for rank in ranks)


def test_a_job_that_is_told_to_stop_under_torchrun(tmp_path: Path) -> None:
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    process = _start(tmp_path, "stops", before=torchrun)
    assert process.stdout.readline() == "running 2 gloo 1\n"
    for rank in psutil.Process(process.pid).children():  # as Slurm does
        rank.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)
    code, output, errors = _finish(process)
    assert code == 1  # torchrun knows no other
    saved = [(tmp_path / "out" / f"saved_{rank}").read_text() for rank in range(2)]
    assert saved[0] == saved[1]
    assert output == f"SIGTERM after {saved[0]}\n"
    assert "error: " not in errors.splitlines()


def _wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGHUP, signal.SIGKILL, signal.SIGTERM])
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
    if sent is not signal.SIGKILL:
        said = f"error: stopped by {sent.name}; all ranks were ended\n"
        assert (code, errors) == (128 + sent, said)


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGTERM])
def test_what_ended_ranks_that_are_not_forked_is_told(
    sent: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch's agent raises it, when it has ended them."""

    def agent(*_arguments: object) -> None:
        raise KeyboardInterrupt if sent == signal.SIGINT else SignalException("ended", sent)

    monkeypatch.setattr(api, "elastic_launch", lambda *_: agent)
    monkeypatch.setattr(starts.logging.root.manager, "loggerDict", {})
    with pytest.raises(starts.Interrupted) as caught:
        starts.start_scripts(Job("job.py", parse_options, print), [], 2, tmp_path)
    assert (caught.value.sent, str(caught.value)) == (sent, sent.name)


@pytest.mark.parametrize(
    ("parents", "ends"),
    [([77, 77, 77], False), ([1, 1, 1], False), ([77, 1, 1], True), ([77, 77, 88], True)],
    ids=["waits", "launcher is pid 1", "to pid 1", "to a subreaper"],
)
def test_a_rank_waits_for_the_store_as_long_as_its_launcher_lives(
    parents: list[int], ends: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a container the launcher may be process 1, and some other process adopt orphans."""
    gate, seen = tmp_path / "store", iter(parents)

    def parent() -> int:
        found = next(seen, None)
        if found is None:
            gate.write_text("12345")
        return found or parents[-1]

    def end(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(starts, "os", SimpleNamespace(getppid=parent, _exit=end))
    if ends:
        with pytest.raises(SystemExit, match="1"):
            starts._port(gate)
    else:
        assert starts._port(gate) == "12345"


def test_gloo_s_notes_on_refused_connections_are_held_back(capfd):
    def write(*lines: str) -> None:
        os.write(2, "".join(f"{line}\n" for line in lines).encode())

    with pytest.raises(RuntimeError, match="lost"), connection_notes.held_back():  # noqa: PT012
        write(_REFUSED, "a warning", _REFUSED)
        raise RuntimeError("lost")
    write("what comes later", _REFUSED)
    assert capfd.readouterr().err.splitlines() == ["a warning", "what comes later", _REFUSED]


def test_a_rank_that_joins_in_vain_gives_up(monkeypatch):
    """Gloo would try a rank that is stopped again and again, and cannot be interrupted."""
    errors: list[Exception] = []
    monkeypatch.setattr(ranks, "_fail_this_rank", [errors.append])
    with ranks._given_up_after(30.0):
        pass
    with ranks._given_up_after(0.05):
        deadline = time.monotonic() + 20
        while not errors and time.monotonic() < deadline:
            time.sleep(0.01)
    assert len(errors) == 1
    report = Report.of(3, errors[0], "")
    assert (report.kind, report.message) == (
        "peer", "TimeoutError: Timed out after 0.05 s in init_process_group"
    )  # fmt: skip
