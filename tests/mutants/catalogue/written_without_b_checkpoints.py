# SPDX-License-Identifier: Apache-2.0
"""Written from the code, without the tests: mistakes in checkpoints."""

from tests.mutants.mutant import Mutant

WITHOUT_B_CHECKPOINTS = (
    Mutant(
        name="a-full-quota-is-no-full-disk",
        file="megatron/core/models/mimo/training/agreement.py",
        old="for n in (errno.ENOSPC, errno.EDQUOT)",
        new="for n in (errno.ENOSPC,)",
        tests=(
            "tests/unit_tests/mimo/test_background_save_8rank.py::test_a_writer_that_fails_is_an_error_of_the_run",
        ),
        why="a save that fails with EDQUOT no longer says that the disk is full",
        ranks=8,
    ),
    Mutant(
        name="megatrons-errors-stay-off-the-console-for-good",
        file="megatron/core/models/mimo/training/agreement.py",
        old="        logger.propagate = before\n",
        new="        logger.propagate = False\n",
        tests=(
            "tests/unit_tests/mimo/test_agreement.py::test_errors_are_overheard_inside_and_logged_outside",
        ),
        why="after the first save every error that Megatron-Core's checkpointing logs is lost",
    ),
    Mutant(
        name="a-rank-that-lost-its-peer-names-itself",
        file="megatron/core/models/mimo/training/agreement.py",
        old="distance=2 if lost else 0)",
        new="distance=0)",
        tests=(
            "tests/unit_tests/mimo/test_agreement.py::test_a_rank_that_lost_its_peer_is_not_the_reason",
        ),
        why="the reason named is the broken connection, not what the failing rank says",
    ),
    Mutant(
        name="the-last-failure-published-is-not-read",
        file="megatron/core/models/mimo/training/agreement.py",
        old="store.add(_key(call), 0) + 1)",
        new="store.add(_key(call), 0))",
        tests=(
            "tests/unit_tests/mimo/test_agreement.py::test_every_failure_that_was_published_is_read",
        ),
        why="with one failing rank its peers find no reason",
    ),
    Mutant(
        name="a-failed-background-writer-is-silent",
        file="megatron/core/models/mimo/checkpoint/background_save.py",
        old="            self._thread.join()\n",
        new="            self._thread.join()\n            return\n",
        tests=(
            "tests/unit_tests/mimo/test_background_save_8rank.py::test_a_writer_that_fails_is_an_error_of_the_run",
        ),
        why="a checkpoint whose files were not written is published",
        ranks=8,
    ),
    Mutant(
        name="layouts-alone-make-the-layout",
        file="megatron/core/models/mimo/checkpoint/store.py",
        old="manifest.layouts == self.layouts and manifest.world_size == dist.get_world_size()",
        new="manifest.layouts == self.layouts",
        tests=(
            "tests/unit_tests/mimo/test_checkpoint_8rank.py::test_the_manifest_says_what_was_saved",
        ),
        why="random states of another world size are asked for",
        ranks=8,
    ),
    Mutant(
        name="a-modules-name-is-a-list-of-letters",
        file="megatron/core/models/mimo/checkpoint/store.py",
        old="names = (modules,) if isinstance(modules, str) else modules",
        new="names = modules",
        tests=(
            "tests/unit_tests/mimo/test_load_weights_8rank.py::test_one_module_goes_into_a_model_with_others",
        ),
        why="load(modules='images') fails, or loads modules whose name is a part of the given one",
        ranks=8,
    ),
    Mutant(
        name="extra-is-not-copied",
        file="megatron/core/models/mimo/checkpoint/store.py",
        old="extra=copy.deepcopy(extra or {})",
        new="extra=extra or {}",
        tests=(
            "tests/unit_tests/mimo/test_background_save_8rank.py::test_the_bytes_and_the_losses_are_those_of_a_foreground_save",
        ),
        why="a background save writes what the job's dict holds later",
        ranks=8,
    ),
    Mutant(
        name="load-does-not-wait-for-the-save",
        file="megatron/core/models/mimo/checkpoint/store.py",
        old="        self.wait()\n        with phases.during(phases.LOAD):",
        new="        with phases.during(phases.LOAD):",
        tests=(
            "tests/unit_tests/mimo/test_background_save_8rank.py::test_the_next_save_and_a_load_wait",
        ),
        why="a load while a background save is under way does not see that checkpoint",
        ranks=8,
    ),
    Mutant(
        name="another-layout-keeps-its-random-states",
        file="megatron/core/models/mimo/checkpoint/store.py",
        old="            self.randomness.reseed(manifest.step)\n",
        new="            pass\n",
        tests=(
            "tests/unit_tests/mimo/test_checkpoint_8rank.py::test_another_layout_loads_the_same_weights_and_continues",
        ),
        why="a run resumed in another layout repeats the random numbers of its first steps",
        ranks=8,
    ),
    Mutant(
        name="loading-does-not-move-the-run",
        file="megatron/core/models/mimo/checkpoint/store.py",
        old="        self.history.stands_at = manifest.step\n",
        new="",
        tests=(
            "tests/unit_tests/mimo/test_checkpoint_8rank.py::test_going_back_saves_the_new_run_and_keeps_the_abandoned_one",
        ),
        why="the first save after a load abandons every checkpoint",
        ranks=8,
    ),
    Mutant(
        name="a-rank-that-fails-alone-leaves",
        file="megatron/core/models/mimo/checkpoint/errors.py",
        old="_raise(run_together(action, has_collectives=False), doing, advice)",
        new="_raise(run_together(action, has_collectives=True), doing, advice)",
        tests=(
            "tests/unit_tests/mimo/test_checkpoint_refused_8rank.py::test_a_damaged_file_is_named",
        ),
        why="the others wait in the exchange of outcomes: a hang",
        ranks=8,
    ),
    Mutant(
        name="digests-of-tensors-cover-names-alone",
        file="megatron/core/models/mimo/checkpoint/global_tensors.py",
        old="json.dumps(own, sort_keys=True)",
        new="json.dumps(sorted(own))",
        tests=(
            "tests/unit_tests/mimo/test_checkpoint_pipeline_8rank.py::test_stages_of_different_models_are_an_error_on_all_ranks",
        ),
        why="stages built from different configurations are not refused",
        ranks=8,
    ),
    Mutant(
        name="the-new-name-is-not-on-the-disk",
        file="megatron/core/models/mimo/checkpoint/history.py",
        old=("        os.rename(partial, final)\n        fsync(self.root)\n"),
        new="        os.rename(partial, final)\n",
        tests=("tests/unit_tests/mimo/test_history.py::test_a_kill_at_any_change_loses_nothing",),
        why="older checkpoints go before the new one's name is durable",
    ),
    Mutant(
        name="the-manifest-is-written-after-the-fsync",
        file="megatron/core/models/mimo/checkpoint/history.py",
        old=(
            "        (partial / MANIFEST).write_text(manifest.to_json())\n"
            "        for file in partial.iterdir():\n"
            "            fsync(file)\n"
        ),
        new=(
            "        for file in partial.iterdir():\n"
            "            fsync(file)\n"
            "        (partial / MANIFEST).write_text(manifest.to_json())\n"
        ),
        tests=("tests/unit_tests/mimo/test_history.py::test_what_is_on_the_disk_before_what",),
        why="a power loss leaves a checkpoint with an empty manifest",
    ),
    Mutant(
        name="steps-of-nine-digits-are-invisible",
        file="megatron/core/models/mimo/checkpoint/history.py",
        old='_NAME = re.compile(r"step_(\\d{8,})")',
        new='_NAME = re.compile(r"step_(\\d{8})")',
        tests=("tests/unit_tests/mimo/test_history.py::test_steps_of_nine_digits_are_steps",),
        why="checkpoints from step 100000000 on are never found",
    ),
    Mutant(
        name="shelves-are-counted",
        file="megatron/core/models/mimo/checkpoint/history.py",
        old="shelf = shelves / str(1 + max(numbers, default=0))",
        new="shelf = shelves / str(1 + len(numbers))",
        tests=(
            "tests/unit_tests/mimo/test_history.py::test_a_folder_of_abandoned_checkpoints_may_be_removed",
        ),
        why="after a user removed abandoned/1 no save goes back any more",
    ),
    Mutant(
        name="newest-moves-aside-first",
        file="megatron/core/models/mimo/checkpoint/history.py",
        old=("        for step in steps:\n            os.rename(self.path(step), shelf"),
        new=("        for step in reversed(steps):\n            os.rename(self.path(step), shelf"),
        tests=("tests/unit_tests/mimo/test_history.py::test_a_kill_at_any_change_loses_nothing",),
        why="a kill between two moves makes an older checkpoint the newest",
    ),
    Mutant(
        name="empty-files-are-no-work",
        file="megatron/core/models/mimo/checkpoint/integrity.py",
        old="loads[least] += max(sizes[name], 1)",
        new="loads[least] += sizes[name]",
        tests=(
            "tests/unit_tests/mimo/test_checkpoint_integrity.py::test_empty_files_are_shared_out_too",
        ),
        why="all empty files fall to one rank",
    ),
    Mutant(
        name="main-copies-are-refused-on-one-rank",
        file="megatron/core/models/mimo/checkpoint/load_checks.py",
        old="if any(gathered(copied)):",
        new="if gathered(copied)[dist.get_rank()]:",
        tests=(
            "tests/unit_tests/mimo/test_load_checks.py::test_fp32_copies_on_some_ranks_are_an_error_on_all",
        ),
        why="a rank that trains nothing goes on to load and waits for ever",
    ),
    Mutant(
        name="ranks-may-read-different-manifests",
        file="megatron/core/models/mimo/checkpoint/load_checks.py",
        old="        if digest != said[0][1]:\n",
        new="        if not digest:\n",
        tests=(
            "tests/unit_tests/mimo/test_load_weights_8rank.py::test_ranks_that_read_different_manifests_are_told_so",
        ),
        why="ranks with different checkpoints of one step load them together",
        ranks=8,
    ),
    Mutant(
        name="the-manifests-digest-covers-names",
        file="megatron/core/models/mimo/checkpoint/manifest.py",
        old="json.dumps(entries, sort_keys=True)",
        new="json.dumps(sorted(entries))",
        tests=(
            "tests/unit_tests/mimo/test_checkpoint_integrity.py::test_a_changed_manifest_is_refused",
        ),
        why="a changed entry is not noticed",
    ),
    Mutant(
        name="lengths-may-be-negative",
        file="megatron/core/models/mimo/checkpoint/safe_pickles.py",
        old="min(offset, length) < 0",
        new="offset < 0",
        tests=(
            "tests/unit_tests/mimo/test_safe_pickles.py::test_places_outside_the_files_are_refused",
        ),
        why="metadata may make the check read other bytes than the loader",
    ),
    Mutant(
        name="the-first-object-is-not-checked",
        file="megatron/core/models/mimo/checkpoint/safe_pickles.py",
        old="[rank::world_size]",
        new="[rank + 1 :: world_size]",
        tests=(
            "tests/unit_tests/mimo/test_safe_pickles.py::test_all_ranks_together_check_every_object",
        ),
        why="a pickle that executes code passes",
    ),
    Mutant(
        name="an-empty-folder-is-the-same-folder",
        file="megatron/core/models/mimo/checkpoint/shared_folder.py",
        old="return bool(own & steps) or not own | steps",
        new="return bool(own & steps) or not own",
        tests=(
            "tests/unit_tests/mimo/test_shared_folder.py::test_folders_to_read_from_must_hold_the_same",
        ),
        why="a rank that sees none of rank 0's checkpoints agrees",
    ),
    Mutant(
        name="folders-are-removed-from-above",
        file="megatron/core/models/mimo/checkpoint/shared_folder.py",
        old="        for path in self._made:\n",
        new="        for path in reversed(self._made):\n",
        tests=(
            "tests/unit_tests/mimo/test_shared_folder.py::test_one_folder_passes_and_nothing_is_left",
        ),
        why="the probe leaves empty folders behind",
    ),
)
