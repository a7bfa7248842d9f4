# SPDX-License-Identifier: Apache-2.0
"""What a training step marks on each of 8 ranks, and what its groups are called.

``tests/faults`` compares the phases with what the ranks really did; here it is their order, for
each bridge and with pipeline stages.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

from mimo_colocated import phases
from tests.unit_tests.mimo.digits_runs import FAN_IN, SIZE, run

pytestmark = [pytest.mark.ranks(8, timeout=120), pytest.mark.once]

STEP = [
    phases.ENCODER_FORWARD, phases.BRIDGE_FORWARD, phases.LANGUAGE_FORWARD,
    phases.LANGUAGE_BACKWARD, phases.BRIDGE_BACKWARD, phases.ENCODER_BACKWARD, phases.FINALIZE,
    phases.OPTIMIZER, phases.BETWEEN,
]  # fmt: skip


@contextlib.contextmanager
def marked() -> Iterator[list[phases.Place]]:
    """The places that are marked inside, in order; a mark of the same place counts once."""
    found: list[phases.Place] = []
    write = phases._Own.write

    def noting(own: phases._Own) -> None:
        write(own)
        place = phases.here()
        if not found or (place.phase, place.microbatch) != (found[-1].phase, found[-1].microbatch):
            found.append(place)

    phases._Own.write = noting
    try:
        yield found
    finally:
        phases._Own.write = write


def in_order(places: list[phases.Place]) -> list[str]:
    """The phases in the order in which each came first, without reading and the time before."""
    names = dict.fromkeys(place.phase for place in places[1:])
    return [name for name in names if name not in (phases.DATA, phases.START)]


@pytest.mark.parametrize("bridge", ["routed", "gather"])
def test_a_step_and_a_checkpoint(bridge: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    with run(FAN_IN, bridge=bridge) as one:
        phases.mark(phases.START)
        with marked() as places:
            one.train(0, 1)
        assert in_order(places) == STEP
        assert phases.DATA in {place.phase for place in places}
        assert {place.step for place in places[1:]} == {1}
        whole = {place.phase for place in places if place.microbatch < 0}
        assert whole >= {phases.FINALIZE, phases.OPTIMIZER, phases.BETWEEN}
        assert not whole & set(STEP[:6])
        assert phases.here().phase == phases.BETWEEN
        assert one.built.collections["language"].cp.group_desc == "cp"
        if bridge == "routed":  # rows that arrive while the text is embedded
            assert one.trainer.plans.bridges["images"].group.group_desc == "images -> language"
            names = [place.phase for place in places]
            at = names.index(phases.LANGUAGE_FORWARD)
            assert names[at : at + 3] == [
                *(phases.LANGUAGE_FORWARD, phases.BRIDGE_FORWARD, phases.LANGUAGE_FORWARD)
            ]
            root = [str(tmp_path_factory.mktemp("checkpoints"))]
            dist.broadcast_object_list(root, src=0)
            store = one.store(Path(root[0]))
            with marked() as places:
                one.save(store, 1)
                one.load(store, 1)
            names = [place.phase for place in places]
            assert names == [phases.SAVE, phases.BETWEEN, phases.LOAD, phases.BETWEEN]


def test_pipeline_stages() -> None:
    size = SIZE.__class__(**{**vars(SIZE), "language_layers": 2})
    with run(("tp=1,dp=8", "tp=1,cp=2,pp=2,dp=2"), size=size) as one:
        waits = []
        phases.mark(phases.START)
        with pytest.MonkeyPatch.context() as patch, marked() as places:
            write = phases._Own.write_wait
            patch.setattr(
                phases._Own, "write_wait", lambda own: (write(own), waits.append(own.wait))
            )
            one.train(0, 1)
        assert in_order(places) == STEP
        language = [
            p for p in places if p.phase in (phases.LANGUAGE_FORWARD, phases.LANGUAGE_BACKWARD)
        ]
        assert {place.microbatch for place in language} == {0}
        # Every rank exchanges with the rank of its CP and DP place on the other stage.
        peer = (dist.get_rank() + 4) % 8
        noted = [wait for wait in waits if wait is not None and wait.group == "pp"]
        assert {wait.peers for wait in noted} == {(peer,)}
        assert {wait.kind for wait in noted} >= {"receive"}
        assert phases.here().wait is None
