# SPDX-License-Identifier: Apache-2.0
"""PyTorch's own flight recorder on gloo: two processes, one of which does not come."""

from __future__ import annotations

import importlib
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mimo_colocated.forensics import flight_recorder
from mimo_colocated.forensics.evidence import Evidence, read_dumps
from mimo_colocated.forensics.flight_recorder import (
    ENTRIES,
    _under_way,
    progress,
    read_record,
    switch_on,
    take_record,
)
from mimo_colocated.forensics.who_waits import calls_of

_RANK = """
import sys, time
from datetime import timedelta
from pathlib import Path
import torch
import torch.distributed as dist
from mimo_colocated import phases
from mimo_colocated.forensics import flight_recorder
from mimo_colocated.process_groups import make_groups

folder, rank = Path(sys.argv[1]), int(sys.argv[2])
phases.record_into(folder, rank)
flight_recorder.switch_on(folder)
store = dist.FileStore(str(folder / "store"), 2)
dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
pair = make_groups([[0, 1]], group_desc="pair")
# Not torch's own half an hour, in which nobody learns of a rank that stalls.
assert pair._get_backend(torch.device("cpu")).options._timeout == timedelta(seconds=60)
asked = folder / "asked"
watch = flight_recorder.Watch(folder, rank, asked.exists)
watch.start()
dist.all_reduce(torch.ones(3, 4))
if rank == 1:
    phases.mark("between lessons")
    time.sleep(1)
    asked.touch()
    while not (watch.path.exists() and (folder / "rank_0").exists()):
        time.sleep(0.05)
    assert watch.save() == watch.path
    assert "torch._inductor" not in sys.modules  # its import costs seconds of every rank
else:
    phases.mark("lesson")
    dist.all_gather_into_tensor(torch.zeros(4, 5), torch.ones(2, 5), group=pair)
"""


@pytest.mark.once
def test_who_waits_for_whom_from_the_recorder_itself(tmp_path: Path):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TORCH_FR")}
    environment.pop("TORCH_NCCL_TRACE_BUFFER_SIZE", None)
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", _RANK, str(tmp_path), str(rank)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        assert ranks[1].wait(timeout=200) == 0, ranks[1].stderr.read()
        assert ranks[0].wait(timeout=200) == 1  # its peer is gone
    finally:
        for rank in ranks:
            rank.kill()
            rank.stderr.close()
    dumps = read_dumps(tmp_path)
    # What PyTorch records and what was added to it: the ranks of the groups.
    mine = [(c.kind, c.group, c.ranks, c.seq, c.shapes, c.under_way) for c in calls_of(dumps[0])]
    assert mine[-2:] == [
        ("all_reduce", "all ranks", (0, 1), 1, "Float [3, 4]", False),
        ("all_gather", "pair", (0, 1), mine[-1][3], "Float [2, 5]", True),
    ]
    waits = Evidence.read(tmp_path, tmp_path).about({})
    assert waits.lost == [1]
    assert waits.waited() == (
        f"rank 0 waited for it in all_gather #{mine[-1][3]} of the group pair [0, 1]"
    )
    assert waits.where([1]) == " in the phase 'between lessons'"
    # As PyTorch's own analysis reads it.
    saved = pickle.loads((tmp_path / "rank_0").read_bytes())
    assert {"entries", "version", "pg_config"} <= saved.keys()
    assert {config["ranks"] for config in saved["pg_config"].values()} == {"[0, 1]"}


def test_nccl_has_a_recorder_of_its_own(monkeypatch):
    """Played: a build for CUDA has two, and only NCCL's knows what goes over NCCL."""
    module = torch._C._distributed_c10d
    status = {"last_enqueued_collective": 9, "last_completed_collective": 8}
    told = {"pg_status": {"5": status}, "pg_config": {"5": {"name": "5", "desc": "cp"}}}
    dump = {**told, "entries": [{"record_id": 3}], "version": "2.10"}
    monkeypatch.setattr(module, "_dump_nccl_trace", lambda **how: pickle.dumps(dump), raising=False)
    monkeypatch.setattr(
        module,
        "_dump_nccl_trace_json",
        lambda includeCollectives: json.dumps(told),
        raising=False,
    )
    taken = read_record(take_record())
    assert {"record_id": 3} in taken["entries"]
    assert taken["pg_config"]["5"]["desc"] == "cp"
    assert taken["pg_status"]["5"] == status
    assert ("5", 9, 8) in progress()


def test_what_both_recorders_know_is_in_one_record():
    known = [
        {"entries": [n], "pg_config": {n: {"name": n}}, "pg_status": {n: n}, "version": "2"}
        for n in ("of gloo", "of NCCL")
    ]
    taken = read_record([pickle.dumps(each) for each in known])
    assert taken["entries"] == ["of gloo", "of NCCL"]
    assert taken["pg_status"] == {n: n for n in taken["entries"]}
    assert {*taken["entries"]} <= taken["pg_config"].keys()


def test_a_collective_that_has_ended_is_not_under_way():
    assert not _under_way((("a", 3, 3), ("b", 0, 0)))
    assert _under_way((("a", 3, 3), ("b", 1, 0)))


def test_a_record_that_cannot_be_saved_is_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread that saves it has to live on: nothing is raised."""
    (tmp_path / "file").touch()
    record = [pickle.dumps({"pg_config": {}, "entries": []})]
    for folder, taken in ((tmp_path / "file", record), (tmp_path / "none", [])):
        monkeypatch.setattr(flight_recorder, "take_record", lambda taken=taken: taken)
        assert flight_recorder.Watch(folder, 0, lambda: False).save() is None
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    monkeypatch.setattr(flight_recorder, "take_record", lambda: record)
    recorder = flight_recorder.Watch(tmp_path / "there", 0, lambda: False)
    assert recorder.save() == recorder.save() == tmp_path / "there" / "rank_0"
    assert read_record([]) is None


@pytest.mark.parametrize("name", ["flight_recorder", "who_waits", "evidence"])
def test_earlier_names_are_the_same_modules(name: str) -> None:
    now = importlib.import_module(f"mimo_colocated.forensics.{name}")
    assert importlib.import_module(f"mimo_colocated.{name}") is now


def test_what_the_user_has_switched_stays(monkeypatch, tmp_path: Path):
    names = ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE", "TORCH_FR_DUMP_TEMP_FILE")
    more = ("TORCH_NCCL_DEBUG_INFO_TEMP_FILE", "TORCH_NCCL_DUMP_ON_TIMEOUT")
    for name in (*names, *more):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    switch_on(tmp_path / "errors" / "flight_recorder")
    assert os.environ["TORCH_FR_BUFFER_SIZE"] == str(ENTRIES)
    file = Path(os.environ["TORCH_FR_DUMP_TEMP_FILE"])
    assert file == tmp_path / "errors" / "flight_recorder" / "nccl_rank_"
    assert file.parent.is_dir()  # NCCL's watchdog makes none
    assert os.environ["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "1"
    monkeypatch.setenv("TORCH_FR_BUFFER_SIZE", "0")
    switch_on(tmp_path)
    assert os.environ["TORCH_FR_BUFFER_SIZE"] == "0"
    monkeypatch.delenv("TORCH_FR_BUFFER_SIZE")
    monkeypatch.setenv("TORCH_NCCL_TRACE_BUFFER_SIZE", "7")
    switch_on(tmp_path)
    assert "TORCH_FR_BUFFER_SIZE" not in os.environ
