# SPDX-License-Identifier: Apache-2.0
"""A fifth round from the code without the tests: a break in each of some drawn functions."""

from tests.mutants.catalogue.places import EXAMPLE, FUNCTIONAL, MIMO, UNIT
from tests.mutants.mutant import Mutant

WITHOUT_F = (
    Mutant(
        name="parse-accepts-larger-job",
        file="mimo_colocated/cli/main.py",
        old="if world not in (None, options.world_size):",
        new="if world is not None and world < options.world_size:",
        tests=(
            FUNCTIONAL + "test_mimo_command.py"
            "::test_ranks_that_the_layouts_do_not_span_are_refused",
        ),
        why="surplus ranks are not refused; they hang or fail later",
    ),
    Mutant(
        name="output-of-forgets-cp",
        file=MIMO + "submodules/base.py",
        old="            rows_per_item=self.rows_per_item.get(name),\n            cp=self.cp,\n",
        new="            rows_per_item=self.rows_per_item.get(name),\n",
        tests=(UNIT + "test_encoder_cp.py::test_an_encoder_of_ones_own_trains_as_on_one_rank",),
        why="parts of items over CP are read as whole ones",
    ),
    Mutant(
        name="item-exchange-checks-dest-cp",
        file=MIMO + "comm/item_exchange.py",
        old="cp = bridge.layout.src_cp_size",
        new="cp = bridge.layout.dest_cp_size",
        tests=(UNIT + "test_encoder_cp.py::test_items_do_not_move_between_replicas_that_cut_them",),
        why="items that an encoder cuts over CP are moved; others, beside language CP, are refused",
    ),
    Mutant(
        name="majority-tie-by-insertion",
        file="mimo_colocated/train/answers.py",
        old="usual = max(counts, key=lambda said: (counts[said], said))",
        new="usual = max(counts, key=lambda said: counts[said])",
        tests=(
            UNIT + "train/test_job.py"
            "::test_the_most_frequent_answer_is_that_of_samples_that_are_kept",
        ),
        why="of two equally frequent answers the baseline takes that which was counted first",
    ),
    Mutant(
        name="planned-rows-not-shared-by-encoders",
        file=EXAMPLE + "memory_plan.py",
        old="rows = DIGITS_PER_SAMPLE * TOKENS_PER_IMAGE / SEQUENCE_LENGTH / len(encoders)",
        new="rows = DIGITS_PER_SAMPLE * TOKENS_PER_IMAGE / SEQUENCE_LENGTH",
        tests=(
            FUNCTIONAL + "test_digits_two_encoders.py"
            "::test_the_planner_is_told_of_every_digit_once",
        ),
        why="with --audio the planner counts every digit for both encoders",
    ),
    Mutant(
        name="comparison-runs-counted-once",
        file=MIMO + "comm/plan_guard.py",
        old='+ 2 * header[:, _AT["runs"]]',
        new='+ header[:, _AT["runs"]]',
        tests=(UNIT + "test_routed_bridge.py::test_dp_sizes_that_do_not_divide",),
        why="token places are cut off in the fixed message; ranks plan from what is left",
    ),
    Mutant(
        name="expert-marks-whole-moe-layer",
        file=MIMO + "training/experts.py",
        old=(
            "            experts: Any = layer.experts\n"
            "            for parameter in experts.parameters():"
        ),
        new="            experts: Any = layer\n            for parameter in experts.parameters():",
        tests=(
            UNIT + "test_experts_8rank.py"
            "::test_loss_gradients_and_norm_equal_the_unsharded_model",
        ),
        why="routers are summed over the experts' groups, so copies drift apart",
        ranks=8,
    ),
    Mutant(
        name="calibrate-says-milliseconds-as-us",
        file="mimo_colocated/cli/calibrating.py",
        old="{1e6 * machine.layer_start:.0f} us",
        new="{1e3 * machine.layer_start:.0f} us",
        tests=(UNIT + "plan/test_calibration.py::test_what_was_measured_is_told_and_written",),
        why="a layer is said to start a thousand times faster than it does",
    ),
    Mutant(
        name="stop-requests-exit-only-on-success",
        file="mimo_colocated/stop_requests.py",
        old="    def __exit__(self, *_: object) -> None:\n        self.close()",
        new=(
            "    def __exit__(self, kind: object, *_: object) -> None:\n"
            "        if kind is None:\n"
            "            self.close()"
        ),
        tests=(UNIT + "test_left_as_found.py::test_it_is_as_before",),
        why="after an error SIGTERM stays swallowed",
    ),
    Mutant(
        name="who-waits-ranks-without-culprits",
        file="mimo_colocated/forensics/who_waits.py",
        old="ranks = sorted({*self.places, *self.dumps, *self.culprits})",
        new="ranks = sorted({*self.places, *self.dumps})",
        tests=(
            UNIT + "test_who_waits.py"
            "::test_every_rank_of_which_anything_is_known_is_in_the_list",
        ),
        why="a rank that died early is missing in the list of all ranks",
    ),
    Mutant(
        name="sound-steps-rounded-down",
        file=MIMO + "data/places.py",
        old="rows = self.rows(-(-length // self._step))",
        new="rows = self.rows(length // self._step)",
        tests=(UNIT + "data/test_sounds.py::test_tokens_and_spectra_are_those_of_the_processor",),
        why="sounds between two steps of the spectrum have one token too few",
    ),
    Mutant(
        name="bubbles-one-more-allowed",
        file="mimo_colocated/train/checks.py",
        old="given, most = training.encode_in_bubbles, training.micro_batches - stages\n",
        new="given, most = training.encode_in_bubbles, training.micro_batches - stages + 1\n",
        tests=(UNIT + "train/test_recipe.py::test_bubbles_that_cannot_be_filled_are_refused",),
        why="one microbatch too many in the bubbles is accepted",
    ),
    Mutant(
        name="version-missing-is-empty",
        file="mimo_colocated/cli/doctor.py",
        old=(
            "    except importlib.metadata.PackageNotFoundError:\n"
            "        return None\n"
            "\n"
            "\n"
            "def _gib"
        ),
        new='    except importlib.metadata.PackageNotFoundError:\n        return ""\n\n\ndef _gib',
        tests=(
            FUNCTIONAL + "test_mimo_command.py"
            "::test_the_doctor_needs_no_extras_and_tells_each_cure",
        ),
        why="the doctor has an empty cell for what is not installed",
    ),
    Mutant(
        name="start-scripts-all-stops-are-sigint",
        file="mimo_colocated/launch/starts.py",
        old="raise Interrupted(stop.sigval) from stop",
        new="raise Interrupted(signal.SIGINT) from stop",
        tests=(
            FUNCTIONAL + "test_digits_launch.py"
            "::test_what_ended_ranks_that_are_not_forked_is_told",
        ),
        why="a job on GPUs that SIGHUP ended exits as if by Ctrl-C",
    ),
    Mutant(
        name="metrics-size-not-summed",
        file=MIMO + "job/results.py",
        old="self._size += len(content)",
        new="self._size = len(content)",
        tests=(FUNCTIONAL + "test_digits_report.py::test_a_full_disk_leaves_whole_lines",),
        why="a full disk cuts the metrics back to the length of one line",
    ),
    Mutant(
        name="loops-any-name-is-enough",
        file=MIMO + "torch_native/ring_attention.py",
        old="all(hasattr(found, name) for name in _LOOPS)",
        new="any(hasattr(found, name) for name in _LOOPS)",
        tests=(UNIT + "torch_native/test_context_parallel.py::test_another_torch_is_refused",),
        why="a torch with half of ring attention is taken, and fails later",
    ),
    Mutant(
        name="check-bridge-forgets-language-dp",
        file=EXAMPLE + "options.py",
        old="sizes = {name: layout.dp for name, layout in options.layouts.modules.items()}",
        new="sizes = {name: layout.dp for name, layout in options.encoders.items()}",
        tests=(FUNCTIONAL + "test_digits_options.py::test_what_an_audio_encoder_does_not_go_with",),
        why="--bridge gather with sounds beside another language DP size fails in training",
    ),
    Mutant(
        name="logits-positions-cut-on-first-axis",
        file=MIMO + "huggingface/logits_check.py",
        old="positions[..., own, :].to(device)",
        new="positions[own].to(device)",
        tests=(
            UNIT + "huggingface/test_logits_check.py"
            "::test_samples_are_made_up_where_there_is_no_processor",
        ),
        why="of places in three directions a rank takes directions instead of samples",
    ),
    Mutant(
        name="report-oserror-is-no-peer",
        file="mimo_colocated/launch/failures.py",
        old="isinstance(error, (RuntimeError, OSError)) and _PEER_GONE",
        new="isinstance(error, RuntimeError) and _PEER_GONE",
        tests=(FUNCTIONAL + "test_digits_launch.py::test_reports_of_exceptions",),
        why="a rank that lost its peer is blamed in the peer's place",
    ),
    Mutant(
        name="cut-items-default-cp-one",
        file=MIMO + "submodules/base.py",
        old='"context_parallel_size", size)',
        new='"context_parallel_size", 1)',
        tests=(UNIT + "test_encoder_cp.py::test_an_encoder_of_ones_own_trains_as_on_one_rank",),
        why="an encoder without a Megatron config cannot cut its items",
    ),
    Mutant(
        name="stand-in-helpers-bound-to-original",
        file=MIMO + "stand_ins.py",
        old="return found.__get__(self, owner) if bound else found",
        new="return found.__get__(stand_in, owner) if bound else found",
        tests=(UNIT + "test_stand_ins.py::test_methods_work_on_mocks_that_answer_to_any_name",),
        why="a helper that is called on a stand-in does not find further helpers",
    ),
    Mutant(
        name="areas-without-step-axis",
        file="mimo_colocated/train/report_figures.py",
        old="    axes.set_ylabel(said)\n    _steps(axes)\n    return _svg(figure)",
        new="    axes.set_ylabel(said)\n    return _svg(figure)",
        tests=(
            UNIT + "train/test_report.py"
            "::test_what_lies_over_the_steps_says_so_and_marks_whole_ones",
        ),
        why="stacked figures do not say that they lie over steps, and mark halves of them",
    ),
    Mutant(
        name="holders-left-side",
        file=MIMO + "comm/plan/group_rows.py",
        old='run = np.searchsorted(self._start, rows, side="right") - 1',
        new="run = np.searchsorted(self._start, rows) - 1",
        tests=(UNIT + "test_routes.py::test_docstring_examples",),
        why="the first row of each run is taken from another replica",
    ),
    Mutant(
        name="offload-hooks-save-on-cpu",
        file=MIMO + "memory/offload.py",
        old="return torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)",
        new="return torch.autograd.graph.save_on_cpu()",
        tests=(UNIT + "test_activation_memory.py::test_what_stays_on_the_device",),
        why="weights go to the host too, and host use is zero",
    ),
    Mutant(
        name="check-options-advises-new-value",
        file=MIMO + "job/loop.py",
        old="give {flag} {before.get(name)} to resume it",
        new="give {flag} {now[name]} to resume it",
        tests=(UNIT + "test_job_loop.py::test_what_a_resumed_run_may_change",),
        why="a refusal advises the value that it refuses",
    ),
    Mutant(
        name="tables-single-image-dropped",
        file=MIMO + "data/tables.py",
        old="images = _items(number, shown if isinstance(shown, list) else [shown])",
        new="images = _items(number, shown)",
        tests=(UNIT + "data/test_sources.py::test_every_kind_gives_the_same_conversations",),
        why="tables with one image in a row are malformed",
    ),
    Mutant(
        name="encode-ahead-refused-with-pipeline",
        file="mimo_colocated/launch/training_options.py",
        old="if self.encode_ahead is not None and stages == self.micro_batches == 1:",
        new="if self.encode_ahead is not None and self.micro_batches == 1:",
        tests=(FUNCTIONAL + "test_digits_options.py::test_what_a_pipelined_language_model_needs",),
        why="--encode-ahead with stages and one microbatch is refused",
    ),
    Mutant(
        name="progress-ignores-stream",
        file=MIMO + "job/results.py",
        old="self._bar.write(line, file=self.stream)",
        new="self._bar.write(line)",
        tests=(FUNCTIONAL + "test_digits_report.py::test_a_line_per_step_and_no_bar_in_a_file",),
        why="lines of progress go to stdout whatever the stream",
    ),
    Mutant(
        name="items-replica-forgets-cp",
        file=MIMO + "comm/plan_guard.py",
        old="replica = group.src_of // group.layout.src_cp_size",
        new="replica = group.src_of",
        tests=(UNIT + "test_encoder_cp.py::test_an_encoder_of_ones_own_trains_as_on_one_rank",),
        why="items are counted once for every CP rank",
    ),
    Mutant(
        name="problems-skip-groups",
        file="mimo_colocated/train/checks.py",
        old="    yield from _groups(recipe)\n",
        new="",
        tests=(UNIT + "train/test_recipe.py::test_what_is_wrong_is_refused_in_one_sentence",),
        why="wrong parameter groups fail after the start",
    ),
    Mutant(
        name="is-installed-dotted-name-raises",
        file="mimo_colocated/launch/errors.py",
        old=(
            "    try:\n"
            "        return importlib.util.find_spec(name) is not None\n"
            "    except ModuleNotFoundError:  # a parent package of a dotted name is missing\n"
            "        return False\n"
        ),
        new="    return importlib.util.find_spec(name) is not None\n",
        tests=(FUNCTIONAL + "test_digits_launch.py::test_missing_packages_are_named_together",),
        why="a missing parent package is a traceback",
    ),
    Mutant(
        name="flat-accepts-2d-sequence-first",
        file=MIMO + "submodules/encoder_outputs.py",
        old="if output.ndim == 2 and not self.sequence_first:",
        new="if output.ndim == 2:",
        tests=(
            UNIT + "test_submodules.py"
            "::test_flat_rows_of_a_sequence_first_encoder_are_refused",
        ),
        why="rows in an unknown order are taken",
    ),
    Mutant(
        name="port-orphan-means-pid-one",
        file="mimo_colocated/launch/starts.py",
        old="        if os.getppid() != launcher:\n",
        new="        if os.getppid() == 1:\n",
        tests=(
            FUNCTIONAL + "test_digits_launch.py"
            "::test_a_rank_waits_for_the_store_as_long_as_its_launcher_lives",
        ),
        why="where the launcher is process 1 every rank ends at once",
    ),
    Mutant(
        name="module-paths-counts-folder-names",
        file=MIMO + "huggingface/lora_export.py",
        old="key=lambda spelled: len(known & set(spelled.values())))",
        new="key=lambda spelled: len(known & set(spelled)))",
        tests=(
            FUNCTIONAL + "test_fine_tuning.py"
            "::test_adapters_train_on_eight_ranks_as_on_one_and_leave_for_peft",
        ),
        why="adapters of models that transformers spells otherwise cannot be exported",
        ranks=8,
    ),
    Mutant(
        name="chat-jsonl-line-no-object",
        file=MIMO + "data/chat_jsonl.py",
        old='if not isinstance(value, dict) or "messages" not in value:',
        new='if "messages" not in value:',
        tests=(UNIT + "data/test_sources.py::test_samples_that_are_malformed_say_why",),
        why="a line that is a number ends the job",
    ),
    Mutant(
        name="split-mask-not-reordered",
        file=EXAMPLE + "images.py",
        old='chosen = order[held_out[order] == (split == "held_out")]',
        new='chosen = order[held_out == (split == "held_out")]',
        tests=(
            FUNCTIONAL + "test_digits_data.py"
            "::test_the_split_uses_every_image_once_and_keeps_the_shares_of_the_digits",
        ),
        why="held-out images are not a fifth of every digit",
    ),
    Mutant(
        name="singletons-without-rank-offset",
        file=MIMO + "training/groups.py",
        old="ranks = [[r] for r in range(grid.rank_offset, grid.rank_offset + grid.size)]",
        new="ranks = [[r] for r in range(grid.size)]",
        tests=(UNIT + "test_groups_8rank.py::test_members_are_those_of_the_coordinates",),
        why="a grid behind others has no groups for dims that it lacks",
        ranks=8,
    ),
)
