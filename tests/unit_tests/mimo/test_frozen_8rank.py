# SPDX-License-Identifier: Apache-2.0
"""Steps of models that train in part: which collectives run, and that nobody waits in vain.

Encoder TP4 DP2, language model TP2 CP2 DP2: TP, CP and DP groups of both sides differ. That the
gradients of what trains are right is for ``test_end_to_end_8rank`` and the parity table to say.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from examples.mimo.digits.data import DigitsBatches, Token
from megatron.core.models.mimo.gradients.finalize import (
    MimoGradFinalizer,
    refuse_missing_gradients,
)
from mimo_colocated.launch.layouts import Layout
from tests.harness.backend import own_device
from tests.models.encoders import MODALITIES, VISION, DigitEncoder
from tests.models.model import (
    LANGUAGE,
    BuiltModel,
    ModelOptions,
    build_model,
)
from tests.models.trainer import Trainer, TrainOptions
from tests.parity.tensors import local_gradients
from tests.unit_tests.mimo.collective_calls import Calls, calls
from tests.unit_tests.mimo.digits_runs import BATCH, SIZE
from tests.unit_tests.mimo.tiny_modules import COLOCATED, tiny_model

__all__ = ["calls"]  # a fixture

pytestmark = pytest.mark.ranks(8, timeout=90)

PAIR = (Layout(tp=4, dp=2), Layout(tp=2, cp=2, dp=2))
LAYERS = SIZE.vision_layers
BRIDGES = pytest.mark.parametrize("bridge", ["routed", "gather"])


@contextlib.contextmanager
def trainer(freeze: str, bridge: str, overlap: bool = False) -> Iterator[Trainer]:
    options = ModelOptions(
        size=SIZE,
        bridge=bridge,
        freeze=freeze,
        distributed_optimizer=False,
        overlap_grad_reduce=overlap,
    )
    built = build_model(*PAIR, options)
    try:
        yield Trainer(built, TrainOptions(steps=10, global_batch_size=BATCH), False)
    finally:
        dist.barrier()
        built.destroy()


def group_ranks(built: BuiltModel) -> dict[str, tuple[int, ...]]:
    """This rank's groups that the expectations speak of."""
    vision, language = built.collections[VISION], built.collections[LANGUAGE]
    groups = {"encoder tp": vision.tp, "encoder dp": vision.dp, "language dp": language.dp_cp}
    groups["language cp"] = language.cp
    bridge = next(iter(built.model.colocated_comms.values()))
    groups["exchange"] = getattr(bridge, "group", None)
    return {
        name: tuple(dist.get_process_group_ranks(group))
        for name, group in groups.items()
        if group is not None
    }


# Fewer collectives than in a step that trains everything, as (kind, group): number. A transformer
# layer of the encoder sums two input gradients over TP in backward, the projector one.
NO_ENCODER = {("all_reduce", "encoder tp"): 2 * LAYERS + 1}
NO_ROWS = {
    "routed": {("all_to_all_single", "exchange"): 1},
    "gather": {("all_reduce", "language cp"): 1},
}
NO_LANGUAGE = {("all_reduce", "language dp"): 1}


# What depends on the bridge is its exchange alone.
FREEZES = {
    "routed": ("", "lower-encoder", "encoder", "encoder+projector", "language", "encoder+language"),
    "gather": ("", "encoder+projector", "language"),
}


def fewer(freeze: str, bridge: str) -> Counter:
    """What a step with frozen parts leaves out: input gradients and sums over DP, nothing else."""
    if freeze == "encoder+projector":
        own = Counter({**NO_ENCODER, ("all_reduce", "encoder dp"): 1})
        return own + Counter(NO_ROWS[bridge])
    found = Counter(NO_ENCODER if "encoder" in freeze.split("+") else {})
    # The language model passes gradients through, so its own backward collectives all run.
    return found + Counter(NO_LANGUAGE if "language" in freeze else {})


@BRIDGES
def test_frozen_parts_call_exactly_their_own_collectives_less(bridge: str, calls: Calls) -> None:
    batches = DigitsBatches(7, "train", BATCH)
    counts: dict[str, Counter] = {}
    for freeze in FREEZES[bridge]:
        with trainer(freeze, bridge) as run:
            ranks = group_ranks(run.built)
            calls.clear()
            run.gradients(batches, 0)
            counts[freeze] = Counter(calls.taken())
            trained = local_gradients(run.model)
            buffered = [
                parameter
                for module in run.model._active_ddp_modules()
                for buffer in module.buffers
                for parameter in buffer.params
            ]
            wanted = sum(p.requires_grad for p in run.model.parameters())
            success = run.step(batches, 0).success
        assert success
        assert len(buffered) == len(trained) == wanted > 0
    whole = counts.pop("")
    if bridge == "routed":
        # Forward every rank holds the rows that it needs: the same DP, and encoder TP copies.
        assert whole["all_to_all_single", ranks["exchange"]] == 1
    assert whole["all_reduce", ranks["encoder dp"]] == 1
    # In forward two per layer and one for the projector; as many in backward.
    assert whole["all_reduce", ranks["encoder tp"]] == 2 * (2 * LAYERS + 1)
    for freeze, found in counts.items():
        expected = {
            (kind, ranks[group]): number for (kind, group), number in fewer(freeze, bridge).items()
        }
        assert whole - found == expected, freeze
        assert not found - whole, freeze


@pytest.mark.parametrize("overlap", [False, True], ids=["plain", "overlap"])
@BRIDGES
def test_steps_without_images(bridge: str, overlap: bool) -> None:
    """A frozen language model: nothing but rows needs a gradient, and there are none.

    The step must still have a backward pass, which gives the encoder zeros on all ranks.
    """
    batches = DigitsBatches(7, "train", BATCH)
    with trainer("language", bridge, overlap) as run:
        results = [run.step(batches, 0)]
        before = {n: p.detach().clone() for n, p in run.model.named_parameters()}
        batch = batches.local_batch(0, 0, 1, run.parts())
        text = torch.where(batch.input_ids == int(Token.IMAGE), int(Token.ZERO), batch.input_ids)
        run.model.zero_grad_buffer()
        losses, mask = run.model(
            input_ids=text,
            position_ids=batch.position_ids,
            labels=batch.labels,
            loss_mask=batch.loss_mask,
            modality_inputs=None,
        )
        (losses * mask).sum().backward()
        run.built.finalize([run.model], mask.sum().to(torch.int))
        gradients = {n: g.clone() for n, g in local_gradients(run.model).items()}
        unmoved = [torch.equal(p, before[n]) for n, p in run.model.named_parameters()]
        results.append(run.step(batches, 1))
    assert gradients
    assert not any(torch.count_nonzero(gradient) for gradient in gradients.values())
    assert all(unmoved)
    assert all(result.success and result.grad_norm > 0 for result in results)


class WithUnused(DigitEncoder):
    """An encoder with a layer that the ranks of ``unused_on`` do not use."""

    unused_on: tuple[int, ...] = ()

    def __init__(self, config: Any, pg_collection: Any) -> None:
        super().__init__(config, pg_collection)
        self.spare = torch.nn.Linear(2, 2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        found = super().forward(images)
        if dist.get_rank() in self.unused_on:
            return found
        return found + 0 * (self.spare.weight.sum() + self.spare.bias.sum())


@pytest.mark.parametrize(
    ("unused", "said"), [(range(8), "ranks 0, 1, 2, 3 and 4 more"), ([3], "rank 3")]
)
def test_a_parameter_without_a_gradient_is_named_on_all_ranks(
    unused: Sequence[int], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before stock asserts in the second step, on some ranks, and leaves the others waiting."""
    unusing = replace(MODALITIES[VISION], encoder=WithUnused)
    monkeypatch.setitem(MODALITIES, VISION, unusing)
    monkeypatch.setattr(WithUnused, "unused_on", tuple(unused))
    batches = DigitsBatches(7, "train", BATCH)
    with trainer("", "routed", overlap=True) as run:
        with pytest.raises(ValueError, match="module 'images' trains, but got no") as caught:
            run.gradients(batches, 0)
        assert "'encoders.digits.spare.weight' of module 'images' trains" in str(caught.value)
        assert f"({said}), and overlap_grad_reduce waits" in str(caught.value)
        # Later steps look for themselves.
        modules = {VISION: [run.model.modality_submodules[VISION]]}
        if dist.get_rank() in unused:
            with pytest.raises(ValueError, match=rf"\(rank {dist.get_rank()}\), and overlap_grad"):
                refuse_missing_gradients(modules, together=False)
        else:
            refuse_missing_gradients(modules, together=False)
    with trainer("", "routed", overlap=False) as run:
        assert [run.step(batches, step).success for step in range(2)] == [True] * 2


@pytest.mark.parametrize("late", [False, True], ids=["frozen", "unfrozen"])
def test_freezing_after_wrapping_is_refused(late: bool) -> None:
    with tiny_model(COLOCATED, frozen=("images",) if late else ()) as model:
        finalize = MimoGradFinalizer(model.collections)
        finalize([model], torch.ones((), dtype=torch.int, device=own_device()))
        model.modality_submodules["images"].module.whole.requires_grad_(late)
        how = "unfrozen" if late else "frozen"
        with pytest.raises(
            ValueError, match=f"'whole' of module 'images' was {how} after .*save a checkp"
        ):
            finalize([model], torch.ones((), dtype=torch.int, device=own_device()))
