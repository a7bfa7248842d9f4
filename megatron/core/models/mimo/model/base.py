# SPDX-License-Identifier: Apache-2.0
"""The multimodal model: encoders, the bridge, the fused sequence, the language model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.distributed import ProcessGroup

from megatron.core.distributed import DistributedDataParallel
from megatron.core.enums import ModelType
from megatron.core.models.mimo.comm.gather_bridge import ColocatedBridgeCommunicator
from megatron.core.models.mimo.comm.plan.routes import RoutePlan
from megatron.core.models.mimo.comm.routed_bridge import RoutedBridge
from megatron.core.models.mimo.config.base_configs import MimoModelConfig, option_of
from megatron.core.models.mimo.config.checks import check_model_config
from megatron.core.models.mimo.config.role import MIMO_LANGUAGE_MODULE_KEY, ModuleLayout, RankRole
from megatron.core.models.mimo.model.construction import build_modality, make_bridges
from megatron.core.models.mimo.model.ddp_methods import DDPMethods
from megatron.core.models.mimo.model.deepstack import check_levels_move
from megatron.core.models.mimo.model.encoded import EncodedMicrobatch, EncodedMicrobatches
from megatron.core.models.mimo.model.encoder_rank import encode_for_others
from megatron.core.models.mimo.model.encoder_runner import EncoderRunner
from megatron.core.models.mimo.model.input_checks import refuse_route_plans
from megatron.core.models.mimo.model.language_batch import LanguageBatch
from megatron.core.models.mimo.model.language_groups import partition_adapter
from megatron.core.models.mimo.model.language_rank import run_on_received, unpacked
from megatron.core.models.mimo.model.language_runner import LanguageRunner
from megatron.core.models.mimo.model.no_samples import cut_back, padding_in_place_of, without_items
from megatron.core.models.mimo.model.paths import choose_path
from megatron.core.models.mimo.model.rank_modules import RankModules
from megatron.core.models.mimo.model.replaceable import ReplaceableSteps
from megatron.core.models.mimo.model.row_path import RowPath, Runners, levels_of, settled
from megatron.core.models.mimo.model.stage_checks import check_problems, check_stages, refuse_stages
from megatron.core.models.mimo.model.stages import encode_together, later_problem, run_stage
from megatron.core.models.mimo.model.stock_steps import StockSteps
from megatron.core.models.mimo.partition.packed_lengths import forget_lengths
from megatron.core.models.mimo.partition.utils import PartitionAdapter
from megatron.core.models.mimo.stand_ins import model_method
from megatron.core.models.mimo.torch_native.language_model import TorchNativeLanguageModel
from megatron.core.models.mimo.wrappers import hide_in_states
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import build_module
from megatron.core.utils import unwrap_model
from mimo_colocated import phases


class MimoModel(StockSteps, DDPMethods, MegatronModule):
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
    ``pipeline.step`` runs the step in place of ``forward``.

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
    # Here, so that what stands in for a model need not have one.
    partition_adapter: PartitionAdapter | None = None

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
        if self.role.has_language_module:
            colocated = self.role.mode is ModuleLayout.COLOCATED
            self.partition_adapter = partition_adapter(mimo_config, colocated, cp_group, tp_group)
        self.colocated_comms: dict[tuple[str, str], ColocatedBridgeCommunicator | RoutedBridge] = {}
        if grid_map and self.role.mode is ModuleLayout.COLOCATED:
            self._build_colocated_communicators()
        self.modality_submodules = nn.ModuleDict()
        self._initialize_submodules()
        self._initialize_language_model()
        hide_in_states(self)
        # Now, by the bridges that were made.
        check_levels_move(self._rank_modules.deepstack, self.role.mode, self._row_path)

    # -- construction ----------------------------------------------------------------------

    @model_method
    def _build_colocated_communicators(self) -> None:
        """See :func:`.make_bridges`."""
        for ends, bridge in make_bridges(self):
            self.colocated_comms[ends] = bridge

    @model_method
    def _initialize_submodules(self) -> None:
        """Build the modalities of this rank."""
        for name, spec in self.mimo_config.modality_submodules_spec.items():
            stage = self.role.modules.get(name)
            if stage is not None:
                self.modality_submodules[name] = build_modality(name, spec, stage, self.mimo_config)

    @model_method
    def _initialize_language_model(self) -> None:
        """Build the language model, where this rank has a stage of it."""
        self.language_model = None
        if self.role.has_language_module:
            built = self.language_model = build_module(self.mimo_config.language_model_spec)
            specs = option_of(self.mimo_config, "virtual_stage_specs")
            if specs:
                self.virtual_stages = nn.ModuleList(build_module(spec) for spec in specs)
            self._language.check_embedding_does_not_scatter()
            if isinstance(built, TorchNativeLanguageModel):
                built.check_options(self.mimo_config)
            check_stages(self.role, getattr(self, "config", None), self._rank_modules.stages)
            self._language.drop_text_alike_over_tp()
            self._language.seat_levels()

    @model_method
    def destroy(self) -> None:
        """Release the process groups that this model made. May be called again."""
        for communicator in self.colocated_comms.values():
            communicator.destroy()
        self.colocated_comms.clear()

    # -- its parts -------------------------------------------------------------------------

    @cached_property
    def _rank_modules(self) -> RankModules:
        return RankModules(self)

    @cached_property
    def _steps(self) -> ReplaceableSteps:
        return ReplaceableSteps(self)

    @cached_property
    def _encoders(self) -> EncoderRunner:
        return EncoderRunner(self._rank_modules, self._steps)

    @cached_property
    def _language(self) -> LanguageRunner:
        return LanguageRunner(self._rank_modules, self._steps)

    @cached_property
    def _row_path(self) -> RowPath:
        """The way of rows into the sequence, chosen once: at construction, but of a stand-in."""
        balance = option_of(getattr(self, "mimo_config", None), "encoder_balance")
        runners = Runners(self._rank_modules, self._steps, self._encoders, self._language)
        return choose_path(runners, {"encoder_balance": balance})

    def language_stages(self) -> list[nn.Module]:
        """Return the language model's stages on this rank, bare or wrapped, in order.

        One, or several virtual ones of an interleaved pipeline; none on encoder ranks.
        """
        return self._rank_modules.stages

    @model_method
    def _active_submodules(self) -> Iterator[Any]:
        """The language model, then the modalities, as far as this rank has them."""
        return iter(self._rank_modules.active)

    @model_method
    def _active_ddp_modules(self) -> Iterator[Any]:
        """Those of them that have a DDP wrapper."""
        active = self._active_submodules()
        return iter([each for each in active if isinstance(each, DistributedDataParallel)])

    @property
    def is_pipelined(self) -> bool:
        """Whether this rank holds some of the language model's stages only."""
        # Not all that its methods are called on has a role.
        modules = getattr(getattr(self, "role", None), "modules", None) or {}
        stage = modules.get(MIMO_LANGUAGE_MODULE_KEY)
        return stage is not None and not (stage.is_first_stage and stage.is_last_stage)

    @property
    def encoder_spread(self) -> dict[str, tuple[float, float]]:
        """How even the encoders' work was in the last batch, before and after balancing.

        Modality -> (before, after): the heaviest encoder replica's cost over the mean cost, of
        this rank's exchange group. Empty before the first batch and without ``encoder_balance``;
        a batch whose routes were planned ahead is not counted.
        """
        balances = getattr(self._row_path, "input_balances", {}).items()
        return {name: each.spread for name, each in balances if each.spread is not None}

    def give_zero_gradients(self, name: str) -> None:
        """Run a backward pass that gives each weight of a modality that trains a zero, once."""
        self._encoders.give_zero_gradients(name)

    @model_method
    def set_input_tensor(self, input_tensor: Any) -> None:
        """Take what the schedule received from other ranks.

        Args:
            input_tensor: module name -> tensor, kept for the next forward pass; or one tensor
                (or ``None``), handed on to the language model. Schedules put either in a list,
                and a tensor of the dict too; lists are unpacked.
        """
        tensors = self.input_tensors = unpacked(input_tensor)
        if isinstance(tensors, dict):
            return
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
        """Run one microbatch through the modules of this rank.

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
                ``comm.plan.routes.plan_routes``. A modality without one is planned here, which
                reads ``input_ids`` on the host.

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
        # What stock does not know is said only where it is given: a replaced method may lack it.
        further = {} if route_plan is None else {"route_plan": route_plan}
        batch = {
            "input_ids": input_ids,
            "position_ids": position_ids,
            "attention_mask": attention_mask,
            "loss_mask": loss_mask,
            "labels": labels,
            "modality_inputs": without_items(modality_inputs),
            "packing_kwargs": packing_kwargs,
        }
        forget_lengths(packing_kwargs)
        shape = input_ids.shape
        empty = colocated and input_ids.numel() == 0
        if empty:
            # Padding runs, so that other ranks do not wait in vain; nothing of it comes out.
            batch, further = padding_in_place_of(self, batch, further)
        phases.next_microbatch()
        if route_plan is not None:
            self._check_takes_route_plans()
        gathers = self.start_param_gathers()
        try:
            if colocated:
                found = self._forward_all_modules(*batch.values(), **further)
            elif self.role.has_modality_modules:
                rows = self._forward_encoders(
                    input_ids, batch["modality_inputs"], self.input_tensors
                )
                found = rows, loss_mask
            elif self.role.has_language_module:
                del batch["modality_inputs"], batch["packing_kwargs"]
                found = self._forward_language_module(
                    *[*batch.values(), self.input_tensors, packing_kwargs]
                )
            else:
                raise RuntimeError(f"Rank has no modules assigned in role: {self.role}")
        finally:
            self._language.token_positions.latest = None
        if gathers:
            self.finish_param_gathers()
        return (cut_back(found[0], shape), cut_back(found[1], shape)) if empty else found

    def _check_takes_route_plans(self) -> None:
        if not self._row_path.takes_route_plans:
            refuse_route_plans(option_of(self.mimo_config, "bridge"))

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
        problem: str | None = None,
    ) -> tuple[Any, torch.Tensor | None]:
        """Colocated: encoders, bridges, placing, cutting, language model."""
        if self.is_pipelined:
            refuse_stages(self.role)
        batch = LanguageBatch(
            input_ids, position_ids, attention_mask, loss_mask, labels, packing_kwargs, problem
        )
        path = self._row_path
        with settled(path):
            planned = path.plan(batch, modality_inputs, route_plan)
            moved = path.move(planned)
            fused = path.fuse(planned.batch, moved)
            levels = levels_of(path, self._language, self.language_model, planned.batch, moved)
            return self._language.call(batch, fused, levels=levels)

    @model_method
    def _forward_encoders(
        self,
        input_ids: torch.Tensor | None,
        modality_inputs: Mapping[str, Any] | None,
        input_tensors: Mapping[str, torch.Tensor] | None,
    ) -> dict[str, torch.Tensor]:
        """See :func:`.encode_for_others`."""
        return encode_for_others(
            self.role, self._rank_modules, self._steps, input_ids, modality_inputs, input_tensors
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
        """See :func:`.run_on_received`."""
        batch = LanguageBatch(
            input_ids, position_ids, attention_mask, loss_mask, labels, packing_kwargs
        )
        return run_on_received(self.role, self._language, self.language_model, batch, input_tensors)

    # -- a step in stages ------------------------------------------------------------------

    def encode_microbatches(
        self,
        microbatches: Sequence[Mapping[str, Any]],
        problem: str | None = None,
        later: int = 0,
    ) -> EncodedMicrobatches:
        """Run the encoders on microbatches and bring their rows to the first language stage.

        Every rank calls it with the same number of microbatches, whatever its stage. Encoders run
        once per microbatch; then there is one exchange per modality. Parameter gathers that it
        starts are to be finished (``finish_param_gathers``) before the optimizer's step.

        Args:
            microbatches: ``forward``'s keyword arguments of each. Read are ``input_ids``,
                ``attention_mask``, ``modality_inputs``, ``packing_kwargs`` and ``route_plan``.
            problem: why this rank cannot go on (its data ended, say). Told before any encoder
                runs; the ranks that it exchanges rows with raise it too.
            later: how many of the last ones are not encoded yet: see :class:`.LaterMicrobatches`,
                ``later`` of what comes back.

        Raises:
            ValueError, RuntimeError: as ``forward`` over a routed bridge; a rank has a problem;
                ranks have different numbers of microbatches; later ones without route plans.
        """
        self.start_param_gathers()
        if later and problem is None:
            problem = later_problem(self._row_path, microbatches[-later:])
        check_problems(self._row_path, problem, len(microbatches))
        for batch in microbatches:
            if batch.get("route_plan") is not None:
                self._check_takes_route_plans()
        return encode_together(self._row_path, microbatches, later)

    def forward_stage(
        self,
        language_model: nn.Module,
        encoded: EncodedMicrobatch,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        loss_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        packing_kwargs: Mapping[str, Any] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Run one microbatch through one stage of the language model.

        Args:
            language_model: the stage, bare or wrapped. A later one than the first was given its
                input by ``set_input_tensor``.
            encoded: the microbatch, from :meth:`encode_microbatches`.
            input_ids, position_ids, attention_mask, loss_mask, labels, packing_kwargs: as for
                ``forward``; the same on all stages.

        Returns:
            (output, CP-local loss mask). The output is hidden states before the last stage.
        """
        phases.mark(phases.LANGUAGE_FORWARD, encoded.number)
        batch = LanguageBatch(
            input_ids, position_ids, attention_mask, loss_mask, labels, packing_kwargs
        )
        return run_stage(self._row_path, self._language, language_model, encoded, batch)
