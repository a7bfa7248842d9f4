# SPDX-License-Identifier: Apache-2.0
"""One layer of a language model and one of an encoder, as this project builds them, to be timed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron.core.models.gpt import GPTModel
from megatron.core.models.mimo.job.settings import any_module_settings
from megatron.core.models.mimo.plan.shapes import Stack
from megatron.core.models.mimo.transformer.layer_specs import (
    encoder_layer_spec,
    language_layer_spec,
)
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig
from mimo_colocated.launch.layouts import Layout

_VOCABULARY = 8

Run = Callable[[int], Callable[[], None]]
"""Tokens -> a forward and a backward pass over so many."""


def language_stack(width: int, heads: int) -> Stack:
    """Return the sizes of the language model's layer that is timed."""
    return Stack.of(1, width, 2 * width, heads, gated=True)


def encoder_stack(width: int, heads: int) -> Stack:
    """Return the sizes of the encoder's layer that is timed."""
    return Stack.of(1, width, 4 * width, heads)


def language_layer(
    stack: Stack, groups: ProcessGroupCollection, device: torch.device, dtype: torch.dtype
) -> Run:
    """Return a causal decoder layer's passes over one sequence.

    Args:
        stack: its sizes.
        groups: of one rank each.
        device, dtype: of weights and tensors.
    """
    more: dict[str, Any] = {
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "normalization": "RMSNorm",
    }
    config = _config(stack, dtype, more)
    model = GPTModel(
        config=config,
        transformer_layer_spec=language_layer_spec(config),
        vocab_size=_VOCABULARY,
        max_sequence_length=1,
        post_process=False,
        position_embedding_type="rope",
        pg_collection=groups,
    ).to(device)
    _draw(model)

    def run(tokens: int) -> Callable[[], None]:
        hidden = torch.randn(tokens, 1, stack.hidden, device=device, dtype=dtype).requires_grad_()
        positions = torch.arange(tokens, device=device)[None]
        return lambda: _both(model(None, positions, None, decoder_input=hidden))

    return run


def encoder_layer(
    stack: Stack,
    item_tokens: int,
    groups: ProcessGroupCollection,
    device: torch.device,
    dtype: torch.dtype,
) -> Run:
    """Return an encoder layer's passes over items.

    Args:
        stack: its sizes.
        item_tokens: of one item; at least one item is encoded.
        groups: of one rank each.
        device, dtype: of weights and tensors.
    """
    config = _config(stack, dtype, {})
    block = TransformerBlock(config, encoder_layer_spec(config), pg_collection=groups).to(device)
    _draw(block)

    def run(tokens: int) -> Callable[[], None]:
        shape = item_tokens, max(1, tokens // item_tokens), stack.hidden
        hidden = torch.randn(shape, device=device, dtype=dtype).requires_grad_()
        return lambda: _both(block(hidden_states=hidden, attention_mask=None))

    return run


def _config(stack: Stack, dtype: torch.dtype, more: dict[str, Any]) -> TransformerConfig:
    return TransformerConfig(
        num_layers=stack.layers,
        hidden_size=stack.hidden,
        ffn_hidden_size=stack.ffn,
        num_attention_heads=stack.heads,
        add_bias_linear=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        perform_initialization=False,
        **more,
        **any_module_settings(Layout(), dtype, "none"),
    )


def _draw(module: torch.nn.Module) -> None:
    """Weights of a usual size: those that nobody has set may be of any kind, slow ones, too."""
    for weight in module.parameters():
        torch.nn.init.normal_(weight, std=0.02)


def _both(output: Tensor) -> None:
    output.sum().backward()
