# SPDX-License-Identifier: Apache-2.0
"""A third round from the code without the tests: bridges, checkpoints, steps, the model."""

from tests.mutants.catalogue.places import CORE, MIMO, UNIT
from tests.mutants.mutant import Mutant

WITHOUT_D = (
    Mutant(
        name="grid-twin-of-a-part",
        file=CORE + "hyper_comm_grid.py",
        old="if m == wanted and",
        new="if m <= wanted and",
        tests=(
            UNIT + "test_hyper_comm_grid.py"
            "::TestGroups::test_groups_of_some_ranks_are_no_twins_of_those_of_all",
        ),
        why=(
            "ranks of later stages get no group, where the groups of the first stage's are a part "
            "of those wanted"
        ),
    ),
    Mutant(
        name="grid-view-without-offset",
        file=CORE + "hyper_comm_grid.py",
        old="spec = _RankViewSpec(name, shape[:], dim_names[:], shared, self.rank_offset)",
        new="spec = _RankViewSpec(name, shape[:], dim_names[:], shared)",
        tests=(UNIT + "test_hyper_comm_grid.py::TestViews::test_enumerations",),
        why="the expert groups of a grid that does not begin at rank 0 are other ranks'",
    ),
    Mutant(
        name="guard-long-message-alone",
        file=MIMO + "comm/plan_guard.py",
        old="if lengths.max() > _INLINE:",
        new="if places.size > _INLINE:",
        tests=(
            UNIT + "test_routed_bridge.py::test_ranks_with_few_places_take_the_second_message_too",
        ),
        why="only ranks with long messages enter the second gather",
    ),
    Mutant(
        name="exchange-stays-alone",
        file=MIMO + "comm/exchange.py",
        old="stays = there is None and back is None and in_order",
        new="stays = there is None and in_order",
        tests=(UNIT + "test_routed_bridge.py::test_every_pair_of_8_rank_layouts",),
        why="a rank that owns all it holds does not enter the exchange of gradients",
    ),
    Mutant(
        name="gather-check-forgets-stages",
        file=MIMO + "comm/gather_bridge.py",
        old="for group in (self.gather_pg, self.dest_cp_pg, self.dest_pp_pg):",
        new="for group in (self.gather_pg, self.dest_cp_pg):",
        tests=(UNIT + "test_bridge_odd_inputs.py::test_a_gradient_that_one_rank_does_not_want",),
        why="check_shapes does not compare the stages of a replica",
    ),
    Mutant(
        name="merged-legs-move-as-the-last",
        file=MIMO + "comm/plan/merged_routes.py",
        old="moves=any(leg.moves for leg in legs),",
        new="moves=legs[-1].moves,",
        tests=(
            UNIT + "test_stage_routes.py"
            "::test_merged_routes_bring_every_microbatch_what_its_own_routes_do",
        ),
        why="rows stay where they are if the last microbatch has none to move",
    ),
    Mutant(
        name="signature-without-later-stages",
        file=MIMO + "comm/plan/routed_layout.py",
        old="at.rank_offset, at.src_cp_size, *at.later_stages]",
        new="at.rank_offset, at.src_cp_size]",
        tests=(UNIT + "test_routes.py::test_the_digest_names_what_differs",),
        why="ranks whose bridges serve different later stages agree on a plan",
    ),
    Mutant(
        name="aside-not-on-disk",
        file=MIMO + "checkpoint/history.py",
        old="            fsync(shelf)\n",
        new="",
        tests=(UNIT + "test_history.py::test_what_is_on_the_disk_before_what",),
        why="after a power cut an abandoned checkpoint is in neither folder",
    ),
    Mutant(
        name="same-step-saved-again",
        file=MIMO + "checkpoint/history.py",
        old="if s > self.stands_at or s >= step]",
        new="if s > self.stands_at or s > step]",
        tests=(UNIT + "test_history.py::test_who_leaves_the_line",),
        why="saving a step again fails when it is published",
    ),
    Mutant(
        name="plain-optimizer-then",
        file=MIMO + "checkpoint/load_checks.py",
        old="if manifest.distributed_optimizer in (None, distributed):",
        new=(
            "if not manifest.distributed_optimizer or manifest.distributed_optimizer == "
            "distributed:"
        ),
        tests=(
            UNIT + "test_checkpoint_refused_8rank.py"
            "::test_a_checkpoint_of_another_kind_of_optimizer_is_refused",
        ),
        why="a plain optimizer's checkpoint is loaded into a distributed one",
        ranks=8,
    ),
    Mutant(
        name="writer-loses-other-errors",
        file=MIMO + "checkpoint/background_save.py",
        old="except Exception as error:  # raised by join",
        new="except OSError as error:  # raised by join",
        tests=(UNIT + "test_shard_writer.py::test_every_error_of_a_writer_is_raised_by_join",),
        why="a checkpoint without a rank's tensors is published",
    ),
    Mutant(
        name="token-count-in-32-bits",
        file=MIMO + "gradients/finalize.py",
        old="total = num_tokens.to(torch.float64, copy=True)",
        new="total = num_tokens.to(torch.float32, copy=True)",
        tests=(
            UNIT + "test_grad_finalize_8rank.py"
            "::test_counts_beyond_the_whole_numbers_of_fp32_are_exact",
        ),
        why="counts beyond 2**24 are rounded",
        ranks=8,
    ),
    Mutant(
        name="virtual-stages-window-of-all",
        file=MIMO + "pipeline/checks.py",
        old="encode_ahead < num_microbatches and chunks > 1:",
        new="encode_ahead <= num_microbatches and chunks > 1:",
        tests=(UNIT + "test_step_checks.py::test_bounds_of_a_step",),
        why="encode_ahead of all microbatches is refused with virtual stages",
    ),
    Mutant(
        name="narrow-packed",
        file=MIMO + "pipeline/microbatches.py",
        old='for name in ("attention_mask", "packing_kwargs"):',
        new='for name in ("attention_mask",):',
        tests=(UNIT + "test_microbatches.py::test_what_cannot_be_narrowed_is_refused",),
        why="a packed batch keeps the lengths of all samples",
    ),
    Mutant(
        name="mask-fused-in-fp32",
        file=MIMO + "model/attention_masks.py",
        old="fused = softmax.scaled_masked_softmax_fusion and softmax.input_in_float16",
        new="fused = softmax.scaled_masked_softmax_fusion",
        tests=(
            UNIT + "test_attention_masks.py"
            "::test_fused_kernels_of_half_precision_only_have_a_mask_of_their_own",
        ),
        why="a mask that fp32 layers read is refused",
    ),
    Mutant(
        name="levels-of-two-modalities-on-a-later-stage",
        file=MIMO + "model/deepstack.py",
        old="+ len(blocks))) and blocks[0] >= 0:",
        new="+ len(blocks))):",
        tests=(UNIT + "test_deepstack.py::test_levels_and_gradients_in_stages_against_one_rank",),
        why="a later stage whose first level is another modality's dies",
    ),
    Mutant(
        name="levels-keep-their-dtype",
        file=MIMO + "model/deepstack.py",
        old="    level = level.to(hidden.dtype)\n",
        new="",
        tests=(
            UNIT + "test_deepstack.py"
            "::test_hidden_states_elsewhere_stay_and_what_comes_out_is_no_view",
        ),
        why="hidden states become fp32 after a layer with levels",
    ),
    Mutant(
        name="problems-of-the-last-bridge",
        file=MIMO + "model/routed_path.py",
        old="for bridge in self._bridges.values():\n            found = bridge.hear(found, count)",
        new=(
            "for bridge in self._bridges.values():\n            found = bridge.hear(problems, "
            "count)"
        ),
        tests=(
            UNIT + "test_stage_side.py"
            "::test_a_problem_is_told_in_the_exchange_groups_of_every_encoder",
        ),
        why="a problem heard by one modality's bridge is not told in the next one's group",
    ),
    Mutant(
        name="plan-for-nobody",
        file=MIMO + "model/input_checks.py",
        old='        check_names("route_plan", plans, routed)\n',
        new="",
        tests=(
            UNIT + "test_routed_model.py::test_what_nobody_reads_is_one_error_in_an_exchange_group",
        ),
        why="a route plan of a modality that nobody has is ignored",
    ),
    Mutant(
        name="max-sequence-length-ignored",
        file=MIMO + "model/language_groups.py",
        old='max_seq_len=params.get("max_sequence_length", _DEFAULT_MAX_SEQ_LEN),',
        new="max_seq_len=_DEFAULT_MAX_SEQ_LEN,",
        tests=(UNIT + "test_model.py::TestSequenceParallel::test_the_fused_sequence_is_scattered",),
        why="overlapped TP communication refuses a model of any length but 4096",
    ),
    Mutant(
        name="encoder-rank-without-images-not-ready",
        file=MIMO + "model/encoder_rank.py",
        old="                output = tied_to_parameters(output, submodule)",
        new="                output = output.detach()",
        tests=(
            UNIT + "test_model.py"
            "::TestEncoderRank::test_its_payload_readies_an_overlapping_encoder",
        ),
        why="on encoder ranks a batch without images leaves the reduction of the others waiting",
    ),
    Mutant(
        name="longest-changed-after-the-check",
        file=MIMO + "partition/utils.py",
        old="key = (batch, seq_len, longest, versions)",
        new="key = (batch, seq_len, versions)",
        tests=(
            UNIT + "test_partition.py"
            "::test_lengths_that_fitted_one_batch_are_compared_with_the_next_one_s",
        ),
        why="a max_seqlen that is too small passes after a batch that was right",
    ),
    Mutant(
        name="overlap-refuses-packed",
        file=MIMO + "partition/utils.py",
        old="overlapped = scattered and self.cfg.tp_comm_overlap and not packed",
        new="overlapped = scattered and self.cfg.tp_comm_overlap",
        tests=(
            UNIT + "test_partition.py"
            "::TestErrors::test_overlapped_communication_takes_packed_batches_of_any_length",
        ),
        why="packed batches need the maximal length with overlapped TP communication",
    ),
    Mutant(
        name="digest-without-shapes",
        file=MIMO + "comm/plan/routes.py",
        old='        state.update(np.array([values.ndim, *values.shape], dtype="<i8").tobytes())\n',
        new="",
        tests=(UNIT + "test_routes.py::test_the_digest_names_what_differs",),
        why="plans that give a replica another replica's rows have one digest",
    ),
    Mutant(
        name="dtypes-of-stages-differ",
        file=MIMO + "checkpoint/global_tensors.py",
        old="if found.setdefault(key, (shape, size)) != (shape, size):",
        new="if found.setdefault(key, (shape, size))[0] != shape:",
        tests=(
            UNIT + "test_global_tensors.py"
            "::test_stages_that_describe_a_tensor_differently_are_refused",
        ),
        why="stages of different dtypes are saved as one model",
    ),
    Mutant(
        name="watching-hooks-stay",
        file=MIMO + "gradients/nonfinite.py",
        old="            handle.remove()",
        new="            pass",
        tests=(UNIT + "test_left_as_found.py::test_it_is_as_before",),
        why="every later forward looks at all outputs",
    ),
    Mutant(
        name="stage-mask-unchecked",
        file=MIMO + "model/stages.py",
        old="    language.check_mask(batch)\n    batch, stage =",
        new="    batch, stage =",
        tests=(
            UNIT + "test_stage_side.py"
            "::test_what_nobody_reads_is_refused_in_stages_as_in_a_forward",
        ),
        why="stages take masks that nobody reads",
    ),
    Mutant(
        name="stage-route-plan-unchecked",
        file=MIMO + "model/base.py",
        old="                self._check_takes_route_plans()",
        new="                pass",
        tests=(
            UNIT + "test_stage_side.py"
            "::test_what_nobody_reads_is_refused_in_stages_as_in_a_forward",
        ),
        why="a route plan for a gathering model is ignored in steps of stages",
    ),
    Mutant(
        name="hear-nothing-in-the-replica",
        file=MIMO + "comm/gather_bridge.py",
        old=(
            "return merge_problems(ranks, [each for each, _ in told], [count for _, count in told])"
        ),
        new="return merge_problems(ranks, [each for each, _ in told], [count] * len(told))",
        tests=(
            UNIT + "test_bridge_odd_inputs.py"
            "::test_ranks_of_a_replica_hear_why_another_one_cannot_go_on",
        ),
        why="ranks that encode different numbers of microbatches wait for one another",
    ),
)
