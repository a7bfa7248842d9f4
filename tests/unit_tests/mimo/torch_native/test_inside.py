# SPDX-License-Identifier: Apache-2.0
"""A language model of transformers as ``MimoModel`` calls it, unsharded; what is refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from megatron.core.models.mimo.huggingface.composites import describe
from megatron.core.models.mimo.huggingface.family import UnsupportedModelError
from megatron.core.models.mimo.huggingface.torch_native import with_native_parts
from megatron.core.models.mimo.torch_native import language_model
from megatron.core.models.mimo.torch_native.language_model import TorchNativeLanguageModel
from megatron.core.models.mimo.towers import torch_native as torch_native_tower
from megatron.core.models.mimo.towers.torch_native import TorchNativeEncoder
from megatron.core.models.mimo.training.initial_weights import initialize_weights
from megatron.core.transformer.transformer_config import TransformerConfig
from mimo_colocated.launch.layouts import Layout
from tests.unit_tests.mimo.huggingface import harness, models, qwen_vl_models
from tests.unit_tests.mimo.huggingface.llava_models import llava, llava_task

HIDDEN = models.SIZES["hidden_size"]
IDS = torch.arange(24).view(2, 12)


def config(**changes: Any) -> TransformerConfig:
    settings = {"num_layers": 2, "hidden_size": HIDDEN, "num_attention_heads": 8}
    return TransformerConfig(**{**settings, **changes})


def language(attention: str = "sdpa", **changes: Any) -> TorchNativeLanguageModel:
    model = harness.randomise(models.DENSE["qwen2-tied"](), seed=1)
    model.config._attn_implementation = attention
    return TorchNativeLanguageModel(config(**changes), model, grid=None)


def run(model: TorchNativeLanguageModel, **more: Any) -> torch.Tensor:
    fused = model.embedding(input_ids=IDS)
    assert fused.shape == (12, 2, HIDDEN)
    given = {"position_ids": None, "attention_mask": None, **more}
    return model(input_ids=None, decoder_input=fused, **given)


def test_logits_and_token_losses_are_those_of_transformers() -> None:
    model = language()
    with torch.no_grad():
        expected = model.model(input_ids=IDS).logits
        found = run(model, position_ids=torch.arange(12).expand(2, 12))
        losses = run(model, labels=IDS)
    torch.testing.assert_close(found, expected)
    own = torch.nn.functional.cross_entropy(expected.transpose(1, 2), IDS, reduction="none")
    torch.testing.assert_close(losses, own)
    assert losses.shape == (2, 12)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_mask_is_megatron_s(attention: str) -> None:
    """True forbids; it replaces the causal mask."""
    model, length = language(attention), IDS.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).triu(1)[None, None]
    with torch.no_grad():
        expected = run(model)
        torch.testing.assert_close(run(model, attention_mask=causal), expected)
        free = causal.clone()
        free[..., 3:6, 3:6] = False  # rows of an image see each other
        found = run(model, attention_mask=free)
    torch.testing.assert_close(found[:, :3], expected[:, :3])
    assert not torch.allclose(found[:, 3:6], expected[:, 3:6], atol=1e-3)


def test_no_token_is_embedded_as_no_row_with_a_gradient() -> None:
    model = language()
    empty = model.embedding(input_ids=IDS[:1, :0])
    assert empty.shape == (0, 1, HIDDEN)
    empty.sum().backward()
    assert not model.model.get_input_embeddings().weight.grad.any()


def test_drawn_weights_have_the_spread_of_the_configuration() -> None:
    """Not that of ``nn.Embedding``, whose standard deviation is 1."""
    source = models.DENSE["qwen2-tied"]().config
    model = TorchNativeLanguageModel(config(), source, grid=None)
    initialize_weights(model, 5, name_prefix="language")
    first = model.model.get_input_embeddings().weight.detach().clone()
    assert first.std().item() == pytest.approx(source.initializer_range, rel=0.1)
    torch.manual_seed(8)
    again = TorchNativeLanguageModel(config(), source, grid=None)
    initialize_weights(again, 5, name_prefix="language")
    assert torch.equal(again.model.get_input_embeddings().weight, first)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 64}, "hidden_size 64, the model of transformers 32; give the model's"),
        (
            {"pipeline_model_parallel_size": 2, "pipeline_dtype": torch.float32},
            "pipeline_model_parallel_size=2: .*over TP, CP and DP; give those ranks to them",
        ),
        (
            {"sequence_parallel": True, "tensor_model_parallel_size": 2},
            "sequence_parallel=True, .*takes whole sequences .*; set it to False",
        ),
    ],
)
def test_a_configuration_that_it_cannot_follow_is_refused(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        language(**changes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_format": "thd"}, "kv_format='thd': attention .*does not read cu_seqlens; give"),
        ({"deepstack_layers": {"images": (0,)}}, "deepstack_layers=.* add no levels of rows"),
    ],
)
def test_a_whole_model_that_it_cannot_be_part_of_is_refused(
    options: dict[str, Any], message: str
) -> None:
    whole = SimpleNamespace(**{"kv_format": "sbhd", "deepstack_layers": {}, **options})
    with pytest.raises(ValueError, match=message):
        language().check_options(whole)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"packed_seq_params": object()}, "packing_kwargs is given, .*pad samples to one length"),
        ({"position_ids": torch.zeros(3, 2, 12)}, r"must be \(B, S\) .*got \(3, 2, 12\)"),
        (
            {"attention_mask": torch.ones(2, 12)},
            r"bool, True where attention is forbidden.*got torch.float32 of shape \(2, 12\)",
        ),
    ],
)
def test_inputs_that_it_would_ignore_are_refused(inputs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(language(), **inputs)


@pytest.mark.parametrize(
    ("model", "names", "message"),
    [
        (lambda: llava("clip-llama").config, "language", r"is a name; give several: \['language'"),
        (
            lambda: llava("clip-llama").config,
            ["vision"],
            r"names \['vision'\], but the model's modules are \['images', 'language'\]",
        ),
        (
            lambda: qwen_vl_models.qwen2_5_vl().config,
            ["images"],
            "torch_native names 'images', and a .* has no torch-native form here; leave it out",
        ),
    ],
)
def test_modules_without_a_native_form_are_refused(model: Any, names: Any, message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        with_native_parts(describe(model()), names, "full")


def test_only_named_encoders_are_native() -> None:
    composite = describe(llava("clip-llama").config)
    assert composite.encoders[0].native is not None
    assert with_native_parts(composite, ["images"], "full").encoders[0].native is not None
    assert with_native_parts(composite, ["language"], "full").encoders[0].native is None
    assert with_native_parts(composite, [], "selective").encoders[0].native is None


@pytest.mark.parametrize("name", ["images", "language"])
def test_selective_recomputation_is_refused(name: str) -> None:
    words = rf"recompute='selective' is of Megatron's .*names \['{name}'\], .*take 'full' or 'none'"
    with pytest.raises(UnsupportedModelError, match=words):
        with_native_parts(describe(llava("clip-llama").config), [name], "selective")


@pytest.mark.usefixtures("one_rank")
def test_on_one_rank_nothing_is_split_and_what_is_moved_later_is_refused(tmp_path: Path) -> None:
    layouts = (Layout(), {"images": Layout()})
    case = harness.Case(*layouts, {"torch_native": ("images", "language")})
    task = llava_task(llava("clip-llama"))
    built, found = harness.compared(task, case, tmp_path)
    assert not any(isinstance(p, DTensor) for p in built.model.parameters())
    built.model.double()
    with pytest.raises(RuntimeError, match="moved or cast after its module was sharded, .*before"):
        harness.trainer_of(built, task).gradients(task, 0)
    built.destroy()
    assert found.logits <= harness.LOGITS
    assert found.gradient <= harness.GRADIENTS, found.tensor


def test_settings_reach_what_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Any, ...]] = []

    def record(model: Any, grid: Any, **settings: Any) -> None:
        seen.append((model, grid, settings))

    for module in (language_model, torch_native_tower):
        monkeypatch.setattr(module, "parallelize", record)
    source, grid, groups, plan = models.DENSE["qwen2-tied"](), object(), object(), object()
    model = TorchNativeLanguageModel(
        config(),
        source,
        grid,
        plan=plan,
        precision=torch.bfloat16,
        sequence_parallel=False,
        activation_checkpointing=True,
        pg_collection=groups,
    )
    assert model.pg_collection is groups
    assert model.embedding.output_dtype is torch.bfloat16
    tower = llava("clip-llama").model.vision_tower
    encoder = TorchNativeEncoder(
        tower, grid=grid, plan=plan, sequence_parallel=False, gradient_checkpointing=True
    )
    model.shard()
    encoder.shard()
    given = {"plan": plan, "sequence_parallel": False, "activation_checkpointing": True}
    assert seen == [
        (source, grid, {**given, "precision": torch.bfloat16, "cut_sequence": False}),
        (tower, grid, {**given, "fsdp": False}),
    ]
