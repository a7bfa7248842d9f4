# SPDX-License-Identifier: Apache-2.0
"""Whole runs of the digits job, started as a user starts it.

Launches are what costs time here: runs are made once per module and shared by the tests that look
at different sides of them.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from pathlib import Path
from typing import NamedTuple

import matplotlib.image
import pytest

from tests.functional.digits_job import (
    Job,
    checkpoints,
    everything,
    is_alive,
    metrics,
    sabotage,
    steps_done,
    trained,
)

ONE_RANK = "--vision tp=1,dp=1 --language tp=1,dp=1"
TWO_RANKS = "--vision tp=1,dp=2 --language tp=2,dp=1"
FOUR_RANKS = "--vision tp=2,dp=2 --language tp=1,cp=2,dp=2"
PARITY_STEPS = 6
LAST_STEP = f"step_{PARITY_STEPS:08}"


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the runs that tests share."""
    return tmp_path_factory.mktemp("jobs")


@pytest.fixture(scope="module")
def reference(shelf: Path) -> Job:
    """The one-process run, which is right by definition."""
    arguments = f"{ONE_RANK} --steps {PARITY_STEPS}"
    return Job(shelf / "reference", arguments, fresh=True).wait().succeeded()


# ------------------------------------------------------------------------- parity and the outputs


class Parity(NamedTuple):
    """An 8-rank run and the layouts that its summary must show."""

    arguments: str
    vision: dict[str, int]
    language: dict[str, int]


EIGHT_RANKS = {
    "fan-in": Parity(
        "--vision tp=2,dp=4 --language tp=2,cp=2,dp=2",
        {"tp": 2, "dp": 4},
        {"tp": 2, "cp": 2, "dp": 2},
    ),
    "pipelined": Parity(
        "--vision tp=1,dp=8 --language tp=1,cp=2,pp=2,dp=2 --micro-batches 4 --encode-ahead 1",
        {"tp": 1, "dp": 8},
        {"tp": 1, "cp": 2, "pp": 2, "dp": 2},
    ),
    "fan-out": Parity(
        "--vision tp=4,dp=2 --language tp=1,cp=2,dp=4 --no-overlap-grad-reduce "
        "--no-distributed-optimizer --no-evaluate --bridge gather",
        {"tp": 4, "dp": 2},
        {"tp": 1, "cp": 2, "dp": 4},
    ),
    "equal DP": Parity(
        "--vision tp=4,dp=2 --language tp=2,cp=2,dp=2 --sequence-parallel "
        "--distributed-optimizer --overlap-grad-reduce --micro-batches 2 --no-evaluate",
        {"tp": 4, "dp": 2},
        {"tp": 2, "cp": 2, "dp": 2},
    ),
}


@pytest.fixture(scope="module", params=list(EIGHT_RANKS))
def eight_ranks(request: pytest.FixtureRequest, shelf: Path) -> tuple[Parity, Job]:
    """A run on 8 ranks with the reference's seed, data and learning rates."""
    parity = EIGHT_RANKS[request.param]
    arguments = f"{parity.arguments} --steps {PARITY_STEPS}"
    folder = shelf / request.param.replace(" ", "_")
    return parity, Job(folder, arguments).wait().succeeded()


def test_eight_ranks_lose_what_one_process_loses(
    reference: Job, eight_ranks: tuple[Parity, Job]
) -> None:
    _, job = eight_ranks
    wanted = reference.losses()
    assert len(wanted) == PARITY_STEPS
    assert wanted[-1] < wanted[0] - 1  # it does learn: equal losses are not equal constants
    assert job.losses() == pytest.approx(wanted, rel=0, abs=1e-4)


def test_experts_on_eight_ranks_lose_what_they_lose_on_one(tmp_path: Path) -> None:
    """With everything that is on by default: both overlaps, the distributed optimizer."""
    more = "--experts 4 --steps 3 --save-every 0 --no-evaluate"
    eight = "--vision tp=2,dp=4 --language tp=2,cp=2,dp=2,ep=4,etp=1 --sequence-parallel"
    one = Job(tmp_path / "one", f"{ONE_RANK} {more}")
    many = Job(tmp_path / "many", f"{eight} {more}").wait().succeeded()
    assert many.summary()["language"] | {"ep": 4, "etp": 1} == many.summary()["language"]
    assert many.losses() == pytest.approx(one.wait().succeeded().losses(), rel=0, abs=1e-4)


def test_the_outputs_are_complete(eight_ranks: tuple[Parity, Job]) -> None:
    parity, job = eight_ranks
    summary = job.summary()
    assert {axis: summary["vision"][axis] for axis in parity.vision} == parity.vision
    assert {axis: summary["language"][axis] for axis in parity.language} == parity.language
    assert (summary["world_size"], summary["backend"]) in [(8, "gloo"), (8, "nccl")]
    assert {"python", "torch", "megatron-core"} <= set(summary["versions"])
    assert (summary["seed"], summary["steps"]) == (1234, PARITY_STEPS)
    assert summary["final_loss"] == job.losses()[-1]
    assert summary["seconds_per_step"] > 0
    assert [line["step"] for line in job.metrics()] == list(range(1, PARITY_STEPS + 1))
    assert "Traceback" not in job.output + job.errors
    pictures = ["loss.png", "layout.png"]
    if "--no-evaluate" in parity.arguments:
        assert summary["test_accuracy"] is None
    else:
        assert 0 <= summary["test_accuracy"] <= 1
        pictures.append("predictions.png")
    for name in pictures:
        height, width, _ = matplotlib.image.imread(job.out / name).shape
        assert min(height, width) > 100, name


def test_one_line_per_step_is_printed(reference: Job) -> None:
    lines = [line for line in reference.output.splitlines() if line.startswith("step ")]
    assert len(lines) == PARITY_STEPS
    for line, step in zip(lines, reference.metrics(), strict=True):
        assert f"loss {step['loss']:.4f}  grad norm {step['grad_norm']:.3f}" in line
    assert f"starting anew in {reference.out}" in reference.output
    assert reference.errors == ""


@pytest.mark.once
def test_a_finished_run_resumes_says_so_and_changes_no_loss(reference: Job, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(reference.out, out)
    again = Job(out, f"{ONE_RANK} --steps {PARITY_STEPS}").wait().succeeded()
    assert f"resuming after step {PARITY_STEPS} from {out}" in again.output
    assert again.metrics() == reference.metrics()
    before, after = reference.summary(), again.summary()
    assert after.pop("seconds_per_step") > 0
    del before["seconds_per_step"]
    assert after == before


@pytest.mark.once
def test_fresh_sets_earlier_results_aside_and_deletes_nothing(
    reference: Job, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(reference.out, out)
    before = dict(everything(out))
    fresh = Job(out, f"{ONE_RANK} --steps 2 --fresh --no-evaluate").wait().succeeded()
    aside = out / "previous" / "1"
    assert f"--fresh: the earlier results are in {aside}\n" in fresh.output
    assert f"starting anew in {out}" in fresh.output
    assert dict(everything(aside)) == before
    assert [line["step"] for line in fresh.metrics()] == [1, 2]
    assert fresh.losses()[0] == reference.losses()[0]


# ----------------------------------------------------------------------------------- two encoders

SOUND_STEPS = 6
ONE_RANK_WITH_SOUNDS = "--vision tp=1,dp=1 --audio tp=1,dp=1 --language tp=1,dp=1"
STAGES_WITH_SOUNDS = (
    "--vision tp=2,dp=4 --audio tp=1,dp=8 --language tp=1,cp=2,pp=2,dp=2 --micro-batches 4 "
    "--encode-in-bubbles 2"
)


@pytest.fixture(scope="module")
def with_sounds(shelf: Path) -> tuple[Job, Job]:
    """The same steps on one process and on 8 ranks, with images and sounds."""
    alone = f"{ONE_RANK_WITH_SOUNDS} --steps {SOUND_STEPS} --no-evaluate --save-every 0"
    staged = f"{STAGES_WITH_SOUNDS} --steps {SOUND_STEPS} --save-every 3"
    return (
        Job(shelf / "sounds_one", alone).wait().succeeded(),
        Job(shelf / "sounds_eight", staged).wait().succeeded(),
    )


def test_two_encoders_lose_what_one_process_loses(with_sounds: tuple[Job, Job]) -> None:
    alone, staged = with_sounds
    wanted = alone.losses()
    assert len(wanted) == SOUND_STEPS
    assert wanted[-1] < wanted[0] - 1
    assert staged.losses() == pytest.approx(wanted, rel=0, abs=1e-4)


def test_the_outputs_tell_of_both_encoders(with_sounds: tuple[Job, Job]) -> None:
    alone, staged = with_sounds
    summary = staged.summary()
    layouts = {name: summary[name] for name in ("vision", "audio", "language")}
    assert {name: layout["dp"] for name, layout in layouts.items()} == {
        "vision": 4,
        "audio": 8,
        "language": 2,
    }
    kinds = summary["test_accuracy_by_kind"]
    assert set(kinds) == {"images", "sounds"}
    assert summary["test_accuracy"] == pytest.approx(sum(kinds.values()) / 2)
    assert "reading 359 held-out images and 359 sounds" in staged.output
    sizes = {
        name: matplotlib.image.imread(staged.out / name).shape
        for name in ("layout.png", "predictions.png")
    }
    assert sizes["layout.png"][0] > sizes["layout.png"][1] * 0.9  # one panel is half as high
    assert min(sizes["predictions.png"][:2]) > 100
    assert alone.summary()["test_accuracy"] is None


@pytest.mark.once
def test_a_run_with_sounds_goes_on_in_another_layout(
    with_sounds: tuple[Job, Job], tmp_path: Path
) -> None:
    alone, staged = with_sounds
    out = tmp_path / "run"
    shutil.copytree(staged.out, out)
    shutil.rmtree(out / "checkpoints" / f"step_{SOUND_STEPS:08}")
    two_ranks = "--vision tp=1,dp=2 --audio tp=2,dp=1 --language tp=2,dp=1 --micro-batches 4"
    job = Job(out, f"{two_ranks} --steps {SOUND_STEPS} --no-evaluate").wait().succeeded()
    assert f"resuming after step 3 from {out}" in job.output
    assert "saved in another layout" in job.output
    assert job.losses() == pytest.approx(alone.losses(), rel=0, abs=1e-4)


# -------------------------------------------------------------------------------------- SIGKILL

KILLED = f"{TWO_RANKS} --steps 8 --save-every 3 --no-evaluate"

_WATCH_OPEN = """
import builtins, io, pathlib, time
_open = io.open

def watched(file, *args, **kwargs):
    if RANK == "{rank}" and str(file).endswith("{name}") and "{folder}" in str(file):
        {action}
    return _open(file, *args, **kwargs)

builtins.open = io.open = watched
pathlib.Path.open = lambda self, *args, **kwargs: watched(self, *args, **kwargs)
"""


@pytest.fixture(scope="module")
def uninterrupted(shelf: Path) -> Job:
    """Eight steps on two ranks, nothing happens to them."""
    return Job(shelf / "uninterrupted", KILLED).wait().succeeded()


@pytest.mark.once
def test_killed_runs_continue_to_bit_identical_losses(uninterrupted: Job, tmp_path: Path) -> None:
    out = tmp_path / "run"
    partial = out / "checkpoints" / ".saving_00000006"

    # Before there is any checkpoint.
    job = Job(out, KILLED)
    job.wait_for(lambda: steps_done(out) >= 2)
    job.kill()
    assert steps_done(out) < 8

    # In the middle of the second save: rank 1 is not done with its files, rank 0 is.
    hold_write = _WATCH_OPEN.format(
        rank=1, name=".distcp", folder="_00000006", action="time.sleep(600)"
    )
    job = Job(out, KILLED, faults=sabotage(tmp_path / "hold_write", hold_write))
    job.wait_for(lambda: list(partial.glob("__0_*.distcp")))
    job.kill()
    assert "starting anew" in job.output
    assert checkpoints(out) == [partial.name, "step_00000003"]

    # At the end of the same save, when everything is there but the name; the partial is taken
    # away first and never picked up.
    hold_rename = (
        "import time\n_rename = os.rename\n"
        "os.rename = lambda a, b: time.sleep(600) if 'step_00000006' in str(b) else _rename(a, b)\n"
    )
    job = Job(out, KILLED, faults=sabotage(tmp_path / "hold_rename", hold_rename))
    job.wait_for((partial / "mimo.json").exists)
    job.kill()
    assert "resuming after step 3 " in job.output
    assert checkpoints(out) == [partial.name, "step_00000003"]

    # At whatever moment after the second save; the last line of the metrics is cut short.
    job = Job(out, KILLED)
    job.wait_for(lambda: "step_00000006" in checkpoints(out))
    job.kill()
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')

    job = Job(out, KILLED).wait().succeeded()
    assert "resuming after step 6 " in job.output
    assert trained(metrics(out)) == trained(uninterrupted.metrics())
    assert checkpoints(out) == ["step_00000006", "step_00000008"]


# --------------------------------------------------------------------------------- told to stop


def _ends_of(job: Job) -> tuple[int, str, str]:
    """Exit code, last line and errors of a job that was told to stop."""
    job.wait()
    errors = [line for line in job.errors.splitlines() if "rror" in line]
    return job.process.returncode, job.output.splitlines()[-1], "".join(errors)


@pytest.mark.once
def test_a_job_that_is_told_to_stop_saves_and_goes_on_to_bit_identical_losses(
    uninterrupted: Job, tmp_path: Path
) -> None:
    out = tmp_path / "run"

    # One rank alone, as soon as it receives signals.
    early = (
        "import threading, time, signal\n"
        "def warn():\n"
        "    while signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL: time.sleep(0.001)\n"
        "    os.kill(os.getpid(), signal.SIGUSR1)\n"
        "if RANK == '1': threading.Thread(target=warn, daemon=True).start()\n"
    )
    job = Job(out, KILLED, faults=sabotage(tmp_path / "early", early))
    said = "stopped by SIGUSR1 before any step; the same command starts again"
    assert _ends_of(job) == (75, said, "")
    assert checkpoints(out) == []

    # While the first checkpoint is saved: it is finished, and no other one is made.
    touch = f"open({str(tmp_path / 'saving')!r}, 'w').close(); time.sleep(1)"
    slow_write = _WATCH_OPEN.format(rank=1, name=".distcp", folder="_00000003", action=touch)
    foreground = f"{KILLED} --no-background-saves"
    job = Job(out, foreground, faults=sabotage(tmp_path / "slow_write", slow_write))
    job.wait_for((tmp_path / "saving").exists)
    job.rank(0).terminate()
    said = (
        f"stopped by SIGTERM after step {{}} of 8, which is saved in {out}/checkpoints/"
        "step_{:08}; the same command goes on from there"
    )
    assert _ends_of(job) == (75, said.format(3, 3), "")
    assert checkpoints(out) == ["step_00000003"]

    # Between two saves.
    job = Job(out, KILLED)
    job.wait_for(lambda: steps_done(out) >= 4)
    job.process.terminate()
    ends, steps = _ends_of(job), steps_done(out)
    assert ends == (75, said.format(steps, steps), "")
    assert 4 <= steps < 8
    assert f"step_{steps:08}" in checkpoints(out)

    # All is trained, and the held-out images are being read.
    evaluating = f"{KILLED.replace('--no-evaluate', '')} --eval-batch-size 2"
    job = Job(out, evaluating)
    job.wait_for(lambda: "reading 359 held-out images" in job.output)
    job.process.terminate()
    assert _ends_of(job) == (75, said.format(8, 8), "")
    assert f"resuming after step {steps} " in job.output
    assert trained(metrics(out)) == trained(uninterrupted.metrics())
    assert not (out / "summary.json").exists()

    job = Job(out, KILLED).wait().succeeded()
    assert "resuming after step 8 " in job.output
    assert trained(metrics(out)) == trained(uninterrupted.metrics())


# ------------------------------------------------------------------------------------- bad input


@pytest.mark.once
@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            "--vision tp=2,dp=4 --language tp=2,cp=2,dp=4",
            "vision tp=2,dp=4 spans 8 ranks, language tp=2,cp=2,dp=4 spans 16, and both must span "
            "the same ranks; try --vision tp=2,dp=4 --language tp=2,cp=2,dp=2",
        ),
        (
            "--vision tp=2,dp=3 --language tp=3,dp=2",
            "vision dp=3 and language dp=2 do not divide, and the larger must be a multiple of the "
            "smaller; try --vision tp=2,dp=2 --language tp=2,dp=2",
        ),
        (
            "--nproc 4",
            "vision tp=2,dp=4 and language tp=2,cp=2,dp=2 span 8 ranks, but the job has 4 ranks; "
            "try --vision tp=2,dp=2 --language tp=2,cp=2,dp=1",
        ),
    ],
)
def test_wrong_layouts_are_refused_with_a_pair_that_fits(
    tmp_path: Path, arguments: str, sentence: str
) -> None:
    job = Job(tmp_path / "run", arguments).wait()
    assert job.error() == sentence
    assert job.process.returncode == 2
    assert not job.out.exists()


@pytest.mark.once
def test_too_few_ranks_under_torchrun(tmp_path: Path) -> None:
    torchrun = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"}
    job = Job(tmp_path / "run", "--vision tp=2,dp=4 --language tp=2,cp=2,dp=2", **torchrun).wait()
    assert "span 8 ranks, but the job has 4 ranks; try --vision" in job.error()
    assert not job.out.exists()


@pytest.mark.once
def test_a_missing_package_is_named(tmp_path: Path) -> None:
    hidden = sabotage(
        tmp_path / "hidden",
        """
import sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("matplotlib", "rich"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hidden())
""",
    )
    job = Job(tmp_path / "run", ONE_RANK, faults=hidden, fresh=True).wait()
    assert job.error() == (
        "the packages are missing: matplotlib, rich; "
        "install what the examples need with: pip install '.[examples]'"
    )
    assert not job.out.exists()


@pytest.mark.once
def test_a_run_whose_numbers_are_not_finite_says_where_and_gives_up(tmp_path: Path) -> None:
    """A learning rate of 1e38 leaves weights that no forward pass survives."""
    arguments = f"{ONE_RANK} --steps 20 --lr 1e38 --max-skipped 3 --save-every 1"
    job = Job(tmp_path / "run", arguments).wait()
    skipped = [line for line in job.metrics() if "skipped" in line]
    last = skipped[-1]
    assert [line["step"] for line in skipped] == list(range(last["step"] - 2, last["step"] + 1))
    assert last["skipped"].startswith(
        "the loss is not finite: the output of images is not finite (rank 0); gradients of images "
        "and language are not finite (rank 0: modality_submodules.images."
    )
    assert last["nonfinite"] == ["images", "language"]
    assert f"step {last['step']} skipped: {last['skipped']}" in job.output
    assert len({line["learning_rate"] for line in skipped}) == 1
    assert job.error() == (
        f"step {last['step']} was skipped, the last of 3 in a row: {last['skipped']}; use a "
        "smaller --lr (now 1e+38) and --fresh, or look at what that part of the model reads"
    )
    again = Job(job.out, arguments).wait()
    assert f"resuming after step {last['step'] - 1}" in again.output
    # Skipped steps do not move the schedule, not even over a resume.
    rates = [line["learning_rate"] for line in again.metrics() if "skipped" in line]
    assert len(rates) == 5
    assert set(rates) == {last["learning_rate"]}


@pytest.mark.once
def test_a_killed_rank_is_named_and_the_others_end(tmp_path: Path) -> None:
    job = Job(tmp_path / "run", f"{FOUR_RANKS} --steps 5000 --save-every 0")
    job.wait_for(lambda: steps_done(job.out) >= 3)
    everyone = job.processes()
    start = time.monotonic()
    job.rank(2).kill()
    job.wait()
    assert time.monotonic() - start < 60
    assert re.fullmatch(
        r"rank 2 was killed by SIGKILL in the phase '[a-z ]+' of step \d+(, microbatch 0)?; "
        r"ranks? [\d, and-]+ waited for it in \w+ #\d+ of (all ranks|the group [^\[]+\[[\d, -]+\])"
        r"; the other 3 ranks were ended",
        job.error(),
    ), job.error()
    assert len(everyone) >= 5
    assert not any(map(is_alive, everyone))
    assert job.metrics()  # whole lines only
    assert not (job.out / "summary.json").exists()


SAVING = f"{TWO_RANKS} --steps 3 --save-every 2 --no-evaluate"


@pytest.mark.once
@pytest.mark.parametrize(
    ("code", "options", "sentence"),
    [
        pytest.param(
            "import shutil, types\n"
            "shutil.disk_usage = lambda path: types.SimpleNamespace(free=1_000_000)\n",
            "",
            r"rank 0 could not write checkpoint .*/step_00000002: .* MB needed, 1\.0 MB free: make "
            r"room on that disk; training stopped after step 2",
            id="seen beforehand",
        ),
        pytest.param(
            _WATCH_OPEN.format(
                rank=1, name=".distcp", folder="", action='return _open("/dev/full", "wb")'
            ),
            "--no-background-saves",
            r"rank 1 could not write checkpoint .*/step_00000002: the disk is full "
            r"\(No space left on device\); make room there and resume; training stopped after step "
            r"2",
            id="while one rank writes",
        ),
        pytest.param(
            _WATCH_OPEN.format(
                rank=1, name=".distcp", folder="", action='return _open("/dev/full", "wb")'
            ),
            "",
            r"rank 1 could not write checkpoint .*/step_00000002: the disk is full "
            r"\(No space left on device\); make room there and resume; training stopped after step "
            r"3",
            id="in the background",
        ),
        pytest.param(
            _WATCH_OPEN.format(
                rank=0, name=".metadata.tmp", folder="", action='return _open("/dev/full", "wb")'
            ),
            "--no-background-saves",
            r"rank 0 could not write checkpoint .*/step_00000002: the disk is full "
            r"\(No space left on device\); make room there and resume; training stopped after step "
            r"2",
            id="while the others wait in a collective",
        ),
    ],
)
def test_a_full_disk_ends_the_run_and_leaves_no_checkpoint(
    tmp_path: Path, code: str, options: str, sentence: str
) -> None:
    job = Job(tmp_path / "run", f"{SAVING} {options}", faults=sabotage(tmp_path / "full", code))
    job.wait_for(lambda: steps_done(job.out) >= 2)
    start = time.monotonic()
    job.wait()
    assert time.monotonic() - start < 60
    assert job.process.returncode == 1
    assert re.fullmatch(sentence, job.error()), job.error()
    assert checkpoints(job.out) == []
    last = int(sentence[-1])
    assert [line["step"] for line in job.metrics()] == list(range(1, last + 1))


def _of_another_model(out: Path) -> None:
    path = out / "checkpoints" / LAST_STEP / "mimo.json"
    manifest = json.loads(path.read_text())
    name = next(name for name in manifest["shapes"] if "word_embeddings" in name)
    manifest["shapes"][name] = [64, 256]
    del manifest["digest"]  # which would tell that it was changed
    path.write_text(json.dumps(manifest))


def _with_a_corrupt_manifest(out: Path) -> None:
    path = out / "checkpoints" / LAST_STEP / "mimo.json"
    path.write_text(path.read_text()[:100])


def _with_a_truncated_file(out: Path) -> None:
    path = out / "checkpoints" / LAST_STEP / "__0_0.distcp"
    path.write_bytes(path.read_bytes()[:1000])


def _as_it_is(out: Path) -> None:
    pass


REFUSED = {
    "another model": (
        _of_another_model,
        "",
        r"checkpoint .* is of another model: '.*word_embeddings.*' is \[64, 256\] there and "
        r"\[64, 128\] here; .*",
    ),
    "corrupt manifest": (
        _with_a_corrupt_manifest,
        "",
        rf"checkpoint .*{LAST_STEP} cannot be read \(.*\); remove that folder to use an earlier "
        r"one",
    ),
    "truncated file": (
        _with_a_truncated_file,
        "",
        rf"rank 0 could not read checkpoint .*{LAST_STEP}: .*{LAST_STEP}/__0_0\.distcp has 1000 "
        r"bytes, \d+ were saved; remove that folder to use an earlier one",
    ),
    "other options": (
        _as_it_is,
        "--lr 0.01",
        r".* holds a run with --lr 0\.0015, this one has 0\.01; give --lr 0\.0015 to resume it, "
        r"--fresh to start anew, or another --out",
    ),
}


@pytest.fixture(scope="module")
def refused(shelf: Path, reference: Job) -> dict[str, tuple[Job, dict[str, bytes]]]:
    """Re-runs that cannot resume, side by side, and what was in their folders before."""
    jobs = {}
    for name, (spoil, arguments, _) in REFUSED.items():
        out = shelf / "refused" / name.replace(" ", "_")
        shutil.copytree(reference.out, out)
        spoil(out)
        before = dict(everything(out))
        jobs[name] = Job(out, f"{ONE_RANK} --steps {PARITY_STEPS} {arguments}"), before
    for job, _ in jobs.values():
        job.wait()
    return jobs


@pytest.mark.once
@pytest.mark.parametrize("name", list(REFUSED))
def test_a_run_that_cannot_resume_is_refused_and_its_folder_left_alone(
    refused: dict[str, tuple[Job, dict[str, bytes]]], name: str
) -> None:
    job, before = refused[name]
    assert re.fullmatch(REFUSED[name][2], job.error()), job.error()
    after = {k: v for k, v in everything(job.out) if not k.startswith("errors/")}
    assert after == before
