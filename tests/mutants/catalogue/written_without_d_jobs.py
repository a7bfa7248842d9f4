# SPDX-License-Identifier: Apache-2.0
"""A third round from the code without the tests: jobs, configurations, the launcher."""

from tests.mutants.catalogue.places import FUNCTIONAL, MIMO, UNIT
from tests.mutants.mutant import Mutant

WITHOUT_D_JOBS = (
    Mutant(
        name="metrics-short-writes",
        file=MIMO + "job/results.py",
        old="os.write(self._file, content[written:])",
        new="os.write(self._file, content)",
        tests=(
            FUNCTIONAL + "test_digits_report.py"
            "::test_a_file_that_takes_a_few_bytes_at_a_time_has_every_byte_once",
        ),
        why="a short write repeats a line's beginning",
    ),
    Mutant(
        name="lowest-scale-goes-on",
        file=MIMO + "job/trainer.py",
        old="math.isfinite(result.loss) and scale > lowest",
        new="math.isfinite(result.loss) and scale >= lowest",
        tests=(UNIT + "test_job_loop.py::test_when_a_smaller_loss_scale_may_mend_it",),
        why="a run at the smallest loss scale is never stopped",
    ),
    Mutant(
        name="route-plan-of-other-lengths",
        file=MIMO + "job/route_plans.py",
        old="if known and np.array_equal(known[0], tokens) and np.array_equal(known[1], lengths):",
        new="if known and np.array_equal(known[0], tokens):",
        tests=(
            FUNCTIONAL + "test_digits_two_encoders.py"
            "::test_a_plan_serves_as_long_as_tokens_stand_in_the_same_places",
        ),
        why="packed samples of other lengths go by the routes of before",
    ),
    Mutant(
        name="level-behind-the-last-layer",
        file=MIMO + "config/checks.py",
        old="0 <= numbers[0] <= numbers[-1] < count:",
        new="0 <= numbers[0] <= numbers[-1] <= count:",
        tests=(UNIT + "test_deepstack.py::test_layers_that_cannot_be",),
        why="a layer that does not exist is named late and elsewhere",
    ),
    Mutant(
        name="aborted-beside-fates",
        file="mimo_colocated/launch/failures.py",
        old="if own or fates or len(aborted) < len(killed):",
        new="if own or len(aborted) < len(killed):",
        tests=(
            FUNCTIONAL + "test_digits_launch.py"
            "::test_lost_ranks_are_named_with_phase_and_collective",
        ),
        why="ranks that waited are named instead of the stopped one",
    ),
    Mutant(
        name="folder-of-two-dtypes",
        file="mimo_colocated/cli/models.py",
        old='if {name for name in found if "float" in name} == {half}:',
        new="if half in found:",
        tests=(
            UNIT + "huggingface/test_refusals.py"
            "::test_all_weights_of_a_folder_fit_the_dtype_that_is_chosen",
        ),
        why="fp32 tensors of a folder are rounded to its halves",
    ),
    Mutant(
        name="torch-ddp-shows-in-names",
        file=MIMO + "wrappers.py",
        old="    torch.nn.parallel.DistributedDataParallel,\n",
        new="",
        tests=(
            UNIT + "test_wrapped_names.py::test_wrappers_that_hold_a_module_are_looked_through",
        ),
        why="names and initial weights change with torch's DDP around a module",
    ),
    Mutant(
        name="summary-not-on-disk",
        file="mimo_colocated/launch/errors.py",
        old="                os.fsync(file.fileno())\n",
        new="",
        tests=(FUNCTIONAL + "test_digits_report.py::test_a_full_disk_keeps_the_old_file",),
        why="after a power cut the metrics are empty",
    ),
    Mutant(
        name="doctor-fails-on-notes",
        file="mimo_colocated/cli/doctor.py",
        old="return int(any(line.state == BAD for line in lines))",
        new="return int(any(line.state != OK for line in lines))",
        tests=(
            FUNCTIONAL + "test_mimo_command.py"
            "::test_the_doctor_needs_no_extras_and_tells_each_cure",
        ),
        why="a machine without optional packages is reported as broken",
    ),
    Mutant(
        name="largest-job-refused",
        file="mimo_colocated/launch/layouts.py",
        old="elif encoder.size > MAX_RANKS:",
        new="elif encoder.size >= MAX_RANKS:",
        tests=(
            FUNCTIONAL + "test_digits_options.py::test_the_largest_job_is_checked_and_none_beyond",
        ),
        why="a job of the largest size is refused",
    ),
    Mutant(
        name="group-in-the-order-given",
        file="mimo_colocated/process_groups.py",
        old="next((sorted(ranks) for ranks in rank_enum if rank in ranks), None)",
        new="next((ranks for ranks in rank_enum if rank in ranks), None)",
        tests=(
            UNIT + "test_own_groups.py"
            "::test_a_rank_in_no_group_makes_none_and_gives_torch_its_options",
        ),
        why="members are numbered other than torch does",
    ),
    Mutant(
        name="moment-of-deaths-only",
        file="mimo_colocated/launch/failures.py",
        old=(
            "moments = [report.at for report in reports.values()] + [end.at for end in "
            "exits.values()]"
        ),
        new="moments = [end.at for end in exits.values()]",
        tests=(FUNCTIONAL + "test_digits_launch.py::test_the_first_failure_is_named",),
        why="ranks that were killed because they did not end are given as the reason",
    ),
    Mutant(
        name="micro-batches-may-change",
        file=MIMO + "job/loop.py",
        old='        "micro_batches",\n',
        new="",
        tests=(UNIT + "test_job_loop.py::test_what_a_resumed_run_may_change",),
        why="a resumed run trains on other microbatches than recorded",
    ),
    Mutant(
        name="aside-fails-on-rank-0",
        file=MIMO + "job/loop.py",
        old="        dist.broadcast_object_list(failure, src=0)\n",
        new="",
        tests=(
            UNIT + "test_job_loop.py"
            "::test_results_that_cannot_be_set_aside_are_one_error_on_all_ranks",
        ),
        why="rank 0 raises alone and the others wait",
    ),
    Mutant(
        name="one-more-skipped-step",
        file=MIMO + "job/loop.py",
        old="if self._skipped_in_a_row >= self.options.max_skipped:",
        new="if self._skipped_in_a_row > self.options.max_skipped:",
        tests=(
            UNIT + "test_job_loop.py"
            "::test_a_run_stops_after_as_many_skipped_steps_in_a_row_as_said",
        ),
        why="max_skipped=1 goes on after one skipped step",
    ),
    Mutant(
        name="top-2-of-one-expert",
        file=MIMO + "job/settings.py",
        old='"moe_router_topk": min(2, options.experts),',
        new='"moe_router_topk": 2,',
        tests=(UNIT + "test_job_loop.py::test_a_token_goes_to_two_experts_where_there_are_two",),
        why="a job with one expert dies",
    ),
    Mutant(
        name="nan-loss-on-one-rank",
        file=MIMO + "job/trainer.py",
        old="        dist.all_reduce(losses)\n",
        new="",
        tests=(
            UNIT + "test_job_loop.py"
            "::test_ranks_with_a_loss_that_is_finite_look_with_those_that_have_none",
        ),
        why="only the rank with the nan runs the second forward pass",
    ),
    Mutant(
        name="token-true",
        file=MIMO + "config/checks.py",
        old="_NO_IDS = (bool, float, str,",
        new="_NO_IDS = (float, str,",
        tests=(UNIT + "test_config.py::test_special_tokens_that_cannot_be_meant_are_refused",),
        why="True is taken for token 1",
    ),
    Mutant(
        name="lent-group-stays",
        file=MIMO + "compat.py",
        old="            del borrower.tp_group\n",
        new="            pass\n",
        tests=(UNIT + "test_left_as_found.py::test_it_is_as_before",),
        why="a save leaves groups on modules that had none",
    ),
    Mutant(
        name="cumulative-lengths-of-64-bits",
        file=MIMO + "compat.py",
        old='name: value.to(torch.int32) if "cu_seqlens" in name and value is not None else value',
        new="name: value",
        tests=(
            UNIT + "test_compat.py::test_lengths_of_every_kind_become_32_bit_and_nothing_else_does",
        ),
        why="int64 lengths reach kernels that read int32",
    ),
)
