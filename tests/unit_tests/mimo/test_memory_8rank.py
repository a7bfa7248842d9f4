# SPDX-License-Identifier: Apache-2.0
"""Recomputed and offloaded encoders in a real model: gradients, and bytes that were predicted.

Encoder TP2 DP4 with dropout, language model TP2 CP2 DP2 or in pipeline stages. Gradients are
bit-equal to those with everything kept: the same operations run on the same numbers.
"""

from __future__ import annotations

import contextlib
import gc
from dataclasses import replace

import pytest
import torch

from examples.mimo.digits.data import DigitsBatches
from megatron.core.models.mimo.lossy.install import lossy_links
from megatron.core.models.mimo.lossy.loss_models import preset
from megatron.core.models.mimo.lossy.spec import LinkRule, LossySpec
from megatron.core.models.mimo.memory.kept import part_bytes
from megatron.core.models.mimo.memory.plan import transformer_bytes
from megatron.core.models.mimo.memory.policy import EncoderMemory
from megatron.core.utils import unwrap_model
from tests.models.memory import encoder_shape
from tests.models.model import VISION, ModelOptions
from tests.parity.tasks import MixedBatches
from tests.parity.tensors import local_gradients
from tests.unit_tests.mimo.digits_runs import BATCH, FAN_IN, SIZE, run, train_options

pytestmark = pytest.mark.ranks(8)

POLICIES = [("keep", "keep"), ("recompute", "recompute"), ("offload", "offload"),
            ("recompute", "offload"), ("offload", "recompute")]  # fmt: skip
STAGES = ("tp=2,dp=4", "tp=1,cp=2,pp=2,dp=2")
_PACKAGE = "megatron.core.models.mimo."


@pytest.mark.parametrize(
    "pair, changes",
    [
        (FAN_IN, {"overlap_param_gather": True}),
        (FAN_IN, {"bridge": "gather", "recompute": "full"}),
        (STAGES, {"size": replace(SIZE, language_layers=2)}),
        (STAGES, {"size": replace(SIZE, language_layers=2), "recompute": "full"}),
    ],
    ids=["param-gather", "gather-full", "stages", "stages-full"],
)
def test_gradients_are_those_of_kept_activations(pair: tuple[str, str], changes: dict) -> None:
    """Two microbatches; with stages no rank has images in the first, and some in neither.

    They go back together there, in the next step all have images and then none: DDP must not count
    them. What Megatron-Core recomputes is not recomputed in the run that the others must equal.
    """
    stages = "pp" in pair[1]
    later = batches = DigitsBatches(7, "train", BATCH)
    if stages:
        batches = MixedBatches(BATCH, "mixed", uneven_loss_mask=True)
    first = 2 if stages else 0  # one whose first microbatch has no images at all
    known = []
    kept = {**changes, "recompute": "none"}
    cases = [(("keep", "keep"), kept), *((policy, changes) for policy in POLICIES)]
    for policy, options in cases if "recompute" in changes else cases[1:]:
        memory = EncoderMemory(*policy, offload_from=0)
        with run(pair, memory=memory, dropout=0.25, **options) as one:
            trainer = one.trainer
            trainer.options = train_options(2)
            trainer.model.train()
            losses = [trainer.gradients(batches, first)]
            gradients = {n: g.clone() for n, g in local_gradients(one.built.model).items()}
            # The next step draws on from where this one ended.
            losses.append(trainer.gradients(later, 1))
            found = local_gradients(one.built.model).items()
            gradients |= {f"later {name}": gradient.clone() for name, gradient in found}
            if stages:
                losses.append(trainer.gradients(MixedBatches(BATCH, "none"), 2))
            # Weights that are gathered during the next step's forward are not gathered in backward.
            losses += one.train(3, 5)
            module = unwrap_model(trainer.model.modality_submodules[VISION])
            host = module.activation_memory.host
        assert host.now == 0
        assert (host.moved > 0) is ("offload" in policy)
        known.append((policy, losses, gradients))
    _, losses, gradients = known[0]
    assert any(gradient.any() for gradient in gradients.values())
    for policy, other, found in known[1:]:
        assert other == losses, policy
        assert found.keys() == gradients.keys()
        assert all(torch.equal(found[name], gradients[name]) for name in gradients), policy


@pytest.mark.parametrize(
    ("pair", "changes", "steps"),
    [
        (FAN_IN, {}, {}),
        (FAN_IN, {"bridge": "gather"}, {}),
        (FAN_IN, {"recompute": "full"}, {"encode_ahead": 1}),
        (STAGES, {"size": replace(SIZE, language_layers=2)}, {}),
        (STAGES, {"size": replace(SIZE, language_layers=2)}, {"encode_ahead": 1}),
        (STAGES, {"size": replace(SIZE, language_layers=2)},
         {"encode_in_bubbles": 2}),
        (STAGES, {"size": replace(SIZE, language_layers=2), "deepstack": (0, 1)}, {}),
        (FAN_IN, {"lossy": LossySpec((LinkRule("*", preset("default"), payload=64),), 3)}, {}),
    ],
    ids=["plain", "gather", "ahead", "stages", "windows", "bubbles", "deepstack", "lossy"],
)  # fmt: skip
def test_a_step_leaves_nothing(
    pair: tuple[str, str], changes: dict, steps: dict[str, int]
) -> None:
    """What is kept of a microbatch, of its plan or its exchange, would be kept for ever."""
    found = []
    options = dict(changes)
    lossy = options.pop("lossy", None)
    with run(pair, **options) as one:
        one.trainer.options = replace(train_options(4), **steps)
        links = lossy_links(one.trainer.model, lossy) if lossy else contextlib.nullcontext()
        with links:
            for start, stop in ((0, 2), (2, 5)):
                one.train(start, stop)
                gc.collect()
                found.append(sum(map(_is_of_a_step, gc.get_objects())))
    # Three steps of four microbatches lie between; threads may hold one thing more or less.
    assert found[1] - found[0] < 9, found


def _is_of_a_step(thing: object) -> bool:
    kind = type(thing)
    return issubclass(kind, torch.Tensor) or str(kind.__module__).startswith(_PACKAGE)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"dropout": 0.25},
        {"recompute": "selective"},
        {"recompute": "full", "dropout": 0.25},
        {"dtype": torch.bfloat16},
        {"dtype": torch.bfloat16, "dropout": 0.25},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())) or "plain",
)
def test_the_formula_counts_what_the_layers_keep(changes: dict) -> None:
    size = replace(SIZE, vision_layers=2)
    with run(FAN_IN, size=size, **changes) as one:
        model = one.trainer.model.train()
        device = next(model.parameters()).device
        images = torch.rand(24, 1, 8, 8, device=device)
        module = unwrap_model(model.modality_submodules[VISION])
        counted = part_bytes(module, {"digits": {"images": images}})
        options = ModelOptions(size=size, **changes)
        accelerated = device.type != "cpu"
        shape = encoder_shape(one.built.layouts()[VISION]["tp"], options, accelerated)
    expected = replace(transformer_bytes(shape, 24), encoder_flops=0, projector_flops=0)
    assert counted.inputs == expected.inputs
    assert counted.rows == expected.rows
    # Random numbers' seeds, a few bytes.
    assert abs(counted.projector - expected.projector) <= 64
    assert abs(counted.encoder - expected.encoder) <= 64 * size.vision_layers
