# SPDX-License-Identifier: Apache-2.0
"""Whisper's encoder: log-mel spectra of sounds to rows, each sound as long as it is.

A spectrum is padded to a fixed length, and a mask says how much of it is sound. The convolutions
see all of it, as in transformers. Then frames of padding are dropped: sounds lie end to end, each
attends within itself. What transformers masks as keys and throws away as rows is not computed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from megatron.core.models.mimo.towers.feature_transformer import Features, FeatureTransformer
from megatron.core.models.mimo.uploads import upload
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

_STEPS_PER_FRAME = 2
_FRAMES_PER_POOLED_ROW = 2


class WhisperEncoder(MegatronModule):
    """Two convolutions, fixed positions and layers, for Whisper and Qwen2-Audio.

    Positions are sinusoids until weights are loaded, and do not train. Keys have no bias: theirs
    within Megatron's joined one is zero, gets no gradient and stays zero.

    Args:
        config: of the layers, with biases and LayerNorm.
        pg_collection: of the modality's grid.
        mel_bins: bands of a spectrum.
        positions: frames of a whole spectrum; it has two steps for each.
        pooled: the mean of two neighbouring frames is a row, as in Qwen2-Audio.

    Attributes:
        reads_on_host: inputs that are best left on the host; on a device they are waited for.
    """

    reads_on_host = ("feature_attention_mask",)

    def __init__(
        self,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection,
        mel_bins: int,
        positions: int,
        pooled: bool = False,
    ) -> None:
        super().__init__(config=config)
        width, dtype = config.hidden_size, config.params_dtype
        # Two frames of a row may lie on both sides of a cut.
        self.cuts_items = not pooled
        self.pooled, self.head_width = pooled, width // config.num_attention_heads
        self.conv1 = nn.Conv1d(mel_bins, width, 3, padding=1, dtype=dtype)
        self.conv2 = nn.Conv1d(width, width, 3, stride=2, padding=1, dtype=dtype)
        table = sinusoids(positions, width).to(dtype)
        self.position_embedding = nn.Parameter(table, requires_grad=False)
        # Initial weights leave it alone.
        vars(self.position_embedding)["_is_hf_initialized"] = True
        # Qwen2-Audio normalises after the mean.
        last = Features((config.num_layers,))
        self.transformer = FeatureTransformer(config, pg_collection, last)
        self.layer_norm = nn.LayerNorm(width, eps=config.layernorm_epsilon, dtype=dtype)
        layers: Any = self.transformer.blocks[0].get_submodule("layers")
        for layer in layers:
            layer.self_attention.linear_qkv.bias.register_hook(self._without_keys)

    def forward(
        self, input_features: Tensor, feature_attention_mask: Tensor | None = None
    ) -> Tensor:
        """Encode sounds.

        Args:
            input_features: spectra ``(sounds, mel_bins, 2 * positions)``.
            feature_attention_mask: ``(sounds, 2 * positions)``, 1 for steps that are sound, which
                come first; None if all are.

        Returns:
            Rows ``(n, hidden_size)``, sound by sound.

        Raises:
            ValueError: spectra or a mask of another shape.
        """
        self._check(input_features, feature_attention_mask)
        frames = self._frames(input_features)
        sounds, longest = frames.shape[:2]
        lengths = torch.full((sounds,), longest)
        if feature_attention_mask is not None:
            lengths = frame_counts(feature_attention_mask).cpu()
        at = torch.arange(longest)
        there = at < lengths[:, None]
        hidden = self.transformer(_rows_where(frames.flatten(0, 1), there), lengths.tolist())
        if self.pooled:
            paired = (at < (lengths - lengths % _FRAMES_PER_POOLED_ROW)[:, None])[there]
            pairs = _rows_where(hidden, paired)
            hidden = pairs.unflatten(0, (-1, _FRAMES_PER_POOLED_ROW)).mean(dim=1)
        return self.layer_norm(hidden)

    def _frames(self, spectra: Tensor) -> Tensor:
        """``(sounds, mel_bins, 2 * positions)`` -> ``(sounds, positions, h)``."""
        hidden = nn.functional.gelu(self.conv1(spectra.to(self.conv1.weight.dtype)))
        hidden = nn.functional.gelu(self.conv2(hidden)).transpose(1, 2)
        dropout = self.config.hidden_dropout
        return nn.functional.dropout(hidden + self.position_embedding, dropout, self.training)

    def _without_keys(self, gradient: Tensor) -> Tensor:
        """The gradient of a joined bias, ``[query, key, value]`` per head, with keys' set to 0."""
        heads = gradient.clone().view(-1, 3, self.head_width)
        heads[:, 1] = 0
        return heads.flatten()

    def _check(self, spectra: Tensor, mask: Tensor | None) -> None:
        steps = _STEPS_PER_FRAME * len(self.position_embedding)
        expected = (self.conv1.in_channels, steps)
        if spectra.ndim != 3 or tuple(spectra.shape[1:]) != expected:
            raise ValueError(
                f"input_features must be (sounds, {expected[0]}, {steps}), got "
                f"{tuple(spectra.shape)}; the feature extractor pads to {steps} steps, and "
                "feature_attention_mask says how many of them are sound"
            )
        if mask is not None and tuple(mask.shape) != (len(spectra), steps):
            raise ValueError(
                f"feature_attention_mask must be ({len(spectra)}, {steps}), a number for each step "
                f"of input_features, got {tuple(mask.shape)}"
            )


def frame_counts(mask: Tensor) -> Tensor:
    """Return the frames of each sound: ``(sounds, steps)`` -> ``(sounds,)``."""
    return (mask.sum(dim=-1) + 1) // _STEPS_PER_FRAME


def _rows_where(rows: Tensor, there: Tensor) -> Tensor:
    """Rows by a mask that is on the host, where their number is known without waiting."""
    return rows.index_select(0, upload(there.flatten().nonzero().flatten(), rows.device))


def rows_per_sound(inputs: Mapping[str, Any], pooled: bool) -> list[int]:
    """Return the rows that :class:`WhisperEncoder` makes of each sound.

    Args:
        inputs: of its ``forward``.
        pooled: as of the encoder.
    """
    mask = inputs.get("feature_attention_mask")
    spectra = inputs["input_features"]
    if mask is None:
        frames = [spectra.shape[-1] // _STEPS_PER_FRAME] * len(spectra)
    else:
        frames = frame_counts(mask).tolist()
    return [count // _FRAMES_PER_POOLED_ROW if pooled else count for count in frames]


def sinusoids(positions: int, width: int) -> Tensor:
    """Return Whisper's positions ``(positions, width)``: sines of each frequency, then cosines."""
    half = width // 2
    rates = torch.exp(-torch.arange(half) * (torch.tensor(10000.0).log() / max(half - 1, 1)))
    angles = torch.arange(positions)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)
