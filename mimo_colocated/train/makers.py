# SPDX-License-Identifier: Apache-2.0
"""Models that a recipe has made before it trains them, as Hugging Face folders like any other."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from mimo_colocated.launch.errors import JobError
from mimo_colocated.train.joining import join

_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}"
    "{% if part.type == 'image' %}<image>\n{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_SPECIAL = ["<|pad|>", "<|im_start|>", "<|im_end|>", "<image>"]
_SIDE = 64
_SIZES: dict[str, int] = {
    "patch": 8,
    "vision_width": 128,
    "vision_layers": 4,
    "vision_heads": 4,
    "width": 128,
    "layers": 4,
    "heads": 4,
    "seed": 0,
}


def make_model(name: str, settings: Mapping[str, Any], folder: Path) -> Path:
    """Make a recipe's model, unless it is there; the folder appears when it is whole.

    Args:
        name: of the maker.
        settings: of the model, such as its sizes.
        folder: to write.

    Raises:
        JobError: no such maker or setting, or the folder cannot be written.
    """
    if name not in MAKERS:
        raise JobError(f"model.make={name!r} is not known; known are {', '.join(MAKERS)}")
    if (folder / "config.json").is_file():
        return folder
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        MAKERS[name](settings, temporary)
        temporary.replace(folder)
    except OSError as error:
        reason = error.strerror or str(error)
        raise JobError(f"the model cannot be written to {folder} ({reason})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def train_tokenizer(texts: Iterable[str]) -> Any:
    """Return a byte-level BPE tokenizer of texts, whose answers end in ``<|im_end|>``.

    Args:
        texts: that it is trained on.
    """
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=512, special_tokens=_SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<|pad|>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>", "<image>"],
    )


def _easy_vqa(settings: Mapping[str, Any], folder: Path) -> None:
    """Write a LLaVA folder: SigLIP's tower on 64 x 64 pixels, Qwen2, weights drawn from a seed."""
    import torch
    import transformers

    from megatron.core.models.mimo.data.easy_vqa import EasyVqa

    unknown = settings.keys() - _SIZES.keys()
    if unknown:
        raise JobError(
            f"model.settings.{min(unknown)} is not known; easy-vqa takes {', '.join(_SIZES)}"
        )
    sizes = {**_SIZES, **settings}
    asked = EasyVqa("train").questions
    words = [text for pairs in asked for pair in pairs for text in pair]
    tokenizer = train_tokenizer([*words, "user", "assistant", "system"])
    images = transformers.SiglipImageProcessorPil(size={"height": _SIDE, "width": _SIDE})
    processor = transformers.LlavaProcessor(
        images,
        tokenizer,
        patch_size=sizes["patch"],
        vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
        chat_template=_TEMPLATE,
    )
    with torch.random.fork_rng():
        torch.manual_seed(sizes["seed"])
        model = transformers.LlavaForConditionalGeneration(_config(sizes, tokenizer))
        model.generation_config.eos_token_id = tokenizer.eos_token_id
        model.generation_config.pad_token_id = tokenizer.pad_token_id
        model.save_pretrained(folder)
    processor.save_pretrained(folder)


def _config(sizes: Mapping[str, int], tokenizer: Any) -> Any:
    import transformers

    vision = transformers.SiglipVisionConfig(
        hidden_size=sizes["vision_width"],
        intermediate_size=2 * sizes["vision_width"],
        num_hidden_layers=sizes["vision_layers"],
        num_attention_heads=sizes["vision_heads"],
        image_size=_SIDE,
        patch_size=sizes["patch"],
    )
    text = transformers.Qwen2Config(
        hidden_size=sizes["width"],
        intermediate_size=2 * sizes["width"],
        num_hidden_layers=sizes["layers"],
        num_attention_heads=sizes["heads"],
        num_key_value_heads=sizes["heads"],
        vocab_size=len(tokenizer),
        max_position_embeddings=2048,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return transformers.LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        tie_word_embeddings=False,
    )


def _text(settings: Mapping[str, Any], folder: Path) -> None:
    """Write a language model alone in the shape of Qwen3, with experts where some are asked for."""
    import torch
    import transformers

    sizes = {"width": 1024, "layers": 24, "heads": 16, "inner": 4096, "vocabulary": 50304}
    sizes |= {"experts": 0, "chosen": 2, "expert_layers": 2, "positions": 1024, "seed": 0}
    unknown = settings.keys() - sizes.keys()
    if unknown:
        raise JobError(
            f"model.settings.{min(unknown)} is not known; text takes {', '.join(sizes)}"
        )
    sizes |= settings
    shape = {
        "hidden_size": sizes["width"],
        "num_hidden_layers": sizes["layers"],
        "num_attention_heads": sizes["heads"],
        "num_key_value_heads": sizes["heads"],
        "head_dim": sizes["width"] // sizes["heads"],
        "intermediate_size": sizes["inner"],
        "vocab_size": sizes["vocabulary"],
        "max_position_embeddings": sizes["positions"],
        "bos_token_id": None,
        "eos_token_id": None,
    }
    config: Any = transformers.Qwen3Config(**shape)
    if sizes["experts"]:
        config = transformers.Qwen3MoeConfig(
            **shape,
            num_experts=sizes["experts"],
            num_experts_per_tok=sizes["chosen"],
            decoder_sparse_step=sizes["expert_layers"],
            moe_intermediate_size=sizes["inner"],
            norm_topk_prob=True,
        )
    with torch.random.fork_rng():
        torch.manual_seed(sizes["seed"])
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)


MAKERS: dict[str, Callable[[Mapping[str, Any], Path], None]] = {
    "easy-vqa": _easy_vqa,
    "llava": join,
    "text": _text,
}
"""Name in a recipe -> writes the model's folder."""
