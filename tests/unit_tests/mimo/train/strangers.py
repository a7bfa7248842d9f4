# SPDX-License-Identifier: Apache-2.0
"""A tiny CLIP and a tiny Qwen2 that have not met, with LLaVA's data for them."""

from __future__ import annotations

import json
import wave
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image

from mimo_colocated.train.easy_vqa_model import train_tokenizer

TOKEN = "<image>"
SIDE = 16
RATE = 16_000
TONES = {"low": 200, "high": 3000}  # Hz
COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}
# As language models have it: text alone, which parts would be printed into.
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_folders(place: Path) -> None:
    """Write ``images``, ``language`` and the data of both stages below a folder."""
    torch.manual_seed(2)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    vision = transformers.CLIPVisionConfig(
        **sizes, num_hidden_layers=3, image_size=SIDE, patch_size=8
    )
    transformers.CLIPVisionModel(vision).save_pretrained(place / "images")
    size = {"height": SIDE, "width": SIDE}
    images = transformers.CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=size)
    images.save_pretrained(place / "images")
    tokenizer = train_tokenizer([f"what colour is it {' '.join(COLOURS)} user assistant"] * 3)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(place / "language")
    language = transformers.Qwen2Config(
        **sizes,
        num_hidden_layers=2,
        num_key_value_heads=2,
        vocab_size=len(tokenizer),
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    transformers.Qwen2ForCausalLM(language).save_pretrained(place / "language")
    write_data(place)


def write_data(place: Path) -> None:
    samples = []
    for number in range(24):
        name = list(COLOURS)[number % 3]
        Image.new("RGB", (SIDE + number, SIDE), COLOURS[name]).save(place / f"{number}.png")
        asked = {"from": "human", "value": "<image>\nwhat colour is it"}
        said = {"from": "gpt", "value": name}
        samples.append({"image": f"{number}.png", "conversations": [asked, said]})
    (place / "train.json").write_text(json.dumps(samples))


def write_qwen_audio(folder: Path) -> None:
    """Write a tiny Qwen2-Audio with its tokenizer and its feature extractor, of up to a second."""
    torch.manual_seed(4)
    tokenizer = train_tokenizer([f"which tone is it {' '.join(TONES)} user assistant Audio 1 "] * 3)
    marks = ["<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": marks})
    extractor = transformers.WhisperFeatureExtractor(
        feature_size=10, sampling_rate=RATE, hop_length=400, chunk_length=1
    )
    transformers.Qwen2AudioProcessor(extractor, tokenizer).save_pretrained(folder)
    config = transformers.Qwen2AudioConfig(
        audio_config={
            "model_type": "qwen2_audio_encoder",
            "d_model": 24,
            "encoder_layers": 2,
            "encoder_attention_heads": 4,
            "encoder_ffn_dim": 40,
            "num_mel_bins": 10,
            "max_source_positions": 20,
        },
        text_config={
            "model_type": "qwen2",
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": len(tokenizer),
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
        },
        audio_token_index=tokenizer.convert_tokens_to_ids(marks[0]),
    )
    transformers.Qwen2AudioForConditionalGeneration(config).save_pretrained(folder)


def write_tones(place: Path) -> Path:
    """Write tones of several lengths and chat about them, one sound each, two or none."""
    lines = []
    for number in range(24):
        name = list(TONES)[number % 2]
        length = RATE // 5 + 517 * number
        path = place / f"{number}.wav"
        write_wav(path, np.sin(np.arange(length) * TONES[name] * 2 * np.pi / RATE))
        sounds = [{"type": "audio", "audio": path.name}] * (number % 3 if number > 20 else 1)
        asked = [*sounds, {"type": "text", "text": "which tone is it"}]
        said = {"role": "assistant", "content": name}
        lines.append({"messages": [{"role": "user", "content": asked}, said]})
    (place / "tones.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return place / "tones.jsonl"


def write_wav(path: Path, wave_of: np.ndarray, width: int = 2, rate: int = RATE) -> None:
    """Write numbers from -1 to 1, ``(n,)`` or ``(n, channels)``, with so many bytes each."""
    whole = np.round(wave_of * (2.0 ** (8 * width - 1) - 1)).astype("<i8")
    raw = whole.reshape(-1, 1).view(np.uint8)[:, :width].copy()
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1 if wave_of.ndim == 1 else wave_of.shape[1])
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes((raw + 128 if width == 1 else raw).tobytes())


def write_qwen_vl(folder: Path) -> None:
    """Write a tiny Qwen2.5-VL with its tokenizer and its image processor."""
    torch.manual_seed(3)
    tokenizer = train_tokenizer([f"what colour is it {' '.join(COLOURS)} user assistant"] * 3)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    size = {"shortest_edge": 64, "longest_edge": 64 * 16}
    images = transformers.Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, size=size)
    images.save_pretrained(folder)
    number = tokenizer.convert_tokens_to_ids
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    config = transformers.Qwen2_5_VLConfig(
        text_config={
            "hidden_size": 64,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "vocab_size": len(tokenizer),
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "rope_parameters": rope,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 4,
            "out_hidden_size": 64,
            "patch_size": 4,
            "window_size": 16,
            "fullatt_block_indexes": [1],
        },
        image_token_id=number(TOKEN),
        video_token_id=number("~"),
        vision_start_token_id=number("<|im_start|>"),
        vision_end_token_id=number("<|im_end|>"),
    )
    transformers.Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)
