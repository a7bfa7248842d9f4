# SPDX-License-Identifier: Apache-2.0
"""A fourth round from the code without the tests: models, jobs, data, plans."""

from tests.mutants.catalogue.places import FUNCTIONAL, MIMO, UNIT
from tests.mutants.mutant import Mutant

WITHOUT_E_PARTS = (
    Mutant(
        name="export-config-of-source",
        file=MIMO + "huggingface/export.py",
        old="if not own.exists() or config != source.config:",
        new="if not own.exists():",
        tests=(
            UNIT + "huggingface/test_llava.py"
            "::test_an_export_says_which_hidden_states_were_used",
        ),
        why="an exported config.json says the old dtype and fields",
    ),
    Mutant(
        name="adapter-alpha-is-scale",
        file=MIMO + "huggingface/lora_export.py",
        old='"lora_alpha": lora.alpha,',
        new='"lora_alpha": lora.scale,',
        tests=(UNIT + "huggingface/test_lora.py::test_adapters_are_written_where_nothing_is",),
        why="peft scales the adapters otherwise than they were trained",
    ),
    Mutant(
        name="run-past-the-tensor",
        file=MIMO + "huggingface/weights.py",
        old="if run.start + run.size > lengths[run.source]:",
        new="if run.start > lengths[run.source]:",
        tests=(
            UNIT + "huggingface/test_refusals.py"
            "::test_folders_of_another_model_are_refused_before_a_weight_is_read",
        ),
        why="a tensor that is too short is not refused before loading",
    ),
    Mutant(
        name="nan-logits-pass",
        file=MIMO + "huggingface/logits_check.py",
        old="            difference = torch.nan_to_num(difference, nan=math.inf)\n",
        new="            difference = torch.nan_to_num(difference)\n",
        tests=(UNIT + "huggingface/test_logits_check.py::test_what_differs_is_found",),
        why="mimo check passes a model whose logits are NaN",
    ),
    Mutant(
        name="sparse-step-counts-from-zero",
        file=MIMO + "huggingface/families/decoders.py",
        old="(n + 1) % step == 0",
        new="n % step == 0",
        tests=(
            UNIT + "huggingface/test_language_models.py"
            "::test_logits_and_gradients_are_those_of_transformers",
        ),
        why="expert layers are in the wrong places",
    ),
    Mutant(
        name="own-mrope-section-ignored",
        file=MIMO + "huggingface/families/qwen_vl.py",
        old='{"mrope_section": rope["mrope_section"], **given, **rope["always"]}',
        new='{**given, "mrope_section": rope["mrope_section"], **rope["always"]}',
        tests=(
            UNIT + "huggingface/test_qwen_vl.py"
            "::test_logits_and_gradients_are_those_of_transformers",
        ),
        why="the section that config.json names is overridden by the usual one",
    ),
    Mutant(
        name="options-of-older-runs-missing",
        file=MIMO + "job/loop.py",
        old='before = type(self.options)().as_dict() | manifest.extra.get("options", {})',
        new='before = manifest.extra.get("options", {})',
        tests=(UNIT + "test_job_loop.py::test_a_run_that_knew_fewer_options_had_their_defaults",),
        why="a run saved before an option came cannot be resumed",
    ),
    Mutant(
        name="scaling-counts-as-stuck",
        file=MIMO + "job/loop.py",
        old="if result.success or result.scaling:",
        new="if result.success:",
        tests=(
            UNIT + "test_job_loop.py"
            "::test_a_run_stops_after_as_many_skipped_steps_in_a_row_as_said",
        ),
        why="a loss scale that is searched ends the run",
    ),
    Mutant(
        name="top-p-of-first-scores",
        file=MIMO + "job/next_tokens.py",
        old="(too_few | (found < missing)).any():",
        new="too_few.any():",
        tests=(
            UNIT + "test_next_tokens.py"
            "::test_a_shard_that_has_more_good_scores_than_it_sent_is_asked_again",
        ),
        why="top-p over TP keeps tokens that are below better ones of other shards",
    ),
    Mutant(
        name="host-memory-not-shared",
        file=MIMO + "job/calibration.py",
        old="return psutil.virtual_memory().total / ranks",
        new="return float(psutil.virtual_memory().total)",
        tests=(UNIT + "plan/test_calibration.py::test_nodes_are_as_launchers_tell",),
        why="each rank is planned to have all the host's memory",
    ),
    Mutant(
        name="shares-balanced-to-a-tenth",
        file=MIMO + "data/batches.py",
        old="EncoderBalance(threshold=1.0, cost=cost)",
        new="EncoderBalance(cost=cost)",
        tests=(UNIT + "data/test_batches.py::test_items_are_shared_out_by_cost",),
        why="uneven work below a tenth is not balanced",
    ),
    Mutant(
        name="last-dot-is-the-extension",
        file=MIMO + "data/tar_shards.py",
        old='extension = name.rpartition("/")[2].partition(".")[2]',
        new='extension = name.rpartition(".")[2]',
        tests=(UNIT + "data/test_sources.py::test_every_kind_gives_the_same_conversations",),
        why="KEY.seg.png is taken for KEY.png",
    ),
    Mutant(
        name="sound-length-rounded-down",
        file=MIMO + "data/sounds.py",
        old="return -(-frames * rate // own)",
        new="return frames * rate // own",
        tests=(UNIT + "data/test_sounds.py::test_another_rate_is_converted",),
        why="a resampled sound has one number more than was planned",
    ),
    Mutant(
        name="more-images-than-shown",
        file=MIMO + "data/tables.py",
        old=(
            "        if next(images, None) is not None:\n"
            '            raise SampleError("malformed", f"row {number} has more images than '
            'its messages show")\n'
        ),
        new="",
        tests=(
            UNIT + "data/test_sources.py"
            "::test_images_of_a_table_that_its_messages_do_not_show_are_malformed",
        ),
        why="images of a row that no message shows are dropped in silence",
    ),
    Mutant(
        name="frozen-language-has-no-backward",
        file=MIMO + "plan/step_time.py",
        old="if not own.any and not any(work.encoder_trains(name) for name in shapes.encoders):",
        new="if not own.any:",
        tests=(
            UNIT + "plan/test_plan_parts.py"
            "::test_frozen_modules_have_no_backward_pass_of_their_own",
        ),
        why="a frozen language model that gradients pass is planned without its backward",
    ),
    Mutant(
        name="attention-flops-of-passed-gradients",
        file=MIMO + "plan/flops.py",
        old="BACKWARD_MATMUL * (trained or through)",
        new="BACKWARD_MATMUL * trained",
        tests=(UNIT + "plan/test_plan_flops.py::test_a_frozen_module_has_a_third_of_the_flops",),
        why="a step's FLOPs miss attention's backward of a frozen model",
    ),
    Mutant(
        name="a-whole-node-is-between",
        file=MIMO + "plan/machine.py",
        old=(
            "        if span <= self.node:\n"
            "            return self.inside"
        ),
        new=(
            "        if span < self.node:\n"
            "            return self.inside"
        ),
        tests=(
            UNIT + "plan/test_plan_parts.py"
            "::test_gradients_count_beyond_the_pass_that_they_are_reduced_beside",
        ),
        why="a group that fills a node is planned over the network",
    ),
    Mutant(
        name="native-loss-without-labels",
        file=MIMO + "torch_native/loss.py",
        old="/ _at_least_one(divisor)",
        new="/ divisor",
        tests=(
            UNIT + "torch_native/test_context_parallel.py"
            "::test_a_batch_without_labels_has_no_loss_and_no_gradient",
        ),
        why="a batch without labels has a NaN loss",
    ),
    Mutant(
        name="native-buffers-not-compared",
        file=MIMO + "torch_native/agreed.py",
        old="named = [*model.named_parameters(), *model.named_buffers()]",
        new="named = [*model.named_parameters()]",
        tests=(
            UNIT + "torch_native/test_plans.py"
            "::test_a_digest_sees_all_that_makes_another_model",
        ),
        why="models whose buffers differ are sharded as one",
    ),
    Mutant(
        name="resumed-link-counts-again",
        file=MIMO + "lossy/link.py",
        old='Counts(**saved["counts"]), saved["counted"]',
        new='Counts(**saved["counts"]), 0',
        tests=(UNIT + "test_lossy_link.py::test_links_go_on_after_a_checkpoint",),
        why="after resuming, messages that are sent again are counted",
    ),
    Mutant(
        name="phase-of-time-forgotten",
        file=MIMO + "lossy/loss_models.py",
        old="return states, float(times[-1] - np.floor(times[-1]))",
        new="return states, 0.0",
        tests=(UNIT + "test_lossy_models.py::test_a_step_of_time_moves_with_the_clock",),
        why="of short messages the chain in time never moves",
    ),
    Mutant(
        name="export-dtype-of-parts",
        file=MIMO + "huggingface/export.py",
        old="            value = _with_dtype(value, dtype)\n",
        new="            value = dict(value)\n",
        tests=(
            UNIT + "huggingface/test_export_files.py"
            "::test_the_configuration_names_the_dtype_that_was_written",
        ),
        why="nested configurations keep the old dtype",
    ),
    Mutant(
        name="cut-short-folder-read",
        file=MIMO + "huggingface/folder.py",
        old="if got != each:",
        new="if not got:",
        tests=(
            UNIT + "huggingface/test_refusals.py"
            "::test_a_file_that_is_cut_short_while_it_is_open",
        ),
        why="a file cut short while it is read yields numbers of nothing",
    ),
    Mutant(
        name="token-id-past-vocabulary",
        file=MIMO + "huggingface/compose.py",
        old="if not 0 <= token_id < text.vocab_size:",
        new="if not 0 <= token_id <= text.vocab_size:",
        tests=(
            UNIT + "huggingface/test_from_folders.py"
            "::test_parts_that_do_not_make_a_model_are_refused",
        ),
        why="a token past the vocabulary is taken for images",
    ),
    Mutant(
        name="half-a-line-stays",
        file=MIMO + "job/results.py",
        old=(
            "                os.ftruncate(self._file, self._size)\n"
            "                raise\n"
        ),
        new="                raise\n",
        tests=(FUNCTIONAL + "test_digits_report.py::test_a_full_disk_leaves_whole_lines",),
        why="a full disk leaves half a line in metrics.jsonl, and the next run refuses it",
    ),
    Mutant(
        name="readers-die-of-sigusr1",
        file=MIMO + "data/readers.py",
        old="for sent in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):",
        new="for sent in (signal.SIGINT, signal.SIGTERM):",
        tests=(UNIT + "data/test_readers.py::test_what_tells_the_job_to_stop_leaves_its_readers",),
        why="a stop request to the job kills the readers before the save",
    ),
    Mutant(
        name="prepared-for-any-length",
        file=MIMO + "data/encoding.py",
        old='f"{_MADE} {self.max_tokens}".encode()',
        new='f"{_MADE}".encode()',
        tests=(UNIT + "data/test_encoding.py::test_a_folder_is_known_by_its_text_and_its_length",),
        why="data prepared for another max_tokens is taken",
    ),
    Mutant(
        name="virtual-stages-any-microbatches",
        file=MIMO + "plan/candidates.py",
        old="(language.pp == 1 or m % language.pp):",
        new="language.pp == 1:",
        tests=(UNIT + "plan/test_plan_candidates.py::test_why_a_candidate_cannot_run",),
        why="plans are shown that the schedule refuses",
    ),
    Mutant(
        name="native-clip-scales-up",
        file=MIMO + "torch_native/gathered.py",
        old="(max_norm / (norm + 1e-6)).clamp_max(1.0)",
        new="max_norm / (norm + 1e-6)",
        tests=(
            UNIT + "torch_native/test_parallelize_8rank.py"
            "::test_norm_of_the_gradient_and_clipping",
        ),
        why="small gradients are scaled up to the norm",
        ranks=8,
    ),
    Mutant(
        name="bursts-end-with-messages",
        file=MIMO + "lossy/statistics.py",
        old="np.concatenate([[in_burst], lost[:-1]])",
        new="np.concatenate([[False], lost[:-1]])",
        tests=(UNIT + "test_lossy_link.py::test_a_link_applies_the_masks_of_its_model",),
        why="a burst over two messages counts twice",
    ),
)
