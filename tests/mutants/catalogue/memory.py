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
        name="recompute-without-megatrons-random-states",
        file=_RECOMPUTED,
        old="return checkpoint(lambda _, *rest: function(*rest), False, anchor, *arguments)",
        new="import torch.utils.checkpoint as stock; return stock.checkpoint("
        "lambda _, *rest: function(*rest), anchor, *arguments, use_reentrant=True)",
        tests=(_EQUAL,),
        why="a recomputed encoder drops other elements than the forward pass did",
    ),
    Mutant(
        name="recomputed-encoder-without-gradient",
        file=_RECOMPUTED,
        old="anchor = torch.empty(0, requires_grad=True)",
        new="anchor = torch.empty(0)",
        tests=(_EQUAL,),
        why="pixels need no gradient, so the encoder gets none",
    ),
    Mutant(
        name="frozen-parts-recomputed",
        file=_RECOMPUTED,
        old="needs_gradient = trains or any(argument.requires_grad for argument in arguments)",
        new="needs_gradient = True",
        tests=(_ACTIVATIONS + "test_nothing_to_train_has_no_backward",),
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
        name="offloaded-before-it-is-computed",
        file=_TRANSFERS,
        old="        streams.side.wait_stream(streams.current())\n",
        new="",
        tests=(_STREAMS + "test_a_copy_waits_for_what_writes_the_bytes",),
        why="the host gets what stood in the memory before",
    ),
    Mutant(
        name="memory-reused-while-it-is-offloaded",
        file=_TRANSFERS,
        old="        streams.keep_until_done(data, streams.side)\n",
        new="",
        tests=(_STREAMS + "test_bytes_go_to_the_host_and_back",),
        why="the host gets what the language model writes there",
    ),
    Mutant(
        name="read-before-it-has-come-back",
        file=_TRANSFERS,
        old="        current.wait_event(event)\n",
        new="",
        tests=(_STREAMS + "test_bytes_go_to_the_host_and_back",),
        why="backward reads memory that the copy has not reached",
    ),
    Mutant(
        name="reloaded-memory-reused-before-it-is-read",
        file=_TRANSFERS,
        old="        self._streams.keep_until_done(data, current)\n",
        new="",
        tests=(_STREAMS + "test_memory_that_came_back_is_kept_for_the_computation",),
        why="the next copy overwrites activations that a kernel still reads",
    ),
)
