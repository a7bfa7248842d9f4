# SPDX-License-Identifier: Apache-2.0
"""Runs that go on from a checkpoint with other parameters trained than when it was saved.

The stock optimizer keeps one state per parameter, so what goes on and what starts fresh is read off
it by name where it is whole. Sharded over DP, and in another layout, the same losses must follow.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.unit_tests.mimo.digits_runs import FAN_IN, FAN_OUT, SIZE, Run, run, same
from tests.unit_tests.mimo.tiny_modules import on_all_ranks

pytestmark = pytest.mark.ranks(8, timeout=120)

# Two layers of the encoder: one of a stack that is one tensor in the file can be frozen.
MODEL = {"size": replace(SIZE, vision_layers=2)}
# Losses in fp32, sums in another order. What is fresh takes Adam's first steps, which divide the
# smallest gradients' rounding by their own size: 1.6e-6 on one kind of CPU. A lost moment is 1e-3.
CLOSE = 4e-6


def moments(one: Run) -> dict[str, dict[str, torch.Tensor]]:
    """Name of a parameter -> copies of what Adam remembers of it; of the plain fp32 optimizer."""
    names = {id(p): name for name, p in one.built.model.named_parameters()}
    found = {}
    for optimizer in one.trainer.optimizer._active_optimizers:
        for inner in getattr(optimizer, "chained_optimizers", [optimizer]):
            for parameter, state in inner.optimizer.state.items():
                found[names[id(parameter)]] = {
                    k: torch.as_tensor(v).clone() for k, v in state.items()
                }
    return found


def trained(one: Run) -> set[str]:
    return {name for name, p in one.built.model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("then", "now"),
    [
        ("lower-encoder", ""),
        ("encoder+projector", ""),
        ("encoder+language", "lower-encoder+projector"),
        ("", "encoder"),
    ],
    ids=["layers", "module", "swapped", "freezing"],
)
def test_what_was_trained_goes_on_and_the_rest_starts_fresh(
    then: str, now: str, shared_tmp_path: Path
) -> None:
    folders = {sharded: shared_tmp_path / str(sharded) for sharded in (False, True)}
    for sharded in (True, False):  # what is kept is of the plain optimizer
        folder = folders[sharded]
        with run(FAN_IN, sharded, freeze=then, **MODEL) as first:
            before, initial = trained(first), first.weights()
            first.train(0, 2)
            first.save(first.store(folder), 2)
            weights = first.weights()
            saved = {} if sharded else moments(first)
            moved = {name for name in weights if not torch.equal(weights[name], initial[name])}
            assert moved == before
    with run(FAN_IN, False, seed=6, freeze=now, **MODEL) as second:
        store = second.store(folders[False])
        assert store.manifest(2).frozen is not None
        assert bool(store.manifest(2).frozen) is bool(then)
        second.load(store, 2)
        assert same(second.weights(), weights)
        for name, state in moments(second).items():
            fresh = torch.zeros_like(state["exp_avg"])
            for kind in ("exp_avg", "exp_avg_sq"):
                expected = saved[name][kind] if name in before else fresh
                assert torch.equal(state[kind], expected), (name, kind)
        after = trained(second)
        assert after != before
        losses = second.train(2, 4)
        states = moments(second)
        assert set(states) == after
        for module in ("language_model", "modality_submodules"):
            own = {name for name in after if name.startswith(module)}
            # One count of steps per module, as Megatron-Core has it; from zero if none went on.
            steps = {float(states[name]["step"]) for name in own}
            assert steps == ({4.0 if own & before else 2.0} if own else set()), module
        final = second.weights()
        assert {n for n in final if not torch.equal(final[n], weights[n])} == after
        # What was fresh is saved like the rest.
        second.save(store, 4)
    with run(FAN_OUT, True, seed=6, freeze=now, **MODEL) as third:
        third.load(third.store(folders[True]), 2)
        found = on_all_ranks(third.train(2, 4))
        assert found == [pytest.approx(losses, rel=CLOSE)] * 8
