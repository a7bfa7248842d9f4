# SPDX-License-Identifier: Apache-2.0
"""Mistakes in memory, the CPU backend, compat and mimo_colocated, written without the tests."""

from tests.mutants.mutant import Mutant

WRITTEN_WITHOUT_B_MORE = (
    Mutant(
        name="mask-is-dropped",
        file="megatron/core/models/mimo/memory/__main__.py",
        old="            mask=given.mask,\n",
        new="",
        tests=(
            "tests/unit_tests/mimo/test_memory_plan.py::test_every_option_of_the_command_counts",
        ),
        why="an option is ignored",
    ),
    Mutant(
        name="projectors-are-not-checked",
        file="megatron/core/models/mimo/memory/activations.py",
        old='        _refuse(policy.projector, "projector", projections)\n',
        new="",
        tests=(
            "tests/unit_tests/mimo/test_activation_memory.py::test_what_a_policy_cannot_be_used_with_is_refused",
        ),
        why="a projector under gradient accumulation fusion is offloaded",
    ),
    Mutant(
        name="buffers-count-as-activations",
        file="megatron/core/models/mimo/memory/kept.py",
        old="lasting = [*submodule.parameters(), *submodule.buffers()]",
        new="lasting = [*submodule.parameters()]",
        tests=("tests/unit_tests/mimo/test_memory_plan.py::test_buffers_stay_and_do_not_count",),
        why="bytes that stay anyway are counted",
    ),
    Mutant(
        name="the-smallest-size-stays",
        file="megatron/core/models/mimo/memory/offload.py",
        old="storage.nbytes() < max(self._smallest, 1)",
        new="storage.nbytes() <= max(self._smallest, 1)",
        tests=(
            "tests/unit_tests/mimo/test_activation_memory.py::test_weights_buffers_and_small_tensors_stay",
        ),
        why="a storage of exactly offload_from bytes is not offloaded",
    ),
    Mutant(
        name="conjugates-are-plain",
        file="megatron/core/models/mimo/memory/offload.py",
        old="return not (tensor.is_conj() or tensor.is_neg())",
        new="return True",
        tests=(
            "tests/unit_tests/mimo/test_activation_memory.py::test_what_is_more_than_its_storage_stays",
        ),
        why="a conjugated tensor comes back without its conjugation: wrong gradients",
    ),
    Mutant(
        name="most-is-the-latest",
        file="megatron/core/models/mimo/memory/offload.py",
        old="self.most = max(self.most, self.now)",
        new="self.most = self.now",
        tests=(
            "tests/unit_tests/mimo/test_activation_memory.py::test_the_most_on_the_host_is_remembered",
        ),
        why="the peak of host memory is wrong",
    ),
    Mutant(
        name="frozen-encoders-rows-are-held",
        file="megatron/core/models/mimo/memory/plan.py",
        old="elif memory.encoder == OFFLOAD:",
        new="elif encoder == OFFLOAD:",
        tests=("tests/unit_tests/mimo/test_memory_plan.py::test_frozen_parts_keep_nothing",),
        why="the projector's input of a frozen, offloaded encoder is predicted on the device",
    ),
    Mutant(
        name="a-step-of-0-microbatches",
        file="megatron/core/models/mimo/memory/plan.py",
        old="if value is not None and value < 1:",
        new="if value and value < 1:",
        tests=("tests/unit_tests/mimo/test_memory_plan.py::test_shapes_that_are_none",),
        why="0 is accepted",
    ),
    Mutant(
        name="inputs-have-the-encoders-dtype",
        file="megatron/core/models/mimo/memory/plan.py",
        old="inputs=tokens * shape.patch * shape.input_itemsize",
        new="inputs=tokens * shape.patch * e",
        tests=(
            "tests/unit_tests/mimo/test_memory_plan.py::test_inputs_count_in_their_own_precision",
        ),
        why="recomputed encoders of bf16 hold half of what they do",
    ),
    Mutant(
        name="everything-cannot-be-offloaded",
        file="megatron/core/models/mimo/memory/policy.py",
        old="if self.offload_from < 0:",
        new="if self.offload_from <= 0:",
        tests=("tests/unit_tests/mimo/test_activation_memory.py::test_gradients_are_bit_equal",),
        why="offload_from=0 is refused",
    ),
    Mutant(
        name="recomputation-moves-random-numbers",
        file="megatron/core/models/mimo/memory/recomputed.py",
        old="        _restore(self._after)\n",
        new="        pass\n",
        tests=("tests/unit_tests/mimo/test_activation_memory.py::test_gradients_are_bit_equal",),
        why="after backward random numbers repeat",
    ),
    Mutant(
        name="saving-and-peak-swap-columns",
        file="megatron/core/models/mimo/memory/table.py",
        old=("            _mib(each.saving),\n            _mib(each.peak),\n"),
        new=("            _mib(each.peak),\n            _mib(each.saving),\n"),
        tests=(
            "tests/unit_tests/mimo/test_memory_plan.py::test_every_column_has_what_its_heading_says",
        ),
        why="the table says one for the other",
    ),
    Mutant(
        name="memory-is-not-kept-for-the-reader",
        file="megatron/core/models/mimo/memory/transfers.py",
        old="        self._streams.keep_until_done(data, current)\n",
        new="",
        tests=(
            "tests/unit_tests/mimo/test_transfers.py::test_memory_that_came_back_is_kept_for_the_computation",
        ),
        why="activations on a device are overwritten while another stream reads them",
    ),
    Mutant(
        name="uneven-reductions-always-sum",
        file="megatron/core/models/mimo/cpu_backend.py",
        old="torch.distributed.all_reduce(whole, op=op, group=group)",
        new="torch.distributed.all_reduce(whole, group=group)",
        tests=(
            "tests/unit_tests/mimo/test_cpu_backend.py::test_parts_of_different_sizes_are_reduced",
        ),
        why="an argument is ignored",
    ),
    Mutant(
        name="the-worlds-rank-in-a-group",
        file="megatron/core/models/mimo/cpu_backend.py",
        old="[torch.distributed.get_rank(group)]",
        new="[torch.distributed.get_rank()]",
        tests=(
            "tests/unit_tests/mimo/test_cpu_backend.py::test_parts_of_different_sizes_are_reduced",
        ),
        why="in a group that is not the first ranks, another rank's part is taken",
    ),
    Mutant(
        name="all-of-megatrons-random-warnings-are-dropped",
        file="megatron/core/models/mimo/cpu_backend.py",
        old='return "CPU RNG state changed within GPU RNG context" not in record.getMessage()',
        new="return False",
        tests=("tests/unit_tests/mimo/test_cpu_backend.py::test_a_tracker_forks_and_comes_back",),
        why="warnings that matter are lost",
    ),
    Mutant(
        name="redirects-call-what-was-there-first",
        file="megatron/core/models/mimo/cpu_backend.py",
        old=("        return getattr(owner, name)(*args, **kwargs)\n\n    return call"),
        new=("        return call.__wrapped__(*args, **kwargs)\n\n    return call"),
        tests=(
            "tests/unit_tests/mimo/test_cpu_backend.py::test_megatron_uses_what_others_put_in_place_of_torchs_functions",
        ),
        why="a collective that a test or profiler replaced is not called",
    ),
    Mutant(
        name="the-callers-metadata-is-filled",
        file="megatron/core/models/mimo/compat.py",
        old="return None if metadata is None else dict(metadata)",
        new="return metadata",
        tests=("tests/unit_tests/mimo/test_compat.py::test_metadata_stays_the_callers",),
        why="the next module gets the groups of the one before",
    ),
    Mutant(
        name="files-are-not-synced",
        file="megatron/core/models/mimo/compat.py",
        old="write(transforms, number, bucket, results, running, True)",
        new="write(transforms, number, bucket, results, running, False)",
        tests=(
            "tests/unit_tests/mimo/test_compat.py::test_a_file_is_on_the_disk_when_it_is_written",
        ),
        why="a power loss after a save leaves empty files",
    ),
    Mutant(
        name="the-reading-group-is-dropped",
        file="megatron/core/models/mimo/compat.py",
        old="FullyParallelLoadStrategyWrapper(TorchDistLoadShardedStrategy(), group)",
        new="FullyParallelLoadStrategyWrapper(TorchDistLoadShardedStrategy(), None)",
        tests=(
            "tests/unit_tests/mimo/test_compat.py::test_reading_is_shared_over_the_group_that_is_given",
        ),
        why="an argument is ignored",
    ),
    Mutant(
        name="the-watchdogs-dump-wins",
        file="mimo_colocated/evidence.py",
        old='if path.name.startswith("rank_") or rank not in found:',
        new="if rank not in found:",
        tests=(
            "tests/unit_tests/mimo/test_who_waits.py::test_dumps_are_read_and_nothing_is_executed",
        ),
        why="the dump that has the groups is not read",
    ),
    Mutant(
        name="an-old-summary-stays",
        file="mimo_colocated/evidence.py",
        old="if _DUMPS.fullmatch(path.name) or path.name == SUMMARY:",
        new="if _DUMPS.fullmatch(path.name):",
        tests=(
            "tests/unit_tests/mimo/test_who_waits.py::test_dumps_are_read_and_nothing_is_executed",
        ),
        why="the summary of an earlier failure stands beside the new dumps",
    ),
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
        name="a-full-wait-is-none",
        file="mimo_colocated/phases.py",
        old="if len(text) <= _WAIT.size else",
        new="if len(text) < _WAIT.size else",
        tests=(
            "tests/unit_tests/mimo/test_phases.py::test_names_and_waits_that_just_fit_and_do_not",
        ),
        why="a wait of exactly the size of its place is not recorded",
    ),
    Mutant(
        name="microbatches-go-on-counting",
        file="mimo_colocated/phases.py",
        old=(
            '    """What follows belongs to the whole step."""\n'
            "    _own.microbatch, _own.forwards = -1, 0\n"
        ),
        new=('    """What follows belongs to the whole step."""\n    _own.microbatch = -1\n'),
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
        name="a-process-that-took-the-number-is-the-rank",
        file="mimo_colocated/phases.py",
        old="return state if started == self.started and state not in",
        new="return state if state not in",
        tests=(
            "tests/unit_tests/mimo/test_phases.py::test_another_process_of_the_same_number_is_not_taken_for_it",
        ),
        why="a stranger's process is taken for the rank's, and killed",
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
        name="the-older-switch-is-overruled",
        file="mimo_colocated/flight_recorder.py",
        old="if not any(name in os.environ for name in _SWITCHES):",
        new="if _SWITCH not in os.environ:",
        tests=(
            "tests/unit_tests/mimo/test_flight_recorder.py::test_what_the_user_has_switched_stays",
        ),
        why="what the user set under NCCL's name is overridden",
    ),
    Mutant(
        name="what-has-ended-is-under-way",
        file="mimo_colocated/flight_recorder.py",
        old="any(entered > ended for",
        new="any(entered >= ended for",
        tests=(
            "tests/unit_tests/mimo/test_flight_recorder.py::test_a_collective_that_has_ended_is_not_under_way",
        ),
        why="a rank that waits for nobody is said to be in a collective",
    ),
    Mutant(
        name="the-same-call-is-not-entered",
        file="mimo_colocated/who_waits.py",
        old="return max(same, default=0) >= call.seq",
        new="return max(same, default=0) > call.seq",
        tests=(
            "tests/unit_tests/mimo/test_who_waits.py::test_of_two_under_way_the_one_that_cannot_end",
        ),
        why="ranks that have come are said to be missing",
    ),
    Mutant(
        name="the-first-call-under-way-is-waited-in",
        file="mimo_colocated/who_waits.py",
        old="return next(iter([*stuck, *candidates]), None)",
        new="return next(iter(candidates), None)",
        tests=(
            "tests/unit_tests/mimo/test_who_waits.py::test_of_two_under_way_the_one_that_cannot_end",
        ),
        why="a reduction that overlaps is named in place of the call that cannot end",
    ),
    Mutant(
        name="calls-as-the-recorder-lists-them",
        file="mimo_colocated/who_waits.py",
        old="return sorted(found, key=lambda call: call.at)",
        new="return found",
        tests=(
            "tests/unit_tests/mimo/test_who_waits.py::test_entries_are_read_in_the_order_of_time",
        ),
        why="with two recorders the last call is that of one of them",
    ),
    Mutant(
        name="a-rank-that-waits-is-lost",
        file="mimo_colocated/who_waits.py",
        old="return sorted(wanted - set(self.waits))",
        new="return sorted(wanted)",
        tests=(
            "tests/unit_tests/mimo/test_who_waits.py::test_without_a_known_culprit_the_rank_that_waits_for_nobody_is_found",
        ),
        why="ranks that wait themselves are named as culprits",
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
)
