# SPDX-License-Identifier: Apache-2.0
"""A causal language model of transformers whose sequences are cut over context-parallel ranks.

Sequences are cut as for Megatron's language models (:mod:`..partition`). All but attention works
on a token by itself, so a model runs on its rank's tokens once it is told their positions; in the
place of its attention comes PyTorch's ring attention.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from megatron.core.models.mimo.partition.utils import get_batch_on_this_cp_rank
from megatron.core.models.mimo.torch_native.agreed import judged_together
from megatron.core.models.mimo.torch_native.ring_attention import ring_attention, ring_problem

_ATTENTION = "mimo_ring_attention"
"""Its name among transformers' attention implementations."""
_GROUP = "context_parallel_group"
_SCALED_BY_LENGTH = ("dynamic", "longrope")
_ELSEWHERE = "take cp 1 or Megatron's layers"


def own_chunks(whole: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return this CP rank's chunks of a tensor that is the same on the ranks of its group.

    Args:
        whole: ``(B, S, ...)``.
        group: the CP ranks.

    Returns:
        ``(B, S/cp, ...)``: chunks ``r`` and ``2 * cp - 1 - r`` of ``2 * cp``.

    Raises:
        SequenceShardError: ``2 * cp`` does not divide S.
    """
    (own,) = get_batch_on_this_cp_rank({"x": whole}, cp_group=group).values()
    assert own is not None
    return own


def context_parallel_problem(model: Any, precision: torch.dtype | None) -> str:
    """Return why a model's sequences cannot be cut over CP; empty if they can.

    Args:
        model: of transformers.
        precision: in which it computes, if not in its weights' dtype.
    """
    return next(_problems(model, precision), "")


def _problems(model: Any, precision: torch.dtype | None) -> Iterator[str]:
    config, name = model.config, type(model).__name__
    layers = list(_attention_of(model))
    if not layers or not all(layer.is_causal for layer in layers):
        yield (
            f"{name} does not attend causally, and context parallelism is for causal language "
            "models; give those ranks to tp or dp"
        )
    asked = config._attn_implementation
    if asked != "sdpa":
        yield (
            f"{name} has attn_implementation={asked!r}, and over cp attention is PyTorch's ring "
            "attention; build the model with attn_implementation='sdpa', or take cp 1"
        )
    kinds = {*(getattr(config, "layer_types", None) or ())} - {"full_attention"}
    if kinds or any(getattr(layer, "sliding_window", None) for layer in layers):
        yield (
            f"{name} has layers of {sorted(kinds) or 'sliding_attention'}, and over cp every layer "
            f"attends to all that is before a token; {_ELSEWHERE}"
        )
    if any(getattr(layer, "attention_dropout", 0.0) for layer in layers):
        yield (
            f"{name} has attention_dropout {config.attention_dropout}, which ring attention does "
            f"not draw; set it to 0, or {_ELSEWHERE}"
        )
    scaling = (getattr(config, "rope_parameters", None) or {}).get("rope_type")
    if scaling in _SCALED_BY_LENGTH:
        yield (
            f"{name} has rope_type={scaling!r}, whose frequencies depend on the length, of which a "
            f"cp rank has a part; {_ELSEWHERE}"
        )
    if layers:
        weight = next(model.parameters())
        width = getattr(layers[0], "head_dim", config.hidden_size // config.num_attention_heads)
        yield ring_problem(weight.device, precision or weight.dtype, width)


def attend_over_cp(
    model: Any,
    group: dist.ProcessGroup,
    *,
    cut_sequence: bool,
    together: dist.ProcessGroup,
) -> None:
    """Put ring attention in the place of a model's own, and cut what the model is called with.

    Args:
        model: of transformers; is changed, its configuration is not.
        group: the CP ranks.
        cut_sequence: the model is called with whole sequences, the same on all ranks of the
            group; else with a rank's chunks, with ``position_ids`` and ``shift_labels``.
        together: ranks that run every forward together, which refuse what one of them has to
            refuse: those of ``group``, with FSDP all of its.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(_ATTENTION, _attend)
    # Its attention and its masks ask the configuration, which other models may share.
    theirs, own = model.config, copy.copy(model.config)
    own._attn_implementation = _ATTENTION
    for module in model.modules():
        if getattr(module, "config", None) is theirs:
            module.config = own
    for layer in _attention_of(model):
        setattr(layer, _GROUP, group)
    signature = inspect.signature(model.forward)

    def take(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        inputs = signature.bind_partial(*args, **kwargs).arguments
        inputs = {**inputs.pop("kwargs", {}), **inputs}

        def judged() -> dict[str, Any]:
            _refuse_inputs(inputs)
            if cut_sequence:
                return inputs | _cut(inputs, group)
            _check_chunks(inputs, group)
            return inputs

        # In every forward: one rank that stops alone leaves the others in attention or in FSDP.
        return (), judged_together(judged, together, model.device)

    model.register_forward_pre_hook(take, with_kwargs=True, prepend=True)


def _attention_of(model: nn.Module) -> Iterator[Any]:
    """What calls the attention that a configuration names."""
    return (module for module in model.modules() if hasattr(module, "is_causal"))


def _cut(inputs: dict[str, Any], group: dist.ProcessGroup) -> dict[str, Tensor]:
    """This rank's chunks of all that has one entry per token."""
    ids, embedded = inputs.get("input_ids"), inputs.get("inputs_embeds")
    tokens = embedded if ids is None else ids
    if tokens is None:
        raise ValueError("a forward pass needs input_ids or inputs_embeds, got neither")
    whole = {"input_ids": ids, "inputs_embeds": embedded}
    samples, length = tokens.shape[:2]
    positions = inputs.get("position_ids")
    if positions is None:
        positions = torch.arange(length, device=tokens.device)[None]
    else:
        check_one_sequence(positions)
    whole["position_ids"] = positions.expand(samples, length)
    labels, shifted = inputs.get("labels"), inputs.get("shift_labels")
    if shifted is None and labels is not None:
        # A chunk's last token is followed by another rank's first.
        shifted = functional.pad(labels, (0, 1), value=-100)[..., 1:].contiguous()
    if shifted is not None:
        whole |= {"labels": shifted, "shift_labels": shifted}
    return {name: own_chunks(each, group) for name, each in whole.items() if each is not None}


def _refuse_inputs(inputs: dict[str, Any]) -> None:
    for name in ("attention_mask", "past_key_values", "cache"):
        if inputs.get(name) is not None:
            raise ValueError(
                f"{name} is given, and over cp attention is causal over whole sequences without "
                "one; pad at the end, with labels of -100, or take cp 1"
            )
    kept = inputs.get("logits_to_keep")
    if torch.is_tensor(kept) or kept:
        raise ValueError(
            f"logits_to_keep={kept} would count within each cp rank's chunks; leave it out, and "
            "choose from the logits of own_chunks' tokens, or take cp 1"
        )


def check_one_sequence(whole: Tensor) -> None:
    """Refuse positions that are not those of one sequence; what attends looks at no position.

    Args:
        whole: position ids ``(B, S)`` before they are cut, from any first one.

    Raises:
        ValueError: a row does not count its tokens.
    """
    _check_counted(whole, torch.arange(whole.shape[-1], device=whole.device)[None])


def _check_chunks(inputs: dict[str, Any], group: dist.ProcessGroup) -> None:
    """Refuse chunks that a caller has cut and that are not those of one sequence."""
    positions = inputs.get("position_ids")
    if positions is None:
        raise ValueError(
            "position_ids must be given with cut_sequence=False: those of this rank's chunks, "
            "own_chunks(position_ids, group)"
        )
    if inputs.get("labels") is not None and inputs.get("shift_labels") is None:
        raise ValueError(
            "labels of a chunk lack the token after it; give shift_labels, the next token of each, "
            "as well: own_chunks(shift_labels, group)"
        )
    counted = torch.arange(positions.shape[-1] * group.size(), device=positions.device)
    _check_counted(positions, own_chunks(counted[None], group))


def _check_counted(positions: Tensor, wanted: Tensor) -> None:
    if not torch.equal(positions - positions[:, :1], (wanted - wanted[:, :1]).expand_as(positions)):
        raise ValueError(
            "position_ids do not count the tokens of one sequence, as of packed samples or of "
            "chunks of another rank, and over cp a row is attended to as one sequence; give a "
            f"sample a row, or {_ELSEWHERE}"
        )


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """Transformers' interface of attention: ``(B, heads, S/cp, D)`` to ``(B, S/cp, heads, D)``."""
    for name in ("sliding_window", "softcap", "s_aux", "position_bias", "cu_seq_lens_q"):
        if more.get(name) is not None:
            raise ValueError(
                f"{type(module).__name__} attends with {name}={more[name]}, which ring attention "
                f"does not; {_ELSEWHERE}"
            )
    assert attention_mask is None, "no mask is made for attention that transformers does not know"
    output = ring_attention(query, key, value, getattr(module, _GROUP), scaling)
    return output.transpose(1, 2).contiguous(), None
