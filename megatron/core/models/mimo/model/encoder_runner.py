# SPDX-License-Identifier: Apache-2.0
"""Run the encoders: inputs to rows, or empty rows that are tied to the encoder's weights.

**Who takes part.** A rank whose microbatch has no inputs of a modality may still owe its peers
something: a gradient of every weight where DDP reduces during the backward pass, or its place in
an exchange. Then it brings empty rows, whose backward pass gives each weight that trains a zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from megatron.core.models.mimo.config.role import MIMO_LANGUAGE_MODULE_KEY
from megatron.core.models.mimo.memory.activations import latest_offloaded
from megatron.core.models.mimo.memory.offload import reload_when_needed
from megatron.core.models.mimo.model.input_checks import (
    check_inputs_given,
    check_modalities,
    check_names,
    check_tokens_have_modality,
)
from megatron.core.models.mimo.model.rank_modules import RankModules
from megatron.core.models.mimo.model.replaceable import ReplaceableSteps
from megatron.core.utils import unwrap_model
from mimo_colocated import phases


class EncoderRunner:
    """The encoders of a rank.

    Args:
        modules: the rank's.
        steps: the model's replaceable ones.
    """

    def __init__(self, modules: RankModules, steps: ReplaceableSteps) -> None:
        self._modules, self._steps = modules, steps

    def run_present(
        self,
        names: list[str],
        modality_inputs: Mapping[str, Any] | None,
        tokens: Mapping[str, int],
    ) -> dict[str, torch.Tensor]:
        """Run the encoders that have inputs.

        Args:
            names: the modalities to run.
            modality_inputs: as for ``forward``.
            tokens: modality -> its tokens in this rank's language batch.

        Returns:
            Modality -> rows ``(n, H)``.

        Raises:
            RuntimeError: special tokens of a modality without inputs.
            ValueError: a modality has no token id, or a token no modality.
        """
        encoders = self._modules.encoders
        inputs = {name: (modality_inputs or {}).get(name) for name in names}
        present = [name for name, value in inputs.items() if value is not None]
        # Everything that can be seen before an encoder runs is refused before.
        check_modalities(present, self._modules.special_token_ids)
        check_tokens_have_modality(tokens, encoders)
        for name in inputs:
            if name not in present:
                check_inputs_given(name, tokens.get(name, 0))
        check_names("modality_inputs", modality_inputs, encoders)
        rows: dict[str, torch.Tensor] = {}
        for name in names:
            encoded = None
            if name in present:
                encoded = run_encoder(encoders[name], encoder_inputs=inputs[name])
            if encoded is not None:
                rows[name] = encoded
            else:
                check_inputs_given(name, tokens.get(name, 0))
        return rows

    def run_all(
        self, names: list[str], modality_inputs: Mapping[str, Any] | None, dtype: torch.dtype
    ) -> tuple[dict[str, torch.Tensor], set[str]]:
        """Run the encoders that have inputs, and make empty rows for the others.

        All ranks of an exchange group enter it, so their rows must need a gradient alike: empty
        ones do if a parameter of the encoder does.

        Args:
            names: the modalities.
            modality_inputs: as for ``forward``.
            dtype: of the rows.

        Returns:
            (modality -> rows ``(n, H)``, ``(0, H)`` without inputs; the modalities that have a
            backward pass here: they ran, or are waited for).
        """
        rows: dict[str, torch.Tensor] = {}
        part = set()
        for name in names:
            submodule = self._modules.encoders[name]
            inputs = (modality_inputs or {}).get(name)
            encoded = None if inputs is None else run_encoder(submodule, encoder_inputs=inputs)
            if encoded is None:
                encoded = self._steps.empty_output(name).detach()
                if torch.is_grad_enabled() and trains(submodule):
                    encoded = tied_to_parameters(encoded, submodule)
            rows[name] = encoded.to(dtype)
            if inputs is not None or self.needs_empty_rows(name):
                part.add(name)
        return rows, part

    def whole_items(self, name: str, modality_inputs: Mapping[str, Any] | None) -> list[int]:
        """Return the rows of the whole items that this rank's replica encodes, where CP cuts them.

        Args:
            name: of the modality.
            modality_inputs: as for ``forward``.
        """
        inputs = (modality_inputs or {}).get(name)
        encoder: Any = unwrap_model(self._modules.encoders[name])
        return encoder.whole_items(inputs) if inputs else []

    def needs_empty_rows(self, name: str) -> bool:
        """Return whether a modality without rows in a batch brings an empty tensor to backward.

        With overlap its DDP wrapper waits for a gradient of every parameter. And where the text
        embedding does not train, rows alone decide whether the fused sequence needs a gradient:
        ranks of a language replica that disagreed would wait for each other in its backward pass,
        and a step without any rows would have no gradient at all.
        """
        submodule = self._modules.encoders[name]
        if not torch.is_grad_enabled() or not trains(submodule):
            return False
        embedding = getattr(unwrap_model(self._modules.language_model), "embedding", None)
        text_is_frozen = isinstance(embedding, nn.Module) and not any(
            parameter.requires_grad for parameter in embedding.parameters()
        )
        return text_is_frozen or waits_for_gradients(submodule)

    def empty_rows(self, name: str) -> torch.Tensor:
        """Return no rows, ``(0, H)``, tied to the weights of a modality."""
        return tied_to_parameters(self._steps.empty_output(name), self._modules.encoders[name])

    def device_of(self, name: str) -> torch.device:
        """Return where the rows of a modality lie."""
        return self._steps.empty_output(name).device

    def give_zero_gradients(self, name: str) -> None:
        """Run a backward pass that gives each weight of a modality that trains a zero, once."""
        submodule = self._modules.encoders[name]
        if waits_for_gradients(submodule) and trains(submodule):
            empty = self._steps.empty_output(name).detach()
            tied_to_parameters(empty, submodule).sum().backward()


def empty_output(modules: RankModules, name: str) -> torch.Tensor:
    """Return no rows, ``(0, H)``, on the encoder's device and in the language model's dtype.

    With levels they are as much wider as rows are.

    Raises:
        ValueError: the language config has no ``hidden_size``.
    """
    config = modules.language_config
    hidden_size = getattr(config, "hidden_size", None)
    if hidden_size is None:
        raise ValueError("Language model config must define hidden_size for empty modality output")
    submodule = modules.encoder(name)
    parameter = next(submodule.parameters(), None) if isinstance(submodule, nn.Module) else None
    return torch.empty(
        (0, modules.deepstack.row_width(name)),
        # A module without parameters has no device; Megatron's current one is then right.
        device=torch.cuda.current_device() if parameter is None else parameter.device,
        dtype=getattr(config, "params_dtype", None) or torch.float32,
        requires_grad=True,
    )


def over_bridges(
    modules: RankModules, modality_embeddings: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Send each modality's rows over its bridge, if it has one; the dict is updated."""
    for name in list(modality_embeddings):
        communicator = modules.bridges.get((name, MIMO_LANGUAGE_MODULE_KEY))
        if communicator is not None:
            phases.mark(phases.BRIDGE_FORWARD)
            moved = communicator.communicate(modality_embeddings[name])
            phases.when_gradient_arrives(moved, phases.BRIDGE_BACKWARD)
            encoder = modules.encoder(name)
            offloaded = None if encoder is None else latest_offloaded(encoder)
            modality_embeddings[name] = reload_when_needed(moved, offloaded)
    return modality_embeddings


def run_encoder(submodule: Any, **inputs: Any) -> torch.Tensor | None:
    """Call a modality's module; ``None`` where it made no rows."""
    phases.mark(phases.ENCODER_FORWARD)
    # Through __call__, so that forward hooks run: DDP's parameter gather is one.
    call = submodule if isinstance(submodule, nn.Module) else submodule.forward
    return phases.when_gradient_arrives(call(**inputs), phases.ENCODER_BACKWARD)


def waits_for_gradients(submodule: nn.Module) -> bool:
    """Return whether a DDP wrapper reduces during backward: it waits for every parameter."""
    config = getattr(submodule, "ddp_config", None)
    return torch.is_grad_enabled() and getattr(config, "overlap_grad_reduce", False) is True


def trains(submodule: nn.Module) -> bool:
    """Return whether rows need a gradient; the same on all ranks, with inputs or without."""
    return any(parameter.requires_grad for parameter in _row_parameters(submodule))


def tied_to_parameters(empty: torch.Tensor, submodule: nn.Module) -> torch.Tensor:
    """Return an empty tensor whose backward pass gives every parameter that trains a zero.

    A rank whose microbatch has no inputs takes part in the reduction that its peers start. The
    sums are over no elements, so weights that are not finite leave zeros, too.
    """
    trained = [p for p in _row_parameters(submodule) if p.requires_grad]
    zeros = [_own(p).reshape(-1)[:0].sum().float() for p in trained]
    tied = empty + torch.stack(zeros).sum().to(empty.dtype) if zeros else empty
    return phases.when_gradient_arrives(tied, phases.ENCODER_BACKWARD)


def _own(parameter: torch.Tensor) -> torch.Tensor:
    """This rank's part of a torch-native weight, with its gradient; others are plain."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def _row_parameters(submodule: nn.Module) -> Iterator[nn.Parameter]:
    """What rows are made with: decoders and output projections have no part in them."""
    inner = unwrap_model(submodule)
    if not isinstance(inner, nn.Module):
        return  # a stand-in
    parts = [getattr(inner, part, None) for part in ("encoders", "input_projections")]
    for part in [part for part in parts if isinstance(part, nn.Module)] or [inner]:
        yield from part.parameters()
