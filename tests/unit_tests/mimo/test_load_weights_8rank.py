# SPDX-License-Identifier: Apache-2.0
"""Weights alone, of all modules or of some: for evaluation, inference and a next stage."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron.core.models.mimo.checkpoint.load_checks import module_of
from megatron.core.models.mimo.checkpoint.store import CheckpointError, CheckpointStore
from tests.unit_tests.mimo.digits_runs import (
    FAN_IN,
    FAN_OUT,
    SIZE,
    Layout,
    ModelOptions,
    Run,
    build_model,
    ended,
    only_rank_0,
    run,
    same,
)
from tests.unit_tests.mimo.tiny_modules import on_all_ranks

pytestmark = pytest.mark.ranks(8)

AUDIO = "tp=1,dp=8"


@pytest.fixture(scope="module")
def saved(trained: Run, tmp_path_factory: pytest.TempPathFactory) -> CheckpointStore:
    """Its checkpoint of step 1."""
    store = trained.store(on_all_ranks(tmp_path_factory.mktemp("one"))[0])
    trained.save(store, 1)
    return store


def copy_of(parameters: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in parameters.named_parameters()}


def bare(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """By the names that they have without DDP."""
    return {name.replace(".module.", "."): value for name, value in weights.items()}


def of_module(weights: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    return {key: value for key, value in bare(weights).items() if module_of(key) == name}


def with_sounds(options: ModelOptions) -> object:
    pair = (Layout.parse(FAN_IN[0], "vision"), Layout.parse(FAN_IN[1], "language"))
    return build_model(*pair, options, audio=Layout.parse(AUDIO, "audio"))


def test_weights_alone_leave_all_else_as_it_was(trained: Run, saved: CheckpointStore) -> None:
    with run(FAN_IN, distributed=False, seed=6) as other:  # the other kind of optimizer
        other.train(0, 1)
        store = other.store(saved.root)
        assert not same(other.weights(), trained.weights())
        state, moments = random.getstate(), other.optimizer_state()
        generators = other.built.randomness.get_states()
        manifest = store.load(1, other.built.model)
        assert manifest == saved.manifest(1)
        assert same(other.weights(), trained.weights())
        assert random.getstate() == state
        assert all(map(torch.equal, other.optimizer_state(), moments))
        for name, now in other.built.randomness.get_states().items():
            assert torch.equal(now["default"], generators[name]["default"])
        assert store.history.stands_at == -1
        assert store.history.abandoned_by(5) == [1]  # a run of its own


def test_another_layout_reads_the_same_outputs(trained: Run, saved: CheckpointStore) -> None:
    with run(FAN_OUT, seed=6) as other:
        before = other.trainer.read(other.batches, 0)
        other.store(saved.root).load(1, other.built.model)
        read = other.trainer.read(other.batches, 0)
        assert not torch.equal(before, read)
        assert torch.equal(read, trained.trainer.read(trained.batches, 0))


@pytest.mark.parametrize("name", ["images", "language"])
def test_one_module_goes_into_a_model_with_others(
    name: str, trained: Run, saved: CheckpointStore
) -> None:
    built = with_sounds(ModelOptions(size=SIZE, seed=6))
    with ended(built):
        store = CheckpointStore(saved.root, built.layouts())
        before = copy_of(built.model)
        with pytest.raises(
            CheckpointError, match="of another model: 'modality_submodules.audio"
        ):
            store.load(1, built.model)
        assert same(copy_of(built.model), before)
        store.load(1, built.model, modules=name if name == "images" else (name,))
        now, source = copy_of(built.model), trained.weights()
        for module in ("images", "audio", "language"):
            there = source if module == name else before
            assert same(of_module(now, module), of_module(there, module))
        assert not same(of_module(before, name), of_module(source, name))


def test_a_module_of_another_shape_is_refused_and_the_others_load(
    trained: Run, saved: CheckpointStore
) -> None:
    size = type(SIZE)(**{**vars(SIZE), "language_layers": 2})
    with run(FAN_IN, seed=6, size=size) as other:
        store, before = other.store(saved.root), other.weights()
        with pytest.raises(CheckpointError, match=r"another model: 'language_model\S+' is \[1, "):
            store.load(1, other.built.model, modules=["language"])
        assert same(other.weights(), before)
        store.load(1, other.built.model, modules="images")
        assert same(of_module(other.weights(), "images"), of_module(trained.weights(), "images"))
        assert same(of_module(other.weights(), "language"), of_module(before, "language"))


def test_modules_that_are_not_there_are_named(trained: Run, saved: CheckpointStore) -> None:
    model, optimizer = trained.built.model, trained.trainer.optimizer
    words = r"this model has no module 'imagse'; it has \['images', 'language'\]"
    with pytest.raises(CheckpointError, match=words):
        saved.load(1, model, modules=("images", "imagse"))
    with pytest.raises(ValueError, match="modules= loads weights alone; leave the optimizer out"):
        saved.load(1, model, optimizer, modules=("images",))
    with pytest.raises(ValueError, match="settings= is for an optimizer; give one, or leave set"):
        saved.load(1, model, settings="run")
    with pytest.raises(ValueError, match="modules= names none"):
        saved.load(1, model, modules=())
    built = with_sounds(ModelOptions(size=SIZE, seed=6))
    with ended(built):
        store = CheckpointStore(saved.root, built.layouts())
        words = "has no module 'audio'; it has"
        with pytest.raises(CheckpointError, match=words):
            store.load(1, built.model, modules=("audio",))


def test_fp32_copies_of_an_optimizer_are_not_forgotten(saved: CheckpointStore) -> None:
    with run(FAN_IN, seed=6, dtype=torch.bfloat16) as half:
        store, before = half.store(saved.root), half.weights()
        with pytest.raises(CheckpointError) as caught:
            store.load(1, half.built.model)
        assert len(set(on_all_ranks(str(caught.value)))) == 1
        assert "keeps fp32 copies of this model's weights" in str(caught.value)
        assert same(half.weights(), before)


def test_weights_alone_pass_the_same_checks(
    trained: Run, saved: CheckpointStore, shared_tmp_path: Path
) -> None:
    store = trained.store(shared_tmp_path)
    trained.save(store, 1)

    def flip() -> None:
        file = store.path(1) / "__3_0.distcp"
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)

    only_rank_0(flip)
    with pytest.raises(CheckpointError, match=r"__3_0.distcp is damaged"):
        store.load(1, trained.built.model, modules=("images",))


def test_ranks_that_read_different_manifests_are_told_so(
    trained: Run, saved: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two folders to read from, with the same steps of different runs."""
    text = (saved.path(1) / "mimo.json").read_text()
    if dist.get_rank() == 6:
        entries = re.sub(r'"digest": "\w+"', '"digest": null', text.replace('"dp": 4', '"dp": 5'))
        monkeypatch.setattr(Path, "read_text", lambda _path: entries)
    with pytest.raises(CheckpointError, match=r"rank 6 sees another checkpoint in \S+ than rank 0"):
        saved.load(1, trained.built.model)
