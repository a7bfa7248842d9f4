# SPDX-License-Identifier: Apache-2.0
"""Written from the code, without the tests: mistakes in ``mimo_colocated``."""

from tests.mutants.mutant import Mutant

WITHOUT_B_JOBS = (
    Mutant(
        name="the-first-version-that-is-not-supported-is",
        file="mimo_colocated/_startup.py",
        old="any(low <= numbers < high",
        new="any(low <= numbers <= high",
        tests=(
            "tests/packaging/test_versions_agree.py::test_hook_and_pyproject_accept_the_same_versions",
        ),
        why="megatron-core 0.16.2 and 0.20.0 are accepted",
    ),
    Mutant(
        name="the-watchdogs-dump-wins",
        file="mimo_colocated/forensics/evidence.py",
        old='if path.name.startswith("rank_") or rank not in found:',
        new="if rank not in found:",
        tests=(
            "tests/unit_tests/mimo/test_who_waits.py::test_dumps_are_read_and_nothing_is_executed",
        ),
        why="the dump that has the groups is not read",
    ),
    Mutant(
        name="an-old-summary-stays",
        file="mimo_colocated/forensics/evidence.py",
        old="if _DUMPS.fullmatch(path.name) or path.name == SUMMARY:",
        new="if _DUMPS.fullmatch(path.name):",
        tests=(
            "tests/unit_tests/mimo/test_who_waits.py::test_dumps_are_read_and_nothing_is_executed",
        ),
        why="the summary of an earlier failure stands beside the new dumps",
    ),
    Mutant(
        name="the-older-switch-is-overruled",
        file="mimo_colocated/forensics/flight_recorder.py",
        old="if not any(name in os.environ for name in _SWITCHES):",
        new="if _SWITCH not in os.environ:",
        tests=(
            "tests/unit_tests/mimo/test_flight_recorder.py::test_what_the_user_has_switched_stays",
        ),
        why="what the user set under NCCL's name is overridden",
    ),
    Mutant(
        name="what-has-ended-is-under-way",
        file="mimo_colocated/forensics/flight_recorder.py",
        old="any(entered > ended for",
        new="any(entered >= ended for",
        tests=(
            "tests/unit_tests/mimo/test_flight_recorder.py::test_a_collective_that_has_ended_is_not_under_way",
        ),
        why="a rank that waits for nobody is said to be in a collective",
    ),
    Mutant(
        name="microbatches-go-on-counting",
        file="mimo_colocated/phases.py",
        old=(
            '    """Say that what follows belongs to the whole step."""\n'
            "    _own.microbatch, _own.forwards = -1, 0\n"
        ),
        new=(
            '    """Say that what follows belongs to the whole step."""\n'
            "    _own.microbatch = -1\n"
        ),
        tests=(
            "tests/unit_tests/mimo/test_phases.py::test_microbatches_are_counted_anew_in_jobs_that_tell_no_steps",
        ),
        why="jobs that do not tell steps see microbatch numbers grow for ever",
    ),
    Mutant(
        name="step-0-is-none",
        file="mimo_colocated/phases.py",
        old="if self.step >= 0 else",
        new="if self.step > 0 else",
        tests=("tests/unit_tests/mimo/test_phases.py::test_marks_steps_and_microbatches",),
        why="a failure in the first step names no step",
    ),
    Mutant(
        name="microbatch-0-is-the-current-one",
        file="mimo_colocated/phases.py",
        old="number = _own.microbatch if microbatch is None else microbatch",
        new="number = microbatch or _own.microbatch",
        tests=(
            "tests/unit_tests/mimo/test_phases.py::test_backward_marks_only_what_needs_a_gradient",
        ),
        why="backward of the first microbatch is noted as another's",
    ),
    Mutant(
        name="meetings-are-one-arrival-ahead",
        file="mimo_colocated/process_groups.py",
        old='(store.add(f"{base}/arrivals", 1) - 1) // len(ranks)',
        new='store.add(f"{base}/arrivals", 1) // len(ranks)',
        tests=(
            "tests/unit_tests/mimo/test_own_groups.py::test_members_agree_on_names_that_never_come_again",
        ),
        why="the last member waits in another meeting: a hang",
    ),
    Mutant(
        name="the-world-has-one-rank-more",
        file="mimo_colocated/process_groups.py",
        old="if not 0 <= member < world_size]",
        new="if not 0 <= member <= world_size]",
        tests=("tests/unit_tests/mimo/test_own_groups.py::test_bad_enumerations",),
        why="members wait for a rank that is not there",
    ),
    Mutant(
        name="the-default-groups-timeout-wins",
        file="mimo_colocated/process_groups.py",
        old='timeout = kwargs.get("timeout") or _timeout_of_the_default_group()',
        new='timeout = _timeout_of_the_default_group() or kwargs.get("timeout")',
        tests=(
            "tests/unit_tests/mimo/test_own_groups.py::test_timeout_and_options_of_the_caller_reach_torch",
        ),
        why="an argument is ignored",
    ),
    Mutant(
        name="pg-options-are-dropped",
        file="mimo_colocated/process_groups.py",
        old="            backend_options=pg_options,\n",
        new="            backend_options=None,\n",
        tests=(
            "tests/unit_tests/mimo/test_own_groups.py::test_timeout_and_options_of_the_caller_reach_torch",
        ),
        why="an argument is ignored",
    ),
    Mutant(
        name="errors-of-a-release-are-raised-after-the-end",
        file="mimo_colocated/process_groups.py",
        old="        if dist.is_initialized():\n            raise",
        new="        if not dist.is_initialized():\n            raise",
        tests=(
            "tests/unit_tests/mimo/test_hyper_comm_grid.py::test_release_of_a_group_that_went_with_the_world_or_not",
        ),
        why="a group that cannot be destroyed is not told, one that is gone is an error",
        ranks=8,
    ),
    Mutant(
        name="agreed-ignores-its-group",
        file="mimo_colocated/stop_requests.py",
        old="dist.all_reduce(flags, group=group)",
        new="dist.all_reduce(flags)",
        tests=(
            "tests/unit_tests/mimo/test_stop_requests.py::test_what_one_rank_is_asked_all_ranks_agree_on",
        ),
        why="an argument is ignored",
    ),
    Mutant(
        name="a-second-sigterm-counts-from-the-last",
        file="mimo_colocated/stop_requests.py",
        old="self._terminated_at or now\n",
        new="now\n",
        tests=(
            "tests/unit_tests/mimo/test_stop_requests.py::test_a_second_sigterm_is_counted_from_the_first",
        ),
        why="signals that keep coming never end the process",
    ),
    Mutant(
        name="closing-restores-the-default-handlers",
        file="mimo_colocated/stop_requests.py",
        old="                signal.signal(sent, handler)\n",
        new="                signal.signal(sent, signal.SIG_DFL)\n",
        tests=("tests/unit_tests/mimo/test_stop_requests.py::test_handlers_of_before_come_back",),
        why="what handled a signal before is lost",
    ),
    Mutant(
        name="the-milder-signal-is-told",
        file="mimo_colocated/stop_requests.py",
        old="return next((sent for sent in SIGNALS if sent in self._asked), None)",
        new="return next((sent for sent in reversed(SIGNALS) if sent in self._asked), None)",
        tests=(
            "tests/unit_tests/mimo/test_stop_requests.py::test_the_more_urgent_signal_is_told_whatever_came_first",
        ),
        why="asked by both, the job hears of SIGUSR1",
    ),
    Mutant(
        name="the-same-call-is-not-entered",
        file="mimo_colocated/forensics/who_waits.py",
        old="return max(same, default=0) >= call.seq",
        new="return max(same, default=0) > call.seq",
        tests=(
            "tests/unit_tests/mimo/test_who_waits.py::test_of_two_under_way_the_one_that_cannot_end",
        ),
        why="ranks that have come are said to be missing",
    ),
    Mutant(
        name="the-first-call-under-way-is-waited-in",
        file="mimo_colocated/forensics/who_waits.py",
        old="return next(iter([*stuck, *candidates]), None)",
        new="return next(iter(candidates), None)",
        tests=(
            "tests/unit_tests/mimo/test_who_waits.py::test_of_two_under_way_the_one_that_cannot_end",
        ),
        why="a reduction that overlaps is named in place of the call that cannot end",
    ),
    Mutant(
        name="calls-as-the-recorder-lists-them",
        file="mimo_colocated/forensics/who_waits.py",
        old="return sorted(found, key=lambda call: call.at)",
        new="return found",
        tests=(
            "tests/unit_tests/mimo/test_who_waits.py::test_entries_are_read_in_the_order_of_time",
        ),
        why="with two recorders the last call is that of one of them",
    ),
)
