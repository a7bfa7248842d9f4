# SPDX-License-Identifier: Apache-2.0
"""The model of the recipe ``easy-vqa``, drawn and written as a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

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
# Of weights. 0.02, which is usual, is for widths of a thousand: at 128 attention begins so even
# that the first hundreds of steps change little.
_STD = 0.1
_WHITENED_IMAGES = 1000


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


def write_easy_vqa(settings: Mapping[str, Any], folder: Path) -> None:
    """Write a LLaVA folder: SigLIP's tower on 64 x 64 pixels, Qwen2, weights drawn from a seed.

    Args:
        settings: sizes and the seed.
        folder: to write into.

    Raises:
        SourceError: the package with the images is missing.
    """
    import torch
    import transformers
    from PIL import Image

    from megatron.core.models.mimo.data.easy_vqa import EasyVqa

    data = EasyVqa("train")
    words = [text for pairs in data.questions for pair in pairs for text in pair]
    tokenizer = train_tokenizer([*words, "user", "assistant", "system"])
    images = transformers.SiglipImageProcessorPil(size={"height": _SIDE, "width": _SIDE})
    processor = transformers.LlavaProcessor(
        images,
        tokenizer,
        patch_size=settings["patch"],
        vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
        chat_template=_TEMPLATE,
    )
    with torch.random.fork_rng():
        torch.manual_seed(settings["seed"])
        model = transformers.LlavaForConditionalGeneration(_config(settings, tokenizer))
        seen = [Image.open(data.image(n)).convert("RGB") for n in range(_WHITENED_IMAGES)]
        pixels = images(seen, return_tensors="pt")["pixel_values"]
        _begin_where_images_are(model.model.vision_tower, pixels)
        model.generation_config.eos_token_id = tokenizer.eos_token_id
        model.generation_config.pad_token_id = tokenizer.pad_token_id
        model.save_pretrained(folder)
    processor.save_pretrained(folder)


def _begin_where_images_are(tower: Any, pixels: torch.Tensor) -> None:
    """Let a tower's embeddings begin with what its images are made of, instead of with noise.

    Patches are whitened (each direction in which patches differ is as loud as any other, so edges
    are not drowned by areas; Jordan 2024, arXiv 2404.00498, does the same before convolutions),
    then turned at random, so that all channels see all directions. Positions are sines of row and
    column (Beyer et al. 2022, arXiv 2205.01580). Both are trained like all weights.

    Args:
        tower: SigLIP's.
        pixels: (images, 3, side, side), as the tower sees them.
    """
    import torch

    parts = dict(tower.named_modules())
    name = next(name for name in parts if name.endswith("patch_embedding"))
    patch = parts[name]
    positions = parts[name.replace("patch_embedding", "position_embedding")]
    width, size = patch.out_channels, patch.kernel_size[0]
    patches = torch.nn.functional.unfold(pixels, size, stride=size).transpose(1, 2).flatten(0, 1)
    spread, directions = torch.linalg.eigh(torch.cov(patches.T))
    kept = min(width, len(spread))
    # Directions that hardly occur would be noise made loud.
    whitening = (directions[:, -kept:] / (spread[-kept:] + 0.01).sqrt()).T
    turn, _ = torch.linalg.qr(torch.randn(width, kept))
    with torch.no_grad():
        weight = turn @ whitening
        patch.weight.copy_(weight.view_as(patch.weight))
        patch.bias.copy_(-weight @ patches.mean(0))
        positions.weight.copy_(_sines(pixels.shape[-1] // size, width))


def _sines(side: int, width: int) -> torch.Tensor:
    """(side * side, width): sines and cosines of row and column at falling frequencies."""
    import torch

    frequencies = 100.0 ** -(torch.arange(width // 4) / (width // 4))
    angles = torch.arange(side)[:, None] * frequencies
    one = torch.cat([angles.sin(), angles.cos()], 1)
    rows, columns = one.repeat_interleave(side, 0), one.repeat(side, 1)
    return torch.nn.functional.pad(torch.cat([rows, columns], 1), (0, width % 4))


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
        initializer_range=_STD,
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
