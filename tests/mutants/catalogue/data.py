# SPDX-License-Identifier: Apache-2.0
"""Mistakes in how samples become batches of both sides."""

from tests.mutants.catalogue.places import MIMO, UNIT
from tests.mutants.mutant import Mutant

_ROOM = MIMO + "data/"
_TESTS = UNIT + "data/"
_LABELS = _TESTS + "test_loader.py::test_labels_are_the_next_tokens_and_only_answers_are_learned"
_PEERS = _TESTS + "test_loader.py::test_peers_hold_the_same_and_replicas_all"
_ANSWERS = _TESTS + "test_encoding.py::test_answers_are_learned_up_to_their_end_and_nothing_else"
_FOUND = (
    _TESTS + "test_sources.py"
    "::test_where_samples_lie_is_found_again_only_when_files_have_changed"
)

DATA = (
    Mutant(
        name="labels-shifted-twice",
        file=_ROOM + "arrays.py",
        old="    mask[: count - 1] = learned[1:]",
        new="    mask[: count - 2] = learned[2:]",
        tests=(_LABELS,),
        why="the loss counts tokens that stand before the answer",
    ),
    Mutant(
        name="the-next-sample-is-a-label",
        file=_ROOM + "arrays.py",
        old="    mask[: count - 1] = learned[1:]",
        new="    mask[:count] = learned",
        tests=(_LABELS,),
        why="an answer's last token learns what begins another sample, or padding",
    ),
    Mutant(
        name="positions-run-through-a-pack",
        file=_ROOM + "arrays.py",
        old="    return np.arange(len(ids), dtype=np.int64)[None]",
        new="    return np.arange(1, len(ids) + 1, dtype=np.int64)[None]",
        tests=(_LABELS,),
        why="a sample does not begin at position 0",
    ),
    Mutant(
        name="items-in-the-order-of-the-batch",
        file=_ROOM + "batches.py",
        old="for dp in languages for sample in samples[dp]]",
        new="for dp in languages for sample in sorted(samples[dp], reverse=True)]",
        tests=(_TESTS + "test_batches.py::test_items_are_shared_out_by_cost",),
        why="rows reach the tokens of another image",
    ),
    Mutant(
        name="every-epoch-alike",
        file=_ROOM + "order.py",
        old="    drawn = np.random.default_rng([order.seed, epoch, 0])",
        new="    drawn = np.random.default_rng([order.seed, 0, 0])",
        tests=(_TESTS + "test_order.py::test_orders_differ_by_epoch_and_by_seed",),
        why="batches hold the same samples in every epoch",
    ),
    Mutant(
        name="a-fraction-begins-anew-in-each-epoch",
        file=_ROOM + "order.py",
        old="range(epoch * own, (epoch + 1) * own)",
        new="range(own)",
        tests=(_TESTS + "test_order.py::test_a_mixture_holds_what_its_weights_say_in_every_epoch",),
        why="three quarters of a source are never seen",
    ),
    Mutant(
        name="questions-are-learned",
        file=_ROOM + "encoding.py",
        old="pieces += [(before[len(done) :], False), (answer, True), (rest, False)]",
        new="pieces += [(before[len(done) :], True), (answer, True), (rest, False)]",
        tests=(_ANSWERS,),
        why="the model learns to ask",
    ),
    Mutant(
        name="what-follows-an-answer-is-learned",
        file=_ROOM + "encoding.py",
        old="        stop = len(answer) if at < 0 else at + len(end)",
        new="        stop = len(answer)",
        tests=(_ANSWERS,),
        why="line breaks after the end of an answer are learned",
    ),
    Mutant(
        name="an-odd-tail-counts-twice",
        file=_ROOM + "loader.py",
        old="[place < count for place in self.samples]",
        new="[place <= count for place in self.samples]",
        tests=(_TESTS + "test_loader.py::test_an_odd_tail_is_filled_up_without_a_loss",),
        why="held-out loss counts what fills the last batch up",
    ),
    Mutant(
        name="lines-of-a-file-that-has-changed",
        file=_ROOM + "kept_arrays.py",
        old="            if np.array_equal(said, key):",
        new="            if said.size == key.size:",
        tests=(_FOUND,),
        why="a file that is as long as before is cut where the old one's lines ended",
    ),
    Mutant(
        name="what-follows-a-list-is-lost",
        file=_ROOM + "llava_json.py",
        old="        if _after_blanks(rest, 0) < len(rest):",
        new="        if _after_blanks(rest, 0) > len(rest):",
        tests=(_TESTS + "test_sources.py::test_what_is_no_list_is_refused",),
        why="of two files put together the second is never trained on",
    ),
    Mutant(
        name="a-full-sequence-hides-the-next",
        file=_ROOM + "batches.py",
        old="        first[length] = place",
        new="        first[length] = place + 1",
        tests=(
            _TESTS + "test_batches.py::test_sequences_and_bins_are_those_of_the_plain_rules",
        ),
        why="sequences stay half empty",
    ),
    Mutant(
        name="a-dead-reader-is-waited-for",
        file=_ROOM + "readers.py",
        old="            if end in ready:\n                return end.recv()",
        new="            if end in ready or process.exitcode is None:\n                return {}",
        tests=(_TESTS + "test_readers.py::test_a_killed_process_is_an_error",),
        why="images of a killed process are missing without a word",
    ),
    Mutant(
        name="peers-pad-differently",
        file=_ROOM + "loader.py",
        old="        own = [self._of(batch, place) for place in plan.samples[side.replica]]",
        new="        own = [self._of(batch, place) for place in plan.samples[side.rank % "
        "len(plan.samples)]]",
        tests=(_PEERS,),
        why="TP and CP ranks of one replica compute on different samples",
    ),
)
