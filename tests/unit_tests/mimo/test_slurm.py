# SPDX-License-Identifier: Apache-2.0
"""Tasks of srun find each other as ranks, by variables as Slurm sets them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from mimo_colocated.launch import Job, launcher, run
from mimo_colocated.launch.errors import JobError
from mimo_colocated.launch.slurm import first_host, rank_variables, tasks_of_node

pytestmark = pytest.mark.once

STEP = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NUM_TASKS": "12",
    "SLURM_STEP_TASKS_PER_NODE": "8,4",
    "SLURM_STEP_NODELIST": "gpu[07,12]",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
}


def test_a_task_is_a_rank() -> None:
    found = rank_variables(STEP)
    assert 20_000 <= int(found.pop("MASTER_PORT")) < 30_000
    assert found == {
        "RANK": "9",
        "WORLD_SIZE": "12",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "4",
        "MASTER_ADDR": "gpu07",
    }
    given = {"MASTER_ADDR": "head", "MASTER_PORT": "29500"}
    found = rank_variables({**STEP, **given})
    assert {name: found[name] for name in given} == given


def test_all_tasks_of_a_step_meet_and_no_others() -> None:
    tasks = [rank_variables({**STEP, "SLURM_PROCID": str(n)}) for n in range(12)]
    assert len({(each["MASTER_ADDR"], each["MASTER_PORT"]) for each in tasks}) == 1
    other = rank_variables({**STEP, "SLURM_STEP_ID": "3"})
    assert other["MASTER_PORT"] != tasks[0]["MASTER_PORT"]


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"SLURM_JOB_ID": "4711", "SLURM_PROCID": "0", "SLURM_NTASKS": "8"},  # a batch script
        {**STEP, "SLURM_STEP_NUM_TASKS": "1"},
        {**STEP, "RANK": "3"},  # torchrun, which srun started
    ],
)
def test_other_processes_are_no_ranks(environment: dict[str, str]) -> None:
    assert rank_variables(environment) == {}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"SLURM_LOCALID": ""}, "srun started 12 tasks, and SLURM_LOCALID is not set; start ranks"),
        ({"SLURM_PROCID": "x"}, "SLURM_PROCID='x' is no number; start ranks with torchrun"),
    ],
)
def test_a_step_that_cannot_be_read_is_refused(change: dict[str, str], said: str) -> None:
    with pytest.raises(JobError, match=said):
        rank_variables({**STEP, **change})


def test_a_job_in_such_a_step_is_refused_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def become_rank() -> None:
        raise JobError("the step cannot be read")

    monkeypatch.setattr(launcher, "become_rank", become_rank)
    job = Job(__file__, lambda *_: pytest.fail("read"), lambda *_: pytest.fail("run"))
    assert run(job, []) == 2
    assert capsys.readouterr().err == "error: the step cannot be read\n"


def test_a_disk_that_fails_before_ranks_start_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def parse(*_given: object) -> None:
        raise OSError(28, "No space left on device", "runs/x")

    monkeypatch.setattr(launcher, "become_rank", lambda: None)
    monkeypatch.delenv("RANK", raising=False)
    assert run(Job(__file__, parse, lambda *_: pytest.fail("run")), []) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: the disk is full: ")
    assert error.count("\n") == 1


def test_lists_of_hosts_and_tasks() -> None:
    assert first_host("one") == "one"
    assert first_host("rack2-[10,12-14]-gpu,login") == "rack2-10-gpu"
    assert [tasks_of_node("2(x2),1", node) for node in range(3)] == [2, 2, 1]


PROGRAM = """
import sys
from pathlib import Path
from types import SimpleNamespace
from mimo_colocated.launch import Job, init_distributed, run

def parse(argv, world):
    return SimpleNamespace(world_size=world or 2, backend="gloo", out=Path(argv[0]))

def work(options, backend):
    import torch
    import torch.distributed as dist
    init_distributed(backend, 60)
    total = torch.ones(1)
    dist.all_reduce(total)
    print(f"rank {dist.get_rank()} of {dist.get_world_size()} counts {int(total)}", flush=True)

sys.exit(run(Job(__file__, parse, work), sys.argv[1:]))
"""


def test_tasks_of_this_machine_train_together(tmp_path: Path) -> None:
    """Two tasks as srun starts them: none starts ranks of its own."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    step = {
        **{name: value for name, value in os.environ.items() if name != "RANK"},
        **STEP,
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_TASKS_PER_NODE": "2",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NODEID": "0",
        "MASTER_PORT": port,
        "CUDA_VISIBLE_DEVICES": "",
    }
    tasks = [
        subprocess.Popen(
            [sys.executable, str(program), str(tmp_path)],
            env={**step, "SLURM_PROCID": str(n), "SLURM_LOCALID": str(n)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for n in range(2)
    ]
    said = [task.communicate(timeout=200)[0] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0]
    assert said == [f"rank {n} of 2 counts 2\n" for n in range(2)]
