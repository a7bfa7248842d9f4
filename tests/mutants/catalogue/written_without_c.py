# SPDX-License-Identifier: Apache-2.0
"""A second round from the code without the tests: bridges, model, sequences, layers."""

from tests.mutants.catalogue.places import MIMO, UNIT
from tests.mutants.mutant import Mutant

WITHOUT_C = (
    Mutant(
        name="balance-digest-takes-replicas-for-homes",
        file=MIMO + "comm/plan/balance.py",
        old="np.stack([self.tokens, self.home, self.replica])",
        new="np.stack([self.tokens, self.replica, self.replica])",
        tests=(UNIT + "test_balance.py::test_digest_tells_plans_apart",),
        why=(
            "rank 0 plans with items_per_replica (2, 1), rank 1 with (1, 2), of the same "
            "tokens: the heaviest-first assignment is the same, only homes differ, so "
            "BalancePlan.digest() is equal and ItemExchange.confirm lets an all-to-all with "
            "other splits go on (hang or wrong pixels) instead of refusing 'plan differs'"
        ),
    ),
    Mutant(
        name="stays-without-order",
        file=MIMO + "comm/exchange.py",
        old="np.array_equal(plan.local_index, np.arange(plan.held))",
        new="plan.local_index.size == plan.held",
        tests=(UNIT + "test_routed_bridge.py::test_rows_that_stay_are_not_copied",),
        why=(
            "one rank holds and owns everything, but in another order: plan_routes(held=[runs "
            "[[2, 2], [0, 2]]]): no leg moves, local_index is (2, 3, 0, 1), and move() returns "
            "the rows unpermuted, so images land on each other's tokens"
        ),
    ),
    Mutant(
        name="balance-units-of-copies-uncompared",
        file=MIMO + "comm/input_balance.py",
        old="alike = {(tuple(told[c].tokens), tuple(told[c].units)) for c in copies}",
        new="alike = {tuple(told[c].tokens) for c in copies}",
        tests=(
            UNIT + "test_balance.py::test_copies_that_cut_their_items_into_other_units_are_named",
        ),
        why=(
            "TP 2 encoder, both copies say tokens [4, 4], units_per_item gives [2, 1] on the "
            "first and [1, 2] on the second: no ValueError; the second rank cuts its units by "
            "the first's numbers and encodes patches of the wrong image"
        ),
    ),
    Mutant(
        name="merge-plans-of-other-groups",
        file=MIMO + "comm/plan/merged_routes.py",
        old="if plan.rank != plans[0].rank or not np.array_equal(plan.ranks, plans[0].ranks):",
        new="if plan.rank != plans[0].rank or plan.ranks.size != plans[0].ranks.size:",
        tests=(UNIT + "test_stage_routes.py::test_plans_of_two_exchange_groups_are_refused",),
        why=(
            "MergedPlan.of of rank 0's plans in the exchange groups [0, 1] and [0, 2] (two "
            "bridges): no ValueError, splits of rank 2 are added to those of rank 1 and rows "
            "go astray"
        ),
    ),
    Mutant(
        name="confirm-swallows-problem-after-first",
        file=MIMO + "comm/routed_bridge.py",
        old="elif problem is not None:",
        new='elif problem is not None and self.guard == "off":',
        tests=(
            UNIT + "test_routed_bridge.py::"
            "test_where_nothing_is_compared_a_rank_with_a_problem_raises_alone",
        ),
        why=(
            "bridge_guard='first', second batch: the plan is of another rank or _plan_problem "
            "says that it is of another batch; confirm neither compares nor raises, and rows "
            "go by the wrong plan"
        ),
    ),
    Mutant(
        name="token-digest-without-lengths",
        file=MIMO + "comm/plan/routes.py",
        old="yield np.array(packed, dtype=np.int64)",
        new="yield np.array(packed[-1:], dtype=np.int64)",
        tests=(UNIT + "test_routes.py::test_the_digest_names_what_differs",),
        why=(
            "two ranks of one exchange group plan the same token places with cu_seqlens (0, 8, "
            "16) and (0, 4, 16), CP 2: other owners, equal PlanDigest.tokens, so confirm() "
            "does not refuse and the all-to-all's splits do not match"
        ),
    ),
    Mutant(
        name="padded-cu-seqlens-stay-int64",
        file=MIMO + "compat.py",
        old='if "cu_seqlens" in name and value is not None',
        new='if name in ("cu_seqlens_q", "cu_seqlens_kv") and value is not None',
        tests=(
            UNIT + "test_compat.py::test_lengths_of_every_kind_become_32_bit_and_nothing_else_does",
        ),
        why=(
            "packed_seq_params with int64 cu_seqlens_q_padded / cu_seqlens_kv_padded: those "
            "two remain int64, which Transformer Engine's kernels misread"
        ),
    ),
    Mutant(
        name="empty-grid-map-refused",
        file=MIMO + "config/base_configs.py",
        old="if self.module_to_grid_map:",
        new="if self.module_to_grid_map is not None:",
        tests=(UNIT + "test_config.py::test_no_grids_may_be_an_empty_map",),
        why=(
            "MimoModelConfig(module_to_grid_map={}) (no grids, as RankRole and MimoModel take "
            "it) raises ValueError about missing keys"
        ),
    ),
    Mutant(
        name="partial-overlap-of-grids",
        file=MIMO + "config/role.py",
        old="if grid is not language and shared:",
        new="if grid is not language and len(shared) == grid.size:",
        tests=(UNIT + "test_role.py::test_partly_shared_ranks_are_refused",),
        why=(
            "encoder grid on ranks 0-3, language grid on ranks 2-5: not refused; ranks 2 and 3 "
            "are NON_COLOCATED with both modules and run their encoders only"
        ),
    ),
    Mutant(
        name="offload-with-accumulation-fusion",
        file=MIMO + "memory/activations.py",
        old="if policy != KEEP and any(",
        new="if policy == RECOMPUTE and any(",
        tests=(
            UNIT + "test_activation_memory.py::test_what_a_policy_cannot_be_used_with_is_refused",
        ),
        why=(
            "EncoderMemory(encoder='offload') on an encoder whose config has "
            "gradient_accumulation_fusion=True: no ValueError; the kernel notes on a copy of "
            "the weight that its gradient is there, so the weight's gradient is lost"
        ),
    ),
    Mutant(
        name="offload-loses-negative-bit",
        file=MIMO + "memory/offload.py",
        old="return not (tensor.is_conj() or tensor.is_neg())",
        new="return not tensor.is_conj()",
        tests=(UNIT + "test_activation_memory.py::test_what_is_more_than_its_storage_stays",),
        why=(
            "an encoder that multiplies by z.conj().imag (a view with the negative bit), "
            "encoder='offload', offload_from=0: the saved tensor comes back from its bytes "
            "without the bit, the gradient of the other factor has the wrong sign"
        ),
    ),
    Mutant(
        name="plan-table-ignores-stream",
        file=MIMO + "memory/table.py",
        old="console = Console(file=stream, highlight=False, width=132)",
        new="console = Console(highlight=False, width=132)",
        tests=(UNIT + "test_memory_plan.py::test_the_table_goes_to_the_stream_that_is_given",),
        why=(
            "print_plan(parts, step, stream=io.StringIO()): the stream stays empty and the "
            "table goes to standard output"
        ),
    ),
    Mutant(
        name="padding-problem-stays",
        file=MIMO + "model/no_samples.py",
        old='{} if problem is None else {"problem": problem}',
        new="{}",
        tests=(UNIT + "test_model.py::TestMismatch::test_padding_that_experts_would_count",),
        why=(
            "a MoE model with moe_aux_loss_coeff gets an empty batch (a replica without "
            "samples): it is not refused, and the routers' losses count the padding that "
            "stands for it"
        ),
    ),
    Mutant(
        name="split-sizes-of-two-samples",
        file=MIMO + "model/encoder_rank.py",
        old="output.ndim != 2 or input_ids.size(0) <= 1:",
        new="output.ndim != 2 or input_ids.size(0) <= 2:",
        tests=(UNIT + "test_model.py::TestEncoderRank::test_uneven_samples_carry_their_sizes",),
        why=(
            "non-colocated, a batch of exactly two samples with 1 and 3 image tokens: the "
            "output carries no _mimo_bridge_split_sizes, stock's bridge cuts the 4 rows 2 and 2"
        ),
    ),
    Mutant(
        name="cp-group-of-one-rank",
        file=MIMO + "model/language_groups.py",
        old="if group_size not in (None, config_size):",
        new="if group_size not in (None, 1, config_size):",
        tests=(UNIT + "test_model.py::TestContextParallel::test_group_and_config_disagree",),
        why=(
            "refuse_other_cp_size(None, <group of one rank>, 2): no ValueError; the adapter "
            "finds use_cp False and nothing is cut under context_parallel_size=2"
        ),
    ),
    Mutant(
        name="plan-places-looked-at-once",
        file=MIMO + "model/routed_path.py",
        old='bridge.guard != "off" and (bridge.never_confirmed or batch.input_ids.is_cpu)',
        new='bridge.guard != "off" and bridge.never_confirmed',
        tests=(
            UNIT + "test_routed_model.py::test_a_plan_of_the_step_before_is_noticed_on_the_host",
        ),
        why=(
            "on the CPU, second step: route_plan is that of the step before (same shape, same "
            "number of tokens, other places, on all ranks): not refused, rows land on text "
            "positions"
        ),
    ),
    Mutant(
        name="rows-move-if-all-microbatches-have-some",
        file=MIMO + "model/routed_path.py",
        old="if any(name in each.moving for each in planned):",
        new="if all(name in each.moving for each in planned):",
        tests=(UNIT + "test_stage_side.py::test_rows_and_gradients_against_one_rank",),
        why=(
            "PP 2, two microbatches encoded together, the second one without images on any "
            "rank and without overlap_grad_reduce: the first one's image rows are never moved, "
            "its image positions are zeros and the encoder gets no gradient"
        ),
    ),
    Mutant(
        name="virtual-stage-prefix-dropped",
        file=MIMO + "model/ddp_methods.py",
        old='f"{prefix}{LANGUAGE_MODEL}."',
        new='f"{LANGUAGE_MODEL}."',
        tests=(
            UNIT + "test_model.py::"
            "TestState::test_virtual_stages_are_one_language_model_on_the_disk",
        ),
        why=(
            "model.sharded_state_dict(prefix='model.') with virtual stages: tensors of later "
            "stages have keys 'language_model....' without 'model.', so the first stages' "
            "layers and theirs are two models on the disk"
        ),
    ),
    Mutant(
        name="max-seqlen-of-real-tokens",
        file=MIMO + "partition/packed_lengths.py",
        old="    padded, _ = packed_lengths(params)\n",
        new="    _, padded = packed_lengths(params)\n",
        tests=(UNIT + "test_partition.py::test_max_seqlen_counts_padding",),
        why=(
            "check_packing with real lengths (3, 3), padded (4, 4) and max_seqlen_q=3: "
            "accepted, rotary embeddings are made for 3 positions of 4"
        ),
    ),
    Mutant(
        name="packed-memo-without-length",
        file=MIMO + "partition/utils.py",
        old="key = (batch, seq_len, longest, versions)",
        new="key = (batch, longest, versions)",
        tests=(
            UNIT + "test_partition.py::"
            "test_lengths_that_fitted_one_batch_are_compared_with_the_next_one_s",
        ),
        why=(
            "PartitionAdapter.check(1, 16, params), then check(1, 24, params) of the same "
            "cu_seqlens tensors that end at 16: the memo answers, no SequenceShardError"
        ),
    ),
    Mutant(
        name="no-items-of-two-encoders",
        file=MIMO + "submodules/encoder_outputs.py",
        old="torch.cat(pieces or list(self))",
        new="torch.cat(pieces)",
        tests=(UNIT + "test_encoder_outputs.py::test_no_items_give_no_rows",),
        why=(
            "two encoders of one modality return (0, s, h) each: EncodedRows.by_item has no "
            "pieces and torch.cat([]) raises on this rank instead of returning (0, h) rows"
        ),
    ),
    Mutant(
        name="l2-norm-exchanged",
        file=MIMO + "transformer/layer_specs.py",
        old="_KEPT_NORMS = (IdentityOp, L2Norm)",
        new="_KEPT_NORMS = (IdentityOp,)",
        tests=(
            UNIT + "test_norms.py::test_l2_norms_of_the_config_are_there_and_stay_without_weights",
        ),
        why=(
            "qk_l2_norm=True on local layers: query and key get a norm with weights (and mean "
            "removal) in place of the parameterless L2 norm"
        ),
    ),
    Mutant(
        name="z-loss-in-eval",
        file=MIMO + "transformer/router.py",
        old="coefficient is not None and self.training and torch.is_grad_enabled()",
        new="coefficient is not None and torch.is_grad_enabled()",
        tests=(UNIT + "test_experts.py::test_the_z_loss_of_other_ranks_is_that_of_training",),
        why=(
            "moe_z_loss_coeff=1e-3, tp_cp 2, model.eval() with gradients enabled: the router's "
            "logits get the other ranks' share of the z loss although stock adds none in eval"
        ),
    ),
    Mutant(
        name="extra-state-keeps-orig-mod",
        file=MIMO + "wrappers.py",
        old=(
            "        if isinstance(entry, (ShardedTensor, ShardedTensorFactory, ShardedObject)):\n"
            "            entry.key = _HIDDEN"
        ),
        new=(
            "        if isinstance(entry, (ShardedTensor, ShardedTensorFactory)):\n"
            "            entry.key = _HIDDEN"
        ),
        tests=(UNIT + "test_wrapped_names.py::test_checkpoints_do_not_know_wrappers",),
        why=(
            "a torch.compile'd encoder with a layer that has get_extra_state: its object is "
            "saved under '..._orig_mod...._extra_state'; a run without compile does not find it"
        ),
    ),
)
