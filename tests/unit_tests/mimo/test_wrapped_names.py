# SPDX-License-Identifier: Apache-2.0
"""Wrappers do not show in names: initial weights, states, checkpoints, messages. One process."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    TorchFullyShardedDataParallel,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.models.mimo import (
    MimoModel,
    MimoModelConfig,
    VisionModalitySubmodules,
    get_mimo_optimizer,
)
from megatron.core.models.mimo.checkpoint.store import CheckpointStore
from megatron.core.models.mimo.gradients.finalize import (
    iter_modules,
    refuse_late_freezing,
    wrap_modules_with_ddp,
)
from megatron.core.models.mimo.randomness import seed_everything
from megatron.core.models.mimo.training.global_names import global_modules
from megatron.core.models.mimo.training.groups import create_process_groups, make_grid
from megatron.core.models.mimo.training.initial_weights import initialize_weights
from megatron.core.models.mimo.transformer.layer_specs import language_layer_spec
from megatron.core.models.mimo.wrappers import clean_name, loaded_name, name_as_saved, unwrapped
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig


class Layer(nn.Linear):
    """With extra state, which is no weight, as Transformer Engine's; another in each copy."""

    def __init__(self) -> None:
        super().__init__(8, 8)
        self.drawn = torch.rand(1)

    def get_extra_state(self) -> torch.Tensor:
        """What was drawn."""
        return self.drawn

    def set_extra_state(self, state: torch.Tensor) -> None:
        """Take another one's."""
        self.drawn = state


class Patches(nn.Module):
    """Two layers in a list, a norm with buffers, and a child that is really called "module"."""

    output_layout = "sbh"

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.norm = nn.BatchNorm1d(8)
        self.module = nn.Linear(8, 32)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            pixels = layer(pixels).tanh()
        return self.module(self.norm(pixels.transpose(1, 2)).transpose(1, 2)).transpose(0, 1)


@pytest.fixture(autouse=True)
def _wraps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the compiler is switched off, as in runs of mutants, torch.compile wraps nothing."""
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)


def compiled(module: nn.Module) -> nn.Module:
    return torch.compile(module, backend="eager")


def nothing(encoder: nn.Module) -> nn.Module:
    return encoder


def layer_compiled(encoder: Patches) -> nn.Module:
    encoder.layers[1] = compiled(encoder.layers[1])
    return encoder


def layer_recomputed(encoder: Patches) -> nn.Module:
    encoder.layers[0] = checkpoint_wrapper(encoder.layers[0])
    return encoder


def all_of_them(encoder: Patches) -> nn.Module:
    encoder.layers[0] = compiled(checkpoint_wrapper(encoder.layers[0]))
    encoder.layers[1] = checkpoint_wrapper(compiled(encoder.layers[1]))
    return compiled(encoder)


@pytest.mark.parametrize(
    "kind",
    [
        DistributedDataParallel,
        TorchFullyShardedDataParallel,
        Float16Module,
        nn.parallel.DistributedDataParallel,
    ],
)
def test_wrappers_that_hold_a_module_are_looked_through(kind: type) -> None:
    """Megatron's and torch's: they take groups to build, and are told by their class."""
    inner, wrapper = Patches(), object.__new__(kind)
    nn.Module.__init__(wrapper)
    wrapper.module = inner
    assert unwrapped(wrapper) is inner
    for name in ("layers.0.weight", "module.bias"):
        assert clean_name(wrapper, f"module.{name}") == name
        assert clean_name(inner, name) == name
    names = [name for name, _ in global_modules(inner)]
    assert [name for name, _ in global_modules(wrapper)][-len(names) :] == names


WRAPPINGS = [nothing, compiled, checkpoint_wrapper, layer_compiled, layer_recomputed, all_of_them]
Wrap = Callable[[nn.Module], nn.Module]
NAMES = [
    *(f"layers.{i}.{kind}" for i in (0, 1) for kind in ("weight", "bias")),
    *(f"norm.{kind}" for kind in ("weight", "bias", "running_mean", "running_var")),
    *("norm.num_batches_tracked", "module.weight", "module.bias"),
]


def modality(wrap: Wrap, seed: int = 3) -> VisionModalitySubmodules:
    torch.manual_seed(seed)
    return VisionModalitySubmodules(encoders={"patches": wrap(Patches())})


@pytest.mark.parametrize("wrap", WRAPPINGS)
def test_names_and_their_way_back(wrap):
    encoder = wrap(Patches())
    named = [name for name, _ in (*encoder.named_parameters(), *encoder.named_buffers())]
    assert sorted(clean_name(encoder, name) for name in named) == sorted(NAMES)
    wrapped_and_bare = [*NAMES, *named, *(f"_orig_mod.{name}" for name in NAMES)]
    assert {clean_name(encoder, name) for name in wrapped_and_bare} == set(NAMES)
    # The checkpoint wrapper takes names without itself, and puts itself in.
    taken = {name.replace("_checkpoint_wrapped_module.", "") for name in nested_names(encoder)}
    assert {loaded_name(encoder, name) for name in wrapped_and_bare} == taken
    assert type(unwrapped(encoder)) is Patches


def nested_names(encoder: nn.Module) -> list[str]:
    """Names with all levels; checkpoint wrappers leave themselves out of their own."""
    return [
        f"{path}.{key}" if path else key
        for path, module in encoder.named_modules()
        for key in (*module._parameters, *module._buffers)
    ]


@pytest.mark.parametrize("wrap", WRAPPINGS)
def test_initial_weights(wrap):
    bare, other = modality(nothing, 1), modality(wrap, 2)
    for each in (bare, other):
        initialize_weights(each, 5, name_prefix="images")
    own = [p for _, module in global_modules(other) for p in module.parameters(recurse=False)]
    expected = list(bare.parameters())
    assert len(own) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(expected, own, strict=True))


@pytest.mark.parametrize("wrap", WRAPPINGS)
def test_states_and_loading(wrap):
    bare, other = modality(nothing), modality(wrap, 4)
    state = bare.state_dict()
    assert list(state) == [f"encoders.patches.{name}" for name in state_names()]
    assert list(other.state_dict()) == list(state)
    other.load_state_dict(state)
    again = modality(nothing, 6)
    again.load_state_dict(other.state_dict())
    assert all(torch.equal(value, state[name]) for name, value in again.state_dict().items())
    # As torch names them, for states that were saved elsewhere.
    dirty = {f"encoders.patches.{n}": v for n, v in compiled(Patches()).state_dict().items()}
    other.load_state_dict(dirty)
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict({name: value for name, value in state.items() if "norm" not in name})
    with pytest.raises(RuntimeError, match="Unexpected key"):
        other.load_state_dict({**state, "encoders.patches.other": torch.zeros(1)})


def state_names() -> list[str]:
    return list(Patches().state_dict())


@pytest.mark.parametrize("wrap", [nothing, layer_recomputed])
def test_copies_of_a_modality_keep_their_names(wrap):
    copied = copy.deepcopy(modality(wrap))
    assert list(copied.state_dict()) == list(modality(nothing).state_dict())
    copied.load_state_dict(modality(nothing).state_dict())


@pytest.mark.parametrize("wrap", [nothing, compiled, all_of_them])
def test_an_output_layout_is_seen_through_wrappers(wrap):
    pixels = torch.linspace(-1, 1, 3 * 2 * 8).view(3, 2, 8)
    rows = modality(wrap)(encoder_inputs={"patches": {"pixels": pixels}})
    torch.manual_seed(3)
    assert torch.allclose(rows, Patches()(pixels).transpose(0, 1).flatten(0, 1), atol=1e-6)


# --- checkpoints ---------------------------------------------------------------------------


@pytest.fixture
def alone() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def language(groups: Any) -> ModuleSpec:
    config = TransformerConfig(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        calculate_per_token_loss=True,
        cross_entropy_loss_fusion=True,  # on the model's own group
        cross_entropy_fusion_impl="native",
        attention_dropout=0.0,
        hidden_dropout=0.0,
    )
    params = {
        "config": config,
        "transformer_layer_spec": language_layer_spec(config),
        "vocab_size": 64,
        "max_sequence_length": 16,
        "scatter_embedding_sequence_parallel": False,
        "pg_collection": groups,
    }
    return ModuleSpec(module=GPTModel, params=params)


def build(wrap: Wrap, seed: int) -> tuple[MimoModel, Any]:
    """A model whose encoder, and first language layer, are wrapped; and its optimizer."""
    seed_everything(seed)
    grids = {"images": make_grid(), "language": make_grid()}
    groups = {name: create_process_groups(grid) for name, grid in grids.items()}
    spec = ModuleSpec(
        module=VisionModalitySubmodules,
        params={"pg_collection": groups["images"]},
        submodules={"encoders": {"patches": ModuleSpec(module=Patches)}},
    )
    settings = {"special_token_ids": {"images": 63}, "module_to_grid_map": grids}
    model = MimoModel(MimoModelConfig(language(groups["language"]), {"images": spec}, **settings))
    encoders = model.modality_submodules["images"].encoders
    encoders["patches"] = wrap(encoders["patches"])
    layers = model.language_model.decoder.layers
    layers[0] = layers[0] if wrap is nothing else checkpoint_wrapper(layers[0])
    for name, module in iter_modules(model):
        initialize_weights(module, seed, name_prefix=name)
    configs = dict.fromkeys(grids, model.config)
    wrap_modules_with_ddp(model, configs, DistributedDataParallelConfig(), groups)
    optimizer = get_mimo_optimizer(model, OptimizerConfig(optimizer="adam", lr=1e-2))
    return model, optimizer


def step(model: MimoModel, optimizer: Any) -> float:
    ids = torch.cat([torch.full((2, 4), 63), torch.arange(24).view(2, 12)], dim=1)
    pixels = {"images": {"patches": {"pixels": torch.linspace(-1, 1, 64).view(2, 4, 8)}}}
    model.zero_grad_buffer()
    optimizer.zero_grad()
    loss, _ = model(ids, torch.arange(16).expand(2, 16), labels=ids, modality_inputs=pixels)
    loss.mean().backward()
    for _, module in iter_modules(model):
        module.finish_grad_sync()
    optimizer.step()
    return loss.mean().item()


@pytest.mark.parametrize(("there", "here"), [(all_of_them, nothing), (nothing, all_of_them)])
def test_checkpoints_do_not_know_wrappers(there, here, tmp_path: Path, alone):
    model, optimizer = build(there, 1)
    step(model, optimizer)
    store = CheckpointStore(tmp_path, {})
    store.save(1, model, optimizer)
    names = store.manifest(1).shapes
    assert any(name.endswith("encoders.patches.layers.1.weight") for name in names)
    assert not [name for name in names if "_orig_mod" in name or "_wrapped_module" in name]
    other, its_optimizer = build(here, 2)
    store.load(1, other, its_optimizer)
    states = [each.state_dict() for each in (model, other)]
    assert list(states[0]) == list(states[1])
    extra = [n for n in states[0] if "patches" in n and n.endswith("_extra_state")]
    assert len(extra) == 2
    assert all(torch.equal(states[0][name], states[1][name]) for name in extra)
    # The second loss needs the first step's moments and all weights.
    found = [[step(other, its_optimizer) for _ in range(2)], [step(model, optimizer) for _ in "ab"]]
    assert found[0] == pytest.approx(found[1], rel=1e-6)
    assert found[0][0] != pytest.approx(found[0][1], rel=1e-3)


@pytest.mark.parametrize("saved", ["", "module.", "module.module."])
@pytest.mark.parametrize("here", ["", "module."])
def test_a_checkpoint_is_asked_by_its_own_names(saved, here):
    """DDP around a whole module is in the names on the disk, as in stock."""

    def state(levels: str) -> list[str]:
        weights = [f"modality_submodules.images.{levels}encoders.module.weight",
                   f"language_model.{levels}decoder.layers.mlp.weight"]  # fmt: skip
        return [*weights, *(f"mimo.language.optimizer.state.exp_avg.{name}" for name in weights)]

    asked = {"model": [ShardedObject(name, None, (1,), (0,)) for name in state(here)]}
    name_as_saved(asked, state(saved)[:2])
    assert [each.key for each in asked["model"]] == state(saved)
    other = {"rng": ShardedObject("rng", None, (1,), (0,))}
    name_as_saved(other, state(saved)[:2])
    assert other["rng"].key == "rng"


def test_messages_do_not_name_wrappers(alone):
    model, _ = build(all_of_them, 1)
    images = model.modality_submodules["images"]
    unwrapped(unwrapped(images).encoders["patches"]).norm.requires_grad_(False)
    with pytest.raises(ValueError, match=r"parameter 'encoders\.patches\.norm\.weight' of module"):
        refuse_late_freezing("images", images)
