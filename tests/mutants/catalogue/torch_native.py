# SPDX-License-Identifier: Apache-2.0
"""Mistakes in how a model of transformers is sharded as it is."""

from tests.mutants.catalogue.places import MIMO, UNIT
from tests.mutants.mutant import Mutant

_ROOM = MIMO + "torch_native/"
_TESTS = UNIT + "torch_native/"
_SHARDED = _TESTS + "test_parallelize_8rank.py::"
_EQUAL = _SHARDED + "test_loss_and_every_gradient_are_those_of_the_unsharded_model"
_LOSS = _TESTS + "test_loss_8rank.py::"
_PLANS = _TESTS + "test_plans.py::"
_CP, _RING = _ROOM + "context_parallel.py", _ROOM + "ring_attention.py"
_CUT = _TESTS + "test_context_parallel.py::"
_CUT_RANKS = _TESTS + "test_context_parallel_8rank.py::"

TORCH_NATIVE = (
    Mutant(
        name="a-tied-weight-is-split-twice",
        file=_ROOM + "styles.py",
        old="        if parameter not in self._distributed:",
        new="        if True:",
        tests=(_SHARDED + "test_tied_weights_stay_one_and_the_state_loads_into_transformers",),
        why="embedding and output layer become two parameters, each with part of the gradient",
        ranks=8,
    ),
    Mutant(
        name="norms-keep-the-gradient-of-their-part-of-the-sequence",
        file=_ROOM + "styles.py",
        old="    if isinstance(gradient, DTensor) and gradient.placements != parameter.placements:",
        new="    if gradient is None:",
        tests=(_SHARDED + "test_norms_keep_a_part_of_the_sequence_and_sum_their_gradients",),
        why="without FSDP the ranks of a TP group train their norms apart",
        ranks=8,
    ),
    Mutant(
        name="fsdp-averages",
        file=_ROOM + "parallelize.py",
        old="            module.set_gradient_divide_factor(1.0)",
        new="            module.set_gradient_divide_factor(2.0)",
        tests=(_EQUAL,),
        why="gradients are those of another loss; Adam's first step hides it",
        ranks=8,
    ),
    Mutant(
        name="operations-remember-the-mesh-of-a-grid-that-is-gone",
        file=_ROOM + "meshes.py",
        old="        _clear_sharding_prop_cache()",
        new="        pass",
        tests=(_SHARDED + "test_a_grid_over_the_ranks_of_one_that_is_gone",),
        why="a second model over the same ranks communicates over groups that were destroyed",
        ranks=8,
    ),
    Mutant(
        name="columns-of-an-uneven-vocabulary-begin-too-early",
        file=_ROOM + "loss.py",
        old="    width = -(-logits.shape[-1] // mesh.size())",
        new="    width = logits.shape[-1] // mesh.size()",
        tests=(_LOSS + "test_values_and_gradients_are_those_of_the_whole_vocabulary",),
        why="labels are looked up in another rank's columns",
        ranks=8,
    ),
    Mutant(
        name="scalars-are-summed-over-the-world",
        file=_ROOM + "loss.py",
        old="    dist.all_reduce(total, group=group)",
        new="    dist.all_reduce(total)",
        tests=(_LOSS + "test_scalars_are_summed_over_data_ranks_only",),
        why="the loss is tp times as large",
        ranks=8,
    ),
    Mutant(
        name="what-tp-does-not-split-counts-tp-times-in-the-norm",
        file=_ROOM + "gathered.py",
        old="    dist.all_reduce(sums[1:], group=mesh.get_group(TP))",
        new="    dist.all_reduce(sums, group=mesh.get_group(TP))",
        tests=(_SHARDED + "test_norm_of_the_gradient_and_clipping",),
        why="clipping scales by a norm that is too large",
        ranks=8,
    ),
    Mutant(
        name="samples-in-another-order-are-the-same-batch",
        file=_ROOM + "agreed.py",
        old="{int((bits * weights).sum())}",
        new="{int(bits.sum() + 0 * weights.sum())}",
        tests=(_PLANS + "test_digests_see_order_values_shapes_and_names",),
        why="ranks of a TP group compute different samples together",
    ),
    Mutant(
        name="a-module-that-the-plan-forgot-is-left-alone",
        file=_ROOM + "checks.py",
        old="        if own and style is None and not ",
        new="        if False and not ",
        tests=(_PLANS + "test_plans_that_do_not_fit_a_model_are_named",),
        why="its weights get the gradient of a part of the sequence",
    ),
    Mutant(
        name="ring-attention-takes-chunks-for-those-of-another-cut",
        file=_RING,
        old="    torch_s._cp_options.enable_load_balance = True",
        new="    torch_s._cp_options.enable_load_balance = False",
        tests=(_CUT_RANKS + "test_families_and_options",),
        why="queries see keys that come after them, and not all that come before",
        ranks=8,
    ),
    Mutant(
        name="a-switch-of-pytorch-s-stays-turned",
        file=_RING,
        old="        torch_s._cp_options.enable_load_balance = before",
        new="        pass",
        tests=(_CUT + "test_pytorch_s_global_switch_is_left_as_found",),
        why="context parallelism of the user's own is another one afterwards",
    ),
    Mutant(
        name="grouped-queries-gradients-are-averaged",
        file=_RING,
        old=".sum(dim=2)",
        new=".mean(dim=2)",
        tests=(_CUT + "test_grouped_queries_attend_as_pytorch_s",),
        why="keys and values learn from the mean of the heads that share them",
    ),
    Mutant(
        name="a-chunk-s-labels-are-its-own-tokens",
        file=_CP,
        old="        shifted = functional.pad(labels, (0, 1), value=-100)[..., 1:].contiguous()",
        new="        shifted = labels",
        tests=(_CUT + "test_a_model_of_one_rank_is_what_it_was",),
        why="a model over CP learns to repeat the token before it",
    ),
    Mutant(
        name="packed-positions-over-cp-are-one-sequence",
        file=_CP,
        old="    if not torch.equal(positions - positions[:, :1], ",
        new="    if False and not torch.equal(positions - positions[:, :1], ",
        tests=(_CUT + "test_inputs_that_attention_would_not_follow_are_refused",),
        why="samples of a row see each other, which they do not at CP 1",
    ),
    Mutant(
        name="ring-attention-in-every-model-of-a-configuration",
        file=_CP,
        old="    theirs, own = model.config, copy.copy(model.config)",
        new="    theirs, own = model.config, model.config",
        tests=(_CUT + "test_a_model_of_one_rank_is_what_it_was",),
        why="a model beside it, of the same configuration, has no CP group to attend over",
    ),
    Mutant(
        name="dropout-of-attention-over-cp-is-forgotten",
        file=_CP,
        old='    if any(getattr(layer, "attention_dropout", 0.0) for layer in layers):',
        new='    if not layers and getattr(config, "attention_dropout", 0.0):',
        tests=(_CUT + "test_models_whose_sequences_cannot_be_cut_are_named",),
        why="the model trains without the dropout that its configuration asks for",
    ),
    Mutant(
        name="cp-ranks-train-apart",
        file=_ROOM + "meshes.py",
        old='    wanted = {"dp", "cp"} if box.dim_size("cp") > 1 else {"dp"}',
        new='    wanted = {"dp"}',
        tests=(_PLANS + "test_ranks_stand_in_the_mesh_as_in_the_grid",),
        why="each CP rank has the gradient of its own chunks",
    ),
)
