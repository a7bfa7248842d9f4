# SPDX-License-Identifier: Apache-2.0
"""A fifth round from the code without the tests: the second half of the functions."""

from tests.mutants.catalogue.places import EXAMPLE, FUNCTIONAL, MIMO, UNIT
from tests.mutants.mutant import Mutant

WITHOUT_F_MORE = (
    Mutant(
        name="packed-bypasses-replaced-step",
        file=MIMO + "model/language_runner.py",
        old="packed=self._steps.pack(batch.packing_kwargs)",
        new="packed=self.pack(batch.packing_kwargs)",
        tests=(
            UNIT + "test_model.py::test_every_step_that_a_user_replaces_is_taken_from_the_model",
        ),
        why="a replaced method that makes packed-sequence parameters is ignored in every forward",
    ),
    Mutant(
        name="digits-per-pass-floor",
        file=EXAMPLE + "data.py",
        old="return -(-len(self.images) // (self.global_batch_size * DIGITS_PER_SAMPLE))",
        new="return len(self.images) // (self.global_batch_size * DIGITS_PER_SAMPLE)",
        tests=(FUNCTIONAL + "test_digits_data.py::test_held_out_images_are_each_counted_once",),
        why="the last, partly filled batch is dropped: not every image is shown or scored",
    ),
    Mutant(
        name="positions-packed-start-not-added",
        file=MIMO + "huggingface/positions.py",
        old="counted = real[sample, start:stop].nonzero().flatten() + start",
        new="counted = real[sample, start:stop].nonzero().flatten()",
        tests=(UNIT + "huggingface/test_qwen_vl.py::test_positions_are_those_of_transformers",),
        why="packed sequences after the first write their positions over the first one's",
    ),
    Mutant(
        name="phase-clock-starts-in-data",
        file="mimo_colocated/train/clock.py",
        old="self._marks = [(phases.here().phase, self._now())]",
        new="self._marks = [(phases.DATA, self._now())]",
        tests=(UNIT + "train/test_clock.py::test_the_parts_of_a_step",),
        why="time before the first mark counts as loading data",
    ),
    Mutant(
        name="lossy-rules-by-kind",
        file=MIMO + "lossy/install.py",
        old="found = {where: spec.rule(self.name, *where) for where in self.where}",
        new="found = {where: spec.rule(self.kind, *where) for where in self.where}",
        tests=(UNIT + "test_lossy_in_use.py::test_links_are_installed_once",),
        why="rules that name layers install no lossy links",
    ),
    Mutant(
        name="stack-all-expert-layers-refused",
        file=MIMO + "plan/shapes.py",
        old="if not 0 <= self.expert_layers <= self.layers:",
        new="if not 0 <= self.expert_layers < self.layers:",
        tests=(UNIT + "plan/test_plan_shapes.py::test_weights_are_those_of_transformers",),
        why="a model whose layers all have experts cannot be planned",
    ),
    Mutant(
        name="item-flops-adapters-forgotten",
        file=MIMO + "plan/step_flops.py",
        old="    through = encoder or adapted\n",
        new="    through = encoder\n",
        tests=(
            UNIT + "train/test_numbers.py::test_adapters_want_gradients_through_frozen_weights",
        ),
        why="a frozen encoder with adapters counts too few FLOPs",
    ),
    Mutant(
        name="forward-all-problem-dropped",
        file=MIMO + "model/base.py",
        old=(
            "        batch = LanguageBatch(\n"
            "            input_ids, position_ids, attention_mask, loss_mask, labels, "
            "packing_kwargs, problem\n"
            "        )\n"
            "        path = self._row_path\n"
            "        with settled(path):"
        ),
        new=(
            "        batch = LanguageBatch(\n"
            "            input_ids, position_ids, attention_mask, loss_mask, labels, "
            "packing_kwargs\n"
            "        )\n"
            "        path = self._row_path\n"
            "        with settled(path):"
        ),
        tests=(UNIT + "test_model.py::TestMismatch::test_padding_that_experts_would_count",),
        why="a batch that was found to be wrong is run all the same",
    ),
    Mutant(
        name="sound-mono-not-2d",
        file=MIMO + "data/sounds.py",
        old='dtype="float32", always_2d=True)',
        new='dtype="float32")',
        tests=(UNIT + "data/test_sounds.py::test_other_kinds_are_read_by_soundfile",),
        why="sounds of one channel cannot be read where soundfile is installed",
    ),
    Mutant(
        name="norm-only-weight-marked",
        file=MIMO + "transformer/norms.py",
        old="        for parameter in norm.parameters():\n",
        new="        for parameter in [norm.weight]:\n",
        tests=(UNIT + "test_norms.py::test_parameters_say_whether_their_gradients_are_partial",),
        why="a LayerNorm's bias drifts apart over TP with sequence parallelism",
    ),
    Mutant(
        name="routed-rows-only-total-compared",
        file=MIMO + "comm/routed_bridge.py",
        old="        if agreed.rows != wanted:\n",
        new="        if sum(agreed.rows) != sum(wanted):\n",
        tests=(UNIT + "test_encoder_cp.py::test_the_bridge_plans_from_whole_items",),
        why="replicas that bring other rows than assigned are taken if the totals agree",
    ),
    Mutant(
        name="bridges-any-to-all",
        file=MIMO + "model/construction.py",
        old='if any(not {"tp", "dp"} <= set(grid.dim_names) for grid in grid_map.values()):',
        new='if all(not {"tp", "dp"} <= set(grid.dim_names) for grid in grid_map.values()):',
        tests=(UNIT + "test_model.py::TestColocated::test_grids_without_tp_or_dp_need_no_bridge",),
        why="one grid without tp or dp beside one that has both: the model cannot be built",
    ),
    Mutant(
        name="route-layout-dest-tp-cp-swapped",
        file=MIMO + "comm/plan/routed_layout.py",
        old='dest_dp, dest_tp, dest_cp = (_coordinates(dest_grid, d) for d in ("dp", "tp", "cp"))',
        new='dest_dp, dest_tp, dest_cp = (_coordinates(dest_grid, d) for d in ("dp", "cp", "tp"))',
        tests=(UNIT + "test_routes.py::test_docstring_examples",),
        why="rows go to ranks that own other positions",
    ),
    Mutant(
        name="recipe-gradients-data-set-late",
        file="mimo_colocated/train/trainer.py",
        old=(
            "        self._data = data\n"
            "        return super().gradients(data, step)\n"
        ),
        new=(
            "        found = super().gradients(data, step)\n"
            "        self._data = data\n"
            "        return found\n"
        ),
        tests=(
            FUNCTIONAL + "test_recipes.py::test_a_language_model_with_experts_learns_token_files",
        ),
        why="the first step of every recipe fails",
    ),
    Mutant(
        name="heaviest-first-ties-reversed",
        file=MIMO + "comm/plan/balance.py",
        old='np.argsort(-costs, kind="stable").tolist()',
        new='np.argsort(costs, kind="stable")[::-1].tolist()',
        tests=(UNIT + "test_balance.py::test_assignment_is_greedy_and_near_the_best",),
        why="items of equal cost are assigned in another order than is documented",
    ),
    Mutant(
        name="check-bound-fixed-default",
        file="mimo_colocated/cli/options.py",
        old=(
            '        "--bound",\n'
            "        type=_ABOVE_ZERO,\n"
            "        default=None,\n"
        ),
        new=(
            '        "--bound",\n'
            "        type=_ABOVE_ZERO,\n"
            "        default=1e-5,\n"
        ),
        tests=(FUNCTIONAL + "test_mimo_command.py::test_without_a_bound_it_is_that_of_the_dtype",),
        why="mimo check holds half-precision models to the bound of float32",
    ),
    Mutant(
        name="routed-coordinates-no-offset",
        file=MIMO + "model/routed_path.py",
        old="rank = next(iter(self._bridges.values())).current_rank - layout.rank_offset",
        new="rank = next(iter(self._bridges.values())).current_rank",
        tests=(UNIT + "test_routed_model.py::test_grids_need_not_begin_at_rank_0",),
        why="on grids that begin elsewhere a rank takes another one's positions, or fails",
    ),
    Mutant(
        name="joined-lists-left",
        file=MIMO + "torch_native/styles.py",
        old="    if isinstance(output, (tuple, list)):\n        made",
        new="    if isinstance(output, tuple):\n        made",
        tests=(
            UNIT + "torch_native/test_parts_of_a_module.py"
            "::test_outputs_of_any_form_become_whole_and_plain",
        ),
        why="DTensors in a list that a model returns stay split",
    ),
    Mutant(
        name="gathered-own-size-for-all",
        file=MIMO + "torch_native/gathered.py",
        old="pieces = [part[: int(size)] for part, size in zip(parts, sizes, strict=True)]",
        new="pieces = [part[: len(moved)] for part in parts]",
        tests=(
            UNIT + "torch_native/test_parallelize_8rank.py"
            "::test_loss_and_every_gradient_are_those_of_the_unsharded_model",
        ),
        why="whole tensors of uneven shards lose rows or have padding inside",
        ranks=8,
    ),
    Mutant(
        name="set-number-off-by-one",
        file="mimo_colocated/train/reading.py",
        old="if not name.isdecimal() or int(name) >= len(values):",
        new="if not name.isdecimal() or int(name) > len(values):",
        tests=(UNIT + "train/test_recipe.py::test_what_is_wrong_is_refused_in_one_sentence",),
        why="--set just past a list's end is a traceback",
    ),
    Mutant(
        name="batch-misfit-whole-batch",
        file="mimo_colocated/launch/layouts.py",
        old="if batch % micro == 0 and (batch // micro) % layout.dp:",
        new="if batch % micro == 0 and batch % layout.dp:",
        tests=(FUNCTIONAL + "test_digits_options.py::test_layouts_that_do_not_fit",),
        why="a layout whose microbatches do not divide over dp is taken",
    ),
    Mutant(
        name="ddp-expert-check-last-module-only",
        file=MIMO + "gradients/finalize.py",
        old=(
            "        check_expert_sizes(name, configs[name], collections[name])\n"
            "    stages = []\n"
        ),
        new=(
            "    check_expert_sizes(name, configs[name], collections[name])\n"
            "    stages = []\n"
        ),
        tests=(UNIT + "test_experts_8rank.py::test_a_routers_bias_follows_the_loads_of_all_ranks",),
        why="a language model whose experts do not fit its groups is wrapped without a word",
        ranks=8,
    ),
    Mutant(
        name="encoders-one-stage-shapes",
        file=MIMO + "pipeline/step.py",
        old="self._variable = bool(model.config.variable_seq_lengths) or windows.stages == 1",
        new="self._variable = bool(model.config.variable_seq_lengths)",
        tests=(UNIT + "test_encode_ahead.py::test_microbatches_of_other_lengths_need_no_option",),
        why="one stage refuses microbatches of different lengths",
    ),
    Mutant(
        name="sequences-always-one-more-multiple",
        file="mimo_colocated/train/checks.py",
        old="needed = -(-longest // SEQUENCE_MULTIPLE) * SEQUENCE_MULTIPLE",
        new="needed = (longest // SEQUENCE_MULTIPLE + 1) * SEQUENCE_MULTIPLE",
        tests=(UNIT + "train/test_recipe.py::test_what_is_wrong_is_refused_in_one_sentence",),
        why="a capacity that holds the longest sample exactly is refused",
    ),
    Mutant(
        name="missing-gradient-rank-0",
        file=MIMO + "gradients/finalize.py",
        old="    missing = missing if together else [dist.get_rank()]\n",
        new="",
        tests=(
            UNIT + "test_frozen_8rank.py"
            "::test_a_parameter_without_a_gradient_is_named_on_all_ranks",
        ),
        why="a rank that looks for itself blames rank 0",
        ranks=8,
    ),
    Mutant(
        name="input-balance-spread-stale",
        file=MIMO + "comm/input_balance.py",
        old=(
            "        self.spread = plan.before, plan.after\n"
            "        if not plan.moves:\n"
            "            return inputs, plan\n"
        ),
        new=(
            "        if not plan.moves:\n"
            "            return inputs, plan\n"
            "        self.spread = plan.before, plan.after\n"
        ),
        tests=(
            UNIT + "test_balance.py"
            "::test_the_spread_is_of_the_last_batch_whether_items_move_or_not",
        ),
        why="after a batch in which nothing moves the spread is an earlier batch's, or none",
    ),
    Mutant(
        name="export-check-source-not-told",
        file="mimo_colocated/cli/exporting.py",
        old=(
            'target = Target(options.target, overwrite=options.more["overwrite"], source=opened)\n'
            "            try:\n"
            "                target.check()"
        ),
        new=(
            'target = Target(options.target, overwrite=options.more["overwrite"])\n'
            "            try:\n"
            "                target.check()"
        ),
        tests=(
            FUNCTIONAL + "test_mimo_command.py::test_an_export_is_refused_before_a_rank_starts",
        ),
        why="an export into its source's folder is refused late, or for another reason",
    ),
    Mutant(
        name="easy-vqa-draws-not-in-fingerprint",
        file=MIMO + "data/easy_vqa.py",
        old='self._said |= {"turns": turns, "draws": draws}',
        new='self._said |= {"turns": turns}',
        tests=(
            UNIT + "data/test_sources.py::test_every_setting_of_a_source_is_in_its_fingerprint",
        ),
        why="a run goes on with data of another number of draws",
    ),
    Mutant(
        name="qwen-whole-number-takes-pairs",
        file=MIMO + "huggingface/families/qwen_vl.py",
        old="isinstance(getattr(config, field), int) else",
        new="isinstance(getattr(config, field), (int, list)) else",
        tests=(
            UNIT + "huggingface/test_qwen_vl.py"
            "::test_settings_that_would_be_another_model_are_refused",
        ),
        why="pairs of patch sizes are not refused in plain words",
    ),
    Mutant(
        name="read-manifest-own-problem-only",
        file=MIMO + "checkpoint/load_checks.py",
        old="    for rank, (problem, digest) in enumerate(said):\n",
        new="    for rank, (_, digest) in enumerate(said):\n",
        tests=(
            UNIT + "test_load_checks.py"
            "::test_a_manifest_that_some_ranks_cannot_read_is_an_error_on_all",
        ),
        why="ranks that can read the manifest say that the checkpoint is another one",
    ),
    Mutant(
        name="tensorboard-purges-last-step",
        file="mimo_colocated/train/boards.py",
        old='TensorBoard(out / "tensorboard", done + 1)',
        new='TensorBoard(out / "tensorboard", done)',
        tests=(
            UNIT + "train/test_boards.py::test_steps_that_are_made_again_are_in_tensorboard_once",
        ),
        why="going on removes the last step that was done from its curves",
    ),
    Mutant(
        name="join-image-token-unknown",
        file="mimo_colocated/train/joining.py",
        old="number = tokenizer.get_vocab().get(token)",
        new="number = tokenizer.convert_tokens_to_ids(token)",
        tests=(FUNCTIONAL + "test_recipes.py::test_folders_that_cannot_be_joined_are_refused",),
        why="a misspelt image token is the tokenizer's unknown one",
    ),
    Mutant(
        name="parameter-groups-first-wins",
        file=MIMO + "training/parameter_groups.py",
        old="            chosen |= dict.fromkeys(own, number)\n",
        new="            chosen = dict.fromkeys(own, number) | chosen\n",
        tests=(
            UNIT + "huggingface/test_parameter_groups.py"
            "::test_every_group_has_its_rate_and_its_decay",
        ),
        why="a more special group that is given later has no effect",
    ),
    Mutant(
        name="explain-own-by-rank",
        file="mimo_colocated/launch/failures.py",
        old=(
            'own = sorted((r for r in reports.values() if r.kind in ("job", '
            '"error")), key=lambda r: r.at)'
        ),
        new=(
            'own = sorted((r for r in reports.values() if r.kind in ("job", '
            '"error")), key=lambda r: r.rank)'
        ),
        tests=(FUNCTIONAL + "test_digits_launch.py::test_the_first_failure_is_named",),
        why="the failure of the lowest rank hides the first one",
    ),
    Mutant(
        name="optimizer-state-absent-modules-left-out",
        file=MIMO + "optimizer.py",
        old=(
            "            state[name] = {}\n"
            "            if not (info.is_active and info.optimizer):\n"
            "                continue\n"
            "            state[name] = sharded_inner_state("
        ),
        new=(
            "            if not (info.is_active and info.optimizer):\n"
            "                continue\n"
            "            state[name] = sharded_inner_state("
        ),
        tests=(UNIT + "test_optimizer_state.py::test_every_module_is_in_the_state_on_every_rank",),
        why="callers that look up a module of other ranks get a KeyError",
    ),
    Mutant(
        name="plan-under-outer-always",
        file=MIMO + "torch_native/plans/plan.py",
        old="return {**inner, **(self.outer if prefix else {})}",
        new="return {**inner, **self.outer}",
        tests=(UNIT + "torch_native/test_plans.py::test_a_family_fits_its_plan",),
        why="a bare base model is refused for want of lm_head",
    ),
    Mutant(
        name="empty-rows-needs-both",
        file=MIMO + "model/encoder_runner.py",
        old="return text_is_frozen or waits_for_gradients(submodule)",
        new="return text_is_frozen and waits_for_gradients(submodule)",
        tests=(
            UNIT + "test_model.py"
            "::TestDataParallelCalls"
            "::test_a_text_only_batch_readies_every_parameter_of_an_overlapping_encoder",
        ),
        why="DDP waits for gradients of encoders in batches without their modality",
    ),
)
