# SPDX-License-Identifier: Apache-2.0
"""Mistakes in towers from Hugging Face folders, and in models that are put together from parts."""

from tests.mutants.catalogue.places import MIMO, UNIT
from tests.mutants.mutant import Mutant

_TOWERS = MIMO + "towers/"
_FAMILIES = MIMO + "huggingface/families/"
_TESTS = UNIT + "huggingface/"
_FEATURES, _VISION = _TOWERS + "feature_transformer.py", _TOWERS + "vision.py"
_ALONE = _TESTS + "test_vision_towers.py::"
_WHOLE = _TESTS + "test_llava.py::"
_EQUAL = _WHOLE + "test_logits_and_gradients_are_those_of_transformers"
_PADDING = _ALONE + "test_patches_of_padding_have_no_rows"
_REFUSED = _ALONE + "test_patches_that_do_not_fit_together_are_refused"
_RANKS = _TESTS + "test_llava_8rank.py::test_logits_and_gradients_are_those_of_transformers"
_PARTS = _TESTS + "test_from_folders.py::"
_GRIDS, _QWEN = _TOWERS + "image_grids.py", _TOWERS + "qwen_vision.py"
_QWEN_VL = _TESTS + "test_qwen_vl.py::"
_QWEN_ROWS = _QWEN_VL + "test_a_tower_returns_their_rows_and_levels"
_QWEN_RANKS = _TESTS + "test_qwen_vl_8rank.py::test_logits_and_gradients_are_those_of_transformers"

IMPORTED_TOWERS = (
    Mutant(
        name="hidden-states-are-counted-from-the-first-layer",
        file=_FEATURES,
        old="n % (layers + 1) for n in numbers",
        new="n % layers for n in numbers",
        tests=(_ALONE + "test_hidden_states_are_counted_as_transformers_does",),
        why="features are those of the layer below",
    ),
    Mutant(
        name="features-stand-by-depth",
        file=_FEATURES,
        old="[found[depth] for depth in self.features.depths]",
        new="[found[depth] for depth in sorted(self.features.depths)]",
        tests=(_EQUAL,),
        why="the projector reads hidden states in another order than it was trained for",
    ),
    Mutant(
        name="gathered-rows-sum-their-gradients-over-tp",
        file=_FEATURES,
        old="tensor_parallel_output_grad=False",
        new="tensor_parallel_output_grad=True",
        tests=(_RANKS,),
        why="under SP a tower's gradients are TP times too large",
    ),
    Mutant(
        name="layers-behind-frozen-embeddings-are-recomputed-without-gradients",
        file=_FEATURES,
        old="            hidden = recomputable(hidden, block)\n",
        new="",
        tests=(_WHOLE + "test_frozen_embeddings_do_not_stop_gradients_of_recomputed_layers",),
        why="layers that are recomputed as a whole do not train, without an error",
    ),
    Mutant(
        name="images-of-a-pack-see-each-other",
        file="megatron/core/models/mimo/partition/packed_lengths.py",
        old="torch.tensor([0, *accumulate(lengths)],",
        new="torch.tensor([0, sum(lengths)],",
        tests=(_PADDING,),
        why="patches attend to other images",
    ),
    Mutant(
        name="the-class-token-stays",
        file=_FEATURES,
        old="return out[:, self.features.first_row :]",
        new="return out",
        tests=(_EQUAL,),
        why="rows and tokens of an image differ in number",
    ),
    Mutant(
        name="positions-are-interpolated-in-lines",
        file=_VISION,
        old='mode="bicubic"',
        new='mode="bilinear"',
        tests=(_ALONE + "test_images_of_another_size_have_interpolated_positions",),
        why="images of another size have other positions than in transformers",
    ),
    Mutant(
        name="positions-are-resized-the-other-way-round",
        file=_VISION,
        old="(height, width))\n        resized = torch",
        new="(width, height))\n        resized = torch",
        tests=(_PADDING,),
        why="positions of images that are no squares are those of the turned image",
    ),
    Mutant(
        name="patches-are-enlarged-without-a-limit",
        file=_VISION,
        old="distance / max(scale, 1.0)",
        new="distance / scale",
        tests=(_PADDING,),
        why="positions of images with more patches than the grid has are nearest neighbours",
    ),
    Mutant(
        name="a-mask-whose-patches-stand-last-is-accepted",
        file=_VISION,
        old=" or not bool((real == there).all()):",
        new=":",
        tests=(_REFUSED,),
        why="rows of padding are taken for patches",
    ),
    Mutant(
        name="layers-of-a-second-block-take-the-first-ones-weights",
        file=_FAMILIES + "vision_towers.py",
        old='f"{TOWER}encoder.layers.{layer}."',
        new='f"{TOWER}encoder.layers.{layer - first}."',
        tests=(_EQUAL,),
        why="with several feature layers, layers are read twice and others not at all",
    ),
    Mutant(
        name="other-values-of-the-configuration-are-forgotten",
        file=MIMO + "huggingface/compose.py",
        old="        config = changed(config, options.config_fields)",
        new="        changed(read_config(Path(language)), {})",
        tests=(_PARTS + "test_fields_of_the_configuration_may_have_other_values",),
        why="config_fields is accepted and ignored",
    ),
    Mutant(
        name="windows-of-the-first-image-only",
        file=_GRIDS,
        old="        first += units.numel()",
        new="        first += 0",
        tests=(_QWEN_VL + "test_windows_are_those_of_transformers",),
        why="patches of later images are replaced by those of the first",
    ),
    Mutant(
        name="frames-see-each-other",
        file=_GRIDS,
        old="return [h * w for t, h, w in grids for _ in range(t)]",
        new="return [t * h * w for t, h, w in grids]",
        tests=(_QWEN_VL + "test_places_of_patches_are_those_of_transformers",),
        why="full layers attend over all frames of an image",
    ),
    Mutant(
        name="full-layers-attend-within-windows",
        file=_QWEN,
        old="return self.window is not None and layer not in self.full_layers",
        new="return self.window is not None",
        tests=(_QWEN_ROWS,),
        why="no layer of Qwen2.5-VL sees a whole image",
    ),
    Mutant(
        name="merged-rows-stay-in-window-order",
        file=_QWEN,
        old="rows[places.order.argsort()]",
        new="rows[places.order]",
        tests=(_QWEN_ROWS,),
        why="rows stand at the tokens of other squares of their image",
    ),
    Mutant(
        name="towers-lists-are-saved-whole",
        file=_TOWERS + "sharded_list.py",
        old="    def sharded_state_dict(",
        new="    def unsharded_state_dict(",
        tests=(_QWEN_RANKS,),
        ranks=8,
        why="a checkpoint has the first TP rank's part of the layers, called the whole",
    ),
    Mutant(
        name="packs-count-on",
        file=MIMO + "huggingface/positions.py",
        old="    bounds = _bounds(input_ids, attention_mask, cu_seqlens)",
        new="    bounds = _bounds(input_ids, None, None)",
        tests=(_QWEN_VL + "test_positions_are_those_of_transformers",),
        why="packed sequences go on counting positions from the one before",
    ),
    Mutant(
        name="qwen3-vl-levels-one-layer-late",
        file=MIMO + "huggingface/families/qwen_vl.py",
        old="level_layers=tuple(range(len(shape.levels))),",
        new="level_layers=tuple(range(1, 1 + len(shape.levels))),",
        tests=(_QWEN_VL + "test_logits_and_gradients_are_those_of_transformers",),
        why="Qwen3-VL's levels are added after other layers than they were trained for",
    ),
)
