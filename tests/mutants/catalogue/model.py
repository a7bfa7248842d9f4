# SPDX-License-Identifier: Apache-2.0
"""Mistakes in the model: row order, token places, row counts, what is handed on."""

from tests.mutants.catalogue.places import MIMO, UNIT
from tests.mutants.mutant import Mutant

_BASE = MIMO + "model/base.py"
_ENCODER = MIMO + "model/encoder_side.py"
_LANGUAGE = MIMO + "model/language_side.py"
_ROWS = MIMO + "model/token_positions.py"
_DDP = MIMO + "model/ddp_methods.py"
_SUBMODULES = MIMO + "submodules/base.py"
_OUTPUTS = MIMO + "submodules/encoder_outputs.py"
_OUTPUT_TESTS = UNIT + "test_encoder_outputs.py::"
_STAGE = MIMO + "model/stage_side.py"
_EMPTY = MIMO + "model/no_samples.py"
_MASKS = MIMO + "model/attention_masks.py"
_CHECKS = MIMO + "config/checks.py"
_ATTENTION = MIMO + "transformer/context_parallel_attention.py"
_MASK_TESTS = UNIT + "test_attention_masks.py::"
_CONFIG_TESTS = UNIT + "test_config.py::"
_MODEL_TESTS = UNIT + "test_model.py::"
_SUBMODULE_TESTS = UNIT + "test_submodules.py::"

MODEL = (
    Mutant(
        name="helpers-of-a-mock",
        file=MIMO + "stand_ins.py",
        old="if found is _MISSING or (not helper and hasattr(stand_in, name)):",
        new="if found is _MISSING or hasattr(stand_in, name):",
        tests=(UNIT + "test_stand_ins.py::test_methods_work_on_mocks_that_answer_to_any_name",),
        why="a method on a mock asks the mock for what only this project knows",
    ),
    Mutant(
        name="own-adapter-gets-no-embeddings",
        file="megatron/core/models/mimo/model/routed_path.py",
        old="if adapter is None or cuts_as_ours(adapter):",
        new="if True:",
        tests=(
            UNIT + "test_routed_model.py::"
            "test_a_users_partition_adapter_gets_the_whole_sequence_and_what_it_returns_is_used",
        ),
        why="a user's adapter is called without the sequence, and what it makes of it is lost",
    ),
    Mutant(
        name="sequence-major-rows",
        file=_OUTPUTS,
        old="batch_first = output.transpose(0, 1) if self.sequence_first else output",
        new="batch_first = output",
        tests=(_SUBMODULE_TESTS + "test_sequence_first_rows_become_sample_major",),
        why="with more than one sample, embeddings go to another sample's tokens",
    ),
    Mutant(
        name="projection-bias-dropped",
        file=_OUTPUTS,
        old="return value + more[0]",
        new="return value",
        tests=(_SUBMODULE_TESTS + "test_projection_that_returns_megatron_s_output_and_bias",),
        why="a trained bias never reaches the language model",
    ),
    Mutant(
        name="encoder-by-encoder-rows",
        file=_SUBMODULES,
        old="return embeddings.by_item()",
        new="return torch.cat(list(embeddings), dim=0)",
        tests=(
            UNIT + "test_routed_model.py::test_two_encoders_of_one_modality",
            _OUTPUT_TESTS + "test_several_encoders_are_put_together_item_by_item",
        ),
        why="a sample's tokens get rows of other samples, depending on the layout",
    ),
    Mutant(
        name="first-of-the-images-taken-for-all",
        file=_OUTPUTS,
        old="if len(output) > 1 and len(kinds) == 1:",
        new="if False:",
        tests=(_OUTPUT_TESTS + "test_what_holds_no_rows_or_may_be_two_things_is_refused",),
        why="of a tuple with one tensor per image only the first image is used",
    ),
    Mutant(
        name="unmerged-rows-of-a-model-output",
        file=_OUTPUTS,
        old="if dims == {_MAIN: 3, _POOLED: 2}:",
        new="if _MAIN in dims:",
        tests=(_OUTPUT_TESTS + "test_what_holds_no_rows_or_may_be_two_things_is_refused",),
        why="Qwen's tower returns the rows before merging under that name",
    ),
    Mutant(
        name="fused-sequence-batch-first",
        file=_ROWS,
        old="places[name] = flat % self.seq_len * self.batch + flat // self.seq_len",
        new="places[name] = flat",
        tests=(_MODEL_TESTS + "TestForward::test_rows_stand_where_their_tokens_stand",),
        why="samples are interleaved in the fused sequence",
    ),
    Mutant(
        name="modalities-share-their-tokens",
        file=_ROWS,
        old="group.masked_fill_(flat == token_id, index)",
        new="group.masked_fill_(flat == token_id, 1)",
        tests=(_MODEL_TESTS + "TestForward::test_two_modalities",),
        why="rows of one modality are put where the other one's tokens stand",
    ),
    Mutant(
        name="text-rows-in-the-wrong-order",
        file="megatron/core/models/mimo/model/language_runner.py",
        old="input_ids=input_ids.reshape(-1)[text].unsqueeze(0)",
        new="input_ids=input_ids.t().reshape(-1)[text].unsqueeze(0)",
        tests=(_MODEL_TESTS + "TestTextEmbeddings::test_text_rows_in_reading_order",),
        why="words of other samples stand where text should",
    ),
    Mutant(
        name="positions-of-other-tokens",
        file="megatron/core/models/mimo/model/language_runner.py",
        old="channel.expand_as(input_ids).reshape(-1)[text].unsqueeze(0)",
        new="channel.expand_as(input_ids).reshape(-1)[: text.numel()].unsqueeze(0)",
        tests=(_MODEL_TESTS + "TestTextEmbeddings::test_positions_follow_their_tokens",),
        why="text after an image is embedded at the image's positions",
    ),
    Mutant(
        name="row-count-not-checked",
        file="megatron/core/models/mimo/model/language_runner.py",
        old="if rows.count(name) != embeddings.size(0):",
        new="if rows.count(name) > embeddings.size(0):",
        tests=(_MODEL_TESTS + "TestAlign::test_text_count",),
        why="surplus rows are dropped or shift others, instead of one clear error",
    ),
    Mutant(
        name="stale-token-positions",
        file="megatron/core/models/mimo/model/token_positions.py",
        old='latest[1:3] == (version, ids)',
        new='latest[2] == ids',
        tests=(_MODEL_TESTS + "TestForward::test_an_edited_batch_is_looked_at_again",),
        why="a batch that is refilled in place is fused by the last batch's token positions",
    ),
    Mutant(
        name="loss-mask-not-cut",
        file="megatron/core/models/mimo/model/language_runner.py",
        old='embeddings, labels, loss_mask, packed = sharded',
        new='embeddings, labels, _, packed = sharded\n        loss_mask = batch.loss_mask',
        tests=(_MODEL_TESTS + "TestContextParallel::test_the_sequence_is_cut",),
        why="CP ranks weigh their tokens with other positions' mask",
    ),
    Mutant(
        name="fan-in-rows-counted-once",
        file="megatron/core/models/mimo/model/gathered_path.py",
        old="arriving = rows * scale",
        new="arriving = rows",
        tests=(_MODEL_TESTS + "TestColocated::test_rows_pass_the_bridge",),
        why="right batches are refused on fan-in, and wrong ones pass",
    ),
    Mutant(
        name="row-count-not-checked-before-the-bridge",
        file="megatron/core/models/mimo/model/gathered_path.py",
        old="if arriving != tokens:",
        new="if arriving < 0:",
        tests=(_MODEL_TESTS + "TestColocated::test_a_mismatch_is_found_before_the_bridge",),
        why="ranks bring unequal shapes to an all-gather: a hang or garbage",
    ),
    Mutant(
        name="bridge-entered-without-tokens",
        file="megatron/core/models/mimo/model/gathered_path.py",
        old="moving = {name: row for name, row in rows.items() if tokens[name]}",
        new="moving = dict(rows)",
        tests=(
            _MODEL_TESTS
            + "TestColocated::test_an_encoder_that_finds_nothing_does_not_enter_it_either",
        ),
        why="some ranks of a group enter a collective and wait for those who do not",
    ),
    Mutant(
        name="text-only-batch-leaves-ddp-waiting",
        file="megatron/core/models/mimo/model/encoder_runner.py",
        old="empty + torch.stack(zeros).sum().to(empty.dtype) if zeros else empty",
        new="empty",
        tests=(
            _MODEL_TESTS + "TestDataParallelCalls::"
            "test_a_text_only_batch_readies_every_parameter_of_an_overlapping_encoder",
        ),
        why="a rank without images never starts the reduction that its peers wait in",
    ),
    Mutant(
        name="cp-group-not-handed-on",
        file="megatron/core/models/mimo/model/language_groups.py",
        old='            cp_group=cp_group,\n            tp_group=tp_group,\n',
        new='            tp_group=tp_group,\n',
        tests=(_MODEL_TESTS + "TestContextParallel::test_a_given_group_wins",),
        why="the group is kept but not used: falls back to a global one that was never made",
    ),
    Mutant(
        name="mask-kept-from-later-stages",
        file="megatron/core/models/mimo/model/language_runner.py",
        old='attention_mask=batch.attention_mask,',
        new='attention_mask=None if embeddings is None else batch.attention_mask,',
        tests=(_MASK_TESTS + "test_every_stage_of_a_pipeline_gets_the_mask",),
        why="layers of a pipeline attend to what the mask forbids",
    ),
    Mutant(
        name="queries-that-see-nothing-see-all",
        file=_ATTENTION,
        old="return out.permute(1, 2, 0, 3).masked_fill(blind, 0.0).permute(2, 0, 1, 3)",
        new="return out",
        tests=(_MASK_TESTS + "test_a_mask_says_all_whatever_the_layer_s_type",),
        why="padding in front sends gradients into real tokens",
    ),
    Mutant(
        name="a-window-in-the-mask-s-place",
        file=_MASKS,
        old="if softmax.window_size is None and not fused:",
        new="if not fused:",
        tests=(_MASK_TESTS + "test_layers_that_would_ignore_a_mask_are_refused",),
        why="stock's windowed layers ignore the mask",
    ),
    Mutant(
        name="padding-comes-out",
        file=_EMPTY,
        old="kept = value[:0] if shape[0] == 0 else value",
        new="kept = value",
        tests=(UNIT + "test_routed_model.py::test_any_number_of_tokens_against_one_rank",),
        why="a replica without samples trains on padding",
    ),
    Mutant(
        name="one-id-for-two-modalities",
        file=_CHECKS,
        old="if len(others) > 1:",
        new="if len(others) > 2:",
        tests=(_CONFIG_TESTS + "test_special_tokens_that_cannot_be_meant_are_refused",),
        why="rows of one modality overwrite those of another",
    ),
    Mutant(
        name="no-sync-for-nobody",
        file=_DDP,
        old="stack.enter_context(module.no_sync())",
        new="stack.enter_context(ExitStack())",
        tests=(_MODEL_TESTS + "TestDataParallelCalls::test_no_sync_of_overlapping_modules",),
        why="gradients of earlier microbatches are summed over DP once per microbatch",
    ),
)
