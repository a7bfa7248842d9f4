# SPDX-License-Identifier: Apache-2.0
"""Mistakes in who sends which row to whom."""

from tests.mutants.catalogue.places import MIMO, UNIT
from tests.mutants.mutant import Mutant

_ROUTES = MIMO + "comm/plan/routes.py"
_ROWS = MIMO + "comm/plan/group_rows.py"
_TESTS = UNIT + "test_routes.py::"
_EVERY_PAIR = _TESTS + "test_every_pair_of_8_rank_grids_against_the_oracle"

ROUTING = (
    Mutant(
        name="arriving-rows-not-in-the-order-of-senders",
        file=_ROUTES,
        old="own = np.concatenate([local, lacked[arrival]])",
        new="own = np.concatenate([local, lacked])",
        tests=(_EVERY_PAIR,),
        why="rows that come from several ranks are put into one another's places",
    ),
    Mutant(
        name="rows-sent-in-the-order-of-rows",
        file=_ROUTES,
        old='send_index=index[np.argsort(receivers, kind="stable")]',
        new="send_index=index",
        tests=(_EVERY_PAIR,),
        why="receivers get one another's rows",
    ),
    Mutant(
        name="gradients-not-in-the-order-of-senders",
        file=_ROUTES,
        old='backward_index=self._at[lent[np.argsort(incoming, kind="stable")]]',
        new="backward_index=self._at[lent]",
        tests=(_EVERY_PAIR,),
        why="an image's gradient goes to another image",
    ),
    Mutant(
        name="every-tp-copy-sends-the-gradient",
        file=_ROUTES,
        old="away & (turn == group.owner_copy[me])",
        new="away",
        tests=(_EVERY_PAIR,),
        why="gradients are counted once per TP rank, or the exchange does not match",
    ),
    Mutant(
        name="routed-rows-batch-first",
        file=_ROWS,
        old="place = local * tokens.batch + sample",
        new="place = local + sample",
        tests=(_EVERY_PAIR,),
        why="with more than one sample rows stand at another sample's tokens",
    ),
    Mutant(
        name="rank-without-rows-stays-out",
        file=_ROUTES,
        old="forward = self._leg(self._at[rows], receivers, incoming, self._moves[0])",
        new=(
            "forward = self._leg(\n"
            "            self._at[rows], receivers, incoming, bool(rows.size or incoming.size)\n"
            "        )"
        ),
        tests=(_EVERY_PAIR,),
        why="a rank with nothing to move skips the exchange that its peers wait in",
    ),
    Mutant(
        name="digest-without-the-held-rows",
        file=_ROUTES,
        old="held=_digest(self.held)",
        new="held=0",
        tests=(_TESTS + "test_the_digest_names_what_differs",),
        why="ranks with different assignments of images exchange rows that do not match",
    ),
    Mutant(
        name="unheld-row-accepted",
        file=_ROUTES,
        old="if self.total != sum(self.held_counts):",
        new="if self.total < 0:",
        tests=(_TESTS + "test_what_does_not_match_is_refused",),
        why="a wrong number of rows is found by a hang instead of a sentence",
    ),
)
