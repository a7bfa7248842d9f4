# SPDX-License-Identifier: Apache-2.0
"""How often the host waits for the device in a microbatch: never, with plans and lengths ahead.

On ranks with GPUs PyTorch itself raises where one waits. Elsewhere the device is played, see
``tests/harness/host_waits.py``. The microbatches come from the job's own loader, whose uploads
count too. In the first one of a bridge its plan is compared with ``input_ids``: one wait.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.harness.host_waits import Wait
from tests.unit_tests.mimo.waiting_cases import CASES, ENCODER, Case, Watched, watched

pytestmark = pytest.mark.ranks(2, timeout=120)

ALONE = ("alone", "alone")
CUT = ("tp=1,dp=2", "tp=1,cp=2,dp=1")


def waits_of(found: list[Any]) -> list[Any]:
    return [each for each in found if isinstance(each, Wait)]


def assert_one_after_the_encoders(found: list[Any], encoders: int = 1) -> None:
    """All encoders have been launched when the host waits for the first time, and the last."""
    assert found[:encoders] == [ENCODER] * encoders, [str(each) for each in found]
    assert len(found) == encoders + 1, [str(each) for each in found]
    assert found[-1].what == "Event.synchronize", str(found[-1])


@pytest.mark.parametrize(
    ("name", "layouts"),
    [*((name, CUT) for name in CASES), *((name, ALONE) for name in ("dense", "mrope packed"))],
    ids=str,
)
def test_with_plans_ahead_nobody_waits(name, layouts):
    case = CASES[name]
    with watched(case, layouts) as model:
        first = model.run()
        assert_one_after_the_encoders(first, first.count(ENCODER))
        for _ in range(2):
            found = model.run()
            assert [str(each) for each in waits_of(found)] == []
            assert found.count(ENCODER) == (0 if case.text_only else 1 + case.sounds)


def on_device(model: Watched) -> dict[str, Any]:
    """Packing whose lengths are on the device, int64, in a tensor for each field."""
    packing = model.inputs(0)["packing_kwargs"]
    return {
        name: model.device.upload(value.long()) if "cu_seqlens" in name else value
        for name, value in packing.items()
    }


@pytest.mark.parametrize(
    ("name", "layouts"),
    [("dense", CUT), ("packed", CUT), ("two encoders packed", CUT), ("mrope packed", ALONE)],
    ids=str,
)
def test_what_is_not_ahead_is_waited_for_once_after_the_encoders(name, layouts):
    """The plan; lengths that are on the device; both."""
    case = CASES[name]
    with watched(case, layouts) as model:
        model.run()
        withheld: list[dict[str, Any]] = [{"route_plan": None}]
        if case.packed:
            with model.device.noted(), model.device.watch():
                lengths = [on_device(model) for _ in range(2)]
            withheld += [
                {"packing_kwargs": lengths[0]},
                {"packing_kwargs": lengths[1], "route_plan": None},
            ]
        for changes in withheld:
            assert_one_after_the_encoders(model.run(**changes), 1 + case.sounds)
        if case.packed:
            # A tensor may hold other values in the next microbatch.
            assert len(waits_of(model.run(packing_kwargs=lengths[0]))) == 1


def test_over_the_gather_bridge_the_host_waits_for_the_tokens_alone():
    case = Case(packed=True, options=(("bridge", "gather"),))
    with watched(case, CUT) as model:
        (found,) = waits_of(model.run())
        assert found.what == "tolist"
        assert "token_positions.py" in found.where[0]


def test_one_deliberate_wait_is_found_and_named():
    """The control, in forward and in backward."""
    with watched(CASES["packed"], CUT) as model:
        model.run()
        language = model.trainer.model.language_model

        def look(_module: Any, _inputs: Any, output: Any) -> None:
            output.sum().item()

        def look_back(_module: Any, _inputs: Any, gradients: Any) -> None:
            bool(gradients[0].isnan().any())

        for register, seen in (
            (language.register_forward_hook, look),
            (language.register_full_backward_hook, look_back),
        ):
            hook = register(seen)
            found = waits_of(model.run())
            assert len(found) == 1, [str(each) for each in found]
            assert f"{__name__.rpartition('.')[2]}.py" in " ".join(found[0].where)
            hook.remove()
