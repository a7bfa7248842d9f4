# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a language model over pipeline stages, on 8 ranks.

Its word embeddings are its head too: the last stage has a copy of the first one's. What losses say
of many more layouts is in ``tests/reshape``; here every weight and moment is compared bit for bit.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron.core.models.mimo.checkpoint import global_tensors
from megatron.core.models.mimo.checkpoint.manifest import MANIFEST
from megatron.core.models.mimo.checkpoint.store import CheckpointError, CheckpointStore
from tests.parity.measure import TEXT_SIZE
from tests.parity.tensors import local_weights, whole_tensors
from tests.reshape.plan import Place
from tests.reshape.runs import run_at
from tests.unit_tests.mimo.digits_runs import Run, only_rank_0, same
from tests.unit_tests.mimo.tiny_modules import on_all_ranks

pytestmark = pytest.mark.ranks(8)

STAGES = Place("", "tp=2,pp=2,dp=2", distributed=True, tied=True)
ONE_STAGE = Place("", "tp=2,pp=1,dp=4", distributed=True, tied=True)


@pytest.fixture(scope="module")
def staged() -> Iterator[Run]:
    """A run over two stages after one step."""
    with run_at(STAGES, seed=5) as one:
        one.train(0, 1)
        yield one


@pytest.fixture
def saved(staged: Run, shared_tmp_path: Path) -> CheckpointStore:
    store = staged.store(shared_tmp_path / "stages")
    staged.save(store, 1)
    return store


def whole_weights(one: Run) -> dict[str, torch.Tensor]:
    """Whole tensors under global names, of this rank's stage."""
    model = one.built.model
    return whole_tensors(model, one.built.collections, local_weights(model))


def test_a_pipeline_goes_on_without_stages_and_comes_back(
    staged: Run, saved: CheckpointStore, shared_tmp_path: Path
) -> None:
    weights, local, state = whole_weights(staged), staged.weights(), staged.optimizer_state()
    with run_at(ONE_STAGE, seed=6) as other:
        other.load(other.store(saved.root), 1)
        found = whole_weights(other)
        assert same({name: found[name] for name in weights}, weights)
        # Every one of them came from a stage.
        assert set().union(*on_all_ranks(set(weights))) == set(found)
        other.save(other.store(shared_tmp_path / "back"), 1)
    with run_at(STAGES, seed=7) as again:
        again.load(again.store(shared_tmp_path / "back"), 1)
        assert same(again.weights(), local)
        assert all(map(torch.equal, again.optimizer_state(), state))
        assert len(again.optimizer_state()) == len(state) > 0


def test_the_manifest_names_the_tensors_of_all_stages(saved: CheckpointStore) -> None:
    shapes = saved.manifest(1).shapes
    layers = {name: shape for name, shape in shapes.items() if ".layers." in name}
    # Layers are one tensor with the layer's number over all stages in front.
    assert {shape[0] for shape in layers.values()} == {TEXT_SIZE.language_layers}
    ends = {name.rpartition("module.")[2] for name in set(shapes) - set(layers)}
    assert ends == {"embedding.word_embeddings.weight", "decoder.final_layernorm.weight"}
    with run_at(ONE_STAGE, seed=6) as other:
        mine = global_tensors.described(other.built.model.sharded_state_dict())
        assert global_tensors.shapes(mine) == shapes


def test_a_model_that_differs_in_the_last_stage_is_refused_by_all(
    staged: Run, saved: CheckpointStore
) -> None:
    shapes = saved.manifest(1).shapes
    (name,) = [name for name in shapes if name.endswith("final_layernorm.weight")]
    dist.barrier()

    def change() -> None:
        file = saved.path(1) / MANIFEST
        entries = {**json.loads(file.read_text()), "digest": None}
        file.write_text(json.dumps({**entries, "shapes": {**shapes, name: [3]}}))

    only_rank_0(change)
    with pytest.raises(CheckpointError, match="is of another model") as caught:
        staged.load(saved, 1)
    (message,) = set(on_all_ranks(str(caught.value)))
    assert f"'{name}' is [3] there and {shapes[name]} here" in message


def test_stages_of_different_models_are_an_error_on_all_ranks() -> None:
    own = {"weight": ([4 + dist.get_rank() // 6, 2], 4), f"own.{dist.get_rank() % 2}": ([1], 2)}
    with pytest.raises(ValueError, match="build all pipeline stages from one config") as caught:
        global_tensors.of_all_ranks(own)
    (message,) = set(on_all_ranks(str(caught.value)))
    words = "[4, 2] of 4 bytes each on rank 0 and [5, 2] of 4 bytes each on rank 6"
    assert message.startswith(f"'weight' is {words}")
    own["weight"] = ([4, 2], 4)
    wanted = {"own.0": ([1], 2), "own.1": ([1], 2), "weight": ([4, 2], 4)}
    assert global_tensors.of_all_ranks(own) == wanted
