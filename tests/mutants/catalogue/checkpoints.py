# SPDX-License-Identifier: Apache-2.0
"""Mistakes in saving and loading checkpoints, and in which of them is the newest."""

from tests.mutants.catalogue.places import MIMO, UNIT
from tests.mutants.mutant import Mutant

_HISTORY = MIMO + "checkpoint/history.py"
_HISTORY_TESTS = UNIT + "test_history.py::"
_CHECKPOINT_TESTS = UNIT + "test_checkpoint_8rank.py::"
_REFUSED_TESTS = UNIT + "test_checkpoint_refused_8rank.py::"

CHECKPOINTS = (
    Mutant(
        name="adam-shares-one-step-count",
        file=MIMO + "training/optimizer_state.py",
        old='adam_state["step"] = adam_state["step"].clone()',
        new='pass',
        tests=(_CHECKPOINT_TESTS + "test_the_same_layout_continues_bit_for_bit",),
        why="after a resume Adam counts one step per parameter: another bias correction",
        ranks=8,
    ),
    Mutant(
        name="buckets-saved-without-their-padding",
        file=MIMO + "training/optimizer_savers.py",
        old="                    tensors[key] = _spread(value, buffer)\n",
        new="                    pass\n",
        tests=(UNIT + "test_overlap_8rank.py::test_a_checkpoint_has_the_weights_of_the_last_step",),
        why="a model larger than one bucket resumes from weights and moments of other parameters",
        ranks=8,
    ),
    Mutant(
        name="checkpoint-of-another-model-accepted",
        file=MIMO + "checkpoint/load_checks.py",
        old="if there == here:",
        new="if there:",
        tests=(_REFUSED_TESTS + "test_a_checkpoint_of_another_model_is_refused",),
        why="weights of another model are read as far as they fit",
        ranks=8,
    ),
    Mutant(
        name="published-before-it-is-whole",
        file=_HISTORY,
        old='return self.root / f"{_PARTIAL_PREFIX}{step:08d}"',
        new="return self.path(step)",
        tests=(_CHECKPOINT_TESTS + "test_a_checkpoint_is_not_there_before_it_is_whole",),
        why="a run killed while it saves leaves half a checkpoint that the next one picks up",
        ranks=8,
    ),
    Mutant(
        name="published-before-it-is-on-the-disk",
        file=_HISTORY,
        old="for file in partial.iterdir():\n            fsync(file)",
        new="for file in ():\n            fsync(file)",
        tests=(_HISTORY_TESTS + "test_what_is_on_the_disk_before_what",),
        why="after a power failure the newest checkpoint has files without content",
    ),
    Mutant(
        name="background-save-of-what-training-changes",
        file=MIMO + "checkpoint/background_save.py",
        old="host_copies(request, copy=background)",
        new="host_copies(request, copy=False)",
        tests=(
            UNIT + "test_background_save_8rank.py::"
            "test_only_a_background_save_copies_what_is_on_the_host",
        ),
        why="a checkpoint holds weights of several steps",
        ranks=8,
    ),
    Mutant(
        name="folders-that-are-not-shared-accepted",
        file=MIMO + "checkpoint/shared_folder.py",
        old="    if verdict:\n",
        new="    if False:\n",
        tests=(UNIT + "test_shared_folder.py::test_nodes_with_folders_of_their_own_are_named",),
        why="half of a checkpoint stays on each node, and none can be loaded",
    ),
    Mutant(
        name="weights-loaded-under-fp32-copies",
        file=MIMO + "checkpoint/load_checks.py",
        old="if any(gathered(copied)):",
        new="if any(gathered(False)):",
        tests=(
            UNIT + "test_load_weights_8rank.py::"
            "test_fp32_copies_of_an_optimizer_are_not_forgotten",
        ),
        why="the next step of the optimizer puts the weights from before back",
        ranks=8,
    ),
    Mutant(
        name="abandoned-checkpoints-stay-on-the-line",
        file=_HISTORY,
        old="if s > self.stands_at or s >= step]",
        new="if s >= step]",
        tests=(_HISTORY_TESTS + "test_who_leaves_the_line",),
        why="a run that went back and saved is thrown away by rotation, the old one resumed",
    ),
    Mutant(
        name="abandoned-checkpoints-move-after-the-new-one-is-shown",
        file=_HISTORY,
        old="""        moved = self._move_aside(self.abandoned_by(manifest.step))
        os.rename(partial, final)
        fsync(self.root)
""",
        new="""        gone = [s for s in self.abandoned_by(manifest.step) if s != manifest.step]
        os.rename(partial, final)
        fsync(self.root)
        moved = self._move_aside(gone)
""",
        tests=(_HISTORY_TESTS + "test_a_kill_at_any_change_loses_nothing",),
        why="killed in between, the next start takes the abandoned run for the newest",
    ),
    Mutant(
        name="removed-before-the-removal-is-on-the-disk",
        file=_HISTORY,
        old="os.rename(self.path(step), old)\n            fsync(self.root)",
        new="os.rename(self.path(step), old)",
        tests=(_HISTORY_TESTS + "test_what_is_on_the_disk_before_what",),
        why="after a power failure an old checkpoint is back under its name without its files",
    ),
)
