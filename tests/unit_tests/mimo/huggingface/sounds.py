# SPDX-License-Identifier: Apache-2.0
"""A tiny Qwen2-Audio and a batch for it: sounds of different lengths, one, several or none."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn

from mimo_colocated.launch.layouts import Layout
from tests.unit_tests.mimo.huggingface import harness, models

TOKEN = 98
BINS, POSITIONS = 10, 20
STEPS = 2 * POSITIONS
# Of each sound: whole, odd, even, too short for a row.
LENGTHS = [40, 13, 25, 2, 31, 17, 8, 33]
SOUNDS_OF = [[0], [1, 2], [], [3, 4, 5], [], [6], [7], []]
LENGTH = 32
ENCODER = {
    "d_model": 24,
    "encoder_layers": 3,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 40,
    "num_mel_bins": BINS,
    "max_source_positions": POSITIONS,
}


def _case(encoder: Layout, language: Layout, **settings: object) -> harness.Case:
    return harness.Case(language, {"audio": encoder}, settings)


CASES = {
    "one process": _case(Layout(), Layout()),
    "fan-in: DP8, TP2 CP2 DP2": _case(Layout(dp=8), Layout(tp=2, cp=2, dp=2)),
    "fan-in: TP2 DP4, TP2 CP2 DP2, SP": _case(
        Layout(tp=2, dp=4), Layout(tp=2, cp=2, dp=2), sequence_parallel=True
    ),
    "fan-out: TP4 DP2, TP2 DP4": _case(Layout(tp=4, dp=2), Layout(tp=2, dp=4)),
    "equal: TP2 DP4, gather": _case(Layout(tp=2, dp=4), Layout(tp=2, dp=4), bridge="gather"),
    "stages: TP4 DP2, PP2 CP2 DP2, recompute": _case(
        Layout(tp=4, dp=2), Layout(pp=2, cp=2, dp=2), recompute="full"
    ),
    "fan-in: TP2 DP4, TP2 CP2 DP2, packed": _case(
        Layout(tp=2, dp=4), Layout(tp=2, cp=2, dp=2), packed=True
    ),
}
"""Layouts in words -> what is compared."""


def qwen2_audio(**text: Any) -> nn.Module:
    """A model with weights at random."""
    config = transformers.Qwen2AudioConfig(
        audio_config={"model_type": "qwen2_audio_encoder", **ENCODER},
        text_config={**models.SIZES, "model_type": "qwen2", **text},
        audio_token_index=TOKEN,
    )
    made = transformers.Qwen2AudioForConditionalGeneration(config)
    return harness.randomise(made, seed=1)


def spectra() -> tuple[Tensor, Tensor]:
    """Spectra and masks of all sounds."""
    generator = torch.Generator().manual_seed(5)
    features = torch.randn(len(LENGTHS), BINS, STEPS, generator=generator)
    return features, (torch.arange(STEPS) < torch.tensor(LENGTHS)[:, None]).long()


def task() -> harness.Task:
    """Eight samples with none to three sounds each."""
    features, mask = spectra()
    model, rows = qwen2_audio(), [(steps + 1) // 2 // 2 for steps in LENGTHS]
    generator = torch.Generator().manual_seed(7)
    input_ids = torch.randint(0, 95, (len(SOUNDS_OF), LENGTH), generator=generator)
    for sample, sounds in enumerate(SOUNDS_OF):
        at = 2
        for sound in sounds:
            input_ids[sample, at : at + rows[sound]] = TOKEN
            at += rows[sound] + 1
    counts = torch.rand(input_ids.shape, generator=generator) < 0.7
    loss_mask = (counts & (input_ids.roll(-1, dims=1) != TOKEN)).float()
    loss_mask[:, -1] = 0

    def items(samples: range) -> dict[str, Any] | None:
        own = [sound for sample in samples for sound in SOUNDS_OF[sample]]
        inputs = {"input_features": features[own], "feature_attention_mask": mask[own]}
        return {"whisper": inputs} if own else None

    return harness.Task(
        model,
        input_ids,
        loss_mask,
        torch.arange(LENGTH).expand(input_ids.shape),
        items={"audio": items},
        theirs=lambda: {
            "input_features": features,
            "feature_attention_mask": mask,
            "attention_mask": torch.ones_like(input_ids),
        },
    )
