# SPDX-License-Identifier: Apache-2.0
"""Written from the code, without the tests: mistakes in the optimizer and its state."""

from tests.mutants.mutant import Mutant

WITHOUT_B_OPTIMIZER = (
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
        name="main-copies-of-half-precision-weights-are-zeros",
        file="megatron/core/models/mimo/checkpoint/frozen_state.py",
        old='_MAIN_COPIES = ("param", "fp32_param")',
        new='_MAIN_COPIES = ("param",)',
        tests=(
            "tests/unit_tests/mimo/test_optimizer_table.py::test_what_joins_later_starts_from_its_weights",
        ),
        why="what joins training in bf16 with the plain optimizer starts from zeros",
    ),
    Mutant(
        name="main-copies-of-frozen-layers-keep-the-weights-dtype",
        file="megatron/core/models/mimo/checkpoint/frozen_state.py",
        old="data = weight.to(dtype) if is_weight",
        new="data = weight if is_weight",
        tests=(
            "tests/unit_tests/mimo/test_frozen_state.py::test_the_part_of_a_frozen_layer_has_the_dtype_of_the_others",
        ),
        why="the part of a stack that is frozen is saved in bf16 beside fp32",
    ),
    Mutant(
        name="one-frozen-weight-makes-the-module-fresh",
        file="megatron/core/models/mimo/checkpoint/frozen_state.py",
        old="if keys and keys <= names:",
        new="if keys and keys & names:",
        tests=(
            "tests/unit_tests/mimo/test_optimizer_table.py::test_what_joins_later_starts_from_its_weights",
        ),
        why="moments of the weights that did train are thrown away on loading",
    ),
    Mutant(
        name="partly-frozen-is-frozen",
        file="megatron/core/models/mimo/checkpoint/frozen_state.py",
        old="return cls(frozenset(frozen - trained), partly)",
        new="return cls(frozenset(frozen), partly)",
        tests=(
            "tests/unit_tests/mimo/test_unfreezing_8rank.py::test_what_was_trained_goes_on_and_the_rest_starts_fresh",
        ),
        why="moments of the layers of a stack that trained are thrown away on loading",
        ranks=8,
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
        name="the-first-parameters-are-named",
        file="megatron/core/models/mimo/gradients/nonfinite.py",
        old="tuple(reversed(found[-_NAMED:]))",
        new="tuple(reversed(found[:_NAMED]))",
        tests=(
            "tests/unit_tests/mimo/test_nonfinite_8rank.py::test_parameters_are_named_from_the_last_one_on",
        ),
        why="not the parameters nearest to the fault are named",
        ranks=8,
    ),
    Mutant(
        name="frozen-weights-dtypes-count",
        file="megatron/core/models/mimo/training/optimizer_checks.py",
        old="if not (parameter.requires_grad and field):",
        new="if not field:",
        tests=(
            "tests/unit_tests/mimo/test_optimizer_table.py::test_what_does_not_train_may_be_of_another_dtype",
        ),
        why="a frozen bf16 encoder beside an fp32 model is refused",
    ),
    Mutant(
        name="groups-that-join-have-no-step",
        file="megatron/core/models/mimo/training/optimizer_settings.py",
        old="found.append({**own, **steps})",
        new="found.append(own)",
        tests=(
            "tests/unit_tests/mimo/test_optimizer_state.py::test_a_group_that_was_not_saved_counts_on_from_the_steps_of_the_others",
        ),
        why="a parameter group that the checkpoint lacks counts steps from another number",
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
            "tests/unit_tests/mimo/test_optimizer_state.py::test_groups_that_nothing_else_tells_apart_go_by_their_order",
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
        name="buckets-are-read-where-they-are-padded",
        file="megatron/core/models/mimo/training/optimizer_savers.py",
        old="= gathered[start : start + size]",
        new="= gathered[bucket.offset : bucket.offset + size]",
        tests=(
            "tests/unit_tests/mimo/test_overlap_8rank.py::test_a_checkpoint_has_the_weights_of_the_last_step",
        ),
        why="moments of the second bucket are saved shifted",
        ranks=8,
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
)
