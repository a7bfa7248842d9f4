# SPDX-License-Identifier: Apache-2.0
"""Encoders that every TP rank computes whole are said to be so, once. All ranks in one process."""

from __future__ import annotations

import warnings

import pytest
from torch import nn

from megatron.core.hyper_comm_grid import HyperCommGrid
from megatron.core.models.mimo import MimoModel, VisionModalitySubmodules
from megatron.core.models.mimo.model.replicated_encoders import warn_of_replicated_encoders
from megatron.core.models.mimo.torch_native.part import TorchNativePart
from tests.unit_tests.mimo.in_process_ranks import InProcessWorld
from tests.unit_tests.mimo.model_stubs import (
    LinearEncoder,
    StubGrid,
    language_config,
    mimo_config,
)


def said_by(encoders: dict[str, nn.Module], **grid: object) -> list[str]:
    built = VisionModalitySubmodules(encoders=encoders)
    grid = StubGrid(**{"shape": [4, 2], "dim_names": ["tp", "dp"], **grid}) if grid else None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_of_replicated_encoders("images", built, grid)
    return [str(each.message) for each in caught]


def cut() -> nn.Module:
    """As Megatron marks what it cuts."""
    encoder = LinearEncoder()
    encoder.layer.weight.tensor_model_parallel = True
    return encoder


class SplitLater(TorchNativePart, LinearEncoder):
    """Whole until it is wrapped."""


def test_each_item_is_encoded_as_often_as_there_are_tp_ranks():
    (said,) = said_by({"a": LinearEncoder(), "b": cut()}, shape=[4, 2])
    assert "4 TP ranks of modality 'images' compute the same" in said
    assert "encoders ['a']" in said
    assert "tp=1, dp=8 in its grid encodes each once" in said


@pytest.mark.parametrize(
    ("encoders", "grid"),
    [
        ({"a": LinearEncoder()}, {"shape": [1, 8]}),
        ({"a": LinearEncoder()}, {"rank_offset": 4}),  # its first rank says it
        ({"a": LinearEncoder()}, {}),
        ({"a": cut()}, {"shape": [2, 4]}),
        ({"a": nn.Identity()}, {"shape": [2, 4]}),
        ({"a": SplitLater()}, {"shape": [2, 4]}),
    ],
)
def test_nothing_to_say(encoders, grid):
    assert said_by(encoders, **grid) == []


def test_a_model_says_it_on_one_rank_and_makes_no_collective():
    def body(rank: int) -> None:
        grids = {
            "images": HyperCommGrid([2, 2], ["tp", "dp"]),
            "language": HyperCommGrid([2, 1, 2], ["tp", "cp", "dp"]),
        }
        config = language_config(tensor_model_parallel_size=2)
        MimoModel(mimo_config(config, module_to_grid_map=grids))

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        world = InProcessWorld(4)
        world.run(body)
    said = [each for each in caught if "compute the same" in str(each.message)]
    assert len(said) == 1
    assert not world.calls
