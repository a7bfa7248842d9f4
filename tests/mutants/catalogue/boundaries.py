# SPDX-License-Identifier: Apache-2.0
"""Mistakes at boundaries: messages that are just full, numbers that are 0, turns that are even."""

from tests.mutants.catalogue.places import EXAMPLE, FUNCTIONAL, MIMO, UNIT
from tests.mutants.mutant import Mutant

_GUARD = MIMO + "comm/plan_guard.py"
_PHASES = "mimo_colocated/phases.py"
_DATA = EXAMPLE + "data.py"
_FULL = UNIT + "test_routed_bridge.py::test_scattered_tokens_take_a_second_message"
_FITS = UNIT + "test_phases.py::test_names_and_waits_that_just_fit_and_do_not"
_ZERO = UNIT + "test_phases.py::test_rank_step_and_microbatch_0_are_told_like_others"
_ANEW = FUNCTIONAL + "test_digits_data.py::test_every_step_draws_anew"
_TURNS = UNIT + "test_routes.py::test_every_rank_is_served_by_all_copies_alike"
_TOKEN_0 = "test_token_0_stands_for_images_like_any_other"

BOUNDARIES = (
    Mutant(
        name="one-stretch-more-than-fits-the-message",
        file=_GUARD,
        old="if lengths.max() > _INLINE:",
        new="if lengths.max() > _INLINE + 2:",
        tests=(_FULL,),
        why="the last stretch of image tokens of a replica is lost",
    ),
    Mutant(
        name="a-message-that-is-just-full-is-sent-twice",
        file=_GUARD,
        old="if lengths.max() > _INLINE:",
        new="if lengths.max() >= _INLINE:",
        tests=(_FULL,),
        why="a second all-gather where there is nothing more to tell",
    ),
    Mutant(
        name="a-problem-that-does-not-fit-its-message",
        file=MIMO + "comm/item_exchange.py",
        old='"problem": _brief(problem),',
        new='"problem": problem,',
        tests=(
            UNIT
            + "test_balance.py::test_a_problem_fits_the_message_whatever_the_modality_is_called",
        ),
        why="one rank fails while it writes its message, and the others wait for it",
    ),
    Mutant(
        name="a-wait-that-just-fits-is-not-told",
        file=_PHASES,
        old="if len(text) <= _WAIT.size",
        new="if len(text) < _WAIT.size",
        tests=(_FITS,),
        why="nobody learns for whom a stuck rank waits",
    ),
    Mutant(
        name="the-last-letter-of-a-phase-is-cut",
        file=_PHASES,
        old='struct.Struct("<dqi16s40s")',
        new='struct.Struct("<dqi16s39sx")',
        tests=(_FITS,),
        why="a job's own phase has another name in reports",
    ),
    Mutant(
        name="microbatch-0-is-no-microbatch",
        file=_PHASES,
        old="if step and self.microbatch >= 0",
        new="if step and self.microbatch > 0",
        tests=(_ZERO,),
        why="reports do not say that a rank is in its first microbatch",
    ),
    Mutant(
        name="rank-0-has-no-place",
        file=_PHASES,
        old="            found[place.rank] = place",
        new="            if place.rank:\n                found[place.rank] = place",
        tests=(_ZERO,),
        why="what rank 0 does is not reported",
    ),
    Mutant(
        name="token-0-has-no-places",
        file="megatron/core/models/mimo/model/token_positions.py",
        old="for name, i in self._names.items()}",
        new="for name, i in self._names.items() if i}",
        tests=(UNIT + f"test_routed_model.py::{_TOKEN_0}",),
        why="images whose token has the number 0 are refused",
    ),
    Mutant(
        name="token-0-needs-no-inputs",
        file="megatron/core/models/mimo/model/encoder_rank.py",
        old="if token_id is None or input_ids is None:",
        new="if not token_id or input_ids is None:",
        tests=(UNIT + f"test_model.py::TestEncoderRank::{_TOKEN_0}",),
        why="tokens without inputs become nothing, silently, if their number is 0",
    ),
    Mutant(
        name="token-0-has-no-split-sizes",
        file="megatron/core/models/mimo/model/encoder_rank.py",
        old="if token_id is None or input_ids is None or output.ndim != 2",
        new="if not token_id or input_ids is None or output.ndim != 2",
        tests=(UNIT + f"test_model.py::TestEncoderRank::{_TOKEN_0}",),
        why="stock's bridge cuts uneven samples into equal parts",
    ),
    Mutant(
        name="every-epoch-in-the-same-order",
        file=MIMO + "job/samples.py",
        old="default_rng([seed, int(epoch), 0])",
        new="default_rng([seed, 0, 0])",
        tests=(
            FUNCTIONAL + "test_digits_data.py::test_epochs_come_in_orders_of_their_own",
        ),
        why="samples meet the same neighbours in every epoch",
    ),
    Mutant(
        name="every-step-shifts-alike",
        file=_DATA,
        old="rng = np.random.default_rng([self.seed, step, 1])",
        new="rng = np.random.default_rng([self.seed, 0, 1])",
        tests=(_ANEW,),
        why="less augmentation than stated",
    ),
    Mutant(
        name="every-step-varies-alike",
        file=_DATA,
        old="draw = np.random.default_rng([self.seed, step, 2])",
        new="draw = np.random.default_rng([self.seed, 0, 2])",
        tests=(_ANEW,),
        why="the same places of every batch have the short samples",
    ),
    Mutant(
        name="every-step-sounds-alike",
        file=_DATA,
        old="(self.seed, step, 3)",
        new="(self.seed, 0, 3)",
        tests=(_ANEW,),
        why="the same noise in every step",
    ),
    Mutant(
        name="one-copy-sends-all-to-a-receiver",
        file=MIMO + "comm/plan/routes.py",
        old="return (stretch + receiver) % copies",
        new="return (0 * stretch + receiver) % copies",
        tests=(_TURNS,),
        why="one link is as slow as all the TP ranks' together",
    ),
    Mutant(
        name="the-last-copy-sends-less",
        file=MIMO + "comm/plan/routes.py",
        old="self._in_cell[rows] * copies // self._cell_size[rows]",
        new="self._in_cell[rows] // -(-self._cell_size[rows] // copies)",
        tests=(_TURNS,),
        why="TP ranks do not share the sending evenly",
    ),
)
