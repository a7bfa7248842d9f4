# SPDX-License-Identifier: Apache-2.0
"""A third round from the code without the tests: optimizers, layers, towers, folders."""

from tests.mutants.catalogue.places import MIMO, UNIT
from tests.mutants.mutant import Mutant

WITHOUT_D_PARTS = (
    Mutant(
        name="clip-to-nothing",
        file=MIMO + "optimizer.py",
        old="opt.config.clip_grad <= 0.0:",
        new="opt.config.clip_grad < 0.0:",
        tests=(
            UNIT + "test_mimo_optimizer_8rank.py"
            "::test_clipping_scales_every_module_by_the_same_factor",
        ),
        why="clip_grad=0 sets all gradients to zero",
        ranks=8,
    ),
    Mutant(
        name="pretrained-fp64",
        file=MIMO + "training/pretrained.py",
        old="4: torch.int32, 8: torch.int64}",
        new="4: torch.int32}",
        tests=(UNIT + "test_pretrained.py::test_weights_of_every_dtype_are_compared",),
        why="pretrained weights in fp64 die in the first step",
    ),
    Mutant(
        name="items-sequence-first",
        file=MIMO + "submodules/encoder_outputs.py",
        old="tensor.ndim == 3 and tensor.size(1 if self.sequence_first else 0) == 1",
        new="tensor.ndim == 3 and tensor.size(0) == 1",
        tests=(UNIT + "test_encoder_outputs.py::test_items_with_a_batch_of_one_each",),
        why="items (s, 1, h) are refused, and (1, b, h) taken for one item",
    ),
    Mutant(
        name="hidden-state-0",
        file=MIMO + "towers/hugging_face.py",
        old="        if self.layers is None:\n",
        new="        if not self.layers:\n",
        tests=(UNIT + "huggingface/test_own_encoders.py::test_hidden_states_and_rows_are_chosen",),
        why="layers=0 takes the last hidden state",
    ),
    Mutant(
        name="whisper-drops-in-eval",
        file=MIMO + "towers/whisper.py",
        old="nn.functional.dropout(hidden + self.position_embedding, dropout, self.training)",
        new="nn.functional.dropout(hidden + self.position_embedding, dropout)",
        tests=(UNIT + "huggingface/test_qwen2_audio.py::test_frames_are_dropped_in_training_only",),
        why="evaluation has dropout",
    ),
    Mutant(
        name="export-empty-first-file",
        file=MIMO + "huggingface/export.py",
        old="if files[-1] and described.size > room:",
        new="if described.size > room:",
        tests=(UNIT + "huggingface/test_export_files.py::test_files_are_full_and_none_is_empty",),
        why="files are numbered from 2 where the first tensor is larger than a file",
    ),
    Mutant(
        name="export-older-dtype",
        file=MIMO + "huggingface/export.py",
        old='elif key in ("dtype", "torch_dtype") and',
        new='elif key == "dtype" and',
        tests=(
            UNIT + "huggingface/test_export_files.py"
            "::test_the_configuration_names_the_dtype_that_was_written",
        ),
        why="an older folder's config names the dtype of before",
    ),
    Mutant(
        name="export-copies-not-on-disk",
        file=MIMO + "huggingface/export.py",
        old="        shutil.copyfile(path, copy)\n        fsync(copy)\n",
        new="        shutil.copyfile(path, copy)\n",
        tests=(UNIT + "huggingface/test_export_files.py::test_what_is_on_the_disk_before_what",),
        why="after a power cut the tokenizer is empty",
    ),
    Mutant(
        name="export-removes-before-it-is-there",
        file=MIMO + "huggingface/target.py",
        old=(
            "        fsync(self.folder.parent)\n        shutil.rmtree(self._old, "
            "ignore_errors=True)\n"
        ),
        new=(
            "        shutil.rmtree(self._old, ignore_errors=True)\n        "
            "fsync(self.folder.parent)\n"
        ),
        tests=(UNIT + "huggingface/test_export_files.py::test_what_is_on_the_disk_before_what",),
        why="after a power cut neither the old nor the new model is there",
    ),
    Mutant(
        name="joined-tokenizer-of-the-tower",
        file=MIMO + "huggingface/joined_folder.py",
        old="found.setdefault(place, path)",
        new="found[place] = path",
        tests=(
            UNIT + "huggingface/test_from_folders.py"
            "::test_it_is_exported_as_a_model_that_transformers_reads",
        ),
        why="the exported model has the tower's tokenizer",
    ),
    Mutant(
        name="folder-that-grew",
        file=MIMO + "huggingface/folder.py",
        old="if 8 + length + last != size:",
        new="if 8 + length + last > size:",
        tests=(
            UNIT + "huggingface/test_export_files.py"
            "::test_a_file_of_another_size_than_its_header_tells_is_refused",
        ),
        why="a file that has more than its header tells is read",
    ),
    Mutant(
        name="moe-dense-layers",
        file=MIMO + "huggingface/families/decoders.py",
        old="[int(n not in dense and (n + 1) % step == 0) for n in layers]",
        new="[int((n + 1) % step == 0) for n in layers]",
        tests=(
            UNIT + "huggingface/test_language_models.py"
            "::test_logits_and_gradients_are_those_of_transformers",
        ),
        why="mlp_only_layers is ignored",
    ),
    Mutant(
        name="gpt2-inner-width",
        file=MIMO + "huggingface/families/decoders.py",
        old='"ffn_hidden_size": config.n_inner or 4 * config.n_embd,',
        new='"ffn_hidden_size": 4 * config.n_embd,',
        tests=(
            UNIT + "huggingface/test_language_models.py"
            "::test_logits_and_gradients_are_those_of_transformers",
        ),
        why="n_inner is ignored",
    ),
    Mutant(
        name="nan-weight-is-as-read",
        file=MIMO + "huggingface/logits_check.py",
        old="                    off = torch.nan_to_num(off, nan=math.inf)\n",
        new="",
        tests=(UNIT + "huggingface/test_logits_check.py::test_what_differs_is_found",),
        why="a weight that is no number counts as read",
    ),
    Mutant(
        name="token-behind-the-vocabulary",
        file=MIMO + "huggingface/fits.py",
        old="if not 0 <= part.token_id < vocabulary:",
        new="if not 0 <= part.token_id <= vocabulary:",
        tests=(
            UNIT + "huggingface/test_refusals.py"
            "::test_a_token_outside_the_vocabulary_stands_for_nothing",
        ),
        why="a token that no embedding has is accepted",
    ),
    Mutant(
        name="own-tower-of-several-layers",
        file=MIMO + "huggingface/own_encoders.py",
        old="width = width or config.hidden_size * max(len(rows.depths), 1)",
        new="width = width or config.hidden_size",
        tests=(
            UNIT + "huggingface/test_own_encoders.py"
            "::test_a_projector_is_as_wide_as_the_rows_of_all_layers",
        ),
        why="rows of two layers do not fit their projector",
    ),
    Mutant(
        name="output-0-is-undeclared",
        file=MIMO + "submodules/encoder_outputs.py",
        old="        if self.where is not None:\n            found",
        new="        if self.where:\n            found",
        tests=(UNIT + "test_encoder_outputs.py::test_rows_are_found",),
        why="encoder_outputs of 0 is ignored",
    ),
    Mutant(
        name="norm-after-every-depth",
        file=MIMO + "towers/feature_transformer.py",
        old="post_layer_norm=features.final_norm and stop == features.layers,",
        new="post_layer_norm=features.final_norm,",
        tests=(
            UNIT + "huggingface/test_vision_towers.py"
            "::test_hidden_states_in_the_middle_are_before_any_norm",
        ),
        why="hidden states in the middle are normalised, and what follows reads them so",
    ),
    Mutant(
        name="no-frames",
        file=MIMO + "towers/image_grids.py",
        old="if min(grid) < 1 or",
        new="if min(grid) < 0 or",
        tests=(UNIT + "huggingface/test_qwen_vl.py::test_images_of_nothing_are_refused",),
        why="an image of no frames is accepted",
    ),
    Mutant(
        name="one-row-of-patches",
        file=MIMO + "towers/image_grids.py",
        old="(sizes - 1).clamp(min=1)",
        new="(sizes - 1)",
        tests=(
            UNIT + "huggingface/test_qwen_vl.py"
            "::test_an_image_of_one_row_or_column_stands_at_the_first_one",
        ),
        why="an image one patch high gets positions of garbage",
    ),
    Mutant(
        name="image-of-one-patch",
        file=MIMO + "towers/vision.py",
        old="if min(given[1:]) < self.shape.patch or",
        new="if min(given[1:]) <= self.shape.patch or",
        tests=(
            UNIT + "huggingface/test_vision_towers.py"
            "::test_images_of_another_size_have_interpolated_positions",
        ),
        why="an image of one patch is refused",
    ),
    Mutant(
        name="offloaded-data-stay",
        file=MIMO + "memory/transfers.py",
        old="return torch.from_numpy(data.numpy().copy())",
        new="return torch.from_numpy(data.numpy())",
        tests=(UNIT + "test_transfers.py::test_where_the_device_is_the_host_copies_are_plain",),
        why="what is offloaded keeps its memory and follows what is written there",
    ),
    Mutant(
        name="fresh-keeps-its-moments",
        file=MIMO + "training/optimizer_state.py",
        old="        inner.optimizer.state.clear()\n        for group",
        new="        for group",
        tests=(
            UNIT + "test_optimizer_state.py::test_what_starts_anew_has_no_moments_and_no_count",
        ),
        why="what starts anew goes on with old moments",
    ),
    Mutant(
        name="max-logit-ignored",
        file=MIMO + "transformer/context_parallel_attention.py",
        old=(
            '        "log_max_attention_logit": bool(getattr(config, "log_max_attention_logit", '
            "False)),\n"
        ),
        new="",
        tests=(UNIT + "test_cp_attention.py::test_features_that_change_the_result_are_refused",),
        why="log_max_attention_logit is accepted and nothing is logged",
    ),
    Mutant(
        name="imported-drawn-from-the-default-seed",
        file=MIMO + "huggingface/build.py",
        old="            seed=options.seed,\n            freeze=freeze,",
        new="            seed=1234,\n            freeze=freeze,",
        tests=(
            UNIT + "huggingface/test_from_folders.py"
            "::test_the_projector_is_drawn_from_the_seed_that_is_given",
        ),
        why="what a folder does not have is drawn from another seed",
    ),
    Mutant(
        name="integers-are-cast",
        file=MIMO + "huggingface/pieces.py",
        old="if dtype is None or not described.dtype.is_floating_point:",
        new="if dtype is None:",
        tests=(
            UNIT + "huggingface/test_export_files.py"
            "::test_numbers_that_are_no_weights_keep_their_dtype",
        ),
        why="integer tensors are written as numbers of the weights' dtype",
    ),
    Mutant(
        name="export-around-the-source",
        file=MIMO + "huggingface/target.py",
        old="if self.folder.is_relative_to(source) or source.is_relative_to(self.folder):",
        new="if self.folder.is_relative_to(source):",
        tests=(
            UNIT + "huggingface/test_refusals.py"
            "::test_a_model_is_not_written_into_the_folder_it_comes_from",
        ),
        why="an export onto a folder that holds the source replaces both",
    ),
    Mutant(
        name="quantized-folder-read",
        file=MIMO + "huggingface/family.py",
        old='    if getattr(config, "quantization_config", None):',
        new="    if False:",
        tests=(
            UNIT + "huggingface/test_refusals.py"
            "::test_a_setting_that_would_change_the_result_is_refused",
        ),
        why="quantised weights are read as if they were whole",
    ),
    Mutant(
        name="scores-always-normalised",
        file=MIMO + "huggingface/families/decoders.py",
        old="**_expert_settings(config, config.norm_topk_prob),",
        new="**_expert_settings(config, True),",
        tests=(
            UNIT + "huggingface/test_language_models.py"
            "::test_logits_and_gradients_are_those_of_transformers",
        ),
        why="norm_topk_prob=False is ignored",
    ),
    Mutant(
        name="expert-view-with-tp-of-0",
        file=MIMO + "training/groups.py",
        old="if min(ep, expt_tp) < 1 or stage % (expt_tp * ep):",
        new="if min(ep, expt_tp) < 0 or stage % (expt_tp * ep):",
        tests=(UNIT + "test_experts.py::test_sizes_that_do_not_divide_are_refused",),
        why="ep=0 divides by zero",
    ),
)
