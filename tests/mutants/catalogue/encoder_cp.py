# SPDX-License-Identifier: Apache-2.0
"""Mistakes about encoders that cut their items over CP."""

from tests.mutants.catalogue.places import MIMO, UNIT
from tests.mutants.mutant import Mutant

_ULYSSES = MIMO + "transformer/ulysses_attention.py"
_WHOLE = UNIT + "test_ulysses_attention.py::test_equal_to_whole_items_on_one_rank"
_MODEL = UNIT + "test_encoder_cp.py::"
_LLAVA = UNIT + "huggingface/test_llava.py::"

ENCODER_CP = (
    Mutant(
        name="an-encoders-cp-ranks-are-one-holder",
        file=MIMO + "comm/plan/routed_layout.py",
        old="self.layout.src_cp_size + self.layout.src_cp[self.members]",
        new="self.layout.src_cp_size",
        tests=(UNIT + "test_encoder_cp_routes.py::test_exchange_groups_hold_whole_replicas",),
        why="all CP ranks of an encoder send what the first one holds, and others' rows are lost",
    ),
    Mutant(
        name="parts-of-an-item-are-taken-for-items",
        file=MIMO + "comm/plan/token_runs.py",
        old="np.arange(parts + 1) // parts",
        new="np.arange(parts + 1) // (parts + 1)",
        tests=(UNIT + "test_encoder_cp_routes.py::test_rows_of_parts_are_those_of_the_rule",),
        why="rows of one part are put at the places of another",
    ),
    Mutant(
        name="heads-come-back-in-the-order-of-positions",
        file=_ULYSSES,
        old="return received.view(size, own, out.size(1)).transpose(0, 1).flatten(1)",
        new="return received.view(own, size, out.size(1)).flatten(1)",
        tests=(_WHOLE,),
        why="a position gets another position's heads, in the right shape",
    ),
    Mutant(
        name="gradients-of-items-stay-in-their-order",
        file=_ULYSSES,
        old="return dy.index_select(0, ctx.back), None, None",
        new="return dy.clone(), None, None",
        tests=(_WHOLE,),
        why="of several items, gradients go to other positions than the rows came from",
    ),
    Mutant(
        name="a-class-token-is-a-row-of-the-first-part",
        file=_ULYSSES,
        old="        if rank or not self.lead:\n            return local\n",
        new="        if True:\n            return local\n",
        tests=(
            UNIT + "test_ulysses_attention.py::TestParts::test_leading_positions_make_no_rows",
        ),
        why="an image has a row too many, on its first CP rank alone",
    ),
    Mutant(
        name="an-encoder-need-not-say-that-it-cuts-its-items",
        file=MIMO + "submodules/base.py",
        old='if getattr(inner, "cuts_items", False) is not True:',
        new='if getattr(inner, "cuts_items", True) is not True:',
        tests=(_MODEL + "test_encoders_that_do_not_cut_are_refused_when_the_model_is_built",),
        why="every CP rank encodes all items, and the first batch fails, or does not",
    ),
    Mutant(
        name="cp-ranks-with-other-items-are-believed",
        file=MIMO + "comm/plan_guard.py",
        old="        if told[place] != told[one]:\n",
        new="        if False:\n",
        tests=(_MODEL + "test_ranks_of_a_replica_that_encode_other_items",),
        why="parts of two batches are put together as one",
    ),
    Mutant(
        name="a-second-encoders-items-come-after-the-first-ones",
        file=MIMO + "submodules/base.py",
        old="for item in zip(*counts, strict=True) for count in item]",
        new="for item in counts for count in item]",
        tests=(_MODEL + "test_whole_items_stand_as_their_tokens_do",),
        why="with two encoders of a modality rows of one stand at the other's places",
    ),
    Mutant(
        name="plans-ahead-take-a-replica-for-one-holder",
        file=MIMO + "data/loader.py",
        old="parts_of_items(share.held, encoder.layout.src_cp_size)",
        new="parts_of_items(share.held, 1) * encoder.layout.src_cp_size",
        tests=(UNIT + "data/test_loader.py::test_peers_hold_the_same_and_replicas_all",),
        why="routes of a recipe are planned as if each CP rank had whole images",
    ),
    Mutant(
        name="a-class-token-is-counted-where-it-makes-no-row",
        file=MIMO + "huggingface/families/vision_towers.py",
        old="more = int(self.clip) - features.first_row",
        new="more = int(self.clip)",
        tests=(_LLAVA + "test_logits_and_gradients_are_those_of_transformers",),
        why="an image has a row more than its tokens, and every batch is refused",
    ),
    Mutant(
        name="any-encoder-of-a-folder-can-be-cut-over-cp",
        file=MIMO + "huggingface/fits.py",
        old="        if part.cuts_items and part.modality not in torch_native\n",
        new="        if part.modality not in torch_native\n",
        tests=(
            UNIT + "huggingface/test_refusals.py::"
            "test_encoders_that_are_not_cut_over_cp_are_refused_by_name",
        ),
        why="Qwen's towers are refused when ranks have started and the folder is open",
    ),
    Mutant(
        name="torch-native-encoders-can-be-cut-over-cp",
        file=MIMO + "huggingface/fits.py",
        old="        if part.cuts_items and part.modality not in torch_native\n",
        new="        if part.cuts_items\n",
        tests=(
            UNIT + "huggingface/test_refusals.py::"
            "test_encoders_that_are_not_cut_over_cp_are_refused_by_name",
        ),
        why="a tower of transformers would encode whole images on every CP rank",
    ),
    Mutant(
        name="an-encoders-exchanges-take-no-time",
        file=MIMO + "plan/step_time.py",
        old="        cp=encoding.cp + all_of_it.cp,\n",
        new="        cp=all_of_it.cp,\n",
        tests=(UNIT + "plan/test_plan_parts.py::test_an_encoder_cut_over_cp_by_hand",),
        why="an encoder's CP looks free, and is chosen where TP or DP are faster",
    ),
    Mutant(
        name="an-encoders-cp-divides-its-inputs",
        file=MIMO + "memory/plan.py",
        old="        inputs=whole * shape.patch",
        new="        inputs=tokens * shape.patch",
        tests=(
            UNIT + "plan/test_plan_parts.py::"
            "test_cp_divides_what_an_encoder_keeps_but_its_inputs",
        ),
        why="recomputed encoders are planned with a part of the pixels that every rank has",
    ),
)
