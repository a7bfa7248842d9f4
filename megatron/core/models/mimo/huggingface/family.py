# SPDX-License-Identifier: Apache-2.0
"""What a family of Hugging Face models says of itself: two mappings, a table, what is refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from megatron.core.models.mimo.huggingface.tables import Table


class UnsupportedModelError(ValueError):
    """A model, or a setting of one, that would not be the same function here."""


HARMLESS = frozenset(
    [
        "_name_or_path",
        "architectures",
        "bos_token_id",
        "chunk_size_feed_forward",
        "dtype",
        "eos_token_id",
        "id2label",
        "initializer_range",
        "is_encoder_decoder",
        "label2id",
        "max_window_layers",
        "model_type",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "pad_token_id",
        "pretraining_tp",
        "problem_type",
        "return_dict",
        "tokenizer_class",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    ]
)
"""Fields of every configuration that do not change what a trained model computes."""


@dataclass(frozen=True)
class Family:
    """Models of one kind.

    Attributes:
        model_types: as ``config.json`` names them.
        settings: from a configuration to the fields of the ``TransformerConfig`` that follow
            from it, layouts and dtypes aside.
        params: to the further arguments of the module.
        table: to the table of its weights.
        reads: fields of the configuration that ``settings`` and ``params`` read.
        ignores: fields that change nothing here, beside :data:`HARMLESS`.
        refuses: field -> a function of the configuration: why the field's value cannot be had here,
            or None where it can.
    """

    model_types: tuple[str, ...]
    settings: Callable[[Any], dict[str, Any]]
    params: Callable[[Any], dict[str, Any]]
    table: Callable[[Any], Table]
    reads: frozenset[str]
    ignores: frozenset[str] = frozenset()
    refuses: Mapping[str, Callable[[Any], str | None]] = field(default_factory=dict)

    def check(self, config: Any) -> None:
        """Refuse a configuration that would be another function here.

        Args:
            config: transformers' configuration.

        Raises:
            UnsupportedModelError: a setting is refused; one differs from its class's default
                and nobody reads it.
        """
        check_fields(config, self.reads, self.ignores, self.refuses)


def check_fields(
    config: Any,
    reads: frozenset[str],
    ignores: frozenset[str] = frozenset(),
    refuses: Mapping[str, Callable[[Any], str | None]] | None = None,
) -> None:
    """Refuse a configuration with a field that would change the result and that nobody reads.

    Args:
        config: transformers' configuration, of a part or of a whole model.
        reads, ignores, refuses: as of :class:`Family`.

    Raises:
        UnsupportedModelError: a setting is refused; one differs from its class's default and
            nobody reads it.
    """
    refuses = refuses or {}
    values = config.to_dict()
    for name, reason in refuses.items():
        if name in values and (why := reason(config)) is not None:
            raise UnsupportedModelError(
                f"{config.model_type}: {name}={values[name]!r} is not supported: {why}"
            )
    usual = type(config)().to_dict()
    known = reads | ignores | HARMLESS | set(refuses)
    for name in sorted(set(values) & set(usual) - known):
        if values[name] != usual[name]:
            raise UnsupportedModelError(
                f"{config.model_type}: {name}={values[name]!r} is not supported; only its "
                f"default, {usual[name]!r}, is known to give the same results here"
            )
    if getattr(config, "quantization_config", None):
        raise UnsupportedModelError(
            f"{config.model_type}: quantized weights cannot be trained; take the folder in "
            "bfloat16, float16 or float32"
        )


def renamed(config: Any, names: Mapping[str, str]) -> dict[str, Any]:
    """Return fields of a configuration under Megatron's names; ones that it lacks are left out.

    Args:
        config: transformers' configuration.
        names: Megatron's name -> Hugging Face's.
    """
    return {
        ours: getattr(config, theirs)
        for ours, theirs in names.items()
        if getattr(config, theirs, None) is not None
    }


def activation(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return an activation by transformers' name.

    Raises:
        UnsupportedModelError: it has another name.
    """
    known = {
        "silu": torch.nn.functional.silu,
        "swish": torch.nn.functional.silu,
        "gelu": torch.nn.functional.gelu,
        "gelu_new": tanh_gelu,
        "gelu_pytorch_tanh": tanh_gelu,
        "quick_gelu": quick_gelu,
        "relu": torch.nn.functional.relu,
    }
    if name not in known:
        raise UnsupportedModelError(
            f"activation {name!r} is not supported; known are {sorted(known)}"
        )
    return known[name]


def tanh_gelu(x: torch.Tensor) -> torch.Tensor:
    """Return GELU in its tanh approximation."""
    return torch.nn.functional.gelu(x, approximate="tanh")


def quick_gelu(x: torch.Tensor) -> torch.Tensor:
    """Return ``x * sigmoid(1.702 x)``."""
    return x * torch.sigmoid(1.702 * x)
