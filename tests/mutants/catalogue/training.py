# SPDX-License-Identifier: Apache-2.0
"""Mistakes in initial weights, random states, gradient finalisation, the optimizer."""

from tests.mutants.catalogue.places import MIMO, UNIT
from tests.mutants.mutant import Mutant

_WEIGHTS = MIMO + "training/initial_weights.py"
_RANDOM = MIMO + "randomness.py"
_FINALIZE = MIMO + "gradients/finalize.py"
_OPTIMIZER = MIMO + "optimizer.py"
_WEIGHT_TESTS = UNIT + "test_initial_weights.py::"
_FINALIZE_TESTS = UNIT + "test_grad_finalize_8rank.py::"
_OPTIMIZER_TESTS = UNIT + "test_mimo_optimizer_8rank.py::"
_NONFINITE = UNIT + "test_nonfinite_8rank.py::"
_COUNT = _FINALIZE_TESTS + "test_tokens_are_counted_once_over_dp_and_cp"
_EXPERT_TESTS = UNIT + "test_experts_8rank.py::"
_NORM = _OPTIMIZER_TESTS + "test_the_norm_is_that_of_all_modules_on_every_rank"

_NAMES = MIMO + "wrappers.py"
_NAME_TESTS = UNIT + "test_wrapped_names.py::"
_PRETRAINED = MIMO + "training/pretrained.py"
_PRETRAINED_TESTS = UNIT + "test_pretrained.py::"

WEIGHTS = (
    Mutant(
        name="compiled-parts-have-weights-of-their-own",
        file=_NAMES,
        old="_KEYS = (_COMPILED, _CHECKPOINTED)",
        new="_KEYS = (_CHECKPOINTED,)",
        tests=(_NAME_TESTS + "test_initial_weights",),
        why="torch.compile changes the model that a seed gives",
    ),
    Mutant(
        name="wrappers-in-checkpoints",
        file=_NAMES,
        old='entry.key = _HIDDEN.sub("", entry.key)',
        new="pass",
        tests=(_NAME_TESTS + "test_checkpoints_do_not_know_wrappers",),
        why="a checkpoint of a compiled encoder loads into a compiled one only",
    ),
    Mutant(
        name="pretrained-weights-drawn-anew",
        file=_WEIGHTS,
        old="done=set(kept)",
        new="done=set()",
        tests=(_PRETRAINED_TESTS + "test_what_is_marked_stays",),
        why="a pretrained encoder starts from noise",
    ),
    Mutant(
        name="pretrained-parts-of-tp-ranks-compared",
        file=_PRETRAINED,
        old="yield (name, pp, tp if cut else -1)",
        new="yield (name, pp, -1 - cut)",
        tests=(_PRETRAINED_TESTS + "test_parts_of_tensor_parallel_ranks_differ",),
        why="every pretrained encoder with TP is refused",
    ),
    Mutant(
        name="local-layer-index-in-init",
        file=MIMO + "training/global_names.py",
        old="return str(number - 1)",
        new="return key",
        tests=(_WEIGHT_TESTS + "test_pipeline_stages_hold_the_weights_of_one_model",),
        why="pipeline stages start with equal layers, and PP changes the model",
    ),
    Mutant(
        name="gated-layer-cut-in-one-piece",
        file=_WEIGHTS,
        old="2 if id(parameter) in self.survey.gated else 1",
        new="1",
        tests=(_WEIGHT_TESTS + "test_gated_layer_is_known_by_its_mlp",),
        why="gates and values of a gated MLP are mixed up over TP with Transformer Engine",
    ),
    Mutant(
        name="partition-stride-ignored",
        file=_WEIGHTS,
        old="blocks = max(parameter.partition_stride, 2 if",
        new="blocks = max(1, 1 if",
        tests=(_WEIGHT_TESTS + "test_sharded_gated_mlp_is_the_same_function",),
        why="gates and values of a gated MLP are mixed up over TP",
    ),
    Mutant(
        name="shards-taken-in-a-row",
        file=_WEIGHTS,
        old="return torch.cat(pieces[rank::size], dim=dim)",
        new="return torch.cat(pieces[rank * blocks : (rank + 1) * blocks], dim=dim)",
        tests=(_WEIGHT_TESTS + "test_tp_shard_cuts_every_block",),
        why="strided weights start as another model under TP",
    ),
    Mutant(
        name="every-weight-from-one-seed",
        file=_WEIGHTS,
        old="self._draw(parameter, tuple(shape), derive_seed(self.seed, name), init_method, take)",
        new="self._draw(parameter, tuple(shape), self.seed, init_method, take)",
        tests=(_WEIGHT_TESTS + "test_seed_and_name_both_count",),
        why="layers start as copies of one another",
    ),
    Mutant(
        name="row-parallel-init-for-column-parallel",
        file=_WEIGHTS,
        old="parameter.partition_dim == 1",
        new="parameter.partition_dim == 0",
        tests=(_WEIGHT_TESTS + "test_distributions_are_stocks",),
        why="output layers start too large by the square root of the depth",
    ),
    Mutant(
        name="per-shard-seed-without-the-layer",
        file=_WEIGHTS,
        old="layer * 100 + module_id",
        new="layer * 10 + module_id",
        tests=(_WEIGHT_TESTS + "test_per_shard_seed_worked_values",),
        why="weights differ from the documented seeds and collide over layers",
    ),
    Mutant(
        name="dropout-differs-over-tp-copies",
        file=_RANDOM,
        old='derive_seed(seed, name, "default", dp, cp, *stage)',
        new='derive_seed(seed, name, "default", dp, cp, tp, *stage)',
        tests=(UNIT + "test_randomness.py::test_ranks_agree_exactly_where_the_table_says",),
        why="TP ranks drop different elements of one replicated activation and drift apart",
    ),
    Mutant(
        name="dropout-agrees-over-tp-shards",
        file=_RANDOM,
        old='derive_seed(seed, name, "tp", dp, cp, tp, *stage)',
        new='derive_seed(seed, name, "tp", dp, cp, *stage)',
        tests=(UNIT + "test_randomness.py::test_ranks_agree_exactly_where_the_table_says",),
        why="heads of different TP ranks are dropped alike",
    ),
)

GRADIENTS = (
    Mutant(
        name="dp-only-token-count",
        file=_FINALIZE,
        old="dist.all_reduce(total, group=groups.dp_cp)",
        new="dist.all_reduce(total, group=groups.dp)",
        tests=(_COUNT,),
        why="gradients are too large by cp, which Adam and clipping hide",
        ranks=8,
    ),
    Mutant(
        name="tp-copies-counted-as-tokens",
        file=_FINALIZE,
        old="dist.all_reduce(total, group=groups.dp_cp)",
        new="dist.all_reduce(total, group=groups.tp_dp_cp)",
        tests=(_COUNT,),
        why="gradients are too small by tp",
        ranks=8,
    ),
    Mutant(
        name="divisor-on-one-module-only",
        file=_FINALIZE,
        old="in iter_modules(mimo_model):\n            module.scale_gradients",
        new="in list(iter_modules(mimo_model))[:1]:\n            module.scale_gradients",
        tests=(_FINALIZE_TESTS + "test_all_modules_are_divided_by_the_same_count",),
        why="the encoder's gradient is thousands of times the language model's",
        ranks=8,
    ),
    Mutant(
        name="no-tokens-divide-by-zero",
        file=_FINALIZE,
        old="torch.where(total == 0, one, nothing)",
        new="nothing",
        tests=(_FINALIZE_TESTS + "test_a_batch_without_tokens_leaves_zeros",),
        why="a batch without a valid token turns every weight into nan",
        ranks=8,
    ),
    Mutant(
        name="sums-below-one-are-clamped",
        file=_FINALIZE,
        old="one / total,",
        new="one / total.clamp(min=1),",
        tests=(_FINALIZE_TESTS + "test_sums_below_one_divide_exactly",),
        why="small token weights give gradients that are too small by as much",
        ranks=8,
    ),
    Mutant(
        name="shards-of-mixed-groups-under-other-names",
        file=MIMO + "training/inner_optimizers.py",
        old="enumerate([*whole, *halves])",
        new="enumerate([*halves, *whole])",
        tests=(UNIT + "test_optimizer_table.py::test_what_is_saved_goes_on_to_the_bit",),
        why="the state of an fp32 norm is saved as that of the bias beside it",
        ranks=1,
    ),
    Mutant(
        name="shards-are-not-restored",
        file=MIMO + "training/optimizer_shards.py",
        old="tensor.copy_(values[key])",
        new="pass",
        tests=(UNIT + "test_optimizer_table.py::test_what_is_saved_goes_on_to_the_bit",),
        why="the distributed optimizer goes on from uninitialised moments",
        ranks=1,
    ),
    Mutant(
        name="new-settings-are-forgotten",
        file=MIMO + "training/optimizer_settings.py",
        old="if key not in changed}",
        new="if True}",
        tests=(
            UNIT + "test_optimizer_table.py::"
            "test_what_a_new_run_changes_counts_and_the_rest_goes_on",
        ),
        why="a new learning rate does not count, without a word",
        ranks=1,
    ),
)

EXPERTS = (
    Mutant(
        name="experts-summed-like-dense-weights",
        file=MIMO + "training/experts.py",
        old="parameter.allreduce = False",
        new="parameter.allreduce = True",
        tests=(_EXPERT_TESTS + "test_loss_gradients_and_norm_equal_the_unsharded_model",),
        why="gradients of different experts are added up, since they stand in the same places",
        ranks=8,
    ),
    Mutant(
        name="expert-biases-summed-over-tp",
        file=MIMO + "training/experts.py",
        old="parameter.sequence_parallel = False",
        new="pass",
        tests=(_EXPERT_TESTS + "test_loss_gradients_and_norm_equal_the_unsharded_model",),
        why="under sequence parallelism the biases of different experts get one gradient",
        ranks=8,
    ),
    Mutant(
        name="every-ep-rank-draws-the-same-experts",
        file=MIMO + "training/global_names.py",
        old="first = rank * len(list(experts.children()))",
        new="first = 0",
        tests=(_WEIGHT_TESTS + "test_experts_are_counted_over_expert_parallel_ranks",),
        why="a layer starts with several copies of a few experts, and EP changes the model",
    ),
    Mutant(
        name="expert-dp-ignores-expert-tp",
        file=MIMO + "training/groups.py",
        old="shape = [expt_tp, ep, stage // (expt_tp * ep), pp]",
        new="shape = [grid.dim_size('tp'), ep, stage // (grid.dim_size('tp') * ep), pp]",
        tests=(UNIT + "test_experts.py::test_expert_dp_is_what_is_left",),
        why="experts are cut over TP although expert TP was asked for",
    ),
)

OPTIMIZER = (
    Mutant(
        name="group-numbers-stay-after-a-failed-load",
        file=MIMO + "training/optimizer_state.py",
        old="    finally:\n        # Also where loading fails",
        new=(
            "    except ZeroDivisionError:\n        raise\n    else:\n"
            "        # Also where loading fails"
        ),
        tests=(UNIT + "test_left_as_found.py::test_it_is_as_before",),
        why="who catches the error trains on with numbers of groups as factors of weight decay",
    ),
    Mutant(
        name="tp-replicas-counted-twice-in-the-norm",
        file=_OPTIMIZER,
        old="return create_process_groups(grid)",
        new=(
            "collection = create_process_groups(grid)\n"
            "    collection.tp = collection.pp\n"
            "    return collection"
        ),
        tests=(_NORM,),
        why="each TP rank adds its copy of replicated weights: clipping depends on the layout",
        ranks=8,
    ),
    Mutant(
        name="every-rank-adds-the-norm",
        file=_OPTIMIZER,
        old="if norm is not None and (self._speaks_for(name) or not math.isfinite(norm)):",
        new="if norm is not None:",
        tests=(_NORM,),
        why="the norm grows with the number of ranks, and clipping with it",
        ranks=8,
    ),
    Mutant(
        name="norms-added-not-squares",
        file=_OPTIMIZER,
        old="return sum(n * n for n in module_norms.values()) ** 0.5",
        new="return sum(module_norms.values())",
        tests=(_NORM,),
        why="clipping sets in too early",
        ranks=8,
    ),
    Mutant(
        name="each-module-clipped-by-itself",
        file=_OPTIMIZER,
        old="total_norm=grad_norm,",
        new="total_norm=opt.get_grad_norm(),",
        tests=(_OPTIMIZER_TESTS + "test_clipping_scales_every_module_by_the_same_factor",),
        why="the direction of the step depends on how the model is cut into modules",
        ranks=8,
    ),
    Mutant(
        name="found-inf-not-agreed",
        file=_OPTIMIZER,
        old="found_inf = self._any_rank(any(found))",
        new="found_inf = any(found)",
        tests=(_OPTIMIZER_TESTS + "test_an_inf_on_one_rank_stops_all",),
        why="some ranks skip the step and wait for, or drift from, those that do not",
        ranks=8,
    ),
    Mutant(
        name="success-not-agreed",
        file=_OPTIMIZER,
        old="success = not self._any_rank(not self.step_with_ready_grads())",
        new="success = self.step_with_ready_grads()",
        tests=(_OPTIMIZER_TESTS + "test_a_step_that_fails_on_one_rank_has_failed_on_all",),
        why="learning-rate schedules of the ranks drift apart",
        ranks=8,
    ),
    Mutant(
        name="nan-skips-no-step-without-a-loss-scaler",
        file=_OPTIMIZER,
        old="if found_inf or self.nonfinite_modules:",
        new="if found_inf:",
        tests=(_NONFINITE + "test_the_step_is_skipped_everywhere_and_the_module_is_named",),
        why="in float32 and bfloat16 one nan gradient poisons every weight of every module",
        ranks=8,
    ),
    Mutant(
        name="nan-of-another-replica-unheard",
        file=_OPTIMIZER,
        old="(self._speaks_for(name) or not math.isfinite(norm))",
        new="self._speaks_for(name)",
        tests=(_NONFINITE + "test_a_replica_that_is_not_the_one_that_speaks",),
        why="a replica whose copy of a gradient is broken steps away from the others",
        ranks=8,
    ),
    Mutant(
        name="nan-of-a-tp-copy-unheard",
        file=_OPTIMIZER,
        old="if copies:  # nothing",
        new="if False:  # nothing",
        tests=(_NONFINITE + "test_a_copy_that_the_norm_leaves_out",),
        why="the norm counts copies over TP once; a nan in another copy gets into its weight",
        ranks=8,
    ),
)
