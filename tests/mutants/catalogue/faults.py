# SPDX-License-Identifier: Apache-2.0
"""Mistakes in what is said of a rank that died or stalled."""

from tests.mutants.catalogue.places import UNIT
from tests.mutants.mutant import Mutant

_WAITS = "mimo_colocated/forensics/who_waits.py"
_PHASES = "mimo_colocated/phases.py"
_STOPS = "mimo_colocated/stop_requests.py"
_OF_STOPS = UNIT + "test_stop_requests.py::"
_OF_WAITS = UNIT + "test_who_waits.py::"
_OF_PHASES = UNIT + "test_phases.py::"

FAULTS = (
    Mutant(
        name="blames-a-rank-that-waits-itself",
        file=_WAITS,
        old="return sorted(wanted - set(self.waits))",
        new="return sorted(wanted)",
        tests=(_OF_WAITS + "test_ranks_in_a_circle_are_nobodys_fault_alone",),
        why="the message names a rank that is as innocent as those that wait for it",
    ),
    Mutant(
        name="names-a-collective-that-others-hold-up-too",
        file=_WAITS,
        old="return bool(others), not call.seq, call.at",
        new="return False, not call.seq, call.at",
        tests=(_OF_WAITS + "test_a_collective_that_nobody_else_holds_up_is_named_first",),
        why="the collective in the message is a consequence of another wait",
    ),
    Mutant(
        name="ended-collectives-count-as-waits",
        file=_WAITS,
        old='under_way=not entry.get("retired") and entry.get("state") != "completed",',
        new='under_way=entry.get("state") != "completed",',
        tests=(_OF_WAITS + "test_entries_are_read_in_the_order_of_time",),
        why="gloo's entries never say completed: every rank seems to wait in its first collective",
    ),
    Mutant(
        name="phase-is-set-back-after-an-error",
        file=_PHASES,
        old="    yield\n    mark(before)",
        new="    try:\n        yield\n    finally:\n        mark(before)",
        tests=(_OF_PHASES + "test_the_phase_before_comes_back_but_not_after_an_error",),
        why="a rank that gave up in a checkpoint's save is said to have been in the step before",
    ),
    Mutant(
        name="any-process-of-that-number",
        file=_PHASES,
        old='return state if started == self.started and state not in ("Z", "X") else ""',
        new='return state if state not in ("Z", "X") else ""',
        tests=(_OF_PHASES + "test_another_process_of_the_same_number_is_not_taken_for_it",),
        why="a process that has the number of a dead rank by now is killed in its place",
    ),
    Mutant(
        name="groups-with-torchs-timeout",
        file="mimo_colocated/process_groups.py",
        old='timeout = kwargs.get("timeout") or _timeout_of_the_default_group()',
        new='timeout = kwargs.get("timeout")',
        tests=(
            UNIT + "test_flight_recorder.py::test_who_waits_for_whom_from_the_recorder_itself",
        ),
        why="ranks wait for a stalled one in a bridge or TP group for half an hour",
    ),
    Mutant(
        name="ranks-that-stop-alone",
        file=_STOPS,
        old="            dist.all_reduce(flags, group=group)\n",
        new="",
        tests=(_OF_STOPS + "test_what_one_rank_is_asked_all_ranks_agree_on",),
        why="a rank that got the signal leaves, and the others wait for it in the next step",
    ),
    Mutant(
        name="passed-on-signals-end-the-job",
        file=_STOPS,
        old="first is not None and now - first >= self._same_request_s",
        new="first is not None",
        tests=(_OF_STOPS + "test_signals_that_are_the_same_request_do_not_end_the_process",),
        why="under Slurm torchrun passes on what the ranks have got already: they end unsaved",
    ),
    Mutant(
        name="second-sigterm-waits-for-python",
        file=_STOPS,
        old="            end_by(sent)\n",
        new="            self._go_on = False\n",
        tests=(_OF_STOPS + "test_a_second_sigterm_ends_a_process_that_is_stuck_in_a_collective",),
        why="a job that hangs cannot be ended but by SIGKILL",
    ),
    Mutant(
        name="ended-workers-ask-to-stop",
        file=_STOPS,
        old="        requests._stay_with_the_parent()\n",
        new="        pass\n",
        tests=(_OF_STOPS + "test_a_forked_worker_that_is_ended_asks_nobody_to_stop",),
        why="a data loader that ends its workers stops the training",
    ),
)
