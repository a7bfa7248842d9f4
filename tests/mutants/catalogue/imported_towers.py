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
        file=_FEATURES,
        old="torch.tensor([0, *accumulate(lengths)],",
        new="torch.tensor([0, sum(lengths)],",
        tests=(_PADDING,),
        why="patches attend to other images",
    ),
    Mutant(
        name="the-class-token-stays",
        file=_VISION,
        old="        return self.transformer(hidden)[:, self.features.first_row :]",
        new="        return self.transformer(hidden)",
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
        old="    config = changed(config, options.config_fields)",
        new="    changed(read_config(Path(language)), {})",
        tests=(_PARTS + "test_fields_of_the_configuration_may_have_other_values",),
        why="config_fields is accepted and ignored",
    ),
)
