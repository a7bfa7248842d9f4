# SPDX-License-Identifier: Apache-2.0
"""The encoder side of the model: run the encoders, check their rows, send them over the bridge.

**Who enters the bridge.** All ranks of one language replica see the same ``input_ids``, so they
agree, without asking each other, on whether a modality has tokens in it. With tokens all of them
enter the modality's bridge, without tokens none does. A rank that could not enter raises, before
any collective of the bridge. The gather bridge wants the same number of rows of every sibling;
that too is a comparison of own rows with own tokens, so it costs no communication.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from megatron.core.models.mimo import compat
from megatron.core.models.mimo.comm.token_runs import count_mismatch
from megatron.core.models.mimo.config.role import MIMO_LANGUAGE_MODULE_KEY, ModuleLayout
from megatron.core.models.mimo.memory.activations import latest_offloaded
from megatron.core.models.mimo.memory.offload import reload_when_needed
from megatron.core.models.mimo.model.token_rows import TEXT
from megatron.core.models.mimo.stand_ins import TakesStandIns, model_method
from megatron.core.utils import unwrap_model
from mimo_colocated import phases

# Attribute on an encoder's output that stock's pipeline bridge reads.
_SPLIT_SIZES = "_mimo_bridge_split_sizes"


class EncoderSide(TakesStandIns):
    """Mixin of :class:`MimoModel`: what happens before the rows meet the text."""

    def _encode_for_language(
        self, input_ids: torch.Tensor, modality_inputs: Mapping[str, Any] | None
    ) -> dict[str, torch.Tensor]:
        """Colocated: rows of every modality in the language model's layout.

        Raises:
            RuntimeError: special tokens of a modality without inputs.
            ValueError: rows and tokens do not match, a modality has no token id, or a token no
                modality.
        """
        inputs = {name: (modality_inputs or {}).get(name) for name in self.modality_submodules}
        present = [name for name, value in inputs.items() if value is not None]
        # Everything that can be seen before an encoder runs is refused before.
        refuse_unknown_modalities(present, self.special_token_ids)
        tokens = self._modality_tokens(input_ids)
        refuse_tokens_of_nothing(tokens, inputs)
        for name in inputs:
            if name not in present:
                _refuse_tokens_without_inputs(name, tokens.get(name, 0))
        refuse_unknown_names("modality_inputs", modality_inputs, inputs)
        rows: dict[str, torch.Tensor] = {}
        for name, submodule in self.modality_submodules.items():
            encoded = _call(submodule, encoder_inputs=inputs[name]) if name in present else None
            if encoded is not None:
                rows[name] = encoded
            else:
                _refuse_tokens_without_inputs(name, tokens.get(name, 0))
        for name, encoded in rows.items():
            self._check_row_count(name, encoded.size(0), tokens[name])
        return self._bridge(rows, tokens)

    def _modality_tokens(self, input_ids: torch.Tensor) -> dict[str, int]:
        """Tokens per modality in this rank's language batch."""
        found = self._token_rows(input_ids, self.special_token_ids)
        return {name: found.count(name) for name in self.special_token_ids}

    def _bridge(
        self, rows: dict[str, torch.Tensor], tokens: Mapping[str, int]
    ) -> dict[str, torch.Tensor]:
        """Rows of all modalities, those with tokens in the batch moved over their bridge."""
        moving = {name: row for name, row in rows.items() if tokens[name]}
        if self.colocated_comms and moving:
            moving = self._apply_colocated_comms(moving)
        moved = {**rows, **moving}
        for name, submodule in self.modality_submodules.items():
            if name not in moved and tokens.get(name) == 0 and self._needs_empty_rows(name):
                moved[name] = _tied_to_parameters(self._empty_encoder_output(name), submodule)
        return moved

    def _needs_empty_rows(self, name: str) -> bool:
        """Whether a modality without rows in a batch brings an empty tensor to backward.

        With overlap its DDP wrapper waits for a gradient of every parameter. And where the text
        embedding does not train, rows alone decide whether the fused sequence needs a gradient:
        ranks of a language replica that disagreed would wait for each other in its backward pass,
        and a step without any rows would have no gradient at all.
        """
        submodule = self.modality_submodules[name]
        if not torch.is_grad_enabled() or not trains(submodule):
            return False
        embedding = getattr(unwrap_model(self.language_model), "embedding", None)
        text_is_frozen = isinstance(embedding, nn.Module) and not any(
            parameter.requires_grad for parameter in embedding.parameters()
        )
        return text_is_frozen or waits_for_gradients(submodule)

    @model_method
    def _apply_colocated_comms(
        self, modality_embeddings: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Each modality's rows through its bridge, if it has one; the dict is updated."""
        for name in list(modality_embeddings):
            communicator = self.colocated_comms.get((name, MIMO_LANGUAGE_MODULE_KEY))
            if communicator is not None:
                phases.mark(phases.BRIDGE_FORWARD)
                moved = communicator.communicate(modality_embeddings[name])
                phases.when_gradient_arrives(moved, phases.BRIDGE_BACKWARD)
                submodules = getattr(self, "modality_submodules", {})
                offloaded = latest_offloaded(submodules[name]) if name in submodules else None
                modality_embeddings[name] = reload_when_needed(moved, offloaded)
        return modality_embeddings

    def _rows_to_bring(
        self, modality_inputs: Mapping[str, Any] | None, dtype: torch.dtype
    ) -> dict[str, torch.Tensor]:
        """Rows of every modality for its routed bridge: ``(n, H)``, ``(0, H)`` without inputs.

        All ranks of an exchange group enter it, so their rows must need a gradient alike: empty
        ones do if a parameter of the encoder does.
        """
        rows: dict[str, torch.Tensor] = {}
        for name, submodule in self.modality_submodules.items():
            inputs = (modality_inputs or {}).get(name)
            encoded = None if inputs is None else _call(submodule, encoder_inputs=inputs)
            if encoded is None:
                encoded = self._empty_encoder_output(name).detach()
                if torch.is_grad_enabled() and trains(submodule):
                    encoded = _tied_to_parameters(encoded, submodule)
            rows[name] = encoded.to(dtype)
        return rows

    def give_zero_gradients(self, name: str) -> None:
        """A backward pass that gives each weight of a modality that trains a zero, once."""
        submodule = self.modality_submodules[name]
        if waits_for_gradients(submodule) and trains(submodule):
            empty = self._empty_encoder_output(name).detach()
            _tied_to_parameters(empty, submodule).sum().backward()

    def _check_row_count(self, name: str, rows: int, tokens: int) -> None:
        """Compare this encoder replica's rows with this language replica's tokens.

        Fan-in: ``scale`` encoder replicas bring the same number each. Fan-out: this encoder
        replica brings the rows of ``scale`` language replicas.

        Raises:
            ValueError: the bridge would deliver another number of rows than there are tokens.
        """
        communicator = self.colocated_comms.get((name, MIMO_LANGUAGE_MODULE_KEY))
        scale = getattr(communicator, "scale", 1)
        if communicator is None:
            return  # Nobody waits for it; where the rows are placed it is said, too.
        if not isinstance(scale, int) or scale == 1:
            arriving, how = rows, ""
        elif communicator.is_fan_in():
            arriving = rows * scale
            how = f": {rows} on this rank, times the {scale} encoder replicas of a language replica"
        else:
            if rows % scale:
                return  # The bridge refuses this itself, with a better sentence.
            arriving = rows // scale
            how = f": {rows} on this rank, shared by {scale} language replicas"
        if arriving != tokens:
            advice = "; every replica must have the same number" if how else ""
            raise ValueError(count_mismatch(name, tokens, arriving) + how + advice)

    @model_method
    def _forward_encoders(
        self,
        input_ids: torch.Tensor | None,
        modality_inputs: Mapping[str, Any] | None,
        input_tensors: Mapping[str, torch.Tensor] | None,
    ) -> dict[str, torch.Tensor]:
        """Encoder rank of a non-colocated model: its outputs by module name.

        A microbatch without inputs and without special tokens sends an empty ``(0, H)`` payload,
        since the receiver waits for one.

        Raises:
            RuntimeError: special tokens of a modality without inputs.
        """
        outputs: dict[str, torch.Tensor] = {}
        for name in self.role.modality_module_names:
            if name not in self.modality_submodules:
                continue
            submodule = self.modality_submodules[name]
            inputs = (modality_inputs or {}).get(name)
            hidden_states = (input_tensors or {}).get(name)
            output = _call(submodule, encoder_inputs=inputs, hidden_states=hidden_states)
            if output is None and inputs is None and hidden_states is None:
                if self._has_encoder_tokens(input_ids, name):
                    _refuse_tokens_without_inputs(name, None)
                output = self._empty_encoder_output(name)
                if waits_for_gradients(submodule):
                    output = _tied_to_parameters(output, submodule)
            if output is not None:
                self._attach_modality_split_sizes(output, input_ids, name)
                outputs[name] = output
        return outputs

    @model_method
    def _attach_modality_split_sizes(
        self, output: torch.Tensor, input_ids: torch.Tensor | None, encoder_name: str
    ) -> None:
        """Note the rows per sample on a flat output whose samples differ in them.

        Stock's pipeline bridge splits by these numbers on fan-out; equal samples need none.

        Raises:
            ValueError: they differ and the encoder has more DP replicas than the language model:
                stock's bridge has no way to send the numbers along.
        """
        token_id = self.special_token_ids.get(encoder_name)
        if token_id is None or input_ids is None or output.ndim != 2 or input_ids.size(0) <= 1:
            return
        sizes = (input_ids == token_id).sum(dim=1).tolist()
        if sum(sizes) != output.size(0) or len(set(sizes)) <= 1:
            return
        if self.role.mode is ModuleLayout.NON_COLOCATED:
            self._refuse_uneven_fan_in(encoder_name)
        setattr(output, _SPLIT_SIZES, sizes)

    def _refuse_uneven_fan_in(self, encoder_name: str) -> None:
        grids = self.mimo_config.module_to_grid_map
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

    @model_method
    def _has_encoder_tokens(self, input_ids: torch.Tensor | None, encoder_name: str) -> bool:
        """Whether the batch has tokens of a modality."""
        token_id = self.special_token_ids.get(encoder_name)
        if token_id is None or input_ids is None:
            return False
        return bool((input_ids == token_id).any())

    @model_method
    def _empty_encoder_output(self, encoder_name: str) -> torch.Tensor:
        """No rows, ``(0, H)``, on the encoder's device and in the language model's dtype.

        Raises:
            ValueError: the language config has no ``hidden_size``.
        """
        config = self.mimo_config.language_model_spec.params["config"]
        hidden_size = getattr(config, "hidden_size", None)
        if hidden_size is None:
            raise ValueError(
                "Language model config must define hidden_size for empty modality output"
            )
        submodule = dict(getattr(self, "modality_submodules", {})).get(encoder_name)
        parameter = next(submodule.parameters(), None) if isinstance(submodule, nn.Module) else None
        return torch.empty(
            (0, hidden_size),
            # A module without parameters has no device; Megatron's current one is then right.
            device=torch.cuda.current_device() if parameter is None else parameter.device,
            dtype=getattr(config, "params_dtype", None) or torch.float32,
            requires_grad=True,
        )


def refuse_unknown_modalities(
    modalities: Mapping[str, Any] | list[str], special_token_ids: Mapping[str, int]
) -> None:
    """Every modality with rows has a token that stands for them.

    Raises:
        ValueError: one has none.
    """
    for name in modalities:
        if name != TEXT and name not in special_token_ids:
            raise ValueError(
                f"No special token ID defined for modality {name}; special_token_ids has "
                f"{sorted(special_token_ids)}"
            )


def refuse_unknown_names(
    argument: str, given: Mapping[str, Any] | None, known: Collection[str]
) -> None:
    """What is given for a modality that the model does not have would not be read.

    Raises:
        ValueError: such a name, whose value is not ``None``.
    """
    unknown = sorted(name for name, value in (given or {}).items() if value is not None)
    unknown = [name for name in unknown if name not in known]
    if unknown:
        raise ValueError(
            f"{argument} has {unknown}, but this model's modalities are {sorted(known)}; leave out "
            "what nobody reads"
        )


def refuse_tokens_of_nothing(tokens: Mapping[str, int], modalities: Iterable[str]) -> None:
    """Tokens of a modality that the model does not have would become zero rows.

    Args:
        tokens: modality -> how many of its tokens a batch has.
        modalities: those that bring rows.

    Raises:
        ValueError: there are such tokens.
    """
    for name in sorted(set(tokens) - set(modalities)):
        if tokens[name]:
            raise ValueError(
                f"input_ids has {tokens[name]} tokens of '{name}', a modality of special_token_ids "
                f"that brings no rows (those that do: {sorted(modalities)}); give the model that "
                "modality or take the tokens out"
            )


def missing_inputs(name: str, tokens: int | None = None) -> str:
    """The sentence for special tokens of a modality without inputs."""
    count = "" if tokens is None else f" ({tokens} of them)"
    return (
        f"{name} inputs are missing, but matching special tokens exist{count}; pass "
        f"modality_inputs['{name}'] or take the tokens out of input_ids"
    )


def _refuse_tokens_without_inputs(name: str, tokens: int | None) -> None:
    if tokens != 0:
        raise RuntimeError(missing_inputs(name, tokens))


def _call(submodule: Any, **inputs: Any) -> torch.Tensor | None:
    """Through ``__call__``, so that forward hooks run: DDP's parameter gather is one."""
    phases.mark(phases.ENCODER_FORWARD)
    call = submodule if isinstance(submodule, nn.Module) else submodule.forward
    return phases.when_gradient_arrives(call(**inputs), phases.ENCODER_BACKWARD)


def waits_for_gradients(submodule: nn.Module) -> bool:
    """Whether a DDP wrapper reduces during backward, so that it waits for every parameter."""
    config = getattr(submodule, "ddp_config", None)
    return torch.is_grad_enabled() and getattr(config, "overlap_grad_reduce", False) is True


def _row_parameters(submodule: nn.Module) -> Iterator[nn.Parameter]:
    """What rows are made with: decoders and output projections have no part in them."""
    inner = unwrap_model(submodule)
    if not isinstance(inner, nn.Module):
        return  # a stand-in
    parts = [getattr(inner, part, None) for part in ("encoders", "input_projections")]
    for part in [part for part in parts if isinstance(part, nn.Module)] or [inner]:
        yield from part.parameters()


def trains(submodule: nn.Module) -> bool:
    """Whether rows of a modality need a gradient; the same on all ranks, with inputs or without."""
    return any(parameter.requires_grad for parameter in _row_parameters(submodule))


def _tied_to_parameters(empty: torch.Tensor, submodule: nn.Module) -> torch.Tensor:
    """An empty tensor whose backward pass gives every parameter that trains a zero gradient.

    A rank whose microbatch has no inputs takes part in the reduction that its peers start. The
    sums are over no elements, so weights that are not finite leave zeros, too.
    """
    trained = [p for p in _row_parameters(submodule) if p.requires_grad]
    zeros = [p.reshape(-1)[:0].sum().float() for p in trained]
    tied = empty + torch.stack(zeros).sum().to(empty.dtype) if zeros else empty
    return phases.when_gradient_arrives(tied, phases.ENCODER_BACKWARD)
