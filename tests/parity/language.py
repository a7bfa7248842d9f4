# SPDX-License-Identifier: Apache-2.0
"""The proof models' language model alone, over pipeline stages, on Megatron-Core's own schedule."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch

from examples.mimo.digits.data import SEQUENCE_LENGTH, VOCABULARY_SIZE, Batch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.enums import ModelType
from megatron.core.models.mimo.gradients.finalize import (
    MimoGradFinalizer,
    wrap_modules_with_ddp,
)
from megatron.core.models.mimo.model.ddp_methods import DDPMethods
from megatron.core.models.mimo.randomness import ModuleRandomness, seed_everything
from megatron.core.models.mimo.training.groups import create_process_groups, make_grid
from megatron.core.models.mimo.training.initial_weights import initialize_weights
from megatron.core.models.mimo.transformer.exact_loss import ExactLossGPTModel
from megatron.core.models.mimo.transformer.layer_specs import language_layer_spec
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import (
    forward_backward_no_pipelining,
    forward_backward_pipelining_without_interleaving,
)
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import unwrap_model
from mimo_colocated.launch.layouts import Layout
from tests.models.model import LANGUAGE, BuiltModel, ModelOptions, transformer_configs
from tests.models.trainer import Trainer


class LanguageOnly(DDPMethods, MegatronModule):
    """A pipeline stage of a GPT under the names that finalizer, optimizer, checkpoints look for."""

    model_type = ModelType.encoder_or_decoder

    def __init__(self, language_model: ExactLossGPTModel, grids: dict) -> None:
        super().__init__(language_model.config)
        self.language_model = language_model
        self.modality_submodules = torch.nn.ModuleDict()
        self.mimo_config = SimpleNamespace(module_to_grid_map=grids)
        self.share_embeddings_and_output_weights = False

    def _active_submodules(self) -> Iterator[torch.nn.Module]:
        yield self.language_model

    def _active_ddp_modules(self) -> Iterator[Any]:
        yield self.language_model

    def set_input_tensor(self, input_tensor: Any) -> None:
        """Hand what came from the stage before to the stage."""
        unwrap_model(self.language_model).set_input_tensor(input_tensor)

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        labels: torch.Tensor | None,
        loss_mask: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The stage's output and the loss mask, as a ``MimoModel`` returns them."""
        return self.language_model(input_ids, position_ids, None, labels=labels), loss_mask

    def destroy(self) -> None:
        """There is nothing to release."""


def build_language_model(
    sizes: dict[str, int], options: ModelOptions, tied: bool, rank_offset: int = 0
) -> BuiltModel:
    """Build, initialise and wrap one rank's stage; every rank calls it together.

    Args:
        sizes: of the axes ``tp``, ``pp`` and ``dp``.
        options: of the model; the vision side is not built.
        tied: the word embeddings are the head, too.
        rank_offset: the first of the ranks.
    """
    grids = {LANGUAGE: make_grid(**sizes, rank_offset=rank_offset)}
    collections = {LANGUAGE: create_process_groups(grids[LANGUAGE])}
    groups, pp = collections[LANGUAGE], sizes.get("pp", 1)
    tp_layout = Layout(tp=sizes.get("tp", 1))
    config = transformer_configs(Layout(), tp_layout, options)[LANGUAGE]
    config = dataclasses.replace(config, pipeline_model_parallel_size=pp)
    seed_everything(options.seed)
    model = LanguageOnly(_stage(config, groups, tied), grids)
    if torch.cuda.is_available():
        model.to(torch.device(torch.cuda.current_device()))
    initialize_weights(model.language_model, options.seed, name_prefix=LANGUAGE, tp_group=groups.tp)
    randomness = ModuleRandomness({LANGUAGE: model.language_model}, collections, options.seed)
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=options.overlap_grad_reduce,
        use_distributed_optimizer=options.distributed_optimizer,
        check_for_nan_in_grad=False,
    )
    configs = {LANGUAGE: config}
    wrap_modules_with_ddp(model, configs, ddp_config, collections)
    finalize = MimoGradFinalizer(collections)
    return BuiltModel(model, grids, collections, configs, finalize, randomness, packed=False)


def _stage(
    config: TransformerConfig, groups: ProcessGroupCollection, tied: bool
) -> ExactLossGPTModel:
    stage, stages = groups.pp.rank(), groups.pp.size()
    return ExactLossGPTModel(
        config,
        language_layer_spec(config, pp_rank=stage),
        vocab_size=VOCABULARY_SIZE,
        max_sequence_length=SEQUENCE_LENGTH,
        pre_process=stage == 0,
        post_process=stage == stages - 1,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=tied,
        pg_collection=groups,
    )


class LanguageTrainer(Trainer):
    """The proof models' trainer on Megatron-Core's own pipeline schedule and without an encoder."""

    def schedule(
        self, microbatches: Iterator[dict[str, Any]], count: int, *, forward_only: bool = False
    ) -> list[torch.Tensor]:
        keywords: dict[str, Any] = {}
        schedule = forward_backward_no_pipelining
        if self.groups.pp.size() > 1:
            schedule = forward_backward_pipelining_without_interleaving
            keywords["p2p_communicator"] = P2PCommunicator(self.groups.pp, self.model.config)
        return schedule(
            forward_step_func=self.forward_step,
            data_iterator=microbatches,
            model=[self.model],
            num_microbatches=count,
            seq_length=SEQUENCE_LENGTH,
            micro_batch_size=self.options.global_batch_size // (count * self.groups.dp.size()),
            forward_only=forward_only,
            collect_non_loss_data=forward_only,
            pg_collection=self.groups,
            **keywords,
        )

    def inputs(self, batch: Batch) -> dict[str, Any]:
        inputs = super().inputs(batch)
        del inputs["modality_inputs"], inputs["route_plan"]
        return inputs
