# SPDX-License-Identifier: Apache-2.0
"""What of a folder's model trains: counted without making it, as a model that is made has it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from megatron.core.models.mimo.huggingface.build import BuildOptions, from_folder
from megatron.core.models.mimo.huggingface.trained import trained_parts
from megatron.core.models.mimo.plan.shapes import Trained
from megatron.core.models.mimo.training.parameter_names import ParameterNameError
from mimo_colocated.launch.layouts import Layout
from mimo_colocated.launch.lora import Lora
from tests.unit_tests.mimo.huggingface import llava_models

pytestmark = pytest.mark.usefixtures("one_rank")

LORA = Lora(rank=4, targets=["language_model.*.q_proj", "language_model.*.down_proj"])
PARTS = ("language", "images.encoder", "images.projector")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("model")
    llava_models.llava("clip-llama").save_pretrained(place)
    return place


@pytest.mark.parametrize(
    ("frozen", "lora"),
    [
        (["images.encoder"], Lora()),
        (["language.decoder.layers.0", "*final_layernorm*"], Lora()),
        (["language_model.model.layers.1.mlp.down_proj.weight"], Lora()),
        ([], LORA),
        (["language.*.mlp.*"], LORA),
    ],
    ids=str,
)
def test_as_many_as_a_model_that_is_made_trains(
    folder: Path, frozen: Sequence[str], lora: Lora
) -> None:
    """Of the model in training, whose buffers of gradients are made for what trains."""
    found = trained_parts(folder, frozen, lora)
    layouts = {"language": Layout(), "images": Layout()}
    made = from_folder(folder, layouts, BuildOptions(freeze_names=frozen, lora=lora))
    every = made.named_parameters()
    for part in PARTS:
        own = [e for e in every if e.own[1].startswith(part)]
        plain = [e.parameter for e in own if ".lora." not in e.name]
        trained = [p.numel() for p in plain if p.requires_grad]
        assert found[part].share == sum(trained) / sum(p.numel() for p in plain)
        added = [e.parameter for e in own if ".lora." in e.name and e.parameter.requires_grad]
        assert found[part].added == sum(p.numel() for p in added)
    assert sorted(found) == sorted(PARTS)
    # The control: with nothing frozen and no adapters all would train.
    assert found != dict.fromkeys(PARTS, Trained())


def test_parameter_groups_train_as_all_do(folder: Path) -> None:
    """Whatever their learning rates; names that mean nothing are refused as in training."""
    groups = [["images.projector"], ["language"]]
    assert trained_parts(folder, [], Lora(), groups) == dict.fromkeys(PARTS, Trained())
    with pytest.raises(ParameterNameError, match=r"groups\.1: 'langage' names no parameter"):
        trained_parts(folder, [], Lora(), [["images"], ["langage"]])
    with pytest.raises(ParameterNameError, match="leave nothing to train"):
        trained_parts(folder, ["language", "images"], Lora())
