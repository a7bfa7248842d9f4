# SPDX-License-Identifier: Apache-2.0
"""Written from the code, without the tests: mistakes in memory and the CPU backend."""

from tests.mutants.mutant import Mutant

WITHOUT_B_MEMORY = (
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
        old="inputs=whole * shape.patch * shape.input_itemsize",
        new="inputs=whole * shape.patch * e",
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
        name="saving-and-peak-swap-columns",
        file="megatron/core/models/mimo/memory/table.py",
        old=("            _mib(each.saving),\n            _mib(each.peak),\n"),
        new=("            _mib(each.peak),\n            _mib(each.saving),\n"),
        tests=(
            "tests/unit_tests/mimo/test_memory_plan.py::test_every_column_has_what_its_heading_says",
        ),
        why="the table says one for the other",
    ),
)
