# SPDX-License-Identifier: Apache-2.0
"""Options that are accepted and ignored."""

from tests.mutants.catalogue.places import MIMO, UNIT
from tests.mutants.mutant import Mutant

_STATE = UNIT + "test_model.py::TestState::"
_OPTIMIZER = UNIT + "test_optimizer_state.py::test_arguments_reach_every_modules_optimizer"

OPTIONS = (
    Mutant(
        name="units-per-item-ignored",
        file=MIMO + "comm/input_balance.py",
        old="units if fits else None",
        new="None if fits else units",
        tests=(UNIT + "test_balance.py::test_packed_inputs_move_item_by_item",),
        why="patches of one image go to another encoder replica than the rest of it",
    ),
    Mutant(
        name="items-compared-every-time",
        file=MIMO + "comm/item_exchange.py",
        old='(self.guard == "first" and not self._confirmed)',
        new='self.guard == "first"',
        tests=(UNIT + "test_balance.py::test_how_often_ranks_compare_what_they_move",),
        why="guard='first' costs as much as 'always'",
    ),
    Mutant(
        name="force-all-reduce-ignored",
        file=MIMO + "pipeline/step.py",
        old="force_all_reduce=force_all_reduce",
        new="force_all_reduce=False",
        tests=(UNIT + "test_stage_side.py::test_finalisation_is_told_what_the_step_is",),
        why="gradients stay scattered where the caller asked for whole ones",
    ),
    Mutant(
        name="a-dropout-of-0-is-the-configs",
        file=MIMO + "transformer/context_parallel_attention.py",
        old="config.attention_dropout if attention_dropout is None else attention_dropout",
        new="attention_dropout or config.attention_dropout",
        tests=(UNIT + "test_cp_attention.py::test_a_dropout_of_0_overrides_the_configs",),
        why="dropout where a layer was told to have none",
    ),
    Mutant(
        name="router-dtype-ignored",
        file=MIMO + "transformer/router.py",
        old="_DTYPES.get(self.config.moe_router_dtype, input.dtype)",
        new="input.dtype",
        tests=(UNIT + "test_experts.py::test_the_router_computes_in_its_dtype",),
        why="tokens are routed by logits of 8 bits, though 32 were asked for",
    ),
    Mutant(
        name="sharded-offsets-ignored",
        file="megatron/core/models/mimo/model/ddp_methods.py",
        old="[child], sharded_offsets, metadata, groups, path, wrappers",
        new="[child], (), metadata, groups, path, wrappers",
        tests=(_STATE + "test_prefix_and_offsets_of_a_larger_model",),
        why="parts of a larger model overwrite each other on disk",
    ),
    Mutant(
        name="set-to-none-ignored",
        file=MIMO + "optimizer.py",
        old="opt.zero_grad(set_to_none)",
        new="opt.zero_grad()",
        tests=(_OPTIMIZER,),
        why="gradients that somebody holds are replaced instead of cleared",
    ),
    Mutant(
        name="a-problem-while-planning-is-not-told",
        file=MIMO + "comm/routed_bridge.py",
        old="self._agree(Statement(rows, tokens, problem=problem))",
        new="self._agree(Statement(rows, tokens))",
        tests=(
            UNIT
            + "test_routed_bridge.py::test_a_rank_with_a_problem_stops_those_that_plan_with_it",
        ),
        why="a rank that cannot go on moves rows all the same",
    ),
    Mutant(
        name="l2-norms-of-the-config-ignored",
        file=MIMO + "transformer/layer_specs.py",
        old="qk_l2_norm=config.qk_l2_norm,",
        new="qk_l2_norm=False,",
        tests=(
            UNIT + "test_norms.py::test_l2_norms_of_the_config_are_there_and_stay_without_weights",
        ),
        why="a model that asks for L2 norms of query and key trains without any",
    ),
    Mutant(
        name="max-seqlen-of-the-batch-before",
        file=MIMO + "partition/utils.py",
        old="longest = params.max_seqlen_q, params.max_seqlen_kv",
        new="longest = None",
        tests=(
            UNIT + "test_partition.py::"
            "test_lengths_that_fitted_one_batch_are_compared_with_the_next_one_s",
        ),
        why="rotary embeddings end before the longest sequence does",
    ),
)
