# SPDX-License-Identifier: Apache-2.0
"""A fourth round from the code without the tests: the launcher and the command line."""

from tests.mutants.catalogue.places import FUNCTIONAL, UNIT
from tests.mutants.mutant import Mutant

WITHOUT_E_JOBS = (
    Mutant(
        name="zero-replica-samples",
        file="mimo_colocated/cli/planning.py",
        old="int(part) > 0 for part in parts",
        new="int(part) >= 0 for part in parts",
        tests=(FUNCTIONAL + "test_plan_command.py::test_wrong_options",),
        why="--replica-samples 0 is accepted",
    ),
    Mutant(
        name="last-refusal-is-told",
        file="mimo_colocated/cli/planned_recipe.py",
        old="refusal = refusal or error",
        new="refusal = error",
        tests=(
            FUNCTIONAL + "test_plan_command.py"
            "::test_the_best_row_that_fits_is_written_or_the_first_refusal_told",
        ),
        why="what is told is why the last row does not fit, not the best one",
    ),
    Mutant(
        name="peers-gave-up-despite-a-job-error",
        file="mimo_colocated/launch/lost_ranks.py",
        old='if any(report.kind in ("job", "error") for report in reports.values()):',
        new='if any(report.kind == "error" for report in reports.values()):',
        tests=(UNIT + "test_who_waits.py::test_ranks_give_up_where_none_has_a_reason",),
        why="a refusal of one rank counts as a lost rank: ranks are killed",
    ),
    Mutant(
        name="steps-of-a-job-meet",
        file="mimo_colocated/launch/slurm.py",
        old='(int(environment["SLURM_JOB_ID"]) * 31 + step)',
        new='(int(environment["SLURM_JOB_ID"]) * 31)',
        tests=(UNIT + "test_slurm.py::test_all_tasks_of_a_step_meet_and_no_others",),
        why="two steps of one job use one port",
    ),
    Mutant(
        name="environment-keeps-what-was-set",
        file="mimo_colocated/launch/launcher.py",
        old=(
            "        os.environ.clear()\n"
            "        os.environ.update(before)"
        ),
        new="        os.environ.update(before)",
        tests=(UNIT + "test_left_as_found.py::test_it_is_as_before",),
        why="CUDA_VISIBLE_DEVICES stays empty after a job",
    ),
    Mutant(
        name="token-samples-without-last-label",
        file="mimo_colocated/train/checks.py",
        old="        longest += 1\n",
        new="",
        tests=(UNIT + "train/test_recipe.py::test_sequences_have_room_for_a_sample_of_tokens",),
        why="a capacity one token short is accepted and fails in mid-run",
    ),
    Mutant(
        name="peak-memory-in-kilobytes",
        file="mimo_colocated/train/numbers.py",
        old="ru_maxrss * 1024",
        new="ru_maxrss",
        tests=(UNIT + "train/test_numbers.py::test_memory_is_that_of_this_process",),
        why="peak memory on CPUs is a thousandth",
    ),
    Mutant(
        name="tail-of-held-out-counted-twice",
        file="mimo_colocated/train/evaluation.py",
        old="batches.at(start).only(count - start)",
        new="batches.at(start)",
        tests=(UNIT + "train/test_job.py::test_held_out_samples_count_once",),
        why="the last sample counts as often as the batch lacks samples",
    ),
    Mutant(
        name="generate-stops-at-one-end",
        file="mimo_colocated/train/answers.py",
        old='"eos_token_id": [*ends, end]',
        new='"eos_token_id": [end]',
        tests=(UNIT + "train/test_stop_at.py::test_generate_stops_where_an_answer_ends",),
        why="the exported model no longer stops at its own ends",
    ),
    Mutant(
        name="report-counts-shown-answers",
        file="mimo_colocated/train/report.py",
        old="right = sum(each.right for each in read)",
        new="right = sum(each.right for each in read[:ANSWERS])",
        tests=(UNIT + "train/test_report.py::test_the_first_answers_are_shown_right_or_wrong",),
        why="the page says that far fewer answers are right",
    ),
    Mutant(
        name="profile-rank-past-the-world",
        file="mimo_colocated/train/profile_steps.py",
        old="self.ranks[-1] >= world:",
        new="self.ranks[-1] > world:",
        tests=(UNIT + "train/test_tracing.py::test_steps_and_ranks_that_a_run_does_not_have",),
        why="a rank that does not exist is accepted: nothing is recorded",
    ),
    Mutant(
        name="group-status-of-one-recorder",
        file="mimo_colocated/forensics/flight_recorder.py",
        old='for key in ("pg_config", "pg_status"):',
        new='for key in ("pg_config",):',
        tests=(UNIT + "test_flight_recorder.py::test_what_both_recorders_know_is_in_one_record",),
        why="Gloo groups' status is lost where NCCL's recorder answers too",
    ),
    Mutant(
        name="seed-zero-without-draws",
        file="mimo_colocated/cli/generating.py",
        old='if options.more[name] is not None and options.more["temperature"] is None:',
        new='if options.more[name] and options.more["temperature"] is None:',
        tests=(
            FUNCTIONAL + "test_eval_and_generate.py"
            "::test_a_question_that_cannot_be_answered_is_refused",
        ),
        why="--seed 0 without --temperature is accepted and ignored",
    ),
    Mutant(
        name="killed-later-is-the-reason",
        file="mimo_colocated/launch/failures.py",
        old="end.code != -signal.SIGTERM and end.at <= limit",
        new="end.code != -signal.SIGTERM",
        tests=(FUNCTIONAL + "test_digits_launch.py::test_the_first_failure_is_named",),
        why="ranks that the launcher killed are named as the reason",
    ),
    Mutant(
        name="lengths-of-held-out-ignored",
        file="mimo_colocated/train/recipe.py",
        old=(
            "        parts = [*self.data.train, *self.data.held_out]\n"
            "        return len("
        ),
        new=(
            "        parts = self.data.train\n"
            "        return len("
        ),
        tests=(UNIT + "train/test_recipe.py::test_lengths_of_token_files_may_be_known",),
        why="held-out tokens of another length go through stages that cannot tell",
    ),
    Mutant(
        name="prepared-for-other-answers",
        file="mimo_colocated/train/data.py",
        old="data.look_at_images, answer_tokens]",
        new="data.look_at_images, bool(answer_tokens)]",
        tests=(UNIT + "train/test_job.py::test_what_makes_other_prepared_data_has_another_name",),
        why="questions prepared for another answer_tokens are taken",
    ),
    Mutant(
        name="tensorboard-keeps-undone-steps",
        file="mimo_colocated/train/boards.py",
        old="SummaryWriter(str(folder), purge_step=first)",
        new="SummaryWriter(str(folder))",
        tests=(
            UNIT + "train/test_boards.py"
            "::test_steps_that_are_made_again_are_in_tensorboard_once",
        ),
        why="steps after the checkpoint that a run resumes from stay in the curves",
    ),
)
