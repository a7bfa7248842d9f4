# SPDX-License-Identifier: Apache-2.0
"""Mistakes in torch-native modules inside a ``MimoModel``."""

from tests.mutants.catalogue.places import MIMO, UNIT
from tests.mutants.mutant import Mutant

_ROOM = MIMO + "torch_native/"
_PARALLEL, _LANGUAGE = _ROOM + "data_parallel.py", _ROOM + "language_model.py"
_TESTS = UNIT + "torch_native/"
_STEPS = _TESTS + "test_training_inside_8rank.py::test_steps_checkpoints_and_exports"
_CONTROL = _TESTS + "test_inside_8rank.py::test_a_mistake_would_be_seen"
_ONE = _TESTS + "test_inside.py::"
_CUT = _TESTS + "test_context_parallel_inside_8rank.py::"

TORCH_NATIVE_INSIDE = (
    Mutant(
        name="a-native-tower-s-gradients-stay-at-home",
        file=_PARALLEL,
        old="                dist.all_reduce(self._buffer, group=self.pg_collection.dp_cp)",
        new="                pass",
        tests=(_CONTROL,),
        why="each replica trains its own tower on its own images",
        ranks=8,
    ),
    Mutant(
        name="a-microbatch-replaces-the-one-before",
        file=_PARALLEL,
        old="        main_grad.add_(local_part(parameter.grad))",
        new="        main_grad.copy_(local_part(parameter.grad))",
        tests=(_STEPS,),
        why="of several microbatches the last one's gradient counts alone",
        ranks=8,
    ),
    Mutant(
        name="the-norm-is-of-one-fsdp-rank",
        file=MIMO + "training/inner_optimizers.py",
        old="            inner.grad_stats_parallel_group = collection.intra_dist_opt",
        new="            pass",
        tests=(_STEPS,),
        why="ranks clip by other factors, and the weights of a model drift apart",
        ranks=8,
    ),
    Mutant(
        name="fsdp-parts-of-tp-s-parts-the-other-way-round",
        file=_ROOM + "local_shards.py",
        old="        for axis in reversed(range(mesh.ndim)):",
        new="        for axis in range(mesh.ndim):",
        tests=(_STEPS,),
        why="a checkpoint has rows of one rank in the place of another's",
        ranks=8,
    ),
    Mutant(
        name="empty-rows-tied-to-dtensors",
        file=MIMO + "model/encoder_runner.py",
        old="parameter.to_local() if isinstance(parameter, DTensor) else parameter",
        new="parameter",
        tests=(_STEPS,),
        why="a replica of a native tower without images ends the step",
        ranks=8,
    ),
    Mutant(
        name="a-native-language-model-reads-masks-as-transformers-does",
        file=_LANGUAGE,
        old=".masked_fill(forbidden, lowest)",
        new=".masked_fill(~forbidden, lowest)",
        tests=(_ONE + "test_a_mask_is_megatron_s",),
        why="attention sees what it must not, and nothing else",
    ),
    Mutant(
        name="a-native-language-model-takes-packed-batches",
        file=_LANGUAGE,
        old='        if options.kv_format != "sbhd":',
        new='        if options.kv_format == "":',
        tests=(_ONE + "test_a_whole_model_that_it_cannot_be_part_of_is_refused",),
        why="samples of a packed batch attend to each other",
    ),
    Mutant(
        name="native-weights-drawn-as-pytorch-does",
        file=MIMO + "training/initial_weights.py",
        old="            survey.init_methods |= {id(p): draw for p in drawn}",
        new="            survey.init_methods |= {}",
        tests=(_ONE + "test_drawn_weights_have_the_spread_of_the_configuration",),
        why="embeddings begin 50 times too large, and so do logits of a tied head",
    ),
    Mutant(
        name="a-native-language-model-over-cp-counts-its-chunks-from-zero",
        file=_LANGUAGE,
        old="            return own_chunks(positions, group)",
        new="            return positions[:, :length]",
        tests=(_CUT + "test_over_the_gather_bridge",),
        why="rotary positions of a CP rank's tokens are those of the first ones",
        ranks=8,
    ),
)
