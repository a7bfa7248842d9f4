# SPDX-License-Identifier: Apache-2.0
"""Mistakes in Whisper's encoder, in Qwen2-Audio, and in towers of transformers as they are."""

from tests.mutants.catalogue.places import MIMO, UNIT
from tests.mutants.mutant import Mutant

_ROOM = MIMO + "huggingface/"
_WHISPER, _TOWER = MIMO + "towers/whisper.py", MIMO + "towers/hugging_face.py"
_AUDIO = UNIT + "huggingface/test_qwen2_audio.py::"
_OWN = UNIT + "huggingface/test_own_encoders.py::"
_EQUAL = _AUDIO + "test_logits_and_gradients_are_those_of_transformers"
_ROWS = _AUDIO + "test_rows_are_of_real_steps_and_do_not_depend_on_the_others"

IMPORTED_SOUNDS = (
    Mutant(
        name="keys-get-a-bias-by-training",
        file=_WHISPER,
        old="        heads[:, 1] = 0",
        new="        heads[:, 1] *= 1",
        tests=(_AUDIO + "test_keys_have_no_bias_before_and_after_training",),
        why="rounding in a gradient that should be zero moves a bias that no folder has",
    ),
    Mutant(
        name="values-take-the-bias-of-queries",
        file=_ROOM + "cuts.py",
        old="source=run.source // 2) for run in joined",
        new="source=0) for run in joined",
        tests=(_EQUAL,),
        why="a wrong bias is read, and written back",
    ),
    Mutant(
        name="sounds-hear-each-other",
        file=_WHISPER,
        old="frames.flatten(0, 1), there), lengths.tolist())",
        new="frames.flatten(0, 1), there), [int(lengths.sum())])",
        tests=(_ROWS,),
        why="a sound's rows depend on the others of its replica",
    ),
    Mutant(
        name="an-odd-step-makes-no-frame",
        file=_WHISPER,
        old="(mask.sum(dim=-1) + 1) // _STEPS_PER_FRAME",
        new="mask.sum(dim=-1) // _STEPS_PER_FRAME",
        tests=(_ROWS,),
        why="the last frame of a sound of odd length is not attended to",
    ),
    Mutant(
        name="whisper-s-positions-train",
        file=_WHISPER,
        old="nn.Parameter(table, requires_grad=False)",
        new="nn.Parameter(table)",
        tests=(_AUDIO + "test_keys_have_no_bias_before_and_after_training",),
        why="positions that are fixed in transformers change",
    ),
    Mutant(
        name="qwen2-audio-ties-its-output-layer",
        file=_ROOM + "families/qwen2_audio.py",
        old="    text.tie_word_embeddings = False",
        new="    text.tie_word_embeddings = text.tie_word_embeddings",
        tests=(_AUDIO + "test_the_output_layer_is_never_tied",),
        why="logits are those of the embeddings where the text model's config says so",
    ),
    Mutant(
        name="a-frozen-tower-drops-out",
        file=_TOWER,
        old="        mode = self.training and trains",
        new="        mode = self.training",
        tests=(_OWN + "test_a_frozen_tower_stays_in_eval_mode",),
        why="a frozen tower's rows are noisy in training",
    ),
    Mutant(
        name="what-no-row-depends-on-trains",
        file=_TOWER,
        old="            named[name].requires_grad_(False)",
        new="            named[name].requires_grad_(True)",
        tests=(_OWN + "test_what_no_row_depends_on_does_not_train",),
        why="weight decay changes layers above the chosen one",
    ),
    Mutant(
        name="the-mask-keeps-the-class-token",
        file=_TOWER,
        old=".bool()[:, self.first :]",
        new=".bool()[:, : mask.size(1) - self.first]",
        tests=(_OWN + "test_rows_of_padding_are_left_out",),
        why="each row is kept or left out by the mask of the one before it",
    ),
    Mutant(
        name="missing-weights-are-drawn",
        file=_TOWER,
        old="        if lacking:",
        new="        if lacking and not missing:",
        tests=(_OWN + "test_a_folder_without_the_weights_is_refused",),
        why="a tower trains from random weights where pretrained ones were meant",
    ),
    Mutant(
        name="inputs-keep-their-dtype",
        file=_TOWER,
        old="name: value.to(dtype) if _is_floating(value) else value",
        new="name: value",
        tests=(_OWN + "test_inputs_are_cast_to_the_tower_s_dtype",),
        why="towers that do not cast their inputs fail in bfloat16",
    ),
    Mutant(
        name="a-tower-of-transformers-at-tp-2",
        file=_ROOM + "own_encoders.py",
        old="    if groups.tp.size() > 1:",
        new="    if groups.tp.size() > 2:",
        tests=(_OWN + "test_tp_is_refused",),
        why="every TP rank encodes the same",
    ),
)
