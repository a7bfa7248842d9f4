# SPDX-License-Identifier: Apache-2.0
"""A recipe that goes on: on 8, 4, 1 and 8 ranks in turn, and after a rank was killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from megatron.core.models.mimo.data.prepared import Prepared
from tests.faults.starts import LAUNCH_VARIABLES
from tests.functional.recorded_train import digest
from tests.harness import programs

pytestmark = pytest.mark.once

PROGRAM = "tests/functional/recorded_train.py"
TIMEOUT_S = 400
STOPPED = 75
# An epoch of the mixture: 48 images once, 16 twice.
MIXTURE = {48: 1, 16: 2}
STEPS, BATCH = 10, 8
SETTINGS = {
    "model.settings": "{width: 32, layers: 2, vision_width: 32, vision_layers: 2, patch: 16}",
    "data.train": "[{kind: easy-vqa, settings: {split: train, images: 48}}, "
    "{kind: easy-vqa, settings: {split: test, images: 16}, weight: 2.0}]",
    "data.held_out": "[]",
    "data.max_tokens": 512,
    "data.packed": "true",
    "training.steps": STEPS,
    "training.global_batch_size": BATCH,
    "training.warmup_steps": 2,
    "training.save_every": 4,
    "run.export": "false",
}
ALONE = {"layout.language": "dp=1", "layout.encoders": "{images: dp=1}"}
TWO = {"layout.language": "dp=2", "layout.encoders": "{images: dp=2}"}
FOUR = {"layout.language": "tp=2,dp=2", "layout.encoders": "{images: dp=4}"}
EIGHT = {"layout.sequence_parallel": "true"}
# The encoder's ranks cut each image in two: checkpoints go there and back.
FOUR_CP = {**FOUR, "layout.encoders": "{images: 'cp=2,dp=2'}"}
EIGHT_CP = {**EIGHT, "layout.encoders": "{images: 'tp=2,cp=2,dp=2'}"}
# Ranks, layout, ranks of a language replica, and the step in which they are told to stop.
PHASES = ((8, EIGHT, 4, 3), (4, FOUR_CP, 2, 5), (1, ALONE, 1, 8), (8, EIGHT_CP, 4, 0))


def arguments(out: Path, layout: dict[str, str]) -> list[str]:
    changes = {**SETTINGS, **layout, "run.out": str(out)}
    sets = [word for name, value in changes.items() for word in ("--set", f"{name}={value}")]
    return [PROGRAM, "train", "easy-vqa", *sets]


def environment(record: Path, **more: str) -> dict[str, str]:
    record.mkdir(parents=True)
    kept = {name: value for name, value in os.environ.items() if name not in LAUNCH_VARIABLES}
    return {**kept, "RECORD_TO": str(record), "OMP_NUM_THREADS": "1", **more}


def train(
    out: Path, layout: dict[str, str], ranks: int, record: Path, stop_in: int = 0
) -> subprocess.CompletedProcess[str]:
    """Run on ranks as torchrun starts them."""
    told = environment(record, STOP_IN=str(stop_in))
    done = programs.run(arguments(out, layout), Path.cwd(), told, TIMEOUT_S, ranks=ranks)
    assert done.returncode == (STOPPED if stop_in else 0), done.stdout + done.stderr
    return done


def losses(out: Path) -> list[float]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    return [line["loss"] for line in lines]


def epoch(out: Path) -> Counter[str]:
    """What an epoch of the mixture holds, by the digests of samples."""
    found: Counter[str] = Counter()
    for folder in sorted((out / "prepared").iterdir()):
        prepared = Prepared(folder)
        for number in range(len(prepared)):
            found[digest(prepared.tokens(number)[0])] += MIXTURE[len(prepared)]
    assert len(found) == sum(MIXTURE)
    return found


def computed(record: Path, copies: int, skip: int = 0) -> Counter[str]:
    """What language replicas computed on, each sample once: their ranks all have it."""
    lines = [line.split() for file in record.iterdir() for line in file.read_text().splitlines()]
    found = Counter(each for step, each in lines if int(step) != skip)
    assert all(count % copies == 0 for count in found.values())
    return Counter({each: count // copies for each, count in found.items()})


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of two ranks, to its end."""
    place = tmp_path_factory.mktemp("undisturbed")
    train(place / "run", TWO, 2, place / "record")
    return place


def test_an_epoch_is_exact_on_8_then_4_then_1_then_8_ranks(
    undisturbed: Path, tmp_path: Path
) -> None:
    out, seen, without = tmp_path / "run", Counter[str](), Counter[str]()
    before = 0
    for number, (ranks, layout, copies, stop_in) in enumerate(PHASES):
        record = tmp_path / str(number)
        done = train(out, layout, ranks, record, stop_in)
        assert (f"resuming after step {before}" in done.stdout) is (before > 0)
        seen += computed(record, copies)
        without += computed(record, copies, skip=4)
        before = stop_in
    wanted = epoch(out)
    assert sum(wanted.values()) == STEPS * BATCH
    assert seen == wanted
    # A step that is lost, or done twice, would be seen.
    assert without != wanted
    assert (wanted - without).total() == BATCH
    assert seen == computed(undisturbed / "record", 1)
    assert losses(out) == pytest.approx(losses(undisturbed / "run"), rel=1e-4)


def test_torchrun_starts_a_killed_rank_again_and_the_losses_are_the_same(
    undisturbed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
    command = [sys.executable, *torchrun, "--nproc-per-node=2", "--max-restarts=1"]
    done = subprocess.run(
        [*command, *arguments(out, TWO)],
        env=environment(tmp_path / "record", DIE_IN="7"),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "error: rank 1 died" in done.stderr
    assert "resuming after step 4" in done.stdout
    # What came of steps 5 and 6 the first time is not kept; in step 7 the rank was killed.
    recorded = [file.read_text().splitlines() for file in (tmp_path / "record").iterdir()]
    taken = Counter(int(line.split()[0]) for lines in recorded for line in lines)
    del taken[7]
    assert taken == {step: BATCH * (1 + (step in (5, 6))) for step in (*range(1, 7), 8, 9, 10)}
    assert losses(out) == losses(undisturbed / "run")
    assert not np.isclose(losses(out)[0], losses(out)[-1], rtol=1e-2)
