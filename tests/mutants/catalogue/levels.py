# SPDX-License-Identifier: Apache-2.0
"""Mistakes in levels of rows that are added after layers."""

from tests.mutants.catalogue.places import MIMO, UNIT
from tests.mutants.mutant import Mutant

_LEVELS = MIMO + "model/deepstack.py"
_COMM = MIMO + "comm/gather_bridge.py"
_TESTS = UNIT + "test_deepstack.py::"
_IN_STAGES = _TESTS + "test_levels_and_gradients_in_stages_against_one_rank"
_BY_HAND = _TESTS + "test_one_rank_adds_each_level_after_its_layer_and_nowhere_else"

LEVELS = (
    Mutant(
        name="every-layer-adds-the-first-level",
        file=_LEVELS,
        old="level = levels.narrow(1, slot * width, width)",
        new="level = levels.narrow(1, 0, width)",
        tests=(_BY_HAND,),
        why="deeper layers get the features of a shallower one",
    ),
    Mutant(
        name="levels-one-layer-late",
        file=_LEVELS,
        old="found = {each.layer_number - 1: each for each in _layers(stage)}",
        new="found = {each.layer_number - 2: each for each in _layers(stage)}",
        tests=(_BY_HAND,),
        why="the model is another one than it was trained as",
    ),
    Mutant(
        name="levels-of-the-first-stage-everywhere",
        file=_LEVELS,
        old="for i, layer in enumerate(levels) if self.stage_of[layer] == stage]",
        new="for i, layer in enumerate(levels) if self.stage_of[layer] >= stage]",
        tests=(_TESTS + "test_plans_made_ahead_have_routes_to_later_stages",),
        why="stages are sent levels that they do not add",
    ),
    Mutant(
        name="gradients-of-later-stages-lost",
        file=_COMM,
        old="if self.dest_pp_pg is not None and self.later_stages:",
        new="if self.dest_pp_pg is None and self.later_stages:",
        tests=(_IN_STAGES,),
        why="over gather bridges what a later stage adds trains nothing",
    ),
    Mutant(
        name="later-stages-without-the-cp-sum",
        file=_COMM,
        old="if self.dest_cp_pg is not None and (on_first or self.later_stages):",
        new="if self.dest_cp_pg is not None and on_first:",
        tests=(_IN_STAGES,),
        why="levels of later stages train on 1/cp of their gradient",
    ),
    Mutant(
        name="levels-of-one-modality-at-the-places-of-another",
        file=_LEVELS,
        old="return cls(torch.cat(rows), torch.cat(places))",
        new="return cls(torch.cat(rows), torch.cat(places[::-1]))",
        tests=(_TESTS + "test_levels_of_several_modalities_become_one",),
        why="images' levels are added to sounds",
    ),
    Mutant(
        name="rows-of-any-width-have-levels",
        file=_LEVELS,
        old="if found == self.row_width(name) or (not levels and found % self.width):",
        new="if True:",
        tests=(_TESTS + "test_rows_of_another_width_are_told_on_all_ranks",),
        why="columns are cut where they do not end, or one rank fails alone",
    ),
    Mutant(
        name="left-out-levels-are-not-missed",
        file=_LEVELS,
        old="if added != list(range(len(self.layers))):",
        new="if False:",
        tests=(_TESTS + "test_layers_that_run_without_their_hooks_are_an_error",),
        why="captured layers leave the levels out in silence",
    ),
    Mutant(
        name="places-of-the-first-stage",
        file=MIMO + "model/routed_path.py",
        old="at = stages.index(self._stage) if self._stage in stages else 0",
        new="at = 0",
        tests=(_IN_STAGES,),
        why="later stages get no rows for their levels",
    ),
    Mutant(
        name="plans-without-later-stages",
        file=MIMO + "model/input_checks.py",
        old="if len(planned_for := plan.later) != len(later):",
        new="if len(planned_for := plan.later) < 0:",
        tests=(_TESTS + "test_plans_made_ahead_have_routes_to_later_stages",),
        why="a plan of another layout of stages fails on some ranks while others wait",
    ),
)
