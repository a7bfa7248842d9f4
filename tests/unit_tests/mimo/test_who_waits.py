# SPDX-License-Identifier: Apache-2.0
"""Who waits for whom: dumps made by hand in the form that PyTorch's flight recorder gives them.

The form itself is compared with PyTorch's in ``test_flight_recorder.py``.
"""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mimo_colocated.forensics import who_waits as who_waits
from mimo_colocated.forensics.evidence import Evidence, clear_dumps, read_dumps
from mimo_colocated.forensics.who_waits import (
    Call,
    WhoWaits,
    calls_of,
    group_in_words,
    ranks_in_words,
)
from mimo_colocated.launch.failures import Reason, Report
from mimo_colocated.launch.lost_ranks import claim, peers_gave_up, write_summary
from mimo_colocated.phases import Place, Wait

pytestmark = pytest.mark.once

KILLED = "was killed by SIGKILL"
GROUPS = {
    "0": ("default_pg", "[0, 1, 2, 3]"),
    "a/0": ("cp", "[0, 1]"),
    "b/0": ("cp", "[2, 3]"),
    "c/0": ("dp", "[0, 2]"),
    "d/0": ("dp", "[1, 3]"),
}


def entry(group: str, kind: str, seq: int, at: int, **more: Any) -> dict[str, Any]:
    return {
        "process_group": (group, GROUPS[group][0]),
        "profiling_name": f"gloo:{kind}",
        "collective_seq_id": seq,
        "p2p_seq_id": 0,
        "is_p2p": False,
        "input_sizes": [[3, 4]],
        "input_dtypes": ["Float"],
        "state": "scheduled",
        "retired": True,
        "time_created_ns": at,
        **more,
    }


def dump(*entries: dict[str, Any], groups: str = "0 a/0 b/0 c/0 d/0") -> dict[str, Any]:
    config = {n: {"name": n, "desc": GROUPS[n][0], "ranks": GROUPS[n][1]} for n in groups.split()}
    return {"version": "2.10", "pg_config": config, "entries": list(entries)}


def under_way(group: str, kind: str, seq: int, at: int) -> dict[str, Any]:
    return entry(group, kind, seq, at, retired=False)


def test_entries_are_read_in_the_order_of_time():
    calls = calls_of(
        dump(
            under_way("a/0", "all_gather", 2, 20),
            entry("0", "all_reduce", 1, 10),
            entry("a/0", "recv 0<-1", 0, 30, is_p2p=True, p2p_seq_id=4, state="completed"),
        )
    )
    assert [(c.kind, c.group, c.ranks, c.seq, c.under_way) for c in calls] == [
        ("all_reduce", "all ranks", (0, 1, 2, 3), 1, False),
        ("all_gather", "cp", (0, 1), 2, True),
        ("recv 0<-1", "cp", (0, 1), 4, False),
    ]
    assert calls[0].words() == "all_reduce #1 of all ranks"
    assert calls[1].words() == "all_gather #2 of the group cp [0, 1]"
    assert calls[1].shapes == "Float [3, 4]"
    assert calls_of({"entries": [entry("a/0", "barrier", 1, 1)], "pg_config": {}}) == []


PLACES = {
    0: Place(0, step=3, phase="language forward", microbatch=1),
    1: Place(1, step=3, phase="bridge forward", microbatch=1),
    2: Place(2, step=3, phase="gradient finalisation"),
    3: Place(3, step=3, phase="gradient finalisation"),
}
# Rank 1 is lost. Rank 0 waits for it in CP, rank 3 in DP, rank 2 for rank 0.
DUMPS = {
    0: dump(entry("c/0", "all_reduce", 1, 1), under_way("a/0", "all_gather", 17, 50)),
    2: dump(entry("c/0", "all_reduce", 1, 1), under_way("c/0", "all_reduce", 2, 30)),
    3: dump(entry("d/0", "all_reduce", 1, 1), under_way("d/0", "all_reduce", 2, 60)),
}


def test_down_to_the_rank_that_all_wait_for():
    waits = WhoWaits({1: KILLED}, PLACES, DUMPS)
    assert {rank: call.words() for rank, call in waits.waits.items()} == {
        0: "all_gather #17 of the group cp [0, 1]",
        2: "all_reduce #2 of the group dp [0, 2]",
        3: "all_reduce #2 of the group dp [1, 3]",
    }
    assert sorted(waits.direct) == [0, 3]
    assert waits.waited() == "rank 0 waited for it in all_gather #17 of the group cp [0, 1]"
    assert waits.where([1]) == " in the phase 'bridge forward' of step 3, microbatch 1"
    text = waits.text()
    assert text.startswith(
        "Rank 1 was killed by SIGKILL in the phase 'bridge forward' of step 3, microbatch 1.\n"
    )
    assert (
        "Waiting for it:\n"
        "  rank 0 in all_gather #17 of the group cp [0, 1], Float [3, 4]\n"
        "  rank 3 in all_reduce #2 of the group dp [1, 3], Float [3, 4]\n"
        "Waiting for ranks that wait themselves:\n"
        "  rank 2 in all_reduce #2 of the group dp [0, 2], for rank 0, Float [3, 4]\n"
    ) in text
    assert "  the group dp [0, 2]: 0: all_reduce #1, 2: all_reduce #2\n" in text
    assert "  the group cp [0, 1]: 0: all_gather #17, 1: unknown\n" in text
    assert "  rank 1: the phase 'bridge forward' of step 3, microbatch 1; was killed" in text


def test_every_rank_of_which_anything_is_known_is_in_the_list():
    """One that died early has left neither phase nor dump."""
    text = WhoWaits({5: KILLED}, {0: PLACES[0]}, {2: DUMPS[2]}).text()
    lines = text.partition("Every rank:\n")[2].splitlines()
    assert [line.split(":")[0] for line in lines] == ["  rank 0", "  rank 2", "  rank 5"]
    assert lines[-1] == f"  rank 5: no phase recorded; {KILLED}"


def test_without_a_known_culprit_the_rank_that_waits_for_nobody_is_found():
    busy = dump(entry("d/0", "all_reduce", 1, 1), entry("a/0", "all_gather", 16, 2))
    waits = WhoWaits({}, PLACES, {**DUMPS, 1: busy})
    assert waits.lost == [1]
    assert waits.waited() == "rank 0 waited for it in all_gather #17 of the group cp [0, 1]"
    assert "Rank 1 is waited for and waits for nobody in the phase" in waits.text()
    assert "rank 1: the phase 'bridge forward' of step 3, microbatch 1; in no collective" in (
        waits.text()
    )


def test_ranks_in_a_circle_are_nobodys_fault_alone():
    mutual = {
        0: dump(under_way("a/0", "all_reduce", 1, 1), groups="a/0 c/0"),
        1: dump(under_way("d/0", "all_reduce", 1, 1), groups="a/0 d/0"),
        3: dump(under_way("b/0", "all_reduce", 1, 1), groups="b/0 d/0"),
        2: dump(under_way("c/0", "all_reduce", 1, 1), groups="b/0 c/0"),
    }
    waits = WhoWaits({}, {}, mutual)
    assert waits.lost == []
    assert waits.waited() == ""
    assert "No rank was found that the others wait for." in waits.text()


def test_a_collective_that_nobody_else_holds_up_is_named_first():
    late = {
        0: dump(under_way("0", "all_reduce", 4, 1)),  # earlier, but rank 2 is not there either
        2: dump(entry("0", "all_reduce", 3, 1), entry("d/0", "barrier", 1, 2)),
        3: dump(entry("0", "all_reduce", 4, 1), under_way("d/0", "all_gather", 9, 80)),
    }
    assert WhoWaits({1: KILLED}, {}, late).waited() == (
        "rank 3 waited for it in all_gather #9 of the group dp [1, 3]"
    )


def test_the_last_call_of_a_rank_that_gave_up_is_what_it_waited_in():
    done = {0: dump(entry("c/0", "all_reduce", 1, 1), entry("a/0", "all_gather", 17, 50))}
    assert WhoWaits({1: KILLED}, PLACES, done).direct == {}
    gave_up = WhoWaits({1: KILLED}, PLACES, done, frozenset({0}))
    assert gave_up.waited() == "rank 0 waited for it in all_gather #17 of the group cp [0, 1]"
    assert WhoWaits({1: KILLED}, PLACES, done).waited() == "no rank was waiting for it yet"


def test_of_two_under_way_the_one_that_cannot_end():
    # The reduction overlaps; all of its ranks are there.
    both = {
        0: dump(under_way("c/0", "all_reduce", 2, 40), under_way("a/0", "all_gather", 17, 50)),
        2: dump(under_way("c/0", "all_reduce", 2, 30)),
    }
    waits = WhoWaits({1: KILLED}, {}, both)
    assert waits.waits[0].words() == "all_gather #17 of the group cp [0, 1]"


def test_a_wait_that_the_recorder_does_not_record():
    places = {
        **PLACES,
        0: Place(0, step=3, phase="language forward", wait=Wait("receive", (1,), "pp")),
    }
    waits = WhoWaits({1: KILLED}, places, {})
    assert waits.waited() == "rank 0 waited for it in receive of the group pp [0, 1]"


def _ran_ahead(rank: int, *marks: tuple[float, int, str]) -> Place:
    """A host that made these marks (seconds, microbatch, phase) of step 3, one after the other."""
    past = tuple(Place(rank, at=at, step=3, microbatch=m, phase=p) for at, m, p in marks)
    return replace(past[-1], past=past)


def test_the_phase_is_that_of_the_device_where_the_host_has_gone_on():
    """Over NCCL a host enqueues and goes on: rank 0's device waits in what was enqueued before."""
    marks = [(1.0, 0, "bridge backward"), (2.0, 0, "encoder backward"), (3.0, -1, "optimizer step")]
    places = {rank: _ran_ahead(rank, *marks) for rank in (0, 1, 2)}
    call = {**under_way("a/0", "all_gather", 17, int(1.5e9)), "profiling_name": "nccl:all_gather"}
    later = {**under_way("c/0", "all_reduce", 9, int(2.5e9)), "profiling_name": "nccl:all_reduce"}
    device = "the phase 'bridge backward' of step 3, microbatch 0 on the device, while its host "
    host = "the phase 'optimizer step' of step 3"
    waits = WhoWaits({1: KILLED}, places, {0: dump(call, later), 2: dump(entry("c/0", "x", 9, 1))})
    assert waits.place_of(0) == f"{device}was in {host}"
    # Rank 1 left no dump. It has been where rank 0 waits, so its device has not got past it.
    assert waits.where([1]) == f" in {device}was in {host}"
    enqueued = Call(
        "all_gather", "cp", (0, 1), 17, "Float [3, 4]", int(1.5e9), under_way=True, on_device=True
    )
    assert waits.waits[0] == enqueued
    assert waits.place_of(2) == host  # nothing under way
    # A rank that never came there: its host is what others wait for.
    places[1] = _ran_ahead(1, (0.5, 0, "language backward"))
    stopped = WhoWaits({1: "was stopped (SIGSTOP)"}, places, {0: dump(call)})
    assert stopped.where([1]) == " in the phase 'language backward' of step 3, microbatch 0"
    # Gloo's collectives hold the host itself: no other phase is made up.
    on_host = WhoWaits({1: KILLED}, places, {0: dump(under_way("a/0", "x", 17, int(1.5e9)))})
    assert on_host.place_of(0) == host
    # A recorder that reaches further back than the marks do.
    old = WhoWaits({1: KILLED}, places, {0: dump({**call, "time_created_ns": 1})})
    assert old.place_of(0) == host


def test_several_lost_ranks_in_one_and_in_two_places():
    lost = {1: KILLED, 3: KILLED}
    waits = WhoWaits(lost, PLACES, {0: DUMPS[0]})
    assert waits.waited() == "rank 0 waited for them in all_gather #17 of the group cp [0, 1]"
    assert waits.where([1, 3]) == (
        " in the phase 'bridge forward' of step 3, microbatch 1 (rank 1) and "
        "the phase 'gradient finalisation' of step 3 (rank 3)"
    )
    assert waits.where([2, 3]) == " in the phase 'gradient finalisation' of step 3"
    assert WhoWaits(lost).where([1]) == WhoWaits(lost).waited() == ""


@pytest.mark.parametrize(
    ("kinds", "gave_up"),
    [
        (["peer", "peer"], [0, 1]),
        (["peer", "signal"], [0]),
        # Who has a reason of its own ended by it, and nobody is lost.
        (["peer", "job"], []),
        (["peer", "error"], []),
        ([], []),
    ],
)
def test_ranks_give_up_where_none_has_a_reason(
    kinds: list[str], gave_up: list[int], tmp_path: Path
) -> None:
    for rank, kind in enumerate(kinds):
        Report(rank, kind, "why", "", 0.0).write(tmp_path)
    assert peers_gave_up(tmp_path) == gave_up


def test_of_thousands_the_first_are_told():
    many = range(who_waits._GROUPS_SHOWN + 3)
    for n in many:
        GROUPS[f"x{n}"] = (f"g{n}", "[0, 1]")
    try:
        names = " ".join(f"x{n}" for n in many)
        here = [entry(f"x{n}", "all_reduce", 1, n) for n in many]
        there = [entry(f"x{n}", "all_reduce", 2, n) for n in many]
        dumps = {0: dump(*here, groups=names), 1: dump(*there, groups=names)}
    finally:
        for n in many:
            del GROUPS[f"x{n}"]
    places = dict.fromkeys(range(who_waits._RANKS_SHOWN + 5), PLACES[0])
    text = WhoWaits({1: KILLED}, places, dumps).text()
    assert text.count("\n  and 3 more\n") == 1
    assert text.count("\n  and 5 more") == 1


def test_a_group_without_a_description_has_its_name():
    for description in ("", "undefined"):
        config = {"q": {"name": "q", "desc": description, "ranks": "[0, 1]"}}
        own = {**entry("0", "all_reduce", 1, 1), "process_group": ("q", description)}
        (call,) = calls_of({"version": "2.10", "pg_config": config, "entries": [own]})
        assert call.key == ("q", (0, 1))


def test_ranks_and_groups_in_words():
    assert ranks_in_words([4]) == "rank 4"
    assert ranks_in_words([0, 1]) == "ranks 0 and 1"
    assert ranks_in_words([7, 2, 3, 4, 0]) == "ranks 0, 2-4 and 7"
    assert group_in_words("all ranks", [0, 1]) == "all ranks"
    assert group_in_words("dp", range(16384)) == "the group dp [0-16383]"


def test_one_process_of_a_host_says_why(tmp_path: Path):
    """Where none can leave a mark, each does: better twice than never."""
    assert [claim(tmp_path), claim(tmp_path)] == [True, False]
    assert [claim(tmp_path / "gone"), claim(tmp_path / "gone")] == [True, True]


def test_a_summary_that_cannot_be_written_has_no_place(tmp_path: Path):
    reason = Reason("rank 1 was killed", waits=WhoWaits({1: KILLED}, PLACES, {0: DUMPS[0]}))
    place = write_summary(reason, tmp_path / "new")
    assert Path(place).read_text().startswith("rank 1 was killed.\n\n")
    (tmp_path / "file").touch()
    assert write_summary(reason, tmp_path / "file") == ""
    assert write_summary(Reason("why"), tmp_path) == ""


class _Evil:
    def __reduce__(self):
        return (print, ("executed",))


def test_dumps_are_read_and_nothing_is_executed(tmp_path: Path, capsys):
    own, of_nccl = dump(entry("0", "all_reduce", 1, 1)), dump()
    (tmp_path / "rank_0").write_bytes(pickle.dumps(own))
    (tmp_path / "nccl_rank_0").write_bytes(pickle.dumps(of_nccl))
    (tmp_path / "nccl_rank_2").write_bytes(pickle.dumps(of_nccl))
    (tmp_path / "rank_3").write_bytes(pickle.dumps(own)[:50])
    (tmp_path / "rank_4").write_bytes(pickle.dumps(_Evil()))
    (tmp_path / "rank_5").touch()  # killed before it had written a byte
    (tmp_path / "rank_x").write_text("not one of ours")
    assert read_dumps(tmp_path) == {0: own, 2: of_nccl}
    assert capsys.readouterr().out == ""
    assert Evidence.read(tmp_path, tmp_path, {1: KILLED}, [0]).gave_up == {0}
    (tmp_path / "summary.txt").write_text("of the failure before")
    clear_dumps(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["rank_x"]
    clear_dumps(tmp_path / "absent")
