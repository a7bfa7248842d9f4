# SPDX-License-Identifier: Apache-2.0
"""Mistakes in what a rank takes of a Hugging Face folder, and in what is refused."""

from tests.mutants.catalogue.places import MIMO, UNIT
from tests.mutants.mutant import Mutant

_ROOM = MIMO + "huggingface/"
_TESTS = UNIT + "huggingface/"
_CUTS, _WEIGHTS, _ROTARY = _ROOM + "cuts.py", _ROOM + "weights.py", _ROOM + "rotary.py"
_DECODERS = _ROOM + "families/decoders.py"
_MODEL = _ROOM + "language_model.py"
_ONCE = _TESTS + "test_cuts.py::test_every_element_has_one_place"
_PADDED = _TESTS + "test_language_models.py::test_padding_of_the_vocabulary_neither_wins_nor_counts"
_REFUSED = _TESTS + "test_refusals.py::test_a_setting_that_would_change_the_result_is_refused"
_DAMAGED = (
    _TESTS + "test_refusals.py::test_folders_of_another_model_are_refused_before_a_weight_is_read"
)

_EQUAL = (_TESTS + "test_language_models.py::test_logits_and_gradients_are_those_of_transformers",)

IMPORTED = (
    Mutant(
        name="every-tp-rank-reads-the-first-part",
        file=_CUTS,
        old="        return self.rank * own, own",
        new="        return 0, own",
        tests=(_ONCE,),
        why="TP ranks hold the same part of a column- or row-parallel weight",
    ),
    Mutant(
        name="heads-of-query-groups-follow-the-projection",
        file=_CUTS,
        old="        queries = heads.query // heads.groups * heads.width",
        new="        queries = heads.width",
        tests=(_TESTS + "test_cuts.py::test_query_groups_follow_each_other", *_EQUAL),
        why="with fewer key/value heads, some query heads are left out",
    ),
    Mutant(
        name="keys-and-values-change-places",
        file=_DECODERS,
        old='_QKV_NAMES = ("q_proj", "k_proj", "v_proj")',
        new='_QKV_NAMES = ("q_proj", "v_proj", "k_proj")',
        tests=_EQUAL,
        why="keys are read as values; shapes are the same",
    ),
    Mutant(
        name="values-of-a-fused-projection-begin-at-the-keys",
        file=_CUTS,
        old="(0, heads.query * heads.width, (heads.query + heads.groups) * heads.width)",
        new="(0, heads.query * heads.width, heads.query * heads.width)",
        tests=(_ONCE, *_EQUAL),
        why="GPT-2's values are its keys",
    ),
    Mutant(
        name="gate-and-up-change-places",
        file=_CUTS,
        old="        return [Run(0, start, 0, size), Run(1, start, size, size)]",
        new="        return [Run(1, start, 0, size), Run(0, start, size, size)]",
        tests=_EQUAL,
        why="the up projection goes through the activation",
    ),
    Mutant(
        name="transposed-matrices-are-read-as-they-are",
        file=_WEIGHTS,
        old="        return own.t() if self.source.cut.transposed and own.dim() == 2 else own",
        new="        return own",
        tests=_EQUAL,
        why="GPT-2's square matrices are transposed without an error of shape",
    ),
    Mutant(
        name="padding-of-the-vocabulary-is-not-cleared",
        file=_WEIGHTS,
        old="                each.parameter.zero_()  # rows of padding",
        new="                pass",
        tests=(_PADDED,),
        why="rows of padding hold whatever the memory held",
    ),
    Mutant(
        name="padded-logits-are-zero",
        file=_MODEL,
        old="            logits[..., max(real, 0) :] = torch.finfo(logits.dtype).min",
        new="            logits[..., max(real, 0) :] = 0",
        tests=(_PADDED, *_EQUAL),
        why="padding counts in the sum over the vocabulary",
    ),
    Mutant(
        name="the-last-token-is-taken-for-padding",
        file=_MODEL,
        old="        real = self.real_vocab_size - self.pg_collection.tp.rank() * width",
        new="        real = self.real_vocab_size - 1 - self.pg_collection.tp.rank() * width",
        tests=(_TESTS + "test_language_models.py::test_padding_begins_after_the_last_token",),
        why="one token can never be answered",
    ),
    Mutant(
        name="rotary-scaling-is-left-out",
        file=_ROTARY,
        old='    if kind == "default":',
        new='    if kind in ("default", "llama3"):',
        tests=_EQUAL,
        why="Llama 3.x gets Llama 2's frequencies; the start of a sequence hardly shows it",
    ),
    Mutant(
        name="attention-scaled-by-yarn-is-accepted",
        file=_ROTARY,
        old='_SUPPORTED = ("default", "linear", "llama3")',
        new='_SUPPORTED = ("default", "linear", "llama3", "yarn")',
        tests=(_REFUSED,),
        why="yarn's attention scaling is ignored",
    ),
    Mutant(
        name="biases-of-the-queries-are-left-out",
        file=_DECODERS,
        old='    return {**_llama_settings(config), "add_qkv_bias": True}',
        new="    return {**_llama_settings(config)}",
        tests=_EQUAL,
        why="Qwen2's biases are surplus tensors",
    ),
    Mutant(
        name="scores-of-experts-are-normalised-always",
        file=_DECODERS,
        old='        "moe_router_pre_softmax": not normalised,',
        new='        "moe_router_pre_softmax": False,',
        tests=_EQUAL,
        why="experts' outputs are scaled otherwise than the folder's model does",
    ),
    Mutant(
        name="dense-layers-among-experts-are-counted-from-one",
        file=_DECODERS,
        old="[int(n not in dense and (n + 1) % step == 0) for n in layers]",
        new="[int(n + 1 not in dense and (n + 1) % step == 0) for n in layers]",
        tests=_EQUAL,
        why="the dense layer is built one place too early",
    ),
    Mutant(
        name="a-window-is-ignored",
        file=_DECODERS,
        old="    if config.sliding_window is None:\n        return None",
        new="    return None",
        tests=(_REFUSED,),
        why="long sequences attend to what the model never saw",
    ),
    Mutant(
        name="fields-that-nobody-reads-are-accepted",
        file=_ROOM + "family.py",
        old="        if values[name] != usual[name]:",
        new="        if values[name] is None and usual[name] is not None:",
        tests=(_REFUSED,),
        why="a setting that changes the result is accepted and ignored",
    ),
    Mutant(
        name="surplus-tensors-are-accepted",
        file=_WEIGHTS,
        old="    if surplus:",
        new="    if surplus and not everywhere:",
        tests=(_DAMAGED,),
        why="a part of the model is silently left out",
    ),
    Mutant(
        name="only-the-rank-that-found-it-refuses",
        file=_WEIGHTS,
        old="    wrong = [texts[0] for texts, _ in told if texts]",
        new="    wrong = problems",
        tests=(_TESTS + "test_refusals.py::test_every_rank_says_what_one_rank_found",),
        why="the other ranks wait for one that has gone",
    ),
    Mutant(
        name="files-that-were-cut-short-are-accepted",
        file=_ROOM + "folder.py",
        old="    if 8 + length + last != size:",
        new="    if 8 + length + last < size:",
        tests=(_TESTS + "test_refusals.py::test_a_folder_that_is_cut_short",),
        why="an interrupted download fails in the middle of loading, on one rank",
    ),
    Mutant(
        name="a-rank-that-cannot-read-goes",
        file=_ROOM + "all_ranks.py",
        old="        failed = error",
        new="        raise",
        tests=(
            _TESTS + "test_reading_8rank.py::"
            "test_what_one_rank_cannot_read_is_one_sentence_on_all",
        ),
        why="the other ranks wait in their next collective",
    ),
    Mutant(
        name="a-tied-output-layer-is-not-copied-for-sounds",
        file=_ROOM + "compose.py",
        old="    if _OUTPUT not in of_text:  # tied",
        new="    if _OUTPUT in of_text:",
        tests=(
            _TESTS + "test_from_folders.py::"
            "test_whisper_and_a_language_model_are_a_qwen2_audio",
        ),
        why="tied language models cannot hear",
    ),
)
