# SPDX-License-Identifier: Apache-2.0
"""Mistakes on the way from a model back to a Hugging Face folder."""

from tests.mutants.catalogue.places import MIMO, UNIT
from tests.mutants.mutant import Mutant

_ROOM = MIMO + "huggingface/"
_EXPORT, _PIECES, _TARGET = _ROOM + "export.py", _ROOM + "pieces.py", _ROOM + "target.py"
_TESTS = UNIT + "huggingface/test_export_8rank.py::"

EXPORTED = (
    Mutant(
        name="a-tied-embedding-is-written-by-two-stages",
        file=_PIECES,
        old="(piece.start, piece.size) != (kept[-1].start, kept[-1].size)",
        new="piece != kept[-1]",
        tests=(_TESTS + "test_a_folder_comes_back_byte_for_byte",),
        why="a model whose tied embedding is on two pipeline stages cannot be exported",
    ),
    Mutant(
        name="a-repeated-tensor-is-copied-from-the-source",
        file=_PIECES,
        old="            pieces[name] = pieces[other]",
        new="            pass",
        tests=(_TESTS + "test_weights_that_changed_are_written_and_a_repeated_tensor_with_them",),
        why="the stored output layer is that of the model before training",
    ),
    Mutant(
        name="a-rank-whose-disk-is-full-goes",
        file=_EXPORT,
        old="                self._problem = error",
        new="                raise",
        tests=(_TESTS + "test_a_full_disk_is_one_sentence_and_nothing_is_left",),
        why="the ranks that send to it wait until they give up",
    ),
    Mutant(
        name="a-full-disk-is-forgotten",
        file=_EXPORT,
        old="        if self._problem is not None:\n            raise self._problem",
        new="        self._problem = None",
        tests=(_TESTS + "test_a_full_disk_is_one_sentence_and_nothing_is_left",),
        why="a folder that lacks the rest of a file is published as a model",
    ),
    Mutant(
        name="weights-on-their-way-are-not-waited-for",
        file=_EXPORT,
        old="        built.model.start_param_sync(force_sync=True)",
        new="        pass",
        tests=(_TESTS + "test_a_run_starts_from_an_imported_checkpoint",),
        why="with a parameter gather that overlaps, most weights are those of the step before",
    ),
    Mutant(
        name="a-folder-that-is-no-model-is-replaced",
        file=_TARGET,
        old='        if not (self.folder / "config.json").is_file():',
        new="        if False:",
        tests=(_TESTS + "test_a_folder_that_is_taken_is_refused_and_stays",),
        why="a mistyped path is removed with all that is in it",
    ),
    Mutant(
        name="a-dtype-is-accepted-and-ignored",
        file=_PIECES,
        old="    return Described(described.file, dtype, described.shape)",
        new="    return described",
        tests=(_TESTS + "test_weights_that_changed_are_written_and_a_repeated_tensor_with_them",),
        why="the folder has another dtype than was asked for, and its configuration says so",
    ),
)
