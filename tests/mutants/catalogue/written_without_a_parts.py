# SPDX-License-Identifier: Apache-2.0
"""Mistakes in cutting and in layers, written from the code alone."""

from tests.mutants.catalogue.places import MIMO, UNIT
from tests.mutants.mutant import Mutant

WITHOUT_A_PARTS = (
    Mutant(
        name="max-seqlen-kv-unchecked",
        file=MIMO + "partition/packed_lengths.py",
        old=(
            'for name in ("max_seqlen_q", "max_seqlen_kv"):\n'
            "        given"
        ),
        new=(
            'for name in ("max_seqlen_q",):\n'
            "        given"
        ),
        tests=(
            UNIT + "test_routed_model.py::"
            "test_packing_that_does_not_fit_is_one_error_before_anything_moves",
        ),
        why="a max_seqlen_kv below the longest sequence is believed",
    ),
    Mutant(
        name="host-ints-of-an-old-version",
        file=MIMO + "partition/packed_lengths.py",
        old="return seen is None or seen[0] is not tensor or seen[1] != _version(tensor)",
        new="return seen is None or seen[0] is not tensor",
        tests=(UNIT + "test_partition.py::test_the_packed_index_is_made_once_per_batch",),
        why="lengths that were written in place are read from the memory of the batch before",
    ),
    Mutant(
        name="real-lengths-may-decrease",
        file=MIMO + "partition/packed_lengths.py",
        old="any(not 0 <= r <= p for r, p in",
        new="any(not r <= p for r, p in",
        tests=(
            UNIT + "test_routed_model.py::"
            "test_packing_that_does_not_fit_is_one_error_before_anything_moves",
        ),
        why="cu_seqlens_q that decrease are accepted beside padded ones",
    ),
    Mutant(
        name="packed-total-not-over-tp",
        file=MIMO + "partition/position_owners.py",
        old="check_divides(seq_len, cp_size * tp_size)",
        new="check_divides(seq_len, cp_size)",
        tests=(UNIT + "test_routes.py::test_sequences_that_cannot_be_cut_are_refused",),
        why="a packed batch that TP cannot cut is cut anyway",
    ),
    Mutant(
        name="empty-sequence-refused",
        file=MIMO + "partition/sequence_order.py",
        old="if stop < start:",
        new="if stop <= start:",
        tests=(
            UNIT + "test_sequence_order.py::"
            "test_packed_positions_are_each_sequence_s_dense_positions",
        ),
        why="a packed batch with an empty sequence is refused",
    ),
    Mutant(
        name="lengths-of-an-old-version",
        file=MIMO + "partition/utils.py",
        old="[(id(t), t._version) for t in tensors if t is not None and known]",
        new="[id(t) for t in tensors if t is not None and known]",
        tests=(UNIT + "test_partition.py::test_the_packed_index_is_made_once_per_batch",),
        why="lengths that were written in place are not looked at again",
    ),
    Mutant(
        name="cp-by-config-not-by-group",
        file=MIMO + "partition/utils.py",
        old="use_cp=get_pg_size(cp_group) > 1,",
        new="use_cp=mp.context_parallel_size > 1,",
        tests=(
            UNIT + "test_partition.py::"
            "TestFromMpConfig::test_a_given_group_is_cut_over_whatever_the_config_says",
        ),
        why="a CP group that is given does not count",
    ),
    Mutant(
        name="gradient-never-summed-again",
        file=MIMO + "transformer/input_gradients.py",
        old="layer.allreduce_dgrad = inputs[0].requires_grad",
        new="layer.allreduce_dgrad = layer.allreduce_dgrad and inputs[0].requires_grad",
        tests=(
            UNIT + "test_input_gradients.py::"
            "test_a_pass_without_gradients_does_not_end_the_sums_of_later_ones",
        ),
        why="after one pass without gradients (evaluation) TP ranks keep partial gradients",
    ),
    Mutant(
        name="padding-only-rank-leaves-backward",
        file=MIMO + "transformer/context_parallel_attention.py",
        old="    return value[:0].repeat_interleave(repeat, dim=2) + query[:0, ..., :1]\n",
        new="    rows = value[:0].repeat_interleave(repeat, dim=2)\n    return rows.detach()\n",
        tests=(
            UNIT + "test_cp_attention.py::"
            "test_rank_with_nothing_but_padding_keeps_the_gather_in_its_graph",
        ),
        why="a rank with nothing but padding does not enter its CP group's reduce-scatter",
    ),
    Mutant(
        name="dropout-forks-twice",
        file=MIMO + "transformer/context_parallel_attention.py",
        old="if dropout_p == 0.0 or self.config.sequence_parallel:",
        new="if dropout_p == 0.0:",
        tests=(
            UNIT + "test_cp_attention.py::"
            "test_under_sequence_parallelism_the_block_has_forked_already",
        ),
        why="with sequence parallelism attention repeats random numbers that the block has drawn",
    ),
    Mutant(
        name="loss-of-fp64-in-fp32",
        file=MIMO + "transformer/exact_loss.py",
        old="wide = logits.to(torch.promote_types(logits.dtype, torch.float32))",
        new="wide = logits.float()",
        tests=(
            UNIT + "test_exact_loss_8rank.py::"
            "test_losses_and_gradients_are_those_of_the_whole_vocabulary",
        ),
        why="fp64 losses are rounded",
        ranks=8,
    ),
    Mutant(
        name="virtual-stage-dropped",
        file=MIMO + "transformer/layer_specs.py",
        old="return _block_spec(config, None, pp_rank, vp_stage)",
        new="return _block_spec(config, None, pp_rank, None)",
        tests=(UNIT + "test_norms.py::test_a_virtual_stage_gets_its_own_layers",),
        why="virtual stages get the layers of the whole stage, or fail",
    ),
    Mutant(
        name="one-group-per-tp-rank-refused",
        file=MIMO + "transformer/layer_specs.py",
        old="if groups < tp_size:",
        new="if groups <= tp_size:",
        tests=(UNIT + "test_norms.py::test_one_query_group_per_tp_rank_is_enough",),
        why="one query group per TP rank is refused",
    ),
    Mutant(
        name="norm-eps-ignored",
        file=MIMO + "transformer/norms.py",
        old="norm = norm_class(hidden_size, eps=eps, device=device, dtype=config.params_dtype)",
        new="norm = norm_class(hidden_size, device=device, dtype=config.params_dtype)",
        tests=(UNIT + "test_norms.py::test_norm_is_pytorchs",),
        why="layernorm_epsilon of the config is ignored",
    ),
    Mutant(
        name="router-fp64-is-fp32",
        file=MIMO + "transformer/router.py",
        old='{"fp32": torch.float32, "fp64": torch.float64}',
        new='{"fp32": torch.float32, "fp64": torch.float32}',
        tests=(UNIT + "test_experts.py::test_the_router_computes_in_its_dtype",),
        why="moe_router_dtype='fp64' is accepted and computes in fp32",
    ),
)
