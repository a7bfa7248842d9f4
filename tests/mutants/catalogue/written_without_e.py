# SPDX-License-Identifier: Apache-2.0
"""A fourth round from the code without the tests: the library."""

from tests.mutants.catalogue.places import MIMO, UNIT
from tests.mutants.mutant import Mutant

WITHOUT_E = (
    Mutant(
        name="first-gradient-of-rank-zero",
        file=MIMO + "comm/collectives.py",
        old="dist.broadcast(first, dist.get_process_group_ranks(ctx.group)[0], group=ctx.group)",
        new="dist.broadcast(first, 0, group=ctx.group)",
        tests=(UNIT + "test_bridge_properties.py::test_every_bridge",),
        why="groups of stages without global rank 0 cannot hand the gradient on",
    ),
    Mutant(
        name="balance-digest-without-plan",
        file=MIMO + "comm/plan/balance.py",
        old="np.stack([self.tokens, self.home, self.replica])",
        new="np.stack([self.tokens, self.home, self.home])",
        tests=(UNIT + "test_balance.py::test_digest_tells_plans_apart",),
        why="ranks that assign items differently are not noticed; the exchange mismatches",
    ),
    Mutant(
        name="last-rows-held-by-nobody",
        file=MIMO + "comm/plan/group_rows.py",
        old="np.flatnonzero(np.append(self._start, self.total) > reach)",
        new="np.flatnonzero(self._start > reach[:-1])",
        tests=(UNIT + "test_routes.py::test_what_does_not_match_is_refused",),
        why="rows at the end that no encoder replica holds are not refused",
    ),
    Mutant(
        name="item-parts-for-other-cp",
        file=MIMO + "transformer/ulysses_attention.py",
        old="if parts is None or parts.size != group.size():",
        new="if parts is None:",
        tests=(UNIT + "test_ulysses_attention.py::TestRefusals::test_parts",),
        why="parts for another CP size are taken instead of refused",
    ),
    Mutant(
        name="no-sync-only-of-first",
        file=MIMO + "model/ddp_methods.py",
        old=(
            '            for module in self._overlapping("overlap_grad_reduce"):\n'
            "                stack.enter_context(module.no_sync())"
        ),
        new=(
            '            for module in self._overlapping("overlap_grad_reduce")[:1]:\n'
            "                stack.enter_context(module.no_sync())"
        ),
        tests=(
            UNIT + "test_model.py"
            "::TestDataParallelCalls::test_calls_reach_every_module_that_overlaps",
        ),
        why="only the first module's gradients accumulate",
    ),
    Mutant(
        name="whole-token-counts-dropped",
        file=MIMO + "pipeline/step.py",
        old=(
            "counted = [sum(fractions, tokens.double()) for tokens in counted if tokens is "
            "not None]"
        ),
        new="counted = [sum(fractions) for tokens in counted if tokens is not None]",
        tests=(UNIT + "test_stage_side.py::test_finalisation_is_told_what_the_step_is",),
        why="where some microbatches count in integers those are lost: gradients too large",
    ),
    Mutant(
        name="infinite-tokens-scale-to-zero",
        file=MIMO + "gradients/finalize.py",
        old="usable = (total > 0) & total.isfinite()",
        new="usable = total > 0",
        tests=(UNIT + "test_grad_finalize_8rank.py::test_sums_that_nothing_can_be_divided_by",),
        why="an infinite token count makes zero gradients in silence",
        ranks=8,
    ),
    Mutant(
        name="plan-keeps-one-ahead-less",
        file=MIMO + "memory/plan.py",
        old="min(self.microbatches, ahead + 2)",
        new="min(self.microbatches, ahead + 1)",
        tests=(
            UNIT + "test_memory_plan.py"
            "::test_without_stages_there_is_one_microbatch_at_a_time_and_those_ahead",
        ),
        why="planned memory is a microbatch too small",
    ),
    Mutant(
        name="abandon-only-both",
        file=MIMO + "checkpoint/history.py",
        old="if s > self.stands_at or s >= step]",
        new="if s > self.stands_at and s >= step]",
        tests=(UNIT + "test_history.py::test_who_leaves_the_line",),
        why="checkpoints of an earlier line stay among those of this one",
    ),
    Mutant(
        name="empty-read-only-folder-refused",
        file=MIMO + "checkpoint/shared_folder.py",
        old="return bool(own & steps) or not own | steps",
        new="return bool(own & steps)",
        tests=(UNIT + "test_shared_folder.py::test_a_folder_to_read_from_only_passes",),
        why="a read-only folder without checkpoints is said not to be shared",
    ),
    Mutant(
        name="distributed-main-copies-are-moments",
        file=MIMO + "checkpoint/frozen_state.py",
        old='_MAIN_COPIES = ("param", "fp32_param")',
        new='_MAIN_COPIES = ("fp32_param",)',
        tests=(
            UNIT + "test_frozen_state.py"
            "::test_the_part_of_a_frozen_layer_has_the_dtype_of_the_others",
        ),
        why="unfrozen weights restart from zero under the distributed optimizer",
    ),
    Mutant(
        name="reason-is-the-first-line",
        file=MIMO + "training/agreement.py",
        old="lines[-1] if lines else rest",
        new="lines[0] if lines else rest",
        tests=(UNIT + "test_agreement.py::test_a_rank_that_lost_its_peer_is_not_the_reason",),
        why="a failure is told by the first line of its text, not where the reason stands",
    ),
    Mutant(
        name="frozen-group-accepted",
        file=MIMO + "training/parameter_groups.py",
        old="for each in named if each.parameter.requires_grad}",
        new="for each in named}",
        tests=(
            UNIT + "huggingface/test_parameter_groups.py"
            "::test_groups_without_effect_are_refused",
        ),
        why="a group of frozen parameters is accepted and does nothing",
    ),
    Mutant(
        name="read-lengths-alias-the-loader",
        file=MIMO + "partition/packed_lengths.py",
        old="host.to(torch.int32, copy=True)",
        new="host.to(torch.int32)",
        tests=(UNIT + "test_packed_lengths.py::test_copies_are_read_not_what_a_loader_fills_anew",),
        why="a loader that fills its lengths anew changes those of a backward pass",
    ),
    Mutant(
        name="adapter-tp-dim",
        file=MIMO + "transformer/lora.py",
        old="set_tensor_model_parallel_attributes(cut, True, 0 if self.column else 1, 1)",
        new="set_tensor_model_parallel_attributes(cut, True, 0, 1)",
        tests=(
            UNIT + "huggingface/test_lora.py"
            "::test_adapters_say_which_dim_of_which_matrix_tp_cuts",
        ),
        why="a row-parallel layer's A says that TP cuts its rank dim",
    ),
    Mutant(
        name="mixed-problems-heard-once",
        file=MIMO + "model/mixed_path.py",
        old="return self._routed.exchange_problems(found, count)",
        new="return self._routed.exchange_problems(problems, count)",
        tests=(UNIT + "test_row_paths.py::test_what_is_heard_over_either_kind_of_bridge_is_heard",),
        why="what the gather bridges heard is forgotten: ranks go different ways",
    ),
    Mutant(
        name="cp-comm-list-not-looked-at",
        file=MIMO + "config/checks.py",
        old='if "a2a+p2p" in (kinds if isinstance(kinds, (list, tuple)) else [kinds]):',
        new='if kinds == "a2a+p2p":',
        tests=(
            UNIT + "test_config.py"
            "::test_what_needs_ranks_outside_the_module_and_graphs_are_refused",
        ),
        why="per-layer cp_comm_type with a2a+p2p is accepted",
    ),
    Mutant(
        name="same-shard-seed-accepted",
        file=MIMO + "training/initial_weights.py",
        old="        if other != name:\n",
        new="        if not other:\n",
        tests=(
            UNIT + "test_initial_weights.py"
            "::test_per_shard_refuses_two_stacks_of_layers_in_one_call",
        ),
        why="two weights start from the same numbers without an error",
    ),
)
