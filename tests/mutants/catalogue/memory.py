# SPDX-License-Identifier: Apache-2.0
"""Mistakes with activations that are recomputed or offloaded."""

from tests.mutants.catalogue.places import MIMO, UNIT
from tests.mutants.mutant import Mutant

_OFFLOAD = MIMO + "memory/offload.py"
_TRANSFERS = MIMO + "memory/transfers.py"
_RECOMPUTED = MIMO + "memory/recomputed.py"
_ACTIVATIONS = UNIT + "test_activation_memory.py::"
_STREAMS = UNIT + "test_transfers.py::"
_EQUAL = _ACTIVATIONS + "test_gradients_are_bit_equal"

MEMORY = (
    Mutant(
        name="recomputed-without-its-random-states",
        file=_RECOMPUTED,
        old="        _restore(self._then)\n",
        new="",
        tests=(_EQUAL,),
        why="a recomputed encoder drops other elements than the forward pass did",
    ),
    Mutant(
        name="recompute-knows-pytorchs-random-state-only",
        file=_RECOMPUTED,
        old="    restore_states(states[1])\n",
        new="",
        tests=(_EQUAL,),
        why="dropout of sharded activations draws from Megatron's tracker, where it has gone on",
    ),
    Mutant(
        name="recompute-leaves-its-random-states-behind",
        file=_RECOMPUTED,
        old="        _restore(self._after)\n",
        new="        pass\n",
        tests=(_EQUAL,),
        why="the next step draws the numbers of this one again",
    ),
    Mutant(
        name="recompute-runs-a-backward-pass-of-its-own",
        file=_RECOMPUTED,
        old="use_reentrant=False,\n        preserve_rng_state=False,\n        "
        "context_fn=lambda: (nullcontext(), drawn),",
        new="use_reentrant=True,",
        tests=(_ACTIVATIONS + "test_a_weight_gets_its_gradient_once_per_backward_pass",),
        why="DDP counts a gradient per microbatch and reduces before the last one is there",
    ),
    Mutant(
        name="frozen-encoder-recomputed-with-the-projector",
        file=MIMO + "memory/activations.py",
        old="if trains and policy.encoder == policy.projector == RECOMPUTE:",
        new="if policy.encoder == policy.projector == RECOMPUTE:",
        tests=(_ACTIVATIONS + "test_frozen_parts",),
        why="frozen encoders run a second time for gradients that nobody takes",
    ),
    Mutant(
        name="weights-offloaded",
        file=_OFFLOAD,
        old="if key in self._stays:",
        new="if False:",
        tests=(_ACTIVATIONS + "test_weights_buffers_and_small_tensors_stay",),
        why="every weight is copied to the host and a second time to the device",
    ),
    Mutant(
        name="views-offloaded-one-by-one",
        file=_OFFLOAD,
        old="copy = self._copies[key]() if key in self._copies else None",
        new="copy = None",
        tests=(
            _ACTIVATIONS
            + "test_tensors_in_one_storage_are_copied_once_and_come_back_as_they_lay",
        ),
        why="query, key and value are copied three times, each time whole",
    ),
    Mutant(
        name="reloaded-storage-released-after-its-first-view",
        file=_OFFLOAD,
        old="if self._taken == self.tensors:",
        new="if self._taken:",
        tests=(
            _ACTIVATIONS
            + "test_tensors_in_one_storage_are_copied_once_and_come_back_as_they_lay",
        ),
        why="what several operations keep is copied back for each of them",
    ),
    Mutant(
        name="copied-before-it-is-computed",
        file=_TRANSFERS,
        old="        streams.side.wait_stream(computing)\n",
        new="",
        tests=(
            _STREAMS + "test_a_copy_waits_for_what_writes_the_bytes",
            _STREAMS + "test_copies_come_back_into_what_the_computation_released",
        ),
        why="the host gets what stood in the memory before, and copies come back over what is read",
    ),
    Mutant(
        name="memory-reused-while-it-is-copied",
        file=_TRANSFERS,
        old="        copy.stream.wait_event(copy.done)\n",
        new="        pass\n",
        tests=(
            _STREAMS + "test_a_host_that_runs_ahead_needs_no_more_memory",
            _STREAMS + "test_memory_of_a_copy_that_nobody_asked_for_is_kept_for_the_copy",
        ),
        why="the host gets what the language model writes there",
    ),
    Mutant(
        name="read-before-it-has-come-back",
        file=_TRANSFERS,
        old="        current.wait_event(event.done)\n",
        new="",
        tests=(_STREAMS + "test_bytes_go_to_the_host_and_back",),
        why="backward reads memory that the copy has not reached",
    ),
    Mutant(
        name="reloaded-memory-reused-before-it-is-read",
        file=_TRANSFERS,
        old="            self._streams.keep_until_done(data, current)\n",
        new="            pass\n",
        tests=(_STREAMS + "test_memory_that_came_back_is_kept_for_the_computation",),
        why="the next copy overwrites activations that a kernel still reads",
    ),
    Mutant(
        name="recomputed-layers-counted-per-microbatch",
        file=MIMO + "pipeline/step.py",
        old="if not last or name in late]",
        new="if not last]",
        tests=(UNIT + "test_memory_8rank.py::test_gradients_are_those_of_kept_activations",),
        why="DDP reduces the encoder's gradients when as many came as in the first step",
        ranks=8,
    ),
)
