# SPDX-License-Identifier: Apache-2.0
"""Mistakes in which process groups are one, when they connect, and when they end."""

from tests.mutants.catalogue.places import UNIT
from tests.mutants.mutant import Mutant

_KINDS, _SHARED = "mimo_colocated/communicators.py", "mimo_colocated/shared_groups.py"
_MAKING = "mimo_colocated/process_groups.py"
_TESTS = UNIT + "test_communicators.py::"

GROUPS = (
    Mutant(
        name="gradients-of-modules-over-one-communicator",
        file=_KINDS,
        old='if names in ({"pp"}, {"expt_dp"}) or ("dp" in names and names <= {"dp", "cp"}):',
        new='if names in ({"pp"}, {"expt_dp"}):',
        tests=(_TESTS + "test_modules_never_share_what_their_gradients_go_over",),
        why="buckets of two modules, ready in another order on ranks without inputs, meet: a hang",
    ),
    Mutant(
        name="each-grid-has-its-own-tp",
        file=_SHARED,
        old="    found = known.get(key)\n",
        new="    found = None\n",
        tests=(_TESTS + "test_the_readmes_layout",),
        why="every module has its own communicator for the same ranks, hundreds of MB each",
        ranks=8,
    ),
    Mutant(
        name="unused-groups-connect",
        file=_KINDS,
        old='ON_DEMAND = ("dp", "tp_cp", "tp_dp_cp")',
        new="ON_DEMAND = ()",
        tests=(_TESTS + "test_the_reference_layout_has_six_that_connect",),
        why="groups that nobody uses take memory of the device",
    ),
    Mutant(
        name="groups-that-wait-connect-at-once",
        file=_MAKING,
        old="device_id=device if connect else None,",
        new="device_id=device,",
        tests=(_TESTS + "test_the_planner_counts_what_the_first_rank_makes",),
        why="connect=False is accepted and ignored",
        ranks=8,
    ),
    Mutant(
        name="shared-group-ends-with-its-first-grid",
        file=_SHARED,
        old="        if self._users == 0:\n",
        new="        if True:\n",
        tests=(_TESTS + "test_shared_groups_end_with_their_last_grid",),
        why="a grid that goes takes the TP group of another one along",
        ranks=8,
    ),
    Mutant(
        name="destroyed-group-handed-out",
        file=_SHARED,
        old="if found is None or not found.is_alive():",
        new="if found is None:",
        tests=(_TESTS + "test_a_group_that_somebody_destroyed_is_not_handed_out",),
        why="a model gets a group that torch no longer knows",
        ranks=8,
    ),
)
