# SPDX-License-Identifier: Apache-2.0
"""Mistakes in the model and its modalities, written from the code alone."""

from tests.mutants.catalogue.places import MIMO, UNIT
from tests.mutants.mutant import Mutant

WITHOUT_A_MODEL = (
    Mutant(
        name="encoder-inside-the-language-ranks",
        file=MIMO + "config/role.py",
        old="if grid is not language and shared:",
        new="if grid is not language and 0 < len(shared) < grid.size:",
        tests=(UNIT + "test_role.py::test_partly_shared_ranks_are_refused",),
        why="an encoder grid on a part of the language ranks is accepted: those run one side only",
    ),
    Mutant(
        name="balance-without-routes-ignored",
        file="megatron/core/models/mimo/config/base_configs.py",
        old='if unknown or set(self.encoder_balance) - routed:',
        new='if unknown:',
        tests=(UNIT + "test_config.py::test_what_nobody_would_balance_or_keep_is_refused",),
        why="encoder_balance over a gather bridge is accepted and ignored",
    ),
    Mutant(
        name="bridge-guard-not-handed-on",
        file="megatron/core/models/mimo/model/routed_path.py",
        old='            guard=option_of(options, "bridge_guard"),\n',
        new='',
        tests=(UNIT + "test_stage_side.py::test_bridges_have_the_guard_of_the_config",),
        why="bridge_guard is accepted and ignored",
    ),
    Mutant(
        name="last-stage-if-first",
        file=MIMO + "model/construction.py",
        old="spec, is_first_stage=stage.is_first_stage, is_last_stage=stage.is_last_stage",
        new="spec, is_first_stage=stage.is_first_stage, is_last_stage=stage.is_first_stage",
        tests=(
            UNIT + "test_model.py::"
            "TestEncoderRank::test_a_later_stage_gets_rows_from_the_one_before",
        ),
        why="an encoder in stages projects on its first stage",
    ),
    Mutant(
        name="uneven-samples-refused-at-equal-dp",
        file="megatron/core/models/mimo/model/encoder_rank.py",
        old="if encoder_dp > language_dp:",
        new="if encoder_dp >= language_dp:",
        tests=(UNIT + "test_model.py::TestEncoderRank::test_uneven_samples_carry_their_sizes",),
        why="samples with different numbers of rows are refused where the bridge can send them",
    ),
    Mutant(
        name="fused-in-the-first-modality-s-dtype",
        file=MIMO + "model/token_positions.py",
        old="reference = rows[TEXT] if TEXT in rows else next(iter(rows.values()))",
        new="reference = next(iter(rows.values()))",
        tests=(
            UNIT + "test_model.py::"
            "TestAlign::test_rows_take_the_dtype_of_the_text_and_gradients_their_own",
        ),
        why="a bf16 encoder rounds an fp32 language model's text",
    ),
    Mutant(
        name="replicated-encoders-said-by-rank-0",
        file=MIMO + "model/replicated_encoders.py",
        old="if whole and rank == grid.rank_offset:",
        new="if whole and rank == 0:",
        tests=(UNIT + "test_replicated_encoders.py::test_nothing_to_say",),
        why="encoders on ranks of their own say nothing about what they cost",
    ),
    Mutant(
        name="expert-gathers-not-started",
        file=MIMO + "model/ddp_methods.py",
        old="                yield from reversed(module.expert_parallel_bucket_groups)\n",
        new="",
        tests=(
            UNIT + "test_model.py::"
            "test_gathers_of_experts_start_and_are_waited_for_with_all_others",
        ),
        why="experts' weights are gathered in each rank's own order",
    ),
    Mutant(
        name="param-sync-option-ignored",
        file=MIMO + "model/ddp_methods.py",
        old="module.disable_forward_pre_hook(param_sync=param_sync)",
        new="module.disable_forward_pre_hook()",
        tests=(UNIT + "test_model.py::TestDataParallelCalls::test_gather_calls",),
        why="param_sync=False gathers anyway, maybe on some ranks only",
    ),
    Mutant(
        name="rotary-group-lost-by-an-error",
        file=MIMO + "model/multimodal_rotary.py",
        old=(
            "    try:\n"
            "        yield\n"
            "    finally:\n"
            "        rotary.cp_group = before\n"
        ),
        new=(
            "    yield\n"
            "    rotary.cp_group = before\n"
        ),
        tests=(UNIT + "test_model.py::test_rotary_embeddings_cut_as_before_after_an_error",),
        why="after an error inside, the embedding never cuts again",
    ),
    Mutant(
        name="rank-with-a-problem-does-not-tell",
        file="megatron/core/models/mimo/model/routed_path.py",
        old='found = bridge.hear(found, count)',
        new='found = found or bridge.hear(found, count)',
        tests=(UNIT + "test_stage_side.py::test_a_rank_with_a_problem_stops_all",),
        why="the rank whose data ended raises alone, the others wait",
    ),
    Mutant(
        name="sp-text-sample-major",
        file=MIMO + "model/local_text.py",
        old="local[kept] % share * batch.batch + sample[kept]",
        new="local[kept] % share + sample[kept] * share",
        tests=(UNIT + "test_routed_model.py::test_equal_to_the_gather_bridge",),
        why="with sequence parallelism and several samples text tokens change places",
    ),
    Mutant(
        name="one-plan-stands-for-all",
        file="megatron/core/models/mimo/model/routed_path.py",
        old='bool(plans) and all(name in plans for name in special)',
        new='bool(plans) and any(name in plans for name in special)',
        tests=(UNIT + "test_stage_side.py::test_a_plan_made_ahead_for_one_of_two_modalities",),
        why="with a plan for one of two modalities the other is not looked for",
    ),
    Mutant(
        name="ranks-without-rows-stay-out",
        file="megatron/core/models/mimo/model/routed_path.py",
        old='if plans[name].group_rows or name in part:',
        new='if plans[name].held or name in part:',
        tests=(UNIT + "test_routed_model.py::test_any_number_of_tokens_against_one_rank",),
        why="a rank that brings no rows does not enter the exchange that brings it some",
    ),
    Mutant(
        name="grid-without-pp-fits-any-config",
        file=MIMO + "model/language_groups.py",
        old="if grid is not None and known_size(config_size) not in (None, grid_size):",
        new='if _grid_size(grid, "pp") and known_size(config_size) not in (None, grid_size):',
        tests=(UNIT + "test_model.py::test_a_language_grid_without_stages_is_one_of_one_stage",),
        why="a config with stages beside a grid without a pp dim is accepted",
    ),
    Mutant(
        name="fp32-residual-forgotten",
        file="megatron/core/models/mimo/model/language_runner.py",
        old=(
            "        if getattr(self._modules.language_config, "
            '"fp32_residual_connection", False) is True:\n            return torch.float32\n'
        ),
        new='',
        tests=(UNIT + "test_model.py::test_rows_are_brought_in_the_dtype_of_the_embedded_text",),
        why="rows are rounded to bf16 beside an fp32 residual stream",
    ),
    Mutant(
        name="text-dropped-in-evaluation",
        file="megatron/core/models/mimo/model/language_runner.py",
        old="return nn.functional.dropout(embedded, share, module.training)",
        new="return nn.functional.dropout(embedded, share)",
        tests=(UNIT + "test_model.py::test_embedded_text_is_dropped_in_training_only",),
        why="with sequence parallelism evaluation drops text embeddings",
    ),
    Mutant(
        name="last-rotary-channel-is-the-position",
        file="megatron/core/models/mimo/model/language_runner.py",
        old="channel = position_ids[0] if position_ids.dim() == 3 else position_ids",
        new="channel = position_ids[-1] if position_ids.dim() == 3 else position_ids",
        tests=(UNIT + "test_model.py::TestTextEmbeddings::test_positions_follow_their_tokens",),
        why="learned positions of a 3-D batch are the columns",
    ),
    Mutant(
        name="mask-unchecked-for-virtual-stages",
        file="megatron/core/models/mimo/model/attention_masks.py",
        old='for stage in stages:',
        new='for stage in stages[:1]:',
        tests=(
            UNIT + "test_attention_masks.py::test_layers_of_later_virtual_stages_are_looked_at_too",
        ),
        why="a mask that later virtual stages cannot read is ignored there",
    ),
    Mutant(
        name="id-just-outside-the-vocabulary",
        file=MIMO + "config/checks.py",
        old="0 <= token_id < vocabulary",
        new="0 <= token_id <= vocabulary",
        tests=(UNIT + "test_config.py::test_ids_outside_the_vocabulary_are_said_and_work",),
        why="the first id outside the vocabulary is not warned of",
    ),
    Mutant(
        name="token-prediction-of-later-stages",
        file=MIMO + "config/checks.py",
        old='for spec in (config.language_model_spec, *option_of(config, "virtual_stage_specs")):',
        new="for spec in (config.language_model_spec,):",
        tests=(UNIT + "test_config.py::test_multi_token_prediction_is_refused",),
        why=(
            "multi-token prediction in the last virtual stage is accepted and fails in "
            "the first step"
        ),
    ),
    Mutant(
        name="padding-is-a-special-token",
        file=MIMO + "model/no_samples.py",
        old="text = next(number for number in count() if number not in special)",
        new="text = 0",
        tests=(UNIT + "test_no_samples.py::test_padding_is_text",),
        why="where a modality's token is 0, a replica without samples waits for its rows",
    ),
    Mutant(
        name="empty-if-one-tensor-is",
        file=MIMO + "model/no_samples.py",
        old="return bool(tensors) and all(tensor.dim()",
        new="return bool(tensors) and any(tensor.dim()",
        tests=(
            UNIT + "test_no_samples.py::test_inputs_are_none_only_if_all_their_tensors_are_empty",
        ),
        why="inputs with one empty optional tensor are thrown away",
    ),
    Mutant(
        name="padding-not-for-sequence-parallel",
        file=MIMO + "model/no_samples.py",
        old="shortest = 2 * config.context_parallel_size * config.tensor_model_parallel_size",
        new="shortest = 2 * config.context_parallel_size",
        tests=(
            UNIT + "test_no_samples.py::"
            "test_a_batch_without_a_length_gets_one_that_cp_and_sequence_parallelism_can_cut",
        ),
        why="padding of a batch without a length cannot be cut over TP",
    ),
    Mutant(
        name="zero-coefficients-in-a-list-count",
        file=MIMO + "model/no_samples.py",
        old="return any(value) if isinstance(value, list) else bool(value)",
        new="return bool(value)",
        tests=(UNIT + "test_no_samples.py::test_experts_that_would_count_padding_refuse_it",),
        why="a list of zero coefficients is refused",
    ),
    Mutant(
        name="output-projections-on-the-last-stage",
        file=MIMO + "submodules/base.py",
        old='output_projections=listed("output_projections", is_first_stage),',
        new='output_projections=listed("output_projections", is_last_stage),',
        tests=(UNIT + "test_submodules.py::test_projections_are_built_where_they_are_used",),
        why="output projections are built on the wrong stage",
    ),
    Mutant(
        name="no-rows-per-item",
        file=MIMO + "submodules/base.py",
        old="isinstance(rows, int) and rows > 0",
        new="isinstance(rows, int) and rows >= 0",
        tests=(UNIT + "test_encoder_outputs.py::test_settings_are_checked_when_it_is_built",),
        why="rows_per_item 0 is a ZeroDivisionError in the first step",
    ),
    Mutant(
        name="output-projection-never-used",
        file=MIMO + "submodules/base.py",
        old="projections = self.input_projections if is_input else self.output_projections",
        new="projections = self.input_projections",
        tests=(UNIT + "test_submodules.py::test_output_projection",),
        why="is_input=False is accepted and ignored",
    ),
    Mutant(
        name="items-of-sequence-first-encoders",
        file=MIMO + "submodules/encoder_outputs.py",
        old="batch, length = (1, 0) if self.sequence_first else (0, 1)",
        new="batch, length = (0, 1)",
        tests=(
            UNIT + "test_encoder_outputs.py::test_several_encoders_are_put_together_item_by_item",
        ),
        why="several encoders, one of them sequence first: its samples and lengths are exchanged",
    ),
    Mutant(
        name="batch-of-one-item-any-size",
        file=MIMO + "submodules/encoder_outputs.py",
        old="if tensor.ndim == 3 and tensor.size(1 if self.sequence_first else 0) == 1:",
        new="if tensor.ndim == 3:",
        tests=(
            UNIT + "test_encoder_outputs.py::"
            "test_what_holds_no_rows_or_may_be_two_things_is_refused",
        ),
        why="a list's tensor of several samples is taken as one item",
    ),
)
