# SPDX-License-Identifier: Apache-2.0
"""Mistakes in moving rows, gradients and pixels over planned routes."""

from tests.mutants.catalogue.places import MIMO, UNIT
from tests.mutants.mutant import Mutant

_EXCHANGE = MIMO + "comm/exchange.py"
_BRIDGE = MIMO + "comm/routed_bridge.py"
_ROUTES = MIMO + "comm/plan/routes.py"
_ROWS = MIMO + "comm/plan/group_rows.py"
_ITEMS = MIMO + "comm/item_exchange.py"
_MOVES = MIMO + "comm/plan/item_moves.py"
_SIDE = MIMO + "model/routed_side.py"
_BRIDGE_TESTS = UNIT + "test_routed_bridge.py::"
_EVERY_PAIR = _BRIDGE_TESTS + "test_every_pair_of_8_rank_layouts"
_EMPTY = _BRIDGE_TESTS + "test_every_combination_of_empty_and_non_empty_ranks"
_PLANNED = UNIT + "test_routes.py::test_every_pair_of_8_rank_grids_against_the_oracle"
_MODEL_TESTS = UNIT + "test_routed_model.py::"
_BALANCED = UNIT + "test_balance.py::test_gradients_are_those_of_the_unsharded_encoder"

EXCHANGE = (
    Mutant(
        name="exchange-keeps-its-graph",
        file=_EXCHANGE,
        old="        self._exchange, self.plan = exchange, exchange.plan\n",
        new=(
            "        self._exchange, self.plan = exchange, exchange.plan\n"
            "        exchange.flight = self\n"
        ),
        tests=(_BRIDGE_TESTS + "test_nothing_keeps_an_exchange",),
        why="every microbatch's plan, and what its graph has, stays in memory for ever",
    ),
    Mutant(
        name="split-sizes-reversed-in-backward",
        file=_EXCHANGE,
        old="exchange.start(exchange.gradients, gradients, plan.backward)",
        new="exchange.start(exchange.gradients, gradients, plan.backward[::-1])",
        tests=(_EVERY_PAIR,),
        why="gradients of uneven rows are cut at other rows' boundaries, or ranks wait forever",
    ),
    Mutant(
        name="announced-and-never-awaited",
        file=_BRIDGE,
        old="        comparison.result()\n",
        new="",
        tests=(
            UNIT + "test_announced_plans.py::"
            "test_what_was_announced_otherwise_is_one_error_before_rows_move",
        ),
        why="rows move by plans that differ",
    ),
    Mutant(
        name="what-went-wrong-is-moved",
        file=_BRIDGE,
        old="if problem is None and rows.size(0) == plan.held:",
        new="if rows.size(0) == plan.held:",
        tests=(
            UNIT + "test_announced_plans.py::"
            "test_what_turns_out_otherwise_is_one_error_after_the_exchange",
        ),
        why="rows of another width or dtype go into an exchange that expects the announced one",
    ),
    Mutant(
        name="first-error-ends-the-hearing",
        file=MIMO + "model/announced_plans.py",
        old="errors.append(error)",
        new="raise",
        tests=(
            UNIT + "test_announced_plans.py::test_an_encoder_that_raises_is_one_error_on_all_ranks",
        ),
        why="ranks of another modality's group wait for words that nobody says",
    ),
    Mutant(
        name="backward-splits-taken-from-forward",
        file=_EXCHANGE,
        old="for leg in (plan.forward, plan.backward)",
        new="for leg in (plan.forward, plan.forward)",
        tests=(_EVERY_PAIR,),
        why="gradients go to ranks that sent rows, not to all that hold them",
    ),
    Mutant(
        name="routed-gradients-not-taken-in",
        file=_EXCHANGE,
        old="dx.index_copy_(0, plan.backward_index, received)",
        new="dx.index_fill_(0, plan.backward_index, 0.0)",
        tests=(_EVERY_PAIR,),
        why="the encoder learns from the rows that stay on its own rank only",
    ),
    Mutant(
        name="gradients-of-kept-rows-dropped",
        file=_EXCHANGE,
        old="dx.index_copy_(0, plan.local_index, dy[: plan.local])",
        new="dx.index_fill_(0, plan.local_index, 0.0)",
        tests=(_EVERY_PAIR,),
        why="the encoder learns from the rows that travel only",
    ),
    Mutant(
        name="rows-that-stay-not-reordered",
        file=_EXCHANGE,
        old=" and in_order",
        new="",
        tests=(_BRIDGE_TESTS + "test_rows_that_stay_are_not_copied",),
        why="balanced images of one rank stand at one another's tokens",
    ),
    Mutant(
        name="planned-by-the-first-batch",
        file=_BRIDGE,
        old='key = agreed.key + b"".join(',
        new='key = b"".join(',
        tests=(_EMPTY,),
        why="later batches move by the first one's token places",
    ),
    Mutant(
        name="all-rows-to-the-first-sequence-shard",
        file=_ROWS,
        old="self.group.owner(dest, cp, tp), place",
        new="self.group.owner(dest, cp, tp * 0), place",
        tests=(_PLANNED,),
        why="with sequence parallelism one TP rank gets all rows, at places of the others",
    ),
    Mutant(
        name="own-rows-placed-in-reading-order",
        file=_ROUTES,
        old="place=self._place[own]",
        new="place=self._place[np.sort(own)]",
        tests=(_PLANNED,),
        why="rows that are held and rows that arrive are put into one another's places",
    ),
    Mutant(
        name="rank-without-gradients-stays-out",
        file=_ROUTES,
        old="backward = self._leg(number[rows], receivers, incoming, self._moves[1])",
        new=(
            "backward = self._leg(\n"
            "            number[rows], receivers, incoming, bool(rows.size or incoming.size)\n"
            "        )"
        ),
        tests=(_PLANNED,),
        why="a rank with no gradient to move skips the exchange that its peers wait in",
    ),
    Mutant(
        name="encoder-without-images-stays-out",
        file="megatron/core/models/mimo/model/routed_path.py",
        old='if plans[name].group_rows or name in part:',
        new='if rows[name].size(0):',
        tests=(_MODEL_TESTS + "test_any_number_of_tokens_against_one_rank",),
        why="a rank whose samples have no image leaves its peers waiting, or gets no rows",
    ),
    Mutant(
        name="text-gradient-of-one-sequence-shard",
        file="megatron/core/models/mimo/model/routed_path.py",
        old="if layout.dest_tp_size > 1:",
        new="if layout.dest_tp_size < 1:",
        tests=(_MODEL_TESTS + "test_equal_to_the_gather_bridge",),
        why="word embeddings learn from one TP rank's share of the positions",
    ),
    Mutant(
        name="pixels-sent-in-reading-order",
        file=_MOVES,
        old='send_index=_unit_index(units[brought], np.argsort(receivers, kind="stable"))',
        new="send_index=_unit_index(units[brought], np.arange(receivers.size))",
        tests=(_BALANCED,),
        why="receivers get one another's pixels",
    ),
    Mutant(
        name="pixels-cut-as-one-unit-each",
        file=_MOVES,
        old="recv_splits=_total(senders, units[encoded], exchange.size)",
        new="recv_splits=_total(senders, units[encoded] * 0 + 1, exchange.size)",
        tests=(_BALANCED,),
        why="images of more than one patch are cut in the middle",
    ),
    Mutant(
        name="pixels-from-the-first-tp-copy",
        file=_MOVES,
        old="peers = exchange.src_ranks[:, copy]",
        new="peers = exchange.src_ranks[:, 0]",
        tests=(_BALANCED,),
        why="one TP rank sends for all of them and nobody asks the others",
    ),
    Mutant(
        name="balancing-plans-not-compared",
        file=_ITEMS,
        old="if not due or self.control is None:",
        new="if due or self.control is None:",
        tests=(UNIT + "test_balance.py::test_a_rank_that_does_otherwise_is_named_on_all",),
        why="ranks with other plans exchange pixels that do not match",
    ),
)
