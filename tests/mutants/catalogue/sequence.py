# SPDX-License-Identifier: Apache-2.0
"""Mistakes in who owns which position, in cutting tensors, and in attention over the cut."""

from tests.mutants.catalogue.places import MIMO, UNIT
from tests.mutants.mutant import Mutant

_ORDER = MIMO + "partition/sequence_order.py"
_ADAPTER = MIMO + "partition/utils.py"
_ATTENTION = MIMO + "transformer/context_parallel_attention.py"
_SEGMENTS = MIMO + "partition/attention_segments.py"
_VARLEN = MIMO + "transformer/varlen_attention.py"
_KEYS = MIMO + "transformer/gathered_keys.py"
_ORDER_TESTS = UNIT + "test_sequence_order.py::"
_LENGTHS = MIMO + "partition/packed_lengths.py"
_LENGTHS_TESTS = UNIT + "test_packed_lengths.py::"
_ADAPTER_TESTS = UNIT + "test_partition.py::"
_ATTENTION_TESTS = UNIT + "test_cp_attention.py::"
_VARLEN_TESTS = UNIT + "test_varlen_attention.py::"
_UNSHARDED = _ATTENTION_TESTS + "test_every_rank_together_is_the_unsharded_attention"

SHARDING = (
    Mutant(
        name="contiguous-instead-of-zigzag",
        file=_ORDER,
        old="return cp_rank, 2 * cp_size - 1 - cp_rank",
        new="return 2 * cp_rank, 2 * cp_rank + 1",
        tests=(_ORDER_TESTS + "test_chunks_are_an_early_and_a_late_one",),
        why="positions disagree with those of rotary embeddings and of Transformer Engine",
    ),
    Mutant(
        name="late-chunk-off-by-one",
        file=_ORDER,
        old="return cp_rank, 2 * cp_size - 1 - cp_rank",
        new="return cp_rank, (2 * cp_size - 2 - cp_rank) % (2 * cp_size)",
        tests=(_ORDER_TESTS + "test_dense_positions_against_the_rule",),
        why="some positions are owned twice and others by nobody",
    ),
    Mutant(
        name="packed-cut-as-one-sequence",
        file=_ORDER,
        old="            spans += _spans(start, stop, cp_rank, cp_size)\n    return spans",
        new="            pass\n    return _spans(0, cu_seqlens[-1], cp_rank, cp_size)",
        tests=(_ORDER_TESTS + "test_packed_positions_are_each_sequence_s_dense_positions",),
        why="tokens of packed sequences land on ranks that believe they hold others",
    ),
    Mutant(
        name="dense-tensors-cut-contiguously",
        file=_ADAPTER,
        old="for c in cp_chunks(cp_rank, cp_size)]\n    return torch.cat(chunks, dim=1)",
        new="for c in (2 * cp_rank, 2 * cp_rank + 1)]\n    return torch.cat(chunks, dim=1)",
        tests=(_ADAPTER_TESTS + "test_dense_cut_and_its_gradient",),
        why="embeddings are cut one way, positions and the causal mask another",
    ),
    Mutant(
        name="cp-group-not-handed-to-the-cut",
        file=_ADAPTER,
        old="is_hybrid_cp=False, cp_group=self.cfg.cp_group)",
        new="is_hybrid_cp=False)",
        tests=(_ADAPTER_TESTS + "test_dense_cut_and_its_gradient",),
        why="falls back to a global group that is another module's, or was never made",
    ),
    Mutant(
        name="given-cp-group-ignored",
        file=_ADAPTER,
        old="if cp_group is None and mp.context_parallel_size > 1:",
        new="if mp.context_parallel_size > 1:",
        tests=(_ADAPTER_TESTS + "TestFromMpConfig::test_given_groups_are_used_as_they_are",),
        why="the adapter cuts over Megatron's global group instead of the language grid's",
    ),
    Mutant(
        name="padding-of-packed-sequences-ignored",
        file=MIMO + "partition/packed_lengths.py",
        old='bounds = None if params is None else _host_ints(params, "cu_seqlens_q_padded")',
        new='bounds = None if params is None else _host_ints(params, "cu_seqlens_q")',
        tests=(_ADAPTER_TESTS + "test_padded_lengths_win_and_plain_ones_do",),
        why="padded batches are cut at the boundaries of the unpadded ones",
    ),
    Mutant(
        name="embeddings-not-scattered",
        file=_ADAPTER,
        old="if self.cfg.seq_parallel and embeddings is not None:",
        new="if self.cfg.seq_parallel and embeddings is None:",
        tests=(_ADAPTER_TESTS + "test_sequence_parallel_pieces",),
        why="with sequence parallelism every TP rank holds all positions: a wrong sequence length",
    ),
    Mutant(
        name="stale-packed-index",
        file=_ADAPTER,
        old="if memo is not None and memo[0] is lengths and memo[1] == device:",
        new="if memo is not None and memo[1] == device:",
        tests=(_ADAPTER_TESTS + "test_the_packed_index_is_made_once_per_batch",),
        why="every packed batch is cut as the first one was",
    ),
    Mutant(
        name="multimodal-angles-cut-as-one-sequence",
        file=MIMO + "model/multimodal_rotary.py",
        old="None if packed is not None else cp_group",
        new="cp_group",
        tests=(
            UNIT
            + "test_packed_positions_ranks.py::"
            + "test_position_ids_reach_the_tokens_they_were_given_for",
        ),
        why="tokens of packed sequences are rotated by other tokens' position ids",
        ranks=2,
    ),
    Mutant(
        name="packing-is-not-checked-without-cp",
        file="megatron/core/models/mimo/model/language_runner.py",
        old='check_packing(batch.packed, *batch.input_ids.shape)',
        new='pass',
        tests=(
            UNIT
            + "test_routed_model.py::"
            + "test_packing_that_does_not_fit_is_one_error_before_anything_moves",
        ),
        why="ranks whose lengths are wrong fail in their layers, and others wait for them",
    ),
    Mutant(
        name="lengths-are-read-field-by-field",
        file=_LENGTHS,
        old="    copies = Download(unread).arrive()\n",
        new="    copies = [Download([each]).arrive()[0] for each in unread]\n",
        tests=(_LENGTHS_TESTS + "test_all_fields_are_read_in_one_wait",),
        why="the host waits for the device four times per packed microbatch",
    ),
    Mutant(
        name="lengths-of-the-batch-before",
        file=_LENGTHS,
        old="not tensor.is_inference() and known[0] == tensor._version",
        new="not tensor.is_inference()",
        tests=(
            _LENGTHS_TESTS
            + "test_a_batch_is_packed_again_without_a_wait_and_a_new_one_with_one",
        ),
        why="a loader that fills one tensor again and again has all batches cut as the first",
    ),
    Mutant(
        name="lengths-are-never-forgotten",
        file=MIMO + "model/base.py",
        old="        forget_lengths(packing_kwargs)\n",
        new="",
        tests=(
            UNIT
            + "test_host_waits_ranks.py::"
            + "test_what_is_not_ahead_is_waited_for_once_after_the_encoders",
        ),
        why="lengths that a collective writes into the tensor of the batch before are not read",
        ranks=2,
    ),
    Mutant(
        name="kernels-compare-lengths",
        file=_LENGTHS,
        old="made.pad_between_seqs = real[:-1] != padded[:-1]",
        new="made.pad_between_seqs = None",
        tests=(_LENGTHS_TESTS + "test_kernels_are_told_of_padding_instead_of_comparing",),
        why="Transformer Engine compares them on the device and waits, in every layer",
    ),
    Mutant(
        name="waited-for-before-the-encoders",
        file=MIMO + "model/routed_path.py",
        old="        encoded = self._try_to_encode(modality_inputs)\n",
        new="        known = known or self._know(batch, given, plans, reading)\n"
        "        encoded = self._try_to_encode(modality_inputs)\n",
        tests=(
            UNIT
            + "test_host_waits_ranks.py::"
            + "test_what_is_not_ahead_is_waited_for_once_after_the_encoders",
        ),
        why="the device has nothing to do from the last microbatch's end to the encoders' launch",
        ranks=2,
    ),
)

ATTENTION = (
    Mutant(
        name="keys-and-values-swapped",
        file=_ATTENTION,
        old="key, value = both.split([key.size(-1), value.size(-1)], dim=-1)",
        new="value, key = both.split([key.size(-1), value.size(-1)], dim=-1)",
        tests=(_UNSHARDED,),
        why="attends with values and returns keys; shapes are the same",
    ),
    Mutant(
        name="whole-keys-are-kept",
        file=_KEYS,
        old="        if _storage(tensor) != self._whole or not tensor.numel():\n",
        new="        if True:\n",
        tests=(UNIT + "test_cp_attention_ranks.py::test_what_is_kept_divides_by_cp",),
        why="every rank keeps keys and values of all, for every layer",
        ranks=8,
    ),
    Mutant(
        name="only-ranks-with-queries-gather-again",
        file=_KEYS,
        old="        ctx.keys.gather_again()\n",
        new="        if grad.any():\n            ctx.keys.gather_again()\n",
        tests=(_ATTENTION_TESTS + "test_a_rank_of_padding_gathers_again_with_the_others",),
        why="a rank without a real query does not enter the gather that the others wait in",
    ),
    Mutant(
        name="gathered-again-and-kept",
        file=_KEYS,
        old="local.register_hook(lambda _: self._again.clear())",
        new="pass",
        tests=(
            UNIT + "test_cp_attention_ranks.py::"
            "test_what_was_gathered_again_goes_with_the_backward_pass",
        ),
        why="whole keys and values of layers that are through stay until the graph goes",
        ranks=8,
    ),
    Mutant(
        name="groups-of-queries-in-turn",
        file=_ATTENTION,
        old="query = query.reshape(query.size(0), -1, query.size(2) // groups, query.size(3))",
        new="query = query.unflatten(2, (-1, groups)).transpose(2, 3).flatten(1, 2)",
        tests=(_UNSHARDED,),
        why="heads attend to the keys of other groups",
    ),
    Mutant(
        name="keys-in-rank-order",
        file=_SEGMENTS,
        old="place[chunk] = rank * 2 * num_sequences + half",
        new="place[2 * rank + half] = rank * 2 * num_sequences + half",
        tests=(_ATTENTION_TESTS + "test_natural_pieces_undo_the_gather",),
        why="the causal mask hides other keys than it should: tokens see the future",
    ),
    Mutant(
        name="key-gradient-without-the-sum",
        file=_ATTENTION,
        old="_reduce_scatter(out, grad.contiguous(), group=ctx.group)",
        new="out.copy_(grad.chunk(ctx.group.size())[ctx.group.rank()])",
        tests=(
            UNIT + "test_cp_attention_ranks.py::"
            "test_attention_and_its_gradients_are_the_unsharded_ones",
        ),
        why="keys and values lose what other ranks' queries ask of them",
        ranks=8,
    ),
    Mutant(
        name="causal-from-the-first-key",
        file=_ATTENTION,
        old="return causal_lower_right(q_len, k_len), False",
        new="return None, True",
        tests=(_UNSHARDED,),
        why="a late chunk of queries sees only the first keys of the sequence",
    ),
    Mutant(
        name="queries-see-the-whole-sequence",
        file=_SEGMENTS,
        old="[([chunk], chunk + 1) for chunk in own] if causal",
        new="[([chunk], len(parts)) for chunk in own] if causal",
        tests=(_UNSHARDED,),
        why="language-model tokens attend to tokens after them",
    ),
    Mutant(
        name="padding-attended-to",
        file=_SEGMENTS,
        old="min(max(real - chunk * size, 0), size)",
        new="size",
        tests=(_ATTENTION_TESTS + "test_padding_yields_zeros_and_takes_no_gradient",),
        why="padding of packed sequences takes part in attention",
    ),
    Mutant(
        name="one-call-sees-the-future",
        file=_VARLEN,
        old="window_size=(-1, 0) if causal else (-1, -1)",
        new="window_size=(-1, -1)",
        tests=(_VARLEN_TESTS + "test_one_call_is_a_call_per_segment",),
        why="packed tokens attend to tokens after them, on GPUs only",
    ),
    Mutant(
        name="lengths-for-the-kernel-are-waited-for",
        file=_VARLEN,
        old="upload(torch.tensor(segments.bounds(), dtype=torch.int32), query.device)",
        new="torch.tensor(segments.bounds(), dtype=torch.int32).to(query.device)",
        tests=(_VARLEN_TESTS + "test_the_host_waits_for_nothing",),
        why="the host waits for the device in every layer",
    ),
    Mutant(
        name="one-call-drops-nothing",
        file=_ATTENTION,
        old="len(segments.queries) > 1 and self._dropout_now() == 0.0",
        new="len(segments.queries) > 1",
        tests=(_VARLEN_TESTS + "test_dropout_and_dense_batches_are_not_the_kernels",),
        why="packed batches train without attention dropout on GPUs",
    ),
    Mutant(
        name="a-call-per-segment-after-all",
        file=_ATTENTION,
        old="            if kernel is not None:\n",
        new="            if kernel is None:\n",
        tests=(_VARLEN_TESTS + "test_a_layer_is_one_call",),
        why="two calls per sequence and layer",
    ),
    Mutant(
        name="heads-that-the-kernel-does-not-take",
        file=_VARLEN,
        old=" or query.size(-1) % _WIDTH",
        new="",
        tests=(_VARLEN_TESTS + "test_where_it_serves",),
        why="models whose head dim is no multiple of 8 fail on GPUs in packed batches",
    ),
    Mutant(
        name="chunks-see-each-others-keys",
        file=_SEGMENTS,
        old="yield queries, sum(tokens for tokens, _ in parts[:seen]), place[:seen]",
        new="yield queries, sum(tokens for tokens, _ in parts[:seen]), place[::-1][:seen]",
        tests=(UNIT + "test_attention_segments.py::test_every_query_sees_what_it_should",),
        why="queries meet the keys of other positions",
    ),
    Mutant(
        name="rank-of-padding-leaves-the-graph",
        file=_ATTENTION,
        old="return _empty_rows(query, value)",
        new="return query.new_zeros((0, *query.shape[1:-1], value.size(-1)))",
        tests=(
            _ATTENTION_TESTS + "test_rank_with_nothing_but_padding_keeps_the_gather_in_its_graph",
        ),
        why="a rank that holds only padding skips the backward collective, its peers hang",
    ),
    Mutant(
        name="attention-asks-for-the-global-cp-group",
        file=_ATTENTION,
        old='group = getattr(pg_collection, "cp", None)',
        new="group = None",
        tests=(_UNSHARDED,),
        why="the module's own group is dropped for a global one",
    ),
    Mutant(
        name="softmax-scale-dropped",
        file=_ATTENTION,
        old="scale=self.softmax_scale",
        new="scale=None",
        tests=(_ATTENTION_TESTS + "test_softmax_scale_is_used",),
        why="models with a scale of their own train another function",
    ),
    Mutant(
        name="same-dropout-on-all-tp-ranks",
        file=_ATTENTION,
        old="return get_cuda_rng_tracker().fork()",
        new="return nullcontext()",
        tests=(_ATTENTION_TESTS + "test_dropout_draws_from_the_tracker",),
        why="heads of different TP ranks are dropped alike",
    ),
    Mutant(
        name="norm-gradients-not-marked-partial",
        file=MIMO + "transformer/norms.py",
        old="parameter.sequence_parallel = config.sequence_parallel",
        new="parameter.sequence_parallel = False",
        tests=(
            UNIT + "test_norms.py::test_parameters_say_whether_their_gradients_are_partial",
        ),
        why="with sequence parallelism norms train on one TP rank's share of the positions",
    ),
)
