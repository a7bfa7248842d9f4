# SPDX-License-Identifier: Apache-2.0
"""The multimodal model: encoders, the bridge, the fused sequence, the language model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed import ProcessGroup

from megatron.core.distributed import DistributedDataParallel
from megatron.core.enums import ModelType
from megatron.core.models.mimo.comm.colocated_communicator import ColocatedBridgeCommunicator
from megatron.core.models.mimo.comm.routed_bridge import RoutedBridge
from megatron.core.models.mimo.comm.routes import RoutePlan
from megatron.core.models.mimo.config.base_configs import MimoModelConfig, option_of
from megatron.core.models.mimo.config.checks import check_model_config
from megatron.core.models.mimo.config.role import (
    MIMO_LANGUAGE_MODULE_KEY,
    ModuleLayout,
    RankRole,
)
from megatron.core.models.mimo.model.attention_masks import check_mask
from megatron.core.models.mimo.model.ddp_methods import DDPMethods
from megatron.core.models.mimo.model.encoder_side import EncoderSide
from megatron.core.models.mimo.model.language_groups import (
    language_group,
    refuse_other_cp_size,
    refuse_other_pp_size,
)
from megatron.core.models.mimo.model.language_side import LanguageSide
from megatron.core.models.mimo.model.multimodal_rotary import rotary_positions_of
from megatron.core.models.mimo.model.no_samples import (
    cut_back,
    padded_shape,
    padding_for,
    padding_problem,
    without_items,
)
from megatron.core.models.mimo.model.replicated_encoders import warn_of_replicated_encoders
from megatron.core.models.mimo.model.routed_side import RoutedSide
from megatron.core.models.mimo.model.stage_side import StageSide, stages_of
from megatron.core.models.mimo.model.state_dicts import StateDicts
from megatron.core.models.mimo.partition.utils import PartitionAdapter, PartitionConfig
from megatron.core.models.mimo.stand_ins import model_method
from megatron.core.models.mimo.training.recompute import recomputable
from megatron.core.models.mimo.transformer.input_gradients import sum_wanted_gradients_only
from megatron.core.models.mimo.wrappers import hide_in_states
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import build_module
from megatron.core.utils import unwrap_model
from mimo_colocated import phases

_DEFAULT_MAX_SEQ_LEN = 4096


class MimoModel(
    EncoderSide, LanguageSide, RoutedSide, StageSide, StateDicts, DDPMethods, MegatronModule
):
    """Encoders and a language model that reads their rows among its text tokens.

    Colocated, one forward pass on every rank is::

        modality_inputs --encoder, projection--> rows (N, H)       encoder's TP x DP
                        --bridge--> rows (N', H)                   language model's TP x DP
        input_ids       --embedding--> text rows (T, H)
        both            --placed by token position--> (S, B, H)
                        --PartitionAdapter--> (S/(cp*tp), B, H)    language model's CP, SP
                        --language model--> output

    With ``bridge="routed"`` the bridge ends at the last line: rows go straight to their places in
    the cut sequence, and only the text tokens of this rank's part are embedded.

    With pipeline stages of the language model the encoders still run on every rank. The rows go to
    the first stage (over gather bridges to all stages, of which the first uses them), and
    ``training.pipeline_step`` runs the step in place of ``forward``.

    Non-colocated, an encoder rank stops after the rows and returns them by module name; a
    language rank gets them through :meth:`set_input_tensor` and starts at the placing.

    Args:
        mimo_config: the specs of all modules, the special tokens and the grids.
        cp_group: the language model's context-parallel group. ``None``: that of the language
            grid; without one, Megatron's global group, if the config has CP > 1.
        tp_group: the same for tensor parallelism; used with sequence parallelism.

    Attributes:
        role: the modules of this rank.
        colocated_comms: ``(modality, "language")`` -> bridge.
        partition_adapter: cuts the fused sequence; ``None`` without CP and SP.
        modality_submodules: modality -> its module, bare or wrapped.
        language_model: the language model, bare or wrapped; ``None`` on encoder ranks. With
            virtual pipeline stages their first one; ``virtual_stages`` has the others.
        special_token_ids: modality -> token id.

    Raises:
        TypeError, ValueError: a configuration that cannot train as it says
            (``config.checks``), sizes of config, grid and groups that disagree; what the bridge
            refuses.
        RuntimeError: the language model scatters its embeddings for sequence parallelism itself.
        KeyError: the language grid's ``cp`` or ``tp`` group is needed and was not created.
    """

    # The schedules of megatron-core 0.16 ask every model for it.
    model_type = ModelType.encoder_or_decoder
    # What the language rank got from other ranks; set by the schedule.
    input_tensors: Any = None

    def __init__(
        self,
        mimo_config: MimoModelConfig,
        cp_group: ProcessGroup | None = None,
        tp_group: ProcessGroup | None = None,
    ) -> None:
        check_model_config(mimo_config)
        super().__init__(mimo_config.language_model_spec.params["config"])
        self.mimo_config = mimo_config
        grid_map = mimo_config.module_to_grid_map
        self.role = RankRole.build(list(mimo_config.modality_submodules_spec), grid_map)
        self.special_token_ids = dict(mimo_config.special_token_ids or {})
        self.partition_adapter = self._build_partition_adapter(cp_group, tp_group)
        self.colocated_comms: dict[tuple[str, str], ColocatedBridgeCommunicator | RoutedBridge] = {}
        if grid_map and self.role.mode is ModuleLayout.COLOCATED:
            self._build_colocated_communicators()
        self.modality_submodules = nn.ModuleDict()
        self._initialize_submodules()
        self._initialize_language_model()
        hide_in_states(self)

    # -- construction ----------------------------------------------------------------------

    def _build_partition_adapter(
        self, cp_group: ProcessGroup | None, tp_group: ProcessGroup | None
    ) -> PartitionAdapter | None:
        """The adapter of a language rank with CP or SP, with the groups of the language grid."""
        if not self.role.has_language_module:
            # An encoder rank never cuts, and the language model's groups are not its own.
            return None
        config = self.config
        grid = (self.mimo_config.module_to_grid_map or {}).get(MIMO_LANGUAGE_MODULE_KEY)
        needs_cp, needs_sp = config.context_parallel_size > 1, config.sequence_parallel
        refuse_other_cp_size(grid, cp_group, config.context_parallel_size)
        if self.role.mode is ModuleLayout.COLOCATED:
            refuse_other_pp_size(grid, getattr(config, "pipeline_model_parallel_size", None))
        cp_group = language_group(grid, "cp", cp_group, needs_cp)
        tp_group = language_group(grid, "tp", tp_group, needs_sp)
        if not needs_cp and not needs_sp:
            return None
        params = self.mimo_config.language_model_spec.params
        return PartitionAdapter(
            PartitionConfig.from_mp_config(
                mp=config,
                max_seq_len=params.get("max_sequence_length", _DEFAULT_MAX_SEQ_LEN),
                kv_format=self.mimo_config.kv_format,
                cp_group=cp_group,
                tp_group=tp_group,
            )
        )

    @model_method
    def _build_colocated_communicators(self) -> None:
        """One bridge per modality; grids without ``tp`` or ``dp`` say nothing and get none."""
        grid_map = self.mimo_config.module_to_grid_map
        if any(not {"tp", "dp"} <= set(grid.dim_names) for grid in grid_map.values()):
            return
        routed = option_of(self.mimo_config, "bridge") == "routed"
        make = self._routed_bridge if routed else self._gather_bridge
        # The spec's order, the same on all ranks: bridges create process groups.
        for name in self.mimo_config.modality_submodules_spec:
            self.colocated_comms[(name, MIMO_LANGUAGE_MODULE_KEY)] = make(
                src_grid=grid_map[name],
                dest_grid=grid_map[MIMO_LANGUAGE_MODULE_KEY],
                src_module_name=name,
                dest_module_name=MIMO_LANGUAGE_MODULE_KEY,
            )

    def _gather_bridge(self, **ends: Any) -> ColocatedBridgeCommunicator:
        return ColocatedBridgeCommunicator(**ends, dim_mapping={"b": 0, "h": 1})

    def _routed_bridge(self, **ends: Any) -> RoutedBridge:
        return RoutedBridge(
            **ends,
            sequence_parallel=self.config.sequence_parallel,
            guard=option_of(self.mimo_config, "bridge_guard"),
        )

    @model_method
    def _initialize_submodules(self) -> None:
        """Build the modalities of this rank."""
        for name, spec in self.mimo_config.modality_submodules_spec.items():
            stage = self.role.modules.get(name)
            if stage is not None:
                built = spec.module.from_spec(
                    spec, is_first_stage=stage.is_first_stage, is_last_stage=stage.is_last_stage
                )
                memory = option_of(self.mimo_config, "encoder_memory")
                if name in memory:
                    built.use_memory(memory[name])
                if isinstance(built, nn.Module):
                    sum_wanted_gradients_only(built)
                    grids = getattr(self.mimo_config, "module_to_grid_map", None) or {}
                    warn_of_replicated_encoders(name, built, grids.get(name))
                self.modality_submodules[name] = built

    @model_method
    def _initialize_language_model(self) -> None:
        """Build the language model, where this rank has a stage of it."""
        self.language_model = None
        if self.role.has_language_module:
            self.language_model = build_module(self.mimo_config.language_model_spec)
            specs = option_of(self.mimo_config, "virtual_stage_specs")
            if specs:
                self.virtual_stages = nn.ModuleList(build_module(spec) for spec in specs)
            self._refuse_embedding_scatter()
            self._refuse_other_stages()
            self._drop_text_alike_over_tp()

    @model_method
    def destroy(self) -> None:
        """Release the process groups that this model made. May be called again."""
        for communicator in self.colocated_comms.values():
            communicator.destroy()
        self.colocated_comms.clear()

    # -- the modules of this rank ----------------------------------------------------------

    def language_stages(self) -> list[nn.Module]:
        """The language model's stages on this rank, bare or wrapped, in order.

        One, or several virtual ones of an interleaved pipeline; none on encoder ranks.
        """
        return stages_of(self)

    @model_method
    def _active_submodules(self) -> Iterator[nn.Module]:
        """The language model, then the modalities, as far as this rank has them."""
        yield from self.language_stages()
        for submodule in getattr(self, "modality_submodules", {}).values():
            if submodule is not None:
                yield submodule

    @model_method
    def _active_ddp_modules(self) -> Iterator[Any]:
        """Those of them that have a DDP wrapper."""
        for module in self._active_submodules():
            if isinstance(module, DistributedDataParallel):
                yield module

    @model_method
    def set_input_tensor(self, input_tensor: Any) -> None:
        """Take what the schedule received from other ranks.

        Args:
            input_tensor: module name -> tensor, kept for the next forward pass; or one tensor
                (or ``None``), handed on to the language model. Schedules put either in a list,
                and a tensor of the dict too; lists are unpacked.
        """
        tensors = input_tensor[0] if isinstance(input_tensor, list) else input_tensor
        if isinstance(tensors, dict):
            self.input_tensors = {name: _only(tensor) for name, tensor in tensors.items()}
            return
        self.input_tensors = tensors
        language_model = unwrap_model(self.language_model)
        if hasattr(language_model, "set_input_tensor"):
            language_model.set_input_tensor(tensors)

    # -- forward ---------------------------------------------------------------------------

    @model_method
    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        loss_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        modality_inputs: Mapping[str, Mapping[str, Mapping[str, Any]] | None] | None = None,
        packing_kwargs: Mapping[str, Any] | None = None,
        route_plan: Mapping[str, RoutePlan] | None = None,
    ) -> tuple[Any, torch.Tensor | None]:
        """One microbatch through the modules of this rank.

        Args:
            input_ids: ``(B, S)`` of the rank's *language* replica; B may be 0 on some replicas.
            position_ids: ``(B, S)`` or ``(R, B, S)``.
            attention_mask: bool, True where attention is forbidden, ``(B, 1, S, S)`` or
                ``(1, 1, S, S)``; it replaces the causal mask. For local layers without CP and
                packing; ``None`` masks causally or by packing.
            loss_mask: ``(B, S)``.
            labels: ``(B, S)``; with labels the output is the loss per token.
            modality_inputs: modality -> encoder name -> keyword arguments, of the rank's
                *encoder* replica. ``None`` for a modality without inputs in this microbatch.
            packing_kwargs: fields of ``PackedSeqParams``; their presence means ``thd``.
            route_plan: for the routed bridge, modality -> this rank's plan, made ahead by
                ``comm.routes.plan_routes``. A modality without one is planned here, which reads
                ``input_ids`` on the host.

        Returns:
            (output, loss mask). The output of an encoder rank is its rows by module name; the
            loss mask of a language rank is cut for CP.

        Raises:
            ValueError: rows and tokens do not match; a sequence that cannot be cut; a route plan
                without a routed bridge; a language model in pipeline stages.
            MaskError: an attention mask that the layers would not use as it is given.
            RuntimeError: special tokens without inputs.
        """
        colocated = self.role.mode is ModuleLayout.COLOCATED
        if colocated and input_ids.numel() == 0:
            return self._forward_without_samples(
                input_ids=input_ids,
                position_ids=position_ids,
                attention_mask=attention_mask,
                loss_mask=loss_mask,
                labels=labels,
                modality_inputs=modality_inputs,
                packing_kwargs=packing_kwargs,
                route_plan=route_plan,
            )
        modality_inputs = without_items(modality_inputs)
        phases.next_microbatch()
        self._refuse_plan_without_routes(route_plan)
        # What stock does not know is said only where it is given: a replaced method may lack it.
        further = {} if route_plan is None else {"route_plan": route_plan}
        language_inputs = (input_ids, position_ids, attention_mask, loss_mask, labels)
        self.start_param_gathers()
        try:
            if colocated:
                found = self._forward_all_modules(
                    *language_inputs, modality_inputs, packing_kwargs, **further
                )
            elif self.role.has_modality_modules:
                rows = self._forward_encoders(input_ids, modality_inputs, self.input_tensors)
                found = rows, loss_mask
            elif self.role.has_language_module:
                found = self._forward_language_module(
                    *language_inputs, self.input_tensors, packing_kwargs
                )
            else:
                raise RuntimeError(f"Rank has no modules assigned in role: {self.role}")
        finally:
            self._rows_memo = None
        self.finish_param_gathers()
        return found

    def _forward_without_samples(self, **batch: Any) -> tuple[Any, torch.Tensor | None]:
        """Run padding, so that other ranks do not wait in vain; nothing of it comes out."""
        ids = batch["input_ids"]
        self._padding_problem = padding_problem(self)
        try:
            output, loss_mask = self.forward(**padding_for(self, batch, padded_shape(self, ids)))
        finally:
            self._padding_problem = None
        return cut_back(output, ids.shape), cut_back(loss_mask, ids.shape)

    @model_method
    def _forward_all_modules(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        loss_mask: torch.Tensor | None,
        labels: torch.Tensor | None,
        modality_inputs: Mapping[str, Any] | None,
        packing_kwargs: Mapping[str, Any] | None = None,
        route_plan: Mapping[str, RoutePlan] | None = None,
    ) -> tuple[Any, torch.Tensor | None]:
        """Colocated: encoders, bridges, placing, cutting, language model."""
        self._refuse_pipeline()
        if self._routed_bridges():
            fused, packed = self._fuse_routed(
                input_ids, position_ids, attention_mask, modality_inputs, packing_kwargs, route_plan
            )
            fused, labels, loss_mask, packed = self._shard_routed(fused, labels, loss_mask, packed)
            output = self._call_language_model(
                fused, position_ids, attention_mask, labels, packed
            )
            return output, loss_mask
        check_mask(self, attention_mask, input_ids, packing_kwargs)
        packed = self._build_packed_seq_params(packing_kwargs)
        self._check_batch(input_ids, packed)
        rows = self._encode_for_language(input_ids, modality_inputs)
        return self._run_first_stage(
            rows, input_ids, position_ids, attention_mask, loss_mask, labels, packed
        )

    @model_method
    def _forward_language_module(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        loss_mask: torch.Tensor | None,
        labels: torch.Tensor | None,
        input_tensors: Mapping[str, torch.Tensor] | None,
        packing_kwargs: Mapping[str, Any] | None = None,
    ) -> tuple[Any, torch.Tensor | None]:
        """Language rank of a non-colocated model: rows or hidden states from other ranks in.

        Returns:
            (output, CP-local loss mask); before the last stage the output is
            ``{"language": hidden states}``, for the schedule to route.
        """
        check_mask(self, attention_mask, input_ids, packing_kwargs)
        packed = self._build_packed_seq_params(packing_kwargs)
        received = dict(input_tensors or {})
        hidden_states = received.pop(MIMO_LANGUAGE_MODULE_KEY, None)
        if self.role.is_first_stage(MIMO_LANGUAGE_MODULE_KEY):
            output, loss_mask = self._run_first_stage(
                received, input_ids, position_ids, attention_mask, loss_mask, labels, packed
            )
        else:
            _, labels, loss_mask, packed = self._shard_language_inputs(
                embeddings=None, labels=labels, loss_mask=loss_mask, packed_seq_params=packed
            )
            language_model = unwrap_model(self.language_model)
            if hidden_states is not None and hasattr(language_model, "set_input_tensor"):
                language_model.set_input_tensor(hidden_states)
            output = self._call_language_model(None, position_ids, attention_mask, labels, packed)
        if not self.role.is_last_stage(MIMO_LANGUAGE_MODULE_KEY):
            output = {MIMO_LANGUAGE_MODULE_KEY: output}
        return output, loss_mask

    def _run_first_stage(
        self,
        rows: dict[str, torch.Tensor],
        input_ids: torch.Tensor,
        position_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        loss_mask: torch.Tensor | None,
        labels: torch.Tensor | None,
        packed: PackedSeqParams | None,
    ) -> tuple[Any, torch.Tensor | None]:
        """Fuse modality rows with the text and run the language model on the result."""
        phases.mark(phases.LANGUAGE_FORWARD)
        embeddings, labels, loss_mask, packed = self._shard_language_inputs(
            embeddings=self._fuse_gathered(rows, input_ids, position_ids),
            labels=labels,
            loss_mask=loss_mask,
            packed_seq_params=packed,
        )
        output = self._call_language_model(embeddings, position_ids, attention_mask, labels, packed)
        return output, loss_mask

    def _call_language_model(
        self,
        embeddings: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        labels: torch.Tensor | None,
        packed: PackedSeqParams | None,
        language_model: nn.Module | None = None,
    ) -> Any:
        """The language model, or the given stage of it, on inputs that are cut."""
        phases.mark(phases.LANGUAGE_FORWARD)
        stage = language_model or self.language_model
        if embeddings is not None:
            embeddings = recomputable(embeddings, stage)
        cp_group = self._partitioning("cp_group") if self._partitioning("use_cp") else None
        with rotary_positions_of(stage, packed, cp_group):
            output = stage(
                input_ids=None,
                # Not cut: multimodal rotary embeddings read them whole and cut by themselves.
                position_ids=position_ids,
                decoder_input=embeddings,
                labels=labels,
                attention_mask=attention_mask,
                packed_seq_params=packed,
            )
        return phases.when_gradient_arrives(output, phases.LANGUAGE_BACKWARD)


def _only(value: Any) -> Any:
    """The entry of a list of one, as schedules hand tensors over; anything else as it is."""
    return value[0] if isinstance(value, list) and len(value) == 1 else value
