# SPDX-License-Identifier: Apache-2.0
"""The encoder rank of a non-colocated model: it sends its rows to the ranks of the language model.

Stock's pipeline bridge moves them; a flat output whose samples differ in rows carries the rows per
sample along.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from megatron.core.models.mimo import compat
from megatron.core.models.mimo.config.role import MIMO_LANGUAGE_MODULE_KEY, RankRole
from megatron.core.models.mimo.model.encoder_runner import (
    run_encoder,
    tied_to_parameters,
    waits_for_gradients,
)
from megatron.core.models.mimo.model.input_checks import check_inputs_given
from megatron.core.models.mimo.model.rank_modules import RankModules
from megatron.core.models.mimo.model.replaceable import ReplaceableSteps

# Attribute on an encoder's output that stock's pipeline bridge reads.
SPLIT_SIZES = "_mimo_bridge_split_sizes"


def encode_for_others(
    role: RankRole,
    modules: RankModules,
    steps: ReplaceableSteps,
    input_ids: torch.Tensor | None,
    modality_inputs: Mapping[str, Any] | None,
    input_tensors: Mapping[str, torch.Tensor] | None,
) -> dict[str, torch.Tensor]:
    """Run this rank's encoders and return their outputs by module name.

    A microbatch without inputs and without special tokens sends an empty ``(0, H)`` payload,
    since the receiver waits for one.

    Args:
        role: of the rank.
        modules, steps: of the rank.
        input_ids: ``(B, S)``, where the rank has them.
        modality_inputs: as for ``forward``.
        input_tensors: modality -> hidden states of the encoder's stage before.

    Raises:
        RuntimeError: special tokens of a modality without inputs.
    """
    outputs: dict[str, torch.Tensor] = {}
    for name in role.modality_module_names:
        if name not in modules.encoders:
            continue
        submodule = modules.encoders[name]
        inputs = (modality_inputs or {}).get(name)
        hidden_states = (input_tensors or {}).get(name)
        output = run_encoder(submodule, encoder_inputs=inputs, hidden_states=hidden_states)
        if output is None and inputs is None and hidden_states is None:
            if steps.has_tokens(input_ids, name):
                check_inputs_given(name, None)
            output = steps.empty_output(name)
            if waits_for_gradients(submodule):
                output = tied_to_parameters(output, submodule)
        if output is not None:
            steps.attach_split_sizes(output, input_ids, name)
            outputs[name] = output
    return outputs


def split_sizes(
    token_id: int | None, output: torch.Tensor, input_ids: torch.Tensor | None
) -> list[int] | None:
    """Return the rows per sample of a flat output whose samples differ in them, else ``None``.

    Stock's pipeline bridge splits by these numbers on fan-out; equal samples need none.

    Args:
        token_id: the modality's special token.
        output: of its encoder.
        input_ids: ``(B, S)``.
    """
    if token_id is None or input_ids is None or output.ndim != 2 or input_ids.size(0) <= 1:
        return None
    sizes = (input_ids == token_id).sum(dim=1).tolist()
    if sum(sizes) != output.size(0) or len(set(sizes)) <= 1:
        return None
    return sizes


def check_fan_out(grids: Mapping[str, Any], encoder_name: str) -> None:
    """Refuse samples that differ in rows where replicas are merged.

    Raises:
        ContractError: the encoder has more DP replicas than the language model: stock's bridge
            has no way to send the numbers along.
    """
    encoder_dp, language_dp = (
        grid.shape[grid.dim_names.index("dp")]
        for grid in (grids[encoder_name], grids[MIMO_LANGUAGE_MODULE_KEY])
    )
    if encoder_dp > language_dp:
        raise compat.ContractError(
            "Bridge fan-out split metadata with non-uniform per-sample sizes requires encoder "
            f"DP <= LM DP (got encoder='{encoder_name}' DP={encoder_dp}, LM DP={language_dp}); "
            "give every sample the same number of tokens or lower the encoder's DP"
        )


def has_encoder_tokens(token_id: int | None, input_ids: torch.Tensor | None) -> bool:
    """Return whether a batch has tokens of a modality."""
    if token_id is None or input_ids is None:
        return False
    return bool((input_ids == token_id).any())
