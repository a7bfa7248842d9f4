# SPDX-License-Identifier: Apache-2.0
"""What `mimo check` compares: samples of the folder's processor, or made up; what it finds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import torch.distributed as dist
import transformers

from megatron.core.models.mimo.huggingface.build import from_folder
from megatron.core.models.mimo.huggingface.composites import describe
from megatron.core.models.mimo.huggingface.configuration import read_config
from megatron.core.models.mimo.huggingface.examples import Examples
from megatron.core.models.mimo.huggingface.family import UnsupportedModelError
from megatron.core.models.mimo.huggingface.logits_check import LogitsCheck
from mimo_colocated.launch.layouts import Layout
from tests.unit_tests.mimo.huggingface import llava_models, models, qwen_vl_models, sounds
from tests.unit_tests.mimo.huggingface.harness import randomise

IMAGE = llava_models.IMAGE_TOKEN
ROWS = llava_models.PATCHES
TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endfor %}"
)


@pytest.fixture(autouse=True)
def _one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def processor() -> Any:
    """LLaVA's, with a tokenizer of a few words."""
    words = ["compare", "what", "is", "here", "with", "you", "know", "and", "name", "first", "go"]
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, "<image>": IMAGE}
    vocabulary |= {word: 3 + n for n, word in enumerate(words)}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.normalizer = tokenizers.normalizers.Lowercase()
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        unk_token="<unk>",
        pad_token="</s>",
        additional_special_tokens=["<image>"],
    )
    side = llava_models.SIDE
    size = {"height": side, "width": side}
    images = transformers.CLIPImageProcessor(size={"shortest_edge": side}, crop_size=size)
    return transformers.LlavaProcessor(
        images,
        tokenizer,
        patch_size=llava_models.PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    llava_models.llava("clip-llama").save_pretrained(tmp_path)
    return tmp_path


def test_samples_come_from_the_folders_processor(folder: Path) -> None:
    processor().save_pretrained(folder)
    config = read_config(folder)
    examples = Examples(folder, config, describe(config))
    assert examples.source == "the folder's processor"
    for items in (0, 1, 3):
        sample = examples.sample(items, number=1)
        assert (sample.input_ids == IMAGE).sum() == items * ROWS
        assert (sample.input_ids > 3).sum() > 10 + items * ROWS
        shape = (items, 3, llava_models.SIDE, llava_models.SIDE)
        assert not items or sample.inputs["pixel_values"].shape == shape
    built = from_folder(folder, {"images": Layout(), "language": Layout()})
    found = {verdict.case: verdict.error for verdict in LogitsCheck(built).cases()}
    built.destroy()
    assert list(found) == ["text", "one each", "several each", "some without"]
    assert max(found.values()) < 1e-5


@pytest.mark.parametrize(
    ("make", "token", "name"),
    [
        (lambda: llava_models.llava("siglip-qwen2"), IMAGE, "pixel_values"),
        (lambda: feeding("siglip-qwen2", "default"), IMAGE, "pixel_values"),
        (lambda: feeding("clip-llama", "full"), IMAGE, "pixel_values"),
        (sounds.qwen2_audio, sounds.TOKEN, "input_features"),
        (qwen_vl_models.qwen2_5_vl, qwen_vl_models.IMAGE, "image_grid_thw"),
        (qwen_vl_models.qwen3_vl, qwen_vl_models.IMAGE, "image_grid_thw"),
    ],
    ids=["images", "without-first", "class-token", "sounds", "qwen2.5-vl", "qwen3-vl"],
)
def test_samples_are_made_up_where_there_is_no_processor(
    make: Any, token: int, name: str, tmp_path: Path
) -> None:
    make().save_pretrained(tmp_path)
    config = read_config(tmp_path)
    examples = Examples(tmp_path, config, describe(config))
    assert examples.source == "tokens and inputs made up from the configuration"
    assert not (examples.sample(0, 0).input_ids == token).any()
    two = examples.sample(2, 0)
    assert len(two.inputs[name]) == 2
    assert (two.input_ids == token).any()
    built = from_folder(
        tmp_path, {describe(config).encoders[0].modality: Layout(), "language": Layout()}
    )
    check = LogitsCheck(built)
    assert check.source == examples.source
    errors = [verdict.error for verdict in check.cases()]
    built.destroy()
    assert len(errors) == 4
    assert max(errors) < 1e-5


def feeding(kind: str, strategy: str) -> Any:
    """A LLaVA that feeds other rows of its tower."""
    return llava_models.llava(kind, vision_feature_select_strategy=strategy)


def test_inputs_that_nobody_can_make_up_ask_for_the_processor(folder: Path) -> None:
    composite = describe(read_config(folder))
    (part,) = composite.encoders
    other = replace(composite, encoders=(replace(part, inputs=("pixel_values", "depths")),))
    said = r"inputs \['pixel_values', 'depths'\] cannot be made up; save the model's processor in "
    with pytest.raises(UnsupportedModelError, match=said):
        Examples(folder, read_config(folder), other).sample(1, 0)


def test_what_differs_is_found(tmp_path: Path) -> None:
    randomise(models.DENSE["qwen3"](), seed=3).save_pretrained(tmp_path)
    built = from_folder(tmp_path, {"language": Layout()})
    check = LogitsCheck(built)
    assert check.worst_weight() == ("", 0.0)
    assert check.change_a_weight() == "model.norm.weight"
    name, off = check.worst_weight()
    assert name == "model.norm.weight"
    assert 1e-4 < off < 2e-3
    (verdict,) = check.cases()
    assert verdict.error > 1e-4
    with torch.no_grad():
        built.parts[0].modules[0].decoder.final_layernorm.weight.fill_(float("nan"))
    (verdict,) = check.cases()
    assert verdict.error == float("inf")
    # Whatever else is off, before it or after it.
    assert check.worst_weight() == ("model.norm.weight", float("inf"))
    built.destroy()
