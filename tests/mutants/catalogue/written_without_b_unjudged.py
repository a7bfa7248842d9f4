# SPDX-License-Identifier: Apache-2.0
"""Mistakes in training, the optimizer and checkpoints, written from the code without the tests.

Whether their tests notice them has not been run yet.
"""

from tests.mutants.mutant import Mutant

WRITTEN_WITHOUT_B_UNJUDGED = (
    Mutant(
        name="a-rank-that-fails-alone-leaves",
        file="megatron/core/models/mimo/training/checkpoint_errors.py",
        old="_raise(run_together(action, has_collectives=False), doing, advice)",
        new="_raise(run_together(action, has_collectives=True), doing, advice)",
        tests=(
            "tests/unit_tests/mimo/test_checkpoint_refused_8rank.py::test_a_damaged_file_is_named",
        ),
        why="the others wait in the exchange of outcomes: a hang",
        ranks=8,
    ),
    Mutant(
        name="a-failed-background-writer-is-silent",
        file="megatron/core/models/mimo/training/background_save.py",
        old="            self._thread.join()\n",
        new="            self._thread.join()\n            return\n",
        tests=(
            "tests/unit_tests/mimo/test_background_save_8rank.py::test_a_writer_that_fails_is_an_error_of_the_run",
        ),
        why="a checkpoint whose files were not written is published",
        ranks=8,
    ),
    Mutant(
        name="extra-is-not-copied",
        file="megatron/core/models/mimo/training/checkpoint.py",
        old="extra=copy.deepcopy(extra or {})",
        new="extra=extra or {}",
        tests=(
            "tests/unit_tests/mimo/test_background_save_8rank.py::test_the_bytes_and_the_losses_are_those_of_a_foreground_save",
        ),
        why="a background save writes what the job's dict holds later",
        ranks=8,
    ),
    Mutant(
        name="load-does-not-wait-for-the-save",
        file="megatron/core/models/mimo/training/checkpoint.py",
        old="        self.wait()\n        with phases.during(phases.LOAD):",
        new="        with phases.during(phases.LOAD):",
        tests=(
            "tests/unit_tests/mimo/test_background_save_8rank.py::test_the_next_save_and_a_load_wait",
        ),
        why="a load while a background save is under way does not see that checkpoint",
        ranks=8,
    ),
    Mutant(
        name="another-layout-keeps-its-random-states",
        file="megatron/core/models/mimo/training/checkpoint.py",
        old="            self.randomness.reseed(manifest.step)\n",
        new="            pass\n",
        tests=(
            "tests/unit_tests/mimo/test_checkpoint_8rank.py::test_another_layout_loads_the_same_weights_and_continues",
        ),
        why="a run resumed in another layout repeats the random numbers of its first steps",
        ranks=8,
    ),
    Mutant(
        name="loading-does-not-move-the-run",
        file="megatron/core/models/mimo/training/checkpoint.py",
        old="        self.history.stands_at = manifest.step\n",
        new="",
        tests=(
            "tests/functional/test_killed_saves.py::test_every_restart_finds_the_last_complete_checkpoint",
        ),
        why="the first save after a load abandons every checkpoint",
        ranks=2,
    ),
    Mutant(
        name="main-copies-are-refused-on-one-rank",
        file="megatron/core/models/mimo/training/load_checks.py",
        old="if any(of_all_ranks(copied)):",
        new="if of_all_ranks(copied)[dist.get_rank()]:",
        tests=(
            "tests/unit_tests/mimo/test_load_weights_8rank.py::test_fp32_copies_of_an_optimizer_are_not_forgotten",
        ),
        why="a rank that trains nothing goes on to load and waits for ever",
        ranks=8,
    ),
    Mutant(
        name="ranks-may-read-different-manifests",
        file="megatron/core/models/mimo/training/load_checks.py",
        old="        if digest != said[0][1]:\n",
        new="        if not digest:\n",
        tests=(
            "tests/unit_tests/mimo/test_load_weights_8rank.py::test_ranks_that_read_different_manifests_are_told_so",
        ),
        why="ranks with different checkpoints of one step load them together",
        ranks=8,
    ),
    Mutant(
        name="numpys-state-is-not-restored",
        file="megatron/core/models/mimo/training/randomness.py",
        old='    np.random.set_state(state["numpy"])\n',
        new="",
        tests=(
            "tests/unit_tests/mimo/test_checkpoint_8rank.py::test_the_same_layout_continues_bit_for_bit",
        ),
        why="data augmentation by NumPy is not bit-exact after a resume",
        ranks=8,
    ),
    Mutant(
        name="expert-biases-are-summed-over-tp",
        file="megatron/core/models/mimo/training/experts.py",
        old="                parameter.sequence_parallel = False\n",
        new="",
        tests=(
            "tests/unit_tests/mimo/test_experts_8rank.py::test_loss_gradients_and_norm_equal_the_unsharded_model",
        ),
        why="under sequence parallelism gradients of expert biases count TP times",
        ranks=8,
    ),
    Mutant(
        name="one-frozen-weight-makes-the-module-fresh",
        file="megatron/core/models/mimo/training/frozen_state.py",
        old="if keys and keys <= names:",
        new="if keys and keys & names:",
        tests=(
            "tests/unit_tests/mimo/test_optimizer_table.py::test_what_joins_later_starts_from_its_weights",
        ),
        why="moments of the weights that did train are thrown away on loading",
    ),
    Mutant(
        name="partly-frozen-is-frozen",
        file="megatron/core/models/mimo/training/frozen_state.py",
        old="return cls(frozenset(frozen - trained), partly)",
        new="return cls(frozenset(frozen), partly)",
        tests=(
            "tests/unit_tests/mimo/test_unfreezing_8rank.py::test_what_was_trained_goes_on_and_the_rest_starts_fresh",
        ),
        why="moments of the layers of a stack that trained are thrown away on loading",
        ranks=8,
    ),
    Mutant(
        name="grids-of-one-size-are-one-place",
        file="megatron/core/models/mimo/training/grad_finalize.py",
        old="spans = {(grid.rank_offset, grid.size)",
        new="spans = {grid.size",
        tests=(
            "tests/unit_tests/mimo/test_grad_finalize_8rank.py::test_the_count_reaches_ranks_outside_the_language_grid",
        ),
        why="modules on disjoint halves of the ranks are taken for colocated",
        ranks=8,
    ),
    Mutant(
        name="every-tp-rank-counts-tokens",
        file="megatron/core/models/mimo/training/grad_finalize.py",
        old="return groups.tp.rank() == 0 and last_stage",
        new="return last_stage",
        tests=(
            "tests/unit_tests/mimo/test_grad_finalize_8rank.py::test_the_count_reaches_ranks_outside_the_language_grid",
        ),
        why="modules on different ranks: gradients are too small by TP",
        ranks=8,
    ),
    Mutant(
        name="one-ddp-config-for-all-modules",
        file="megatron/core/models/mimo/training/grad_finalize.py",
        old="            copy(ddp_config),\n",
        new="            ddp_config,\n",
        tests=(
            "tests/unit_tests/mimo/test_grad_finalize_8rank.py::test_every_module_gets_a_ddp_config_of_its_own",
        ),
        why="DDP writes into the caller's config and into that of the other modules",
        ranks=8,
    ),
    Mutant(
        name="the-experts-group-lacks-expert-tp",
        file="megatron/core/models/mimo/training/groups.py",
        old='collection.tp_ep = grid.get_or_create_pg(["expt_tp", "ep"], view=EXPERT_VIEW)',
        new='collection.tp_ep = grid.get_or_create_pg(["ep"], view=EXPERT_VIEW)',
        tests=(
            "tests/unit_tests/mimo/test_experts_8rank.py::test_loss_gradients_and_norm_equal_the_unsharded_model",
        ),
        why="tokens are not gathered over expert TP",
        ranks=8,
    ),
    Mutant(
        name="dense-stages-are-expert-ranks",
        file="megatron/core/models/mimo/training/groups.py",
        old='collection.ep = collection.pp if grid.dim_size("pp") == 1 else _singleton_group(grid)',
        new="collection.ep = collection.pp",
        tests=(
            "tests/unit_tests/mimo/test_groups_8rank.py::test_members_are_those_of_the_coordinates",
        ),
        why="without experts the EP group is the pipeline",
        ranks=8,
    ),
    Mutant(
        name="the-optimizers-group-lacks-stages",
        file="megatron/core/models/mimo/training/groups.py",
        old='"intra_dist_opt": ["tp", "cp", "dp", "pp"],',
        new='"intra_dist_opt": ["tp", "cp", "dp"],',
        tests=(
            "tests/unit_tests/mimo/test_groups_8rank.py::test_members_are_those_of_the_coordinates",
        ),
        why="with the distributed optimizer each stage has a gradient norm of its own",
        ranks=8,
    ),
    Mutant(
        name="several-optimizer-instances-pass",
        file="megatron/core/models/mimo/training/inner_optimizers.py",
        old="    if instances != 1:\n",
        new="    if instances < 1:\n",
        tests=(
            "tests/unit_tests/mimo/test_mimo_optimizer_8rank.py::test_several_distributed_optimizer_instances_are_refused",
        ),
        why="an unsupported setting is accepted",
        ranks=8,
    ),
    Mutant(
        name="errors-of-a-release-are-raised-after-the-end",
        file="mimo_colocated/process_groups.py",
        old="        if dist.is_initialized():\n            raise",
        new="        if not dist.is_initialized():\n            raise",
        tests=(
            "tests/unit_tests/mimo/test_hyper_comm_grid.py::test_release_of_a_group_that_went_with_the_world_or_not",
        ),
        why="a group that cannot be destroyed is not told, one that is gone is an error",
        ranks=8,
    ),
    Mutant(
        name="buckets-are-read-where-they-are-padded",
        file="megatron/core/models/mimo/training/optimizer_state.py",
        old="= gathered[start : start + size]",
        new="= gathered[bucket.offset : bucket.offset + size]",
        tests=(
            "tests/unit_tests/mimo/test_overlap_8rank.py::test_a_checkpoint_has_the_weights_of_the_last_step",
        ),
        why="moments of the second bucket are saved shifted",
        ranks=8,
    ),
    Mutant(
        name="groups-that-join-have-no-step",
        file="megatron/core/models/mimo/training/optimizer_settings.py",
        old="found.append({**own, **steps})",
        new="found.append(own)",
        tests=(
            "tests/unit_tests/mimo/test_optimizer_table.py::test_multipliers_that_no_saved_group_has",
        ),
        why="a parameter group that the checkpoint lacks counts steps from another number",
    ),
    Mutant(
        name="fresh-modules-keep-their-main-copies",
        file="megatron/core/models/mimo/training/optimizer_state.py",
        old="    optimizer.reload_model_params()\n",
        new="",
        tests=(
            "tests/unit_tests/mimo/test_optimizer_table.py::test_what_joins_later_starts_from_its_weights",
        ),
        why="a module whose training starts at a resume goes on from its initial weights",
    ),
    Mutant(
        name="adams-step-is-one-tensor-for-all",
        file="megatron/core/models/mimo/training/optimizer_state.py",
        old='adam_state["step"] = adam_state["step"].clone()',
        new="pass",
        tests=(
            "tests/unit_tests/mimo/test_checkpoint_8rank.py::test_the_same_layout_continues_bit_for_bit",
        ),
        why="the step count grows once per parameter",
        ranks=8,
    ),
    Mutant(
        name="an-overflow-elsewhere-is-not-told",
        file="megatron/core/models/mimo/optimizer.py",
        old="and (self._speaks_for(name) or not math.isfinite(norm)):",
        new="and self._speaks_for(name):",
        tests=(
            "tests/unit_tests/mimo/test_nonfinite_8rank.py::test_a_replica_that_is_not_the_one_that_speaks",
        ),
        why="a norm that is not finite on one rank only is lost",
        ranks=8,
    ),
    Mutant(
        name="success-is-a-ranks-own",
        file="megatron/core/models/mimo/optimizer.py",
        old="success = not self._any_rank(not self.step_with_ready_grads())",
        new="success = self.step_with_ready_grads()",
        tests=(
            "tests/unit_tests/mimo/test_mimo_optimizer_8rank.py::test_a_step_that_fails_on_one_rank_has_failed_on_all",
        ),
        why="ranks disagree on whether the step succeeded",
        ranks=8,
    ),
    Mutant(
        name="fresh-modules-give-the-loss-scale",
        file="megatron/core/models/mimo/optimizer.py",
        old="if info.is_active and info.optimizer and FRESH not in loaded[name]",
        new="if info.is_active and info.optimizer",
        tests=(
            "tests/unit_tests/mimo/test_loss_scaling_8rank.py::test_skipped_steps_of_a_model_and_its_checkpoints",
        ),
        why="a module that starts fresh resets the loss scale of a resumed fp16 run",
        ranks=8,
    ),
    Mutant(
        name="frozen-weights-dtypes-count",
        file="megatron/core/models/mimo/training/optimizer_checks.py",
        old="if not (parameter.requires_grad and field):",
        new="if not field:",
        tests=(
            "tests/unit_tests/mimo/test_optimizer_table.py::test_dtypes_and_config_are_compared_when_the_optimizer_is_built",
        ),
        why="a frozen bf16 encoder beside an fp32 model is refused",
    ),
    Mutant(
        name="settings-checkpoint-is-dropped",
        file="megatron/core/models/mimo/training/optimizer_settings.py",
        old="if settings == RUN and built_before is not None:",
        new="if built_before is not None:",
        tests=(
            "tests/unit_tests/mimo/test_optimizer_table.py::test_what_a_new_run_changes_counts_and_the_rest_goes_on",
        ),
        why="an argument is ignored",
    ),
    Mutant(
        name="groups-of-one-key-share-the-first",
        file="megatron/core/models/mimo/training/optimizer_settings.py",
        old="then, built_before = counterparts.pop(0)",
        new="then, built_before = counterparts[0]",
        tests=(
            "tests/unit_tests/mimo/test_optimizer_table.py::test_groups_with_a_learning_rate_of_their_own",
        ),
        why="groups that only their settings tell apart get those of the first",
    ),
    Mutant(
        name="main-copies-are-no-shards",
        file="megatron/core/models/mimo/training/optimizer_shards.py",
        old="return kept if id(shard) in views else {**kept, _MAIN: shard.detach()}",
        new="return kept",
        tests=("tests/unit_tests/mimo/test_optimizer_table.py::test_so_do_shards_of_two_ranks",),
        why="fp32 copies of bf16 weights are not in state_dict",
        ranks=2,
    ),
    Mutant(
        name="shards-of-another-layout",
        file="megatron/core/models/mimo/training/optimizer_shards.py",
        old="if not same_shapes or any(saved[key] != mine[key] for key in mine):",
        new="if any(saved[key] != mine[key] for key in mine):",
        tests=(
            "tests/unit_tests/mimo/test_optimizer_table.py::test_states_of_another_rank_or_kind_are_refused",
        ),
        why="shards of another layout of as many ranks fail in a copy, or are taken",
        ranks=2,
    ),
    Mutant(
        name="windows-go-back-too-early",
        file="megatron/core/models/mimo/training/pipeline_step.py",
        old="self._lag = -(-(stages - 1) // window)",
        new="self._lag = (stages - 1) // window",
        tests=("tests/unit_tests/mimo/test_pipeline_step_8rank.py::test_windows_of_microbatches",),
        why="a window goes back before the first stage has its gradients",
        ranks=8,
    ),
    Mutant(
        name="the-last-window-is-never-the-last",
        file="megatron/core/models/mimo/training/pipeline_step.py",
        old="last = (window + 1) * self._window >= self._count",
        new="last = (window + 1) * self._window > self._count",
        tests=("tests/unit_tests/mimo/test_pipeline_step_8rank.py::test_windows_of_microbatches",),
        why="with windows that divide the step no encoder gradient is reduced under overlap",
        ranks=8,
    ),
    Mutant(
        name="bridges-that-come-apart-are-not-counted-late",
        file="megatron/core/models/mimo/training/pipeline_step.py",
        old="if encoded.comes_apart or gradients_come_apart(module)",
        new="if gradients_come_apart(module)",
        tests=(
            "tests/unit_tests/mimo/test_overlap_8rank.py::test_steps_may_have_other_numbers_of_microbatches",
        ),
        why="over gather bridges, DDP takes a gradient for whole too early",
        ranks=8,
    ),
    Mutant(
        name="collect-non-loss-data-is-dropped",
        file="megatron/core/models/mimo/training/pipeline_step.py",
        old="            collect_non_loss_data=collect_non_loss_data,\n",
        new="",
        tests=(
            "tests/unit_tests/mimo/test_pipeline_step_8rank.py::test_evaluation_has_no_gradients",
        ),
        why="an argument is ignored",
        ranks=8,
    ),
)
