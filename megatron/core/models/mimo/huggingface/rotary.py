# SPDX-License-Identifier: Apache-2.0
"""Rotary frequencies as a configuration has them, and multimodal positions in interleaved order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron.core.models.common.embeddings.rope_utils import get_pos_emb_on_this_cp_rank
from megatron.core.models.common.embeddings.rotary_pos_embedding import MultimodalRotaryEmbedding
from megatron.core.models.mimo.huggingface.family import UnsupportedModelError

_SUPPORTED = ("default", "linear", "llama3")


@dataclass(frozen=True)
class Rotary:
    """Rotary embeddings of a language model.

    Attributes:
        frequencies: one per pair of channels, in fp32.
        sections: pairs of channels that turn with time, height and width; None for text.
        interleaved: the sections take turns, channel by channel, instead of following each other.
    """

    frequencies: tuple[float, ...]
    sections: tuple[int, ...] | None = None
    interleaved: bool = False

    def on(self, device: torch.device) -> Tensor:
        """Return the frequencies as a tensor."""
        return torch.tensor(self.frequencies, dtype=torch.float32, device=device)


def rotary_of(config: Any, head_width: int) -> Rotary:
    """Read the rotary embeddings of a configuration.

    Args:
        config: transformers' configuration of a language model.
        head_width: channels of a head.

    Raises:
        UnsupportedModelError: a scaling whose frequencies depend on the length (dynamic,
            longrope), or that scales attention, too (yarn).
    """
    found = dict(config.rope_parameters or {})
    kind = found.get("rope_type", "default")
    if kind not in _SUPPORTED:
        raise UnsupportedModelError(
            f"{config.model_type}: rope_type={kind!r} is not supported; {', '.join(_SUPPORTED)} "
            "are" + ("; up to its original length 'default' is the same" * (kind == "dynamic"))
        )
    if found.get("partial_rotary_factor", 1.0) != 1.0:
        raise UnsupportedModelError(
            f"{config.model_type}: partial_rotary_factor={found['partial_rotary_factor']} is not "
            "supported; only 1.0 is"
        )
    if kind == "default":
        steps = torch.arange(0, head_width, 2, dtype=torch.int64).float() / head_width
        frequencies = 1.0 / found["rope_theta"] ** steps
    else:
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        frequencies, scale = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
        if scale != 1.0:
            raise UnsupportedModelError(f"{config.model_type}: rope_type={kind!r} scales attention")
    sections = found.get("mrope_section")
    return Rotary(
        tuple(frequencies.tolist()),
        None if sections is None else tuple(sections),
        bool(found.get("mrope_interleaved", False)),
    )


class InterleavedRotaryEmbedding(MultimodalRotaryEmbedding):
    """Multimodal rotary embedding whose channels take turns: time, height, width, time, ...

    Channel ``3 i + 1`` turns with the height for ``i`` below the height's section, ``3 i + 2``
    with the width below the width's, every other one with time.
    """

    def forward(
        self,
        position_ids: Tensor,
        mrope_section: list[int],
        cp_group: ProcessGroup | None = None,
    ) -> Tensor:
        """Return the angles of positions ``(3, b, s)``: ``(s, b, 1, 2 * channels)``.

        Args:
            position_ids: by time, height and width.
            mrope_section: pairs of channels of each.
            cp_group: the ranks that cut the sequence, if they are not the module's own.
        """
        positions = position_ids.to(self.inv_freq.device).float()
        angles = positions[..., None] * self.inv_freq
        chosen = angles[0].clone()
        for which in (1, 2):
            turns = slice(which, 3 * mrope_section[which], 3)
            chosen[..., turns] = angles[which][..., turns]
        both = torch.cat((chosen, chosen), dim=-1)[:, :, None].transpose(0, 1).contiguous()
        group = self.cp_group if cp_group is None else cp_group
        if group is not None and group.size() > 1:
            both = get_pos_emb_on_this_cp_rank(both, 0, group)
        return both
