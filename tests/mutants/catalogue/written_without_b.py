# SPDX-License-Identifier: Apache-2.0
"""Mistakes in training, the optimizer and checkpoints, written from the code without the tests."""

from tests.mutants.mutant import Mutant

WRITTEN_WITHOUT_B = (
    Mutant(
        name="a-full-quota-is-no-full-disk",
        file="megatron/core/models/mimo/training/agreement.py",
        old="for n in (errno.ENOSPC, errno.EDQUOT)",
        new="for n in (errno.ENOSPC,)",
        tests=(
            "tests/unit_tests/mimo/test_background_save_8rank.py::test_a_writer_that_fails_is_an_error_of_the_run",
        ),
        why="a save that fails with EDQUOT no longer says that the disk is full",
        ranks=8,
    ),
    Mutant(
        name="megatrons-errors-stay-off-the-console-for-good",
        file="megatron/core/models/mimo/training/agreement.py",
        old="        logger.propagate = before\n",
        new="        logger.propagate = False\n",
        tests=(
            "tests/unit_tests/mimo/test_agreement.py::test_errors_are_overheard_inside_and_logged_outside",
        ),
        why="after the first save every error that Megatron-Core's checkpointing logs is lost",
    ),
    Mutant(
        name="a-rank-that-lost-its-peer-names-itself",
        file="megatron/core/models/mimo/training/agreement.py",
        old="distance=2 if lost else 0)",
        new="distance=0)",
        tests=(
            "tests/unit_tests/mimo/test_agreement.py::test_a_rank_that_lost_its_peer_is_not_the_reason",
        ),
        why="the reason named is the broken connection, not what the failing rank says",
    ),
    Mutant(
        name="the-last-failure-published-is-not-read",
        file="megatron/core/models/mimo/training/agreement.py",
        old="store.add(_key(call), 0) + 1)",
        new="store.add(_key(call), 0))",
        tests=(
            "tests/unit_tests/mimo/test_agreement.py::test_every_failure_that_was_published_is_read",
        ),
        why="with one failing rank its peers find no reason",
    ),
    Mutant(
        name="a-step-given-up-leaves-its-turn",
        file="megatron/core/models/mimo/training/bucket_order.py",
        old=("        self._next = 0\n        type(group).reset(group)"),
        new="        type(group).reset(group)",
        tests=(
            "tests/unit_tests/mimo/test_bucket_order.py::test_buckets_of_either_kind_wait_for_those_before_them",
        ),
        why="after a step that was interrupted the buckets before its turn are never reduced",
    ),
    Mutant(
        name="expert-buckets-in-any-order",
        file="megatron/core/models/mimo/training/bucket_order.py",
        old="for groups in (wrapped.bucket_groups, wrapped.expert_parallel_bucket_groups):",
        new="for groups in (wrapped.bucket_groups,):",
        tests=(
            "tests/unit_tests/mimo/test_bucket_order.py::test_buckets_of_either_kind_wait_for_those_before_them",
        ),
        why="expert buckets start in the order in which backward fills them",
    ),
    Mutant(
        name="layouts-alone-make-the-layout",
        file="megatron/core/models/mimo/training/checkpoint.py",
        old="manifest.layouts == self.layouts and manifest.world_size == dist.get_world_size()",
        new="manifest.layouts == self.layouts",
        tests=(
            "tests/unit_tests/mimo/test_checkpoint_8rank.py::test_the_manifest_says_what_was_saved",
        ),
        why="random states of another world size are asked for",
        ranks=8,
    ),
    Mutant(
        name="a-modules-name-is-a-list-of-letters",
        file="megatron/core/models/mimo/training/checkpoint.py",
        old="names = (modules,) if isinstance(modules, str) else modules",
        new="names = modules",
        tests=(
            "tests/unit_tests/mimo/test_load_weights_8rank.py::test_one_module_goes_into_a_model_with_others",
        ),
        why="load(modules='images') fails, or loads modules whose name is a part of the given one",
        ranks=8,
    ),
    Mutant(
        name="expert-tp-for-tp",
        file="megatron/core/models/mimo/training/experts.py",
        old="if groups.tp.size() > 1 and not config.sequence_parallel:",
        new="if groups.expt_tp.size() > 1 and not config.sequence_parallel:",
        tests=("tests/unit_tests/mimo/test_experts.py::test_sizes_that_disagree_are_refused",),
        why="experts at TP 2, expert TP 1, without sequence parallelism are accepted",
    ),
    Mutant(
        name="main-copies-of-half-precision-weights-are-zeros",
        file="megatron/core/models/mimo/training/frozen_state.py",
        old='_MAIN_COPIES = ("param", "fp32_param")',
        new='_MAIN_COPIES = ("param",)',
        tests=(
            "tests/unit_tests/mimo/test_optimizer_table.py::test_what_joins_later_starts_from_its_weights",
        ),
        why="what joins training in bf16 with the plain optimizer starts from zeros",
    ),
    Mutant(
        name="main-copies-of-frozen-layers-keep-the-weights-dtype",
        file="megatron/core/models/mimo/training/frozen_state.py",
        old="data = weight.to(dtype) if is_weight",
        new="data = weight if is_weight",
        tests=(
            "tests/unit_tests/mimo/test_frozen_state.py::test_the_part_of_a_frozen_layer_has_the_dtype_of_the_others",
        ),
        why="the part of a stack that is frozen is saved in bf16 beside fp32",
    ),
    Mutant(
        name="expert-numbers-by-rank",
        file="megatron/core/models/mimo/training/global_names.py",
        old="    first = rank * len(list(experts.children()))\n",
        new="    first = rank\n",
        tests=(
            "tests/unit_tests/mimo/test_initial_weights.py::test_experts_are_counted_over_expert_parallel_ranks",
        ),
        why="with two experts a rank, two ranks' experts share a name and a seed",
    ),
    Mutant(
        name="digests-of-tensors-cover-names-alone",
        file="megatron/core/models/mimo/training/global_tensors.py",
        old="json.dumps(own, sort_keys=True)",
        new="json.dumps(sorted(own))",
        tests=(
            "tests/unit_tests/mimo/test_checkpoint_pipeline_8rank.py::test_stages_of_different_models_are_an_error_on_all_ranks",
        ),
        why="stages built from different configurations are not refused",
        ranks=8,
    ),
    Mutant(
        name="force-all-reduce-is-dropped-by-the-finalizer",
        file="megatron/core/models/mimo/training/grad_finalize.py",
        old="parts, None, self.collections[name], force_all_reduce=force_all_reduce",
        new="parts, None, self.collections[name]",
        tests=(
            "tests/unit_tests/mimo/test_grad_finalize_8rank.py::test_force_all_reduce_reaches_every_module",
        ),
        why="an argument of the finalizer is ignored",
        ranks=8,
    ),
    Mutant(
        name="expt-tp-0-is-tp",
        file="megatron/core/models/mimo/training/groups.py",
        old="tp if expt_tp is None else expt_tp)",
        new="expt_tp or tp)",
        tests=("tests/unit_tests/mimo/test_experts.py::test_sizes_that_do_not_divide_are_refused",),
        why="a size of 0 is accepted",
    ),
    Mutant(
        name="the-new-name-is-not-on-the-disk",
        file="megatron/core/models/mimo/training/history.py",
        old=("        os.rename(partial, final)\n        fsync(self.root)\n"),
        new="        os.rename(partial, final)\n",
        tests=("tests/unit_tests/mimo/test_history.py::test_a_kill_at_any_change_loses_nothing",),
        why="older checkpoints go before the new one's name is durable",
    ),
    Mutant(
        name="the-manifest-is-written-after-the-fsync",
        file="megatron/core/models/mimo/training/history.py",
        old=(
            "        (partial / MANIFEST).write_text(manifest.to_json())\n"
            "        for file in partial.iterdir():\n"
            "            fsync(file)\n"
        ),
        new=(
            "        for file in partial.iterdir():\n"
            "            fsync(file)\n"
            "        (partial / MANIFEST).write_text(manifest.to_json())\n"
        ),
        tests=("tests/unit_tests/mimo/test_history.py::test_what_is_on_the_disk_before_what",),
        why="a power loss leaves a checkpoint with an empty manifest",
    ),
    Mutant(
        name="steps-of-nine-digits-are-invisible",
        file="megatron/core/models/mimo/training/history.py",
        old='_NAME = re.compile(r"step_(\\d{8,})")',
        new='_NAME = re.compile(r"step_(\\d{8})")',
        tests=("tests/unit_tests/mimo/test_history.py::test_steps_of_nine_digits_are_steps",),
        why="checkpoints from step 100000000 on are never found",
    ),
    Mutant(
        name="shelves-are-counted",
        file="megatron/core/models/mimo/training/history.py",
        old="shelf = shelves / str(1 + max(numbers, default=0))",
        new="shelf = shelves / str(1 + len(numbers))",
        tests=(
            "tests/unit_tests/mimo/test_history.py::test_a_folder_of_abandoned_checkpoints_may_be_removed",
        ),
        why="after a user removed abandoned/1 no save goes back any more",
    ),
    Mutant(
        name="newest-moves-aside-first",
        file="megatron/core/models/mimo/training/history.py",
        old=("        for step in steps:\n            os.rename(self.path(step), shelf"),
        new=("        for step in reversed(steps):\n            os.rename(self.path(step), shelf"),
        tests=("tests/unit_tests/mimo/test_history.py::test_a_kill_at_any_change_loses_nothing",),
        why="a kill between two moves makes an older checkpoint the newest",
    ),
    Mutant(
        name="resets-draw-in-the-weights-dtype",
        file="megatron/core/models/mimo/training/initial_weights.py",
        old="Parameter(torch.empty_like(p, dtype=torch.float32))",
        new="Parameter(torch.empty_like(p))",
        tests=("tests/unit_tests/mimo/test_initial_weights.py::test_draws_of_any_size_are_fp32",),
        why="a bf16 encoder of another package gets other weights than an fp32 one",
    ),
    Mutant(
        name="weights-are-drawn-in-the-weights-dtype",
        file="megatron/core/models/mimo/training/initial_weights.py",
        old="torch.empty(shape, dtype=torch.float32, device=parameter.device)",
        new="torch.empty(shape, dtype=parameter.dtype, device=parameter.device)",
        tests=("tests/unit_tests/mimo/test_initial_weights.py::test_draws_of_any_size_are_fp32",),
        why="a bf16 model gets other weights than an fp32 one",
    ),
    Mutant(
        name="layer-10000-is-in-range",
        file="megatron/core/models/mimo/training/initial_weights.py",
        old="value >= limit)",
        new="value > limit)",
        tests=(
            "tests/unit_tests/mimo/test_initial_weights.py::test_per_shard_seed_refuses_places_whose_seeds_collide",
        ),
        why="two weights get one seed",
    ),
    Mutant(
        name="a-trailing-dot-stays",
        file="megatron/core/models/mimo/training/initial_weights.py",
        old='prefix = name_prefix.removesuffix(".")',
        new="prefix = name_prefix",
        tests=(
            "tests/unit_tests/mimo/test_initial_weights.py::test_wrappers_and_parts_make_no_difference",
        ),
        why="a part initialised with a trailing dot gets other weights",
    ),
    Mutant(
        name="expert-norms-over-ep",
        file="megatron/core/models/mimo/training/inner_optimizers.py",
        old="inner.tp_group = collection.expt_tp",
        new="inner.tp_group = collection.ep",
        tests=(
            "tests/unit_tests/mimo/test_experts_8rank.py::test_loss_gradients_and_norm_equal_the_unsharded_model",
        ),
        why="whole parameters of experts are left out of the norm on all EP ranks but one",
        ranks=8,
    ),
    Mutant(
        name="empty-files-are-no-work",
        file="megatron/core/models/mimo/training/integrity.py",
        old="loads[least] += max(sizes[name], 1)",
        new="loads[least] += sizes[name]",
        tests=(
            "tests/unit_tests/mimo/test_checkpoint_integrity.py::test_empty_files_are_shared_out_too",
        ),
        why="all empty files fall to one rank",
    ),
    Mutant(
        name="files-may-grow",
        file="megatron/core/models/mimo/training/integrity.py",
        old='        if size != saved["bytes"]:\n',
        new='        if size < saved["bytes"]:\n',
        tests=(
            "tests/unit_tests/mimo/test_checkpoint_integrity.py::test_what_is_changed_is_named",
        ),
        why="without digests a file that grew is not noticed",
    ),
    Mutant(
        name="the-manifests-digest-covers-names",
        file="megatron/core/models/mimo/training/manifest.py",
        old="json.dumps(entries, sort_keys=True)",
        new="json.dumps(sorted(entries))",
        tests=(
            "tests/unit_tests/mimo/test_checkpoint_integrity.py::test_a_changed_manifest_is_refused",
        ),
        why="a changed entry is not noticed",
    ),
    Mutant(
        name="narrowing-changes-the-batch",
        file="megatron/core/models/mimo/training/microbatches.py",
        old="narrowed = dict(batch)",
        new="narrowed = batch",
        tests=(
            "tests/unit_tests/mimo/test_microbatches.py::test_fan_out_gives_every_language_replica_its_samples_of_everything",
        ),
        why="the second replica's part is cut out of the first's",
    ),
    Mutant(
        name="the-first-parameters-are-named",
        file="megatron/core/models/mimo/training/nonfinite.py",
        old="tuple(reversed(found[-_NAMED:]))",
        new="tuple(reversed(found[:_NAMED]))",
        tests=(
            "tests/unit_tests/mimo/test_nonfinite_8rank.py::test_parameters_are_named_from_the_last_one_on",
        ),
        why="not the parameters nearest to the fault are named",
        ranks=8,
    ),
    Mutant(
        name="encode-ahead-0-is-all",
        file="megatron/core/models/mimo/training/pipeline_checks.py",
        old="if encode_ahead is not None and encode_ahead < 1:",
        new="if encode_ahead is not None and encode_ahead < 0:",
        tests=(
            "tests/unit_tests/mimo/test_pipeline_step_8rank.py::test_what_does_not_fit_in_windows_is_an_error_on_all_ranks",
        ),
        why="0 is accepted and taken for None",
        ranks=8,
    ),
    Mutant(
        name="every-window-has-a-shape-of-its-own",
        file="megatron/core/models/mimo/training/pipeline_step.py",
        old="self.shape = self.shape or shapes[0]",
        new="self.shape = shapes[0]",
        tests=(
            "tests/unit_tests/mimo/test_pipeline_step_8rank.py::test_what_does_not_fit_in_windows_is_an_error_on_all_ranks",
        ),
        why="microbatches of different shapes in different windows are not refused",
        ranks=8,
    ),
    Mutant(
        name="no-grad-is-overridden",
        file="megatron/core/models/mimo/training/pipeline_step.py",
        old="backward = not forward_only and torch.is_grad_enabled()",
        new="backward = not forward_only",
        tests=(
            "tests/unit_tests/mimo/test_pipeline_step_8rank.py::test_evaluation_has_no_gradients",
        ),
        why="a step under no_grad trains",
        ranks=8,
    ),
    Mutant(
        name="whole-weights-are-not-compared-over-tp",
        file="megatron/core/models/mimo/training/pretrained.py",
        old="yield (name, pp, tp if cut else -1),",
        new="yield (name, pp, tp),",
        tests=(
            "tests/unit_tests/mimo/test_pretrained.py::test_another_file_on_one_rank_is_one_error_on_all",
        ),
        why="TP ranks with different pretrained norms train on",
    ),
    Mutant(
        name="pretrained-experts-are-compared-as-copies",
        file="megatron/core/models/mimo/training/pretrained.py",
        old='if id(parameter) in kept and getattr(parameter, "allreduce", True):',
        new="if id(parameter) in kept:",
        tests=(
            "tests/unit_tests/mimo/test_pretrained.py::test_experts_of_different_ranks_are_no_copies",
        ),
        why="pretrained experts at EP 2 are refused",
    ),
    Mutant(
        name="a-new-randomness-moves-the-processs",
        file="megatron/core/models/mimo/training/randomness.py",
        old=("    restore_states(outside)\n    return"),
        new="    return",
        tests=("tests/unit_tests/mimo/test_randomness.py::test_the_process_is_left_as_it_was",),
        why="building ModuleRandomness changes the random numbers of everything else",
    ),
    Mutant(
        name="an-exception-leaves-the-modules-states-in",
        file="megatron/core/models/mimo/training/randomness.py",
        old="self._leaving(name), always_call=True)",
        new="self._leaving(name))",
        tests=(
            "tests/unit_tests/mimo/test_randomness.py::test_an_exception_in_forward_restores_the_process",
        ),
        why="after a caught error the process goes on with a module's states",
    ),
    Mutant(
        name="stages-draw-alike",
        file="megatron/core/models/mimo/training/randomness.py",
        old='stage = ("pp", pp) if pp else ()',
        new="stage = ()",
        tests=(
            "tests/unit_tests/mimo/test_randomness.py::test_ranks_agree_exactly_where_the_table_says",
        ),
        why="all pipeline stages drop the same elements",
    ),
    Mutant(
        name="the-embedding-enters-twice",
        file="megatron/core/models/mimo/training/randomness.py",
        old="            if self._outside[name]:  # within",
        new="            if len(self._outside[name]) > 1:  # within",
        tests=(
            "tests/unit_tests/mimo/test_randomness.py::test_an_embedding_that_is_called_by_itself_draws_the_modules_numbers",
        ),
        why="an embedding inside its model's forward draws from the state before it",
    ),
    Mutant(
        name="parts-that-train-are-no-training",
        file="megatron/core/models/mimo/training/recompute.py",
        old="trains = any(parameter.requires_grad for parameter in module.parameters())",
        new="trains = all(parameter.requires_grad for parameter in module.parameters())",
        tests=(
            "tests/unit_tests/mimo/test_recompute.py::test_what_trains_in_part_is_given_an_input_with_a_gradient",
        ),
        why="partly frozen, fully recomputed layers get no gradient",
    ),
    Mutant(
        name="lengths-may-be-negative",
        file="megatron/core/models/mimo/training/safe_pickles.py",
        old="min(offset, length) < 0",
        new="offset < 0",
        tests=(
            "tests/unit_tests/mimo/test_safe_pickles.py::test_places_outside_the_files_are_refused",
        ),
        why="metadata may make the check read other bytes than the loader",
    ),
    Mutant(
        name="the-first-object-is-not-checked",
        file="megatron/core/models/mimo/training/safe_pickles.py",
        old="[rank::world_size]",
        new="[rank + 1 :: world_size]",
        tests=(
            "tests/unit_tests/mimo/test_safe_pickles.py::test_all_ranks_together_check_every_object",
        ),
        why="a pickle that executes code passes",
    ),
    Mutant(
        name="an-empty-folder-is-the-same-folder",
        file="megatron/core/models/mimo/training/shared_folder.py",
        old="return bool(own & steps) or not own | steps",
        new="return bool(own & steps) or not own",
        tests=(
            "tests/unit_tests/mimo/test_shared_folder.py::test_folders_to_read_from_must_hold_the_same",
        ),
        why="a rank that sees none of rank 0's checkpoints agrees",
    ),
    Mutant(
        name="folders-are-removed-from-above",
        file="megatron/core/models/mimo/training/shared_folder.py",
        old="        for path in self._made:\n",
        new="        for path in reversed(self._made):\n",
        tests=(
            "tests/unit_tests/mimo/test_shared_folder.py::test_one_folder_passes_and_nothing_is_left",
        ),
        why="the probe leaves empty folders behind",
    ),
    Mutant(
        name="expert-gathers-are-not-forgotten",
        file="megatron/core/models/mimo/optimizer.py",
        old=(
            "for group in module.bucket_groups + module.expert_parallel_bucket_groups:\n"
            "                    finish_param_gather(group)"
        ),
        new=(
            "for group in module.bucket_groups:\n"
            "                    finish_param_gather(group)"
        ),
        tests=(
            "tests/unit_tests/mimo/test_optimizer_state.py::test_weights_of_either_kind_are_gathered_again_after_a_step",
        ),
        why="experts are stale after a step under overlap_param_gather",
    ),
    Mutant(
        name="set-to-none-is-dropped",
        file="megatron/core/models/mimo/optimizer.py",
        old="            opt.zero_grad(set_to_none)\n",
        new="            opt.zero_grad()\n",
        tests=(
            "tests/unit_tests/mimo/test_optimizer_state.py::test_arguments_reach_every_modules_optimizer",
        ),
        why="an argument is ignored",
    ),
    Mutant(
        name="reload-model-params-drops-its-state",
        file="megatron/core/models/mimo/optimizer.py",
        old="                opt.reload_model_params(state_dict)\n",
        new="                opt.reload_model_params()\n",
        tests=(
            "tests/unit_tests/mimo/test_optimizer_state.py::test_arguments_reach_every_modules_optimizer",
        ),
        why="an argument is ignored",
    ),
    Mutant(
        name="copies-tied-over-stages-are-not-looked-at",
        file="megatron/core/models/mimo/optimizer.py",
        old='if copied or getattr(param, "shared", False):',
        new="if copied:",
        tests=(
            "tests/unit_tests/mimo/test_optimizer_state.py::test_gradients_of_copies_that_are_tied_over_stages_are_looked_at",
        ),
        why="a tied copy that is not finite is stepped",
    ),
)
