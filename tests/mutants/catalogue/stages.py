# SPDX-License-Identifier: Apache-2.0
"""Mistakes with pipeline stages of the language model."""

from tests.mutants.catalogue.places import MIMO, UNIT
from tests.mutants.mutant import Mutant

_STEP = MIMO + "pipeline/step.py"
_SIDE = MIMO + "model/stage_side.py"
_ROUTES = UNIT + "test_stage_routes.py::"
_ON_THREADS = UNIT + "test_stage_side.py::test_rows_and_gradients_against_one_rank"
_ON_RANKS = UNIT + "test_pipeline_step_8rank.py::"
_AHEAD = UNIT + "test_encode_ahead.py::"

STAGES = (
    Mutant(
        name="rows-go-to-every-stage",
        file=MIMO + "comm/plan/routed_layout.py",
        old="return np.where(at.dest_pp[self.members] == at.dest_stage, owner, -1)",
        new="return owner",
        tests=(_ROUTES + "test_every_layout_of_stages_against_the_oracle",),
        why="rows go to stages that do not read them, and the first stage lacks them",
    ),
    Mutant(
        name="merged-gradients-of-other-microbatches",
        file=MIMO + "comm/plan/merged_routes.py",
        old="[own[p.backward.send_index] for p, own in zip(plans, own_index, strict=True)]",
        new="[p.backward.send_index for p in plans]",
        tests=(_ROUTES + "test_merged_routes_bring_every_microbatch_what_its_own_routes_do",),
        why="an image's gradient is that of another microbatch's image",
    ),
    Mutant(
        name="merged-rows-move-if-the-first-microbatch-has-any",
        file=MIMO + "comm/plan/merged_routes.py",
        old="moves=any(leg.moves for leg in legs)",
        new="moves=legs[0].moves",
        tests=(_ON_THREADS,),
        why="a step whose first microbatch has no images never gets the others'",
    ),
    Mutant(
        name="merged-rows-move-if-all-microbatches-have-any",
        file=MIMO + "comm/plan/merged_routes.py",
        old="moves=any(leg.moves for leg in legs)",
        new="moves=all(leg.moves for leg in legs)",
        tests=(_ON_THREADS,),
        why="one microbatch without images takes all others' away",
    ),
    Mutant(
        name="frozen-rows-move-if-the-first-microbatch-has-any",
        file="megatron/core/models/mimo/model/routed_path.py",
        old='if any(name in each.moving for each in planned):',
        new='if name in planned[0].moving:',
        tests=(_ON_THREADS,),
        why="a step whose first microbatch has no images never gets a frozen encoder's rows",
    ),
    Mutant(
        name="gathered-rows-of-a-microbatch-in-another-order",
        file="megatron/core/models/mimo/model/gathered_path.py",
        old='leaves.cut(rows, [torch.arange(rows.size(0), device=rows.device)], None)',
        new='leaves.cut(rows, [torch.arange(rows.size(0), device=rows.device).flip(0)], None)',
        tests=(_ON_THREADS,),
        why="over a gather bridge images of a pipelined step stand at each other's places",
    ),
    Mutant(
        name="a-window-of-half-the-stages-goes-back-early",
        file=MIMO + "pipeline/windows.py",
        old="return cls(count, size, 0, -(-(stages - 1) // size), stages)",
        new="return cls(count, size, 0, max(1, (stages - 1) // size), stages)",
        tests=(_ON_RANKS + "test_windows_of_microbatches",),
        why="with 4 stages and 2 microbatches encoded together gradients are lost",
        ranks=8,
    ),
    Mutant(
        name="a-last-window-that-is-not-full-is-not-the-last",
        file=_STEP,
        old="last = (window + 1) * self._window >= self._count",
        new="last = (window + 1) * self._window == self._count",
        tests=(_ON_RANKS + "test_windows_of_microbatches",),
        why="encoder replicas are not reduced where the step is no multiple of the window",
        ranks=8,
    ),
    Mutant(
        name="gradients-of-the-last-microbatch-only",
        file="megatron/core/models/mimo/model/leaves.py",
        old='whole.index_copy_(0, index, leaf.grad)',
        new='whole = whole.new_zeros(whole.shape).index_copy_(0, index, leaf.grad)',
        tests=(_ON_RANKS + "test_microbatches_with_and_without_images",),
        why="encoders learn from one microbatch of the step",
        ranks=8,
    ),
    Mutant(
        name="gradients-taken-back-a-window-early",
        file=_STEP,
        old="done = window - 1 - self._windows.lag",
        new="done = window - self._windows.lag",
        tests=(_ON_RANKS + "test_windows_of_microbatches",),
        why="the first stage has not run backward on all of the window, so gradients are lost",
        ranks=8,
    ),
    Mutant(
        name="encoders-reduce-in-every-window-but-the-last",
        file=_STEP,
        old="if not last or name in late]",
        new="if last]",
        tests=(_ON_RANKS + "test_windows_of_microbatches",),
        why="the encoder's replicas train on different gradients",
        ranks=8,
    ),
    Mutant(
        name="a-window-is-not-taken-back-at-the-end",
        file=_STEP,
        old="under_way = sorted(self._under_way)",
        new="under_way = sorted(self._under_way)[1:]",
        tests=(_ON_RANKS + "test_microbatches_with_and_without_images",),
        why="encoders do not learn from the windows that are under way when the pipeline ends",
        ranks=8,
    ),
    Mutant(
        name="encoded-ahead-and-waited-for-at-once",
        file=MIMO + "pipeline/step.py",
        old="        self._sent.append((batches, encoded))\n",
        new="        self._sent.append((batches, encoded))\n        _ = encoded.microbatches\n",
        tests=(_AHEAD + "test_exchanges_are_under_way_while_the_language_model_computes",),
        why="exchanges cost what they cost without encode_ahead, and memory besides",
    ),
    Mutant(
        name="gradients-sent-back-and-waited-for-at-once",
        file=MIMO + "pipeline/step.py",
        old="            done -= 1\n",
        new="",
        tests=(_AHEAD + "test_exchanges_are_under_way_while_the_language_model_computes",),
        why="nothing hides the exchange of gradients",
    ),
    Mutant(
        name="gradients-of-a-flight-sent-again",
        file=MIMO + "model/leaves.py",
        old="            if each.edges and each.gradients is None:\n                each",
        new="            if each.edges:\n                each",
        tests=(_AHEAD + "test_gradients_are_those_of_one_microbatch_after_the_other",),
        why="a second exchange sends zeros, or a graph that is gone is walked",
    ),
    Mutant(
        name="problems-of-other-ranks-are-not-heard",
        file="megatron/core/models/mimo/model/routed_path.py",
        old='found = bridge.hear(found, count)',
        new='bridge.hear(found, count)',
        tests=(UNIT + "test_stage_side.py::test_a_rank_with_a_problem_stops_all",),
        why="a rank whose data ended raises alone and the others wait for its rows",
    ),
    Mutant(
        name="a-failed-encoder-is-not-told",
        file="megatron/core/models/mimo/model/routed_path.py",
        old='return *encoders.run_all(names, None, dtype), {}, error',
        new='raise',
        tests=(UNIT + "test_stage_side.py::test_an_encoder_that_fails_stops_all",),
        why="replicas wait for the rows of one whose encoder raised",
    ),
)
