# SPDX-License-Identifier: Apache-2.0
"""Mistakes with collectives that run beside forward and backward."""

from tests.mutants.catalogue.places import MIMO, UNIT
from tests.mutants.mutant import Mutant

_OVERLAP = UNIT + "test_overlap_8rank.py::"
_ORDER = _OVERLAP + "test_gathers_and_reductions_run_beside_forward_and_backward"

OVERLAP = (
    Mutant(
        name="ranks-without-images-start-no-gathers",
        file=MIMO + "model/ddp_methods.py",
        old="                group.start_param_sync()\n",
        new="                pass\n",
        tests=(_ORDER,),
        why="a replica with images waits for the gather of one without, or gets another bucket's",
        ranks=8,
    ),
    Mutant(
        name="gathers-of-what-did-not-run-go-on",
        file=MIMO + "model/ddp_methods.py",
        old="group.finish_param_sync(skip_next_bucket_dispatch=True)",
        new="pass",
        tests=(_ORDER,),
        why="the optimizer writes weights that are still being gathered",
        ranks=8,
    ),
    Mutant(
        name="gathers-from-the-last-layer-on",
        file=MIMO + "model/ddp_methods.py",
        old="yield from reversed(module.bucket_groups)",
        new="yield from module.bucket_groups",
        tests=(_ORDER,),
        why="the first layer waits for the gathers of all others",
        ranks=8,
    ),
    Mutant(
        name="stale-weights-saved",
        file="megatron/core/models/mimo/model/ddp_methods.py",
        old="        self.start_param_sync(force_sync=True)\n",
        new="",
        tests=(_OVERLAP + "test_a_checkpoint_has_the_weights_of_the_last_step",),
        why="a checkpoint mixes the weights of two steps",
        ranks=8,
    ),
    Mutant(
        name="missing-gradient-seen-by-one-rank-alone",
        file=MIMO + "gradients/finalize.py",
        old="together=first",
        new="together=False",
        tests=(UNIT + "test_frozen_8rank.py::"
               "test_a_parameter_without_a_gradient_is_named_on_all_ranks",),
        why="a rank that lacks a gradient ends, and the others wait for its reduction",
        ranks=8,
    ),
    Mutant(
        name="gathered-microbatches-counted-one-by-one",
        file="megatron/core/models/mimo/pipeline/step.py",
        old='if name in encoded.backward_per_microbatch or gradients_come_apart(module)',
        new='if gradients_come_apart(module)',
        tests=(_OVERLAP + "test_steps_may_have_other_numbers_of_microbatches",),
        why="a step of more microbatches than the first one is reduced before the last of them",
        ranks=8,
    ),
    Mutant(
        name="order-of-a-given-up-step-kept",
        file=MIMO + "gradients/bucket_order.py",
        old="        self._asked.clear()\n",
        new="",
        tests=(_OVERLAP + "test_of_a_step_that_was_given_up_nothing_stays",),
        why="a bucket is reduced before its gradients are there, in every step from then on",
        ranks=8,
    ),
    Mutant(
        name="weights-gathered-before-the-step-taken-for-new",
        file=MIMO + "optimizer.py",
        old="                    group.param_gather_dispatched = False\n",
        new="",
        tests=(_OVERLAP + "test_weights_are_gathered_after_a_step_whatever_ran_before_it",),
        why="after an evaluation between backward and step each rank has new weights in its part",
        ranks=8,
    ),
)  # fmt: skip
