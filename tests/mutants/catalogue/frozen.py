# SPDX-License-Identifier: Apache-2.0
"""Mistakes with parts that do not train, with loss scales, and with dropout."""

from tests.mutants.catalogue.places import MIMO, UNIT
from tests.mutants.mutant import Mutant

_STATE = MIMO + "checkpoint/frozen_state.py"
_UNFREEZING = UNIT + "test_unfreezing_8rank.py::"
_UNFROZEN = _UNFREEZING + "test_what_was_trained_goes_on_and_the_rest_starts_fresh"
_FROZEN = UNIT + "test_frozen_8rank.py::"
_DROPOUT = UNIT + "test_dropout_8rank.py::"
_SCALING = UNIT + "test_loss_scaling_8rank.py::"

FROZEN = (
    Mutant(
        name="no-backward-without-rows-and-text",
        file="megatron/core/models/mimo/model/encoder_runner.py",
        old="return text_is_frozen or waits_for_gradients(submodule)",
        new="return waits_for_gradients(submodule)",
        tests=(_FROZEN + "test_steps_without_images",),
        why="with a frozen language model a step without images has no backward pass",
        ranks=8,
    ),
    Mutant(
        name="frozen-late-unnoticed",
        file=MIMO + "gradients/finalize.py",
        old="            refuse_late_freezing(name, module)\n",
        new="",
        tests=(_FROZEN + "test_freezing_after_wrapping_is_refused",),
        why="momentum and weight decay go on moving a parameter that was frozen",
        ranks=8,
    ),
    Mutant(
        name="frozen-layers-saved-as-zeros",
        file=_STATE,
        old="data = weight.to(dtype) if is_weight else torch.zeros_like(weight, dtype=dtype)",
        new="data = torch.zeros_like(weight, dtype=dtype)",
        tests=(_UNFROZEN,),
        why="layers of a stack that begin to train start from zero weights",
        ranks=8,
    ),
    Mutant(
        name="fresh-moments-from-the-weight",
        file=_STATE,
        old="data = weights[name][_place(state)] if is_weight else torch.zeros_like(values)",
        new="data = weights[name][_place(state)]",
        tests=(_UNFROZEN,),
        why="parameters that begin to train have moments that they never had",
        ranks=8,
    ),
    Mutant(
        name="fresh-module-keeps-its-own-loss-scale",
        file=MIMO + "optimizer.py",
        old="if self.config.fp16 and self.config.loss_scale is None:",
        new="if False:",
        tests=(_SCALING + "test_skipped_steps_of_a_model_and_its_checkpoints",),
        why="an encoder that begins to train unscales by another factor than the loss has",
        ranks=8,
    ),
    Mutant(
        name="recomputed-layers-without-gradient",
        file=MIMO + "memory/layer_recompute.py",
        old="return hidden.detach().requires_grad_() if trains else hidden",
        new="return hidden",
        tests=(_DROPOUT + "test_layers_above_frozen_embeddings_are_recomputed",),
        why="recomputed layers above frozen embeddings get no gradient",
        ranks=8,
    ),
    Mutant(
        name="text-dropped-differently-over-tp",
        file="megatron/core/models/mimo/model/language_runner.py",
        old="share, dropout.p = dropout.p, 0.0",
        new="share = 0.0",
        tests=(_DROPOUT + "test_masks_are_the_same_on_copies_and_differ_on_parts",),
        why="under sequence parallelism embeddings get gradients of another dropout mask",
        ranks=8,
    ),
    Mutant(
        name="text-drawn-by-the-process",
        file=MIMO + "randomness.py",
        old='for part in (module, getattr(unwrap_model(module), "embedding", None)):',
        new="for part in (module,):",
        tests=(UNIT + "test_randomness.py::"
               "test_an_embedding_that_is_called_by_itself_draws_the_modules_numbers",),
        why="all DP and CP ranks drop the same elements of their text",
    ),
)  # fmt: skip
