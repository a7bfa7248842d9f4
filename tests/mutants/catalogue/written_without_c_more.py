# SPDX-License-Identifier: Apache-2.0
"""A second round from the code without the tests: training and ``mimo_colocated``."""

from tests.mutants.catalogue.places import MIMO, UNIT
from tests.mutants.mutant import Mutant

WITHOUT_C_MORE = (
    Mutant(
        name="extra-copied-one-level",
        file=MIMO + "checkpoint/store.py",
        old="extra=copy.deepcopy(extra or {}),",
        new="extra=copy.copy(extra or {}),",
        tests=(
            UNIT + "test_background_save_8rank.py::"
            "test_the_bytes_and_the_losses_are_those_of_a_foreground_save",
        ),
        why=(
            "save(background=True, extra={'loader': {'epoch': 0}}), then the job sets "
            "extra['loader']['epoch'] = 1 before poll(): the checkpoint says epoch 1"
        ),
        ranks=8,
    ),
    Mutant(
        name="stateless-optimizer-starts-anew",
        file=MIMO + "checkpoint/frozen_state.py",
        old="if keys and keys <= names:",
        new="if keys <= names:",
        tests=(
            UNIT + "test_optimizer_state.py::"
            "test_an_optimizer_that_keeps_no_tensors_is_loaded_like_others",
        ),
        why=(
            "plain SGD without momentum has no tensors in its state; loading a checkpoint in "
            "which another module was frozen marks it as fresh: with settings='checkpoint' its "
            "saved learning rate and groups are not loaded"
        ),
    ),
    Mutant(
        name="scales-held-after-an-error",
        file=MIMO + "training/inner_optimizers.py",
        old=(
            "    try:\n"
            "        yield\n"
            "    finally:\n"
            "        for scaler in scalers:\n"
            "            del scaler.update\n"
        ),
        new=("    yield\n    for scaler in scalers:\n        del scaler.update\n"),
        tests=(
            UNIT + "test_optimizer_state.py::"
            "test_a_loss_scale_moves_again_after_a_step_that_raised",
        ),
        why=(
            "fp16: prepare_grads of one inner optimizer raises once and the job goes on: "
            "scaler.update stays the lambda, and the loss scale never changes again"
        ),
    ),
    Mutant(
        name="main-copies-refused-on-one-rank",
        file=MIMO + "checkpoint/load_checks.py",
        old="if any(gathered(copied)):",
        new="if copied:",
        tests=(UNIT + "test_load_checks.py::test_fp32_copies_on_some_ranks_are_an_error_on_all",),
        why=(
            "store.load(step, model) under an optimizer with fp32 copies that only some ranks "
            "have (a bf16 encoder that is on rank 1 only): rank 1 raises, the others go on "
            "into the collective load and wait"
        ),
    ),
    Mutant(
        name="empty-manifest-digest",
        file=MIMO + "checkpoint/manifest.py",
        old="if digest is not None and digest != _digest(entries):",
        new="if digest and digest != _digest(entries):",
        tests=(UNIT + "test_checkpoint_integrity.py::test_a_manifest_older_than_digests_is_read",),
        why='mimo.json with "digest": "" and a changed step or extra is read as undamaged',
    ),
    Mutant(
        name="nonfinite-count-of-named",
        file=MIMO + "gradients/nonfinite.py",
        old="NonFiniteGradients(name, rank, named, len(found))",
        new="NonFiniteGradients(name, rank, named, len(named))",
        tests=(UNIT + "test_nonfinite_8rank.py::test_parameters_are_named_from_the_last_one_on",),
        why=(
            "10 parameters of a module have nan gradients: count is 3, and the sentence says "
            "'and 2 more'"
        ),
        ranks=8,
    ),
    Mutant(
        name="shards-of-the-neighbour",
        file=MIMO + "training/optimizer_shards.py",
        old="any(saved[key] != mine[key] for key in mine)",
        new="all(saved[key] != mine[key] for key in mine)",
        tests=(UNIT + "test_optimizer_table.py::test_states_of_another_rank_or_kind_are_refused",),
        why=(
            "MimoOptimizer.state_dict() of rank 0 of 2 loaded on rank 1 of 2, shards of equal "
            "shapes: not refused, rank 1 goes on with rank 0's moments and main weights"
        ),
        ranks=2,
    ),
    Mutant(
        name="variable-lengths-need-batched-p2p",
        file=MIMO + "pipeline/checks.py",
        old="groups.pp.size() == 2 and mimo.config.variable_seq_lengths:",
        new=(
            "groups.pp.size() == 2 and mimo.config.variable_seq_lengths and "
            "mimo.config.batch_p2p_comm:"
        ),
        tests=(
            UNIT + "test_pipeline_step_8rank.py::"
            "test_lengths_that_two_interleaved_ranks_cannot_tell_are_refused",
        ),
        why=(
            "2 pipeline ranks, 2 virtual stages, overlap_p2p_comm=True, batch_p2p_comm=False, "
            "variable_seq_lengths=True: accepted; the lengths sent forward and back are mixed "
            "up, wrong shapes or a hang"
        ),
        ranks=8,
    ),
    Mutant(
        name="kept-or-loaded",
        file=MIMO + "training/pretrained.py",
        old="return kept | loaded",
        new="return kept or loaded",
        tests=(
            UNIT + "test_pretrained.py::"
            "test_what_transformers_loaded_stays_and_what_its_file_lacked_is_drawn",
        ),
        why=(
            "keep_weights marks one encoder, transformers loaded another one below the same "
            "root: initialize_weights draws the second one's weights anew"
        ),
    ),
    Mutant(
        name="default-seed-without-cp",
        file=MIMO + "randomness.py",
        old='derive_seed(seed, name, "default", dp, cp, *stage)',
        new='derive_seed(seed, name, "default", dp, *stage)',
        tests=(UNIT + "test_randomness.py::test_ranks_agree_exactly_where_the_table_says",),
        why=(
            "CP 2: both CP ranks begin with one default state, so the dropout masks of hidden "
            "states (no tensor parallelism in them) repeat over the two parts of the sequence"
        ),
    ),
    Mutant(
        name="pickles-beyond-the-first",
        file=MIMO + "checkpoint/safe_pickles.py",
        old="[rank::world_size]",
        new="[rank:world_size]",
        tests=(UNIT + "test_safe_pickles.py::test_all_ranks_together_check_every_object",),
        why=(
            "a checkpoint with more pickled objects than ranks: those after the first "
            "world_size are not looked at by anybody, and one that runs code is loaded"
        ),
    ),
    Mutant(
        name="empty-dump-raises",
        file="mimo_colocated/forensics/evidence.py",
        old="contextlib.suppress(OSError, EOFError, ValueError, pickle.UnpicklingError)",
        new="contextlib.suppress(OSError, ValueError, pickle.UnpicklingError)",
        tests=(UNIT + "test_who_waits.py::test_dumps_are_read_and_nothing_is_executed",),
        why=(
            "a rank was killed when it had opened its dump (file of 0 bytes): read_dumps "
            "raises EOFError and there is no summary of anybody"
        ),
    ),
    Mutant(
        name="microbatch-zero-not-marked",
        file="mimo_colocated/phases.py",
        old=("    if microbatch is not None:\n        _own.microbatch = microbatch"),
        new=("    if microbatch:\n        _own.microbatch = microbatch"),
        tests=(UNIT + "test_phases.py::test_backward_marks_only_what_needs_a_gradient",),
        why=(
            "a pipelined step is in microbatch 0: forward_stage marks number 0, the place says "
            "-1, or, after a backward hook has marked 1, still 1"
        ),
    ),
    Mutant(
        name="last-verdict-counts",
        file="mimo_colocated/process_groups.py",
        old='if store.add(f"{name}/settlers", 1) == 1:',
        new='if store.add(f"{name}/settlers", 1):',
        tests=(
            UNIT + "test_own_groups.py::test_absent_members_are_named_and_late_ones_hear_of_it",
        ),
        why=(
            "two members give up on a third after the timeout, then it comes: it overwrites "
            "the verdict by 'complete', returns a name from meet_members and waits in making a "
            "group that the others have left"
        ),
    ),
    Mutant(
        name="gave-up-in-the-first-call",
        file="mimo_colocated/forensics/who_waits.py",
        old="candidates = calls[-1:]",
        new="candidates = calls[:1]",
        tests=(
            UNIT + "test_who_waits.py::"
            "test_the_last_call_of_a_rank_that_gave_up_is_what_it_waited_in",
        ),
        why=(
            "a rank that gave up (its wait timed out, nothing is under way in its dump) after "
            "5 calls: the summary says that it waited in #1, and for whom is wrong or nobody"
        ),
    ),
)
