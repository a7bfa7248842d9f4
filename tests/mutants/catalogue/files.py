# SPDX-License-Identifier: Apache-2.0
"""Mistakes in what a checkpoint says of itself and in what is checked before one is loaded."""

from tests.mutants.catalogue.places import MIMO, UNIT
from tests.mutants.mutant import Mutant

_PICKLES = MIMO + "checkpoint/safe_pickles.py"
_INTEGRITY = MIMO + "checkpoint/integrity.py"
_MANIFEST = MIMO + "checkpoint/manifest.py"
_PICKLE_TESTS = UNIT + "test_safe_pickles.py::"
_INTEGRITY_TESTS = UNIT + "test_checkpoint_integrity.py::"

_PIPELINE_TESTS = UNIT + "test_checkpoint_pipeline_8rank.py::"

FILES = (
    Mutant(
        name="manifest-of-the-first-stage",
        file=MIMO + "checkpoint/global_tensors.py",
        old="return own if len(parts) == 1 else joined(parts)",
        new="return parts[0]",
        tests=(_PIPELINE_TESTS + "test_stages_of_different_models_are_an_error_on_all_ranks",),
        why="checkpoints of pipelined runs are of another model as soon as the stages change",
        ranks=8,
    ),
    Mutant(
        name="tied-head-saved-under-its-own-name",
        file=MIMO + "compat.py",
        old="replace(own, key=embeddings, replica_id=copy, allow_shape_mismatch=True)",
        new="replace(own, replica_id=(0, *copy[1:]), allow_shape_mismatch=True)",
        tests=(_PIPELINE_TESTS + "test_the_manifest_names_the_tensors_of_all_stages",),
        why="a pipelined run's checkpoint has a weight that no other layout of the model has",
        ranks=8,
    ),
    Mutant(
        name="flipped-byte-not-noticed",
        file=_INTEGRITY,
        old='sha256(folder / name) != saved["sha256"]',
        new='sha256(folder / name) == ""',
        tests=(_INTEGRITY_TESTS + "test_what_is_changed_is_named",),
        why="a damaged shard loads without an error and trains on",
    ),
    Mutant(
        name="digest-of-the-first-piece",
        file=_INTEGRITY,
        old="while size := file.readinto(buffer):",
        new="if size := file.readinto(buffer):",
        tests=(_INTEGRITY_TESTS + "test_the_digest_is_that_of_all_bytes",),
        why="damage beyond the first megabytes of a shard is not seen",
    ),
    Mutant(
        name="files-that-grew-accepted",
        file=_INTEGRITY,
        old='if size != saved["bytes"]:',
        new='if size < saved["bytes"]:',
        tests=(_INTEGRITY_TESTS + "test_what_is_changed_is_named",),
        why="without digests a file that something was appended to loads",
    ),
    Mutant(
        name="files-without-a-reader",
        file=_INTEGRITY,
        old="        if least == rank:\n",
        new="        if least == rank and loads[least] > 1:\n",
        tests=(_INTEGRITY_TESTS + "test_every_file_has_one_reader",),
        why="files that no rank has to read are not checked",
    ),
    Mutant(
        name="damaged-manifest-accepted",
        file=_MANIFEST,
        old="if digest is not None and digest != _digest(entries):",
        new="if digest is None and digest != _digest(entries):",
        tests=(_INTEGRITY_TESTS + "test_a_changed_manifest_is_refused",),
        why="one flipped bit makes it another layout's checkpoint, whose random states are dropped",
    ),
    Mutant(
        name="any-name-of-a-needed-module",
        file=_PICKLES,
        old="if name in _NEEDED.get(module, ()):",
        new="if module in _NEEDED:",
        tests=(_PICKLE_TESTS + "test_names_that_are_not_needed_are_refused",),
        why="what a needed module has imported, os for one, gets past the rehearsal",
    ),
    Mutant(
        name="objects-unpickled-without-restriction",
        file=_PICKLES,
        old='map_location="cpu", weights_only=True)',
        new='map_location="cpu", weights_only=False)',
        tests=(_PICKLE_TESTS + "test_objects_that_call_are_refused",),
        why="checking an object executes the code that it carries",
    ),
    Mutant(
        name="reader-sent-outside-the-folder",
        file=_PICKLES,
        old='or file != Path(file).name or file in ("", ".", "..")',
        new='or file in ("", ".", "..")',
        tests=(_PICKLE_TESTS + "test_places_outside_the_files_are_refused",),
        why="the loader reads files that nobody has checked",
    ),
    Mutant(
        name="object-behind-no-description",
        file=_PICKLES,
        old='!= "TensorStorageMetadata":',
        new='== "BytesStorageMetadata":',
        tests=(_PICKLE_TESTS + "test_an_object_cannot_hide_behind_another_description",),
        why="an object that is not described is unpickled unchecked",
    ),
    Mutant(
        name="only-some-objects-checked",
        file=_PICKLES,
        old="[rank::world_size]",
        new="[rank : rank + 1]",
        tests=(_PICKLE_TESTS + "test_all_ranks_together_check_every_object",),
        why="objects beyond the number of ranks are unpickled unchecked",
    ),
    Mutant(
        name="stand-ins-forget-earlier-states",
        file=_PICKLES,
        old="self.state = {**self.state, **state} if",
        new="self.state = dict(state) if",
        tests=(_PICKLE_TESTS + "test_a_second_state_adds_to_the_first",),
        why="the rehearsal reads other places out of a pickle than the loader does",
    ),
)
