# SPDX-License-Identifier: Apache-2.0
"""Mistakes in what layouts are predicted to take."""

from tests.mutants.catalogue.places import MIMO, UNIT
from tests.mutants.mutant import Mutant

_PLAN = MIMO + "plan/"
_TESTS = UNIT + "plan/"

PLANNED = (
    Mutant(
        name="causal-attention-counted-whole",
        file=_PLAN + "flops.py",
        old="n * (n + 1) // 2 if causal",
        new="n * n if causal",
        tests=(_TESTS + "test_plan_flops.py::test_causal_and_packed_scores_are_those_that_a_mask"
               "_lets_through",),
        why="long sequences look twice as slow as they are, and CP twice as well hidden",
    ),
    Mutant(
        name="gradients-through-a-frozen-language-model-are-no-work",
        file=_PLAN + "step_flops.py",
        old="through = trained or LANGUAGE in frozen.adapted or frozen.any_encoder_trains(shapes)",
        new="through = trained",
        tests=(UNIT + "train/test_numbers.py::test_what_does_not_train_has_no_gradients",),
        why="the first stage of LLaVA looks half as fast as it is",
    ),
    Mutant(
        name="every-image-of-one-size",
        file=_PLAN + "step_flops.py",
        old="    if rows == shape.rows:\n        return shape",
        new="    if rows:\n        return shape",
        tests=(UNIT + "train/test_numbers.py::test_an_item_of_another_size_is_counted_by_its"
               "_rows",),
        why="the work of large images is not seen",
    ),
    Mutant(
        name="a-projector-reads-one-hidden-state",
        file=MIMO + "huggingface/plan_shapes.py",
        old="row=stack.hidden * part.features,",
        new="row=stack.hidden,",
        tests=(UNIT + "train/test_numbers.py::test_flops_are_those_that_pytorch_counts",),
        why="such a projector is planned with a part of its weights",
    ),
    Mutant(
        name="answers-are-code",
        file="mimo_colocated/train/report.py",
        old="<td>{escape(t)}</td>",
        new="<td>{t}</td>",
        tests=(UNIT + "train/test_report.py::test_the_first_answers_are_shown_right_or_wrong",),
        why="what a model says runs in the browser of who reads the page",
    ),
    Mutant(
        name="an-encoder-fills-no-bubble",
        file=_PLAN + "pipeline.py",
        old="filling + last - (some - 1) * (short_f + e_f)",
        new="filling + last - (some - 1) * short_f",
        tests=(_TESTS + "test_plan_pipeline.py::test_an_encoder_on_the_first_stage",),
        why="homogeneous layouts with stages look slower than they are",
    ),
    Mutant(
        name="cp-ring-in-full",
        file=_PLAN + "step_time.py",
        old="self.machine.seen(step, attention / at.cp)",
        new="step",
        tests=(_TESTS + "test_plan_parts.py::test_a_ring_counts_beyond_the_attention_that_it_runs"
               "_beside",),
        why="context parallelism is never chosen",
    ),
    Mutant(
        name="operations-start-at-once",
        file=_PLAN + "step_time.py",
        old="(linear + self.layers * machine.layer_start) * products",
        new="linear * products",
        tests=(_TESTS + "test_plan_parts.py::test_what_operations_take_to_start_by_hand",),
        why="small layers look as fast as large ones, and much TP as good as little",
    ),
    Mutant(
        name="links-beside-products-on-shared-cores",
        file=_PLAN + "machine.py",
        old="collective - self.hidden * min(collective, products)",
        new="max(0.0, collective - products)",
        tests=(_TESTS + "test_plan_parts.py::test_links_that_need_the_cores_hide_nothing",),
        why="on CPUs what is sent looks free",
    ),
    Mutant(
        name="what-starts-is-a-part-of-the-rate",
        file=MIMO + "job/calibration.py",
        old="rate = (many - few) / max(long - short, long / 2)",
        new="rate = many / long",
        tests=(_TESTS + "test_calibration.py::test_rates_are_work_over_time",),
        why="a calibrated machine is as slow with large layers as with small ones",
    ),
    Mutant(
        name="adapters-have-no-gradients",
        file=_PLAN + "step_time.py",
        old="share * weights + more",
        new="share * weights",
        tests=(_TESTS + "test_plan_parts.py::test_adapters_train_alone",),
        why="LoRA is planned without gradients and without an optimizer",
    ),
    Mutant(
        name="what-is-frozen-in-part-trains-whole",
        file=MIMO + "huggingface/trained.py",
        old="trained + size * trains",
        new="trained + size",
        tests=(UNIT + "huggingface/test_trained.py::test_as_many_as_a_model_that_is_made_trains",),
        why="a recipe that freezes layers by a pattern is planned as if it froze nothing",
    ),
    Mutant(
        name="frozen-layers-keep-what-trained-ones-do",
        file=_PLAN + "footprint.py",
        old="whole -= _for_weights(stack, work.itemsize, at.tp)",
        new="whole -= 0.0",
        tests=("tests/benchmarks_tests/test_plan_memory.py::test_a_step_is_planned_as_it_is"
               "_counted",),
        why="layouts that fit a frozen language model are rejected",
    ),
    Mutant(
        name="layers-are-computed-again-in-no-memory",
        file=_PLAN + "footprint.py",
        old="return gradients + computed_again(name, candidate, shapes, work)",
        new="return gradients",
        tests=("tests/benchmarks_tests/test_plan_memory.py::test_a_step_is_planned_as_it_is"
               "_counted",),
        why="an encoder runs out of memory when its layers are computed again",
    ),
    Mutant(
        name="states-on-every-replica",
        file=_PLAN + "footprint.py",
        old="sum(each.trained / each.ranks for each in held)",
        new="sum(each.trained for each in held)",
        tests=(_TESTS + "test_plan_parts.py::test_states_are_six_bytes_and_twelve_over_the"
               "_replicas",),
        why="layouts that fit are rejected",
    ),
    Mutant(
        name="backward-pass-of-the-encoder-forgotten",
        file=_PLAN + "footprint.py",
        old="moments.append(_moment(candidate, shapes, work, machine, first=True, language=False))",
        new="moments.append(_moment(candidate, shapes, work, machine, first=True))",
        tests=(_TESTS + "test_plan_parts.py::test_the_encoders_own_backward_pass_may_be_the"
               "_fullest_moment",),
        why="a layout is chosen that runs out of memory when the encoder goes back",
    ),
    Mutant(
        name="even-items-assumed",
        file=_PLAN + "encoder_parts.py",
        old="return math.ceil(items / candidate.encoder(name).dp)",
        new="return max(1, items // candidate.encoder(name).dp)",
        tests=(_TESTS + "test_plan_parts.py::test_uneven_items_are_the_fullest_replicas",),
        why="replicas with an item more are waited for, and the plan does not know",
    ),
    Mutant(
        name="first-that-fits",
        file=_PLAN + "estimates.py",
        old="return min(fitting, key=lambda each: each.seconds.total)",
        new="return fitting[-1]",
        tests=(_TESTS + "test_plan_candidates.py::test_what_does_not_fit_gets_a_policy",),
        why="everything is recomputed where a little would have been enough",
    ),
    Mutant(
        name="the-encoders-backward-pass-is-time-of-the-bridge",
        file="mimo_colocated/train/clock.py",
        old='phases.ENCODER_BACKWARD: "encoder",',
        new='phases.ENCODER_BACKWARD: "bridge",',
        tests=(UNIT + "train/test_clock.py::test_the_parts_of_a_step",),
        why="the bridge is blamed for what the encoder takes",
    ),
    Mutant(
        name="the-host-waits-at-every-mark",
        file="mimo_colocated/train/clock.py",
        old="        event.record()\n",
        new="        event.record()\n        event.synchronize()\n",
        tests=(UNIT + "train/test_clock.py::test_the_parts_of_a_step",),
        why="measuring a GPU's step makes it slower",
    ),
    Mutant(
        name="a-phase-goes-on-in-another-thread",
        file="mimo_colocated/train/tracing.py",
        old='event["dur"] = min(event["dur"], following["ts"] - event["ts"])',
        new='event["dur"] = min(event["dur"], following["dur"])',
        tests=(UNIT + "train/test_tracing.py::test_a_phase_ends_where_the_next_begins_whatever_the"
               "_thread",),
        why="a viewer shows the language model's forward pass until the end of the backward pass",
    ),
    Mutant(
        name="a-short-sound-is-embedded-as-a-short-one",
        file=_PLAN + "flops.py",
        old="(shape.embedded or shape.tokens)",
        new="shape.tokens",
        tests=(UNIT + "train/test_numbers.py::test_a_sound_without_rows_is_embedded_as_any_other",),
        why="the work on padded spectra is not seen",
    ),
)
