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
        file=MIMO + "model/state_dicts.py",
        old="        self.start_param_sync(force_sync=True)\n",
        new="",
        tests=(_OVERLAP + "test_a_checkpoint_has_the_weights_of_the_last_step",),
        why="a checkpoint mixes the weights of two steps",
        ranks=8,
    ),
    Mutant(
        name="missing-gradient-seen-by-one-rank-alone",
        file=MIMO + "training/grad_finalize.py",
        old="together=self._first_step",
        new="together=False",
        tests=(UNIT + "test_frozen_8rank.py::"
               "test_a_parameter_without_a_gradient_is_named_on_all_ranks",),
        why="a rank that lacks a gradient ends, and the others wait for its reduction",
        ranks=8,
    ),
)  # fmt: skip
