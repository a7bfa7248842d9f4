# SPDX-License-Identifier: Apache-2.0
"""Written from the code, without the tests: mistakes in weights, gradients and steps."""

from tests.mutants.mutant import Mutant

WITHOUT_B_TRAINING = (
    Mutant(
        name="a-step-given-up-leaves-its-turn",
        file="megatron/core/models/mimo/gradients/bucket_order.py",
        old=("        self._next = 0\n        type(group).reset(group)"),
        new="        type(group).reset(group)",
        tests=(
            "tests/unit_tests/mimo/test_bucket_order.py::test_buckets_of_either_kind_wait_for_those_before_them",
        ),
        why="after a step that was interrupted the buckets before its turn are never reduced",
    ),
    Mutant(
        name="expert-buckets-in-any-order",
        file="megatron/core/models/mimo/gradients/bucket_order.py",
        old="for groups in (wrapped.bucket_groups, wrapped.expert_parallel_bucket_groups):",
        new="for groups in (wrapped.bucket_groups,):",
        tests=(
            "tests/unit_tests/mimo/test_bucket_order.py::test_buckets_of_either_kind_wait_for_those_before_them",
        ),
        why="expert buckets start in the order in which backward fills them",
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
        name="force-all-reduce-is-dropped-by-the-finalizer",
        file="megatron/core/models/mimo/gradients/finalize.py",
        old="parts, None, self.collections[name], force_all_reduce=force_all_reduce",
        new="parts, None, self.collections[name]",
        tests=(
            "tests/unit_tests/mimo/test_grad_finalize_8rank.py::test_force_all_reduce_reaches_every_module",
        ),
        why="an argument of the finalizer is ignored",
        ranks=8,
    ),
    Mutant(
        name="grids-of-one-size-are-one-place",
        file="megatron/core/models/mimo/gradients/finalize.py",
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
        file="megatron/core/models/mimo/gradients/finalize.py",
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
        file="megatron/core/models/mimo/gradients/finalize.py",
        old="DistributedDataParallel(config, copy(ddp_config), module, pg_collection=groups)",
        new="DistributedDataParallel(config, ddp_config, module, pg_collection=groups)",
        tests=(
            "tests/unit_tests/mimo/test_grad_finalize_8rank.py::test_every_module_gets_a_ddp_config_of_its_own",
        ),
        why="DDP writes into the caller's config and into that of the other modules",
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
        name="the-experts-group-lacks-expert-tp",
        file="mimo_colocated/communicators.py",
        old='"tp_ep": ("expt_tp", "ep"),',
        new='"tp_ep": ("ep",),',
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
        file="mimo_colocated/communicators.py",
        old='"intra_dist_opt": ("tp", "cp", "dp", "pp"),',
        new='"intra_dist_opt": ("tp", "cp", "dp"),',
        tests=(
            "tests/unit_tests/mimo/test_groups_8rank.py::test_members_are_those_of_the_coordinates",
        ),
        why="with the distributed optimizer each stage has a gradient norm of its own",
        ranks=8,
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
        name="narrowing-changes-the-batch",
        file="megatron/core/models/mimo/pipeline/microbatches.py",
        old="narrowed = dict(batch)",
        new="narrowed = batch",
        tests=(
            "tests/unit_tests/mimo/test_microbatches.py::test_fan_out_gives_every_language_replica_its_samples_of_everything",
        ),
        why="the second replica's part is cut out of the first's",
    ),
    Mutant(
        name="encode-ahead-0-is-all",
        file="megatron/core/models/mimo/pipeline/checks.py",
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
        file="megatron/core/models/mimo/pipeline/step.py",
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
        file="megatron/core/models/mimo/pipeline/step.py",
        old="backward = not forward_only and torch.is_grad_enabled()",
        new="backward = not forward_only",
        tests=(
            "tests/unit_tests/mimo/test_pipeline_step_8rank.py::test_evaluation_has_no_gradients",
        ),
        why="a step under no_grad trains",
        ranks=8,
    ),
    Mutant(
        name="windows-go-back-too-early",
        file="megatron/core/models/mimo/pipeline/windows.py",
        old="return cls(count, size, 0, -(-(stages - 1) // size), stages)",
        new="return cls(count, size, 0, (stages - 1) // size, stages)",
        tests=("tests/unit_tests/mimo/test_pipeline_step_8rank.py::test_windows_of_microbatches",),
        why="a window goes back before the first stage has its gradients",
        ranks=8,
    ),
    Mutant(
        name="the-last-window-is-never-the-last",
        file="megatron/core/models/mimo/pipeline/step.py",
        old="last = (window + 1) * self._window >= self._count",
        new="last = (window + 1) * self._window > self._count",
        tests=(
            "tests/unit_tests/mimo/test_pipeline_windows.py::test_encoders_reduce_beside_the_backward_pass_of_the_last_window",
        ),
        why="with windows that divide the step no encoder gradient is reduced beside backward",
    ),
    Mutant(
        name="collect-non-loss-data-is-dropped",
        file="megatron/core/models/mimo/pipeline/step.py",
        old="            collect_non_loss_data=collect_non_loss_data,\n",
        new="",
        tests=(
            "tests/unit_tests/mimo/test_pipeline_step_8rank.py::test_evaluation_has_no_gradients",
        ),
        why="an argument is ignored",
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
        file="megatron/core/models/mimo/randomness.py",
        old=("    restore_states(outside)\n    return"),
        new="    return",
        tests=("tests/unit_tests/mimo/test_randomness.py::test_the_process_is_left_as_it_was",),
        why="building ModuleRandomness changes the random numbers of everything else",
    ),
    Mutant(
        name="an-exception-leaves-the-modules-states-in",
        file="megatron/core/models/mimo/randomness.py",
        old="self._leaving(name), always_call=True)",
        new="self._leaving(name))",
        tests=(
            "tests/unit_tests/mimo/test_randomness.py::test_an_exception_in_forward_restores_the_process",
        ),
        why="after a caught error the process goes on with a module's states",
    ),
    Mutant(
        name="stages-draw-alike",
        file="megatron/core/models/mimo/randomness.py",
        old='stage = ("pp", pp) if pp else ()',
        new="stage = ()",
        tests=(
            "tests/unit_tests/mimo/test_randomness.py::test_ranks_agree_exactly_where_the_table_says",
        ),
        why="all pipeline stages drop the same elements",
    ),
    Mutant(
        name="the-embedding-enters-twice",
        file="megatron/core/models/mimo/randomness.py",
        old="            if self._outside[name]:  # within",
        new="            if len(self._outside[name]) > 1:  # within",
        tests=(
            "tests/unit_tests/mimo/test_randomness.py::test_an_embedding_that_is_called_by_itself_draws_the_modules_numbers",
        ),
        why="an embedding inside its model's forward draws from the state before it",
    ),
    Mutant(
        name="numpys-state-is-not-restored",
        file="megatron/core/models/mimo/randomness.py",
        old='    np.random.set_state(state["numpy"])\n',
        new="",
        tests=(
            "tests/unit_tests/mimo/test_checkpoint_8rank.py::test_the_same_layout_continues_bit_for_bit",
        ),
        why="data augmentation by NumPy is not bit-exact after a resume",
        ranks=8,
    ),
    Mutant(
        name="parts-that-train-are-no-training",
        file="megatron/core/models/mimo/memory/layer_recompute.py",
        old="trains = any(parameter.requires_grad for parameter in module.parameters())",
        new="trains = all(parameter.requires_grad for parameter in module.parameters())",
        tests=(
            "tests/unit_tests/mimo/test_recompute.py::test_what_trains_in_part_is_given_an_input_with_a_gradient",
        ),
        why="partly frozen, fully recomputed layers get no gradient",
    ),
)
