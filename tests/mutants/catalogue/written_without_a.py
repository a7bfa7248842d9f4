# SPDX-License-Identifier: Apache-2.0
"""Mistakes in grids and bridges, written from the code alone: before a test was read."""

from tests.mutants.catalogue.places import CORE, MIMO, UNIT
from tests.mutants.mutant import Mutant

WITHOUT_A = (
    Mutant(
        name="grid-mixed-dims-are-shared",
        file=CORE + "hyper_comm_grid.py",
        old="if not set(ordered_dims) <= set(view.shared_dims):",
        new="if not set(ordered_dims) & set(view.shared_dims):",
        tests=(UNIT + "test_hyper_comm_grid.py::TestViews::test_private_dims_have_their_own",),
        why="a group over a shared and an unshared dim of a view is looked for in the base view",
    ),
    Mutant(
        name="grid-destroy-keeps-members",
        file=CORE + "hyper_comm_grid.py",
        old=(
            "        self._pgs.clear()\n"
            "        self._members.clear()\n"
        ),
        new="        self._pgs.clear()\n",
        tests=(
            UNIT + "test_hyper_comm_grid.py::"
            "TestGroups::test_a_destroyed_grid_makes_its_groups_anew",
        ),
        why=(
            "a grid that was destroyed cannot make its groups anew: it looks for a "
            "twin that is gone"
        ),
    ),
    Mutant(
        name="grid-enumeration-without-offset",
        file=CORE + "hyper_comm_grid.py",
        old="return _box(shape, dim_names, self.rank_offset).enumerate_groups(dims)",
        new="return _box(shape, dim_names, 0).enumerate_groups(dims)",
        tests=(UNIT + "test_hyper_comm_grid.py::test_agrees_with_the_installed_stock_grid",),
        why="a grid that does not begin at rank 0 enumerates other grids' ranks",
    ),
    Mutant(
        name="grid-offset-not-in-the-size-check",
        file=CORE + "hyper_comm_grid.py",
        old="if box.size > world_size - rank_offset:",
        new="if box.size > world_size:",
        tests=(UNIT + "test_hyper_comm_grid.py::TestConstructionErrors::test_over_sized",),
        why="a grid reaches beyond the world's last rank",
    ),
    Mutant(
        name="grid-group-desc-overwritten",
        file=CORE + "hyper_comm_grid.py",
        old='kwargs.setdefault("group_desc", "-".join(ordered))',
        new='kwargs["group_desc"] = "-".join(ordered)',
        tests=(UNIT + "test_hyper_comm_grid.py::TestGroups::test_created_once_and_handed_out",),
        why="a caller's group_desc is accepted and ignored",
    ),
    Mutant(
        name="first-gradient-in-place",
        file=MIMO + "comm/collectives.py",
        old="first = dy.clone(memory_format=torch.contiguous_format)",
        new="first = dy.contiguous()",
        tests=(UNIT + "test_bridge_properties.py::test_every_bridge",),
        why="the broadcast writes into a gradient that autograd hands to others",
    ),
    Mutant(
        name="own-block-is-a-view",
        file=MIMO + "comm/collectives.py",
        old="return block.clone(memory_format=torch.contiguous_format)",
        new="return block.contiguous()",
        tests=(UNIT + "test_bridge_odd_inputs.py::test_a_block_is_a_copy",),
        why="a block along dim 0 is a view: what is accumulated into it writes the whole tensor",
    ),
    Mutant(
        name="encoder-stages-on-the-bridge",
        file=MIMO + "comm/plan/gather_layout.py",
        old='src_dims: tuple[str, ...] = ("tp", "dp")',
        new='src_dims: tuple[str, ...] = ("tp", "dp", "pp")',
        tests=(UNIT + "test_bridge_layout.py::TestErrors::test_grids",),
        why=(
            "an encoder in pipeline stages is accepted, and all its stages send as if "
            "they encoded"
        ),
    ),
    Mutant(
        name="positions-of-all-stages",
        file=MIMO + "comm/plan/gather_layout.py",
        old="rank_to_dest_pos={r: at[:2] for r, at in dest.items() if at[2:] == (0, 0)},",
        new="rank_to_dest_pos={r: at[:2] for r, at in dest.items() if at[2] == 0},",
        tests=(UNIT + "test_bridge_layout.py::test_every_pair_with_pipeline_stages",),
        why="ranks of later stages count as receivers",
    ),
    Mutant(
        name="first-stage-before-the-sum",
        file=MIMO + "comm/gather_bridge.py",
        old=(
            "        elif self.dest_pp_pg is not None:\n"
            "            output = first_gradient(output, self.dest_pp_pg)\n"
            "        on_first = self.layout.rank_to_dest_stage[self.current_rank] == 0\n"
            "        if self.dest_cp_pg is not None and (on_first or self.later_stages):\n"
            "            output = sum_gradients(output, self.dest_cp_pg)\n"
        ),
        new=(
            "        on_first = self.layout.rank_to_dest_stage[self.current_rank] == 0\n"
            "        if self.dest_cp_pg is not None and on_first:\n"
            "            output = sum_gradients(output, self.dest_cp_pg)\n"
            "        if self.dest_pp_pg is not None:\n"
            "            output = first_gradient(output, self.dest_pp_pg)\n"
        ),
        tests=(UNIT + "test_bridge_properties.py::test_every_bridge",),
        why="with CP and stages the later stages' encoders get one CP rank's part of the gradient",
    ),
    Mutant(
        name="problems-heard-in-the-finer-replica",
        file=MIMO + "comm/gather_bridge.py",
        old="grid = self.src_grid if self.is_fan_out() else self.dest_grid",
        new="grid = self.src_grid if self.is_fan_in() else self.dest_grid",
        tests=(UNIT + "test_stage_side.py::test_a_rank_with_a_problem_stops_all",),
        why="a problem reaches one of several replicas that a gather joins, the others wait",
    ),
    Mutant(
        name="backend-of-the-encoder-grid-ignored",
        file=MIMO + "comm/gather_bridge.py",
        old="    return src or dest\n",
        new="    return dest\n",
        tests=(UNIT + "test_routed_bridge.py::test_a_backend_that_one_grid_names_is_both_ones",),
        why="a backend that the encoder's grid alone names is ignored",
    ),
    Mutant(
        name="places-one-longer-than-the-message",
        file=MIMO + "comm/plan_guard.py",
        old="if lengths.max() > _INLINE:",
        new="if lengths.max() > _INLINE + 1:",
        tests=(UNIT + "test_routed_bridge.py::test_places_that_just_fit_the_message_and_one_more",),
        why="token places one integer longer than the message lose their last one",
    ),
    Mutant(
        name="problem-words-gathered-by-one",
        file=MIMO + "comm/plan_guard.py",
        old="if table[:, 0].any():",
        new="if problems:",
        tests=(UNIT + "test_stage_side.py::test_a_rank_with_a_problem_stops_all",),
        why="the rank with a problem waits for others that do not listen",
    ),
    Mutant(
        name="usual-count-is-the-first",
        file=MIMO + "comm/plan_guard.py",
        old="usual = max(set(counts), key=counts.count)",
        new="usual = counts[0]",
        tests=(UNIT + "test_stage_side.py::test_sentences_of_problems",),
        why="if the first rank is the odd one, all others are blamed",
    ),
    Mutant(
        name="plan-key-without-rows",
        file=MIMO + "comm/plan_guard.py",
        old="rows.tobytes() + stated.tobytes())",
        new="stated.tobytes())",
        tests=(
            UNIT + "test_routed_bridge.py::test_every_combination_of_empty_and_non_empty_ranks",
        ),
        why=(
            "a batch with the same token places but rows on other encoder replicas "
            "gets an old plan"
        ),
    ),
    Mutant(
        name="lost-peer-of-any-error",
        file=MIMO + "comm/plan_guard.py",
        old="if isinstance(error, RuntimeError) and LOST_PEER.search(text):",
        new="if LOST_PEER.search(text):",
        tests=(UNIT + "test_stage_side.py::test_sentences_of_problems",),
        why="a loader's ValueError with 'timed out' in it is told to nobody, and the others wait",
    ),
    Mutant(
        name="packed-if-not-per-item",
        file=MIMO + "comm/input_balance.py",
        old="per_item, per_unit = (all(fits) for fits in zip(*rows, strict=True))",
        new="per_item, per_unit = rows[-1]",
        tests=(UNIT + "test_balance.py::test_one_rank_packs_what_others_have_one_by_one",),
        why="a rank whose items have one patch each disagrees with its peers about packing",
    ),
    Mutant(
        name="other-arguments-not-compared",
        file=MIMO + "comm/input_balance.py",
        old="if (each.tensors, each.others) != (model.tensors, model.others):",
        new="if each.tensors != model.tensors:",
        tests=(UNIT + "test_balance.py::test_other_arguments_must_be_alike",),
        why="ranks with other non-tensor arguments are balanced, and the first one's count",
    ),
    Mutant(
        name="items-split-by-ceiling",
        file=MIMO + "comm/plan/token_runs.py",
        old="cuts = [count * part // parts for part in range(parts + 1)]",
        new="cuts = [min(-(-count // parts) * part, count) for part in range(parts + 1)]",
        tests=(UNIT + "test_routes.py::test_docstring_examples",),
        why="the last replica gets none where all could have one",
    ),
    Mutant(
        name="empty-sample-refused",
        file=MIMO + "comm/plan/batch_routes.py",
        old="lengths.min() < 0",
        new="lengths.min() <= 0",
        tests=(
            UNIT + "test_batch_routes.py::test_packed_samples_that_are_cut_to_lengths_of_their_own",
        ),
        why="a sample that packs to no tokens is refused",
    ),
    Mutant(
        name="token-at-the-cut-is-lost",
        file=MIMO + "comm/plan/batch_routes.py",
        old="np.arange(mask.shape[1]) >= lengths[:, None]",
        new="np.arange(mask.shape[1]) > lengths[:, None]",
        tests=(UNIT + "test_batch_routes.py::test_lengths_that_do_not_fit_the_samples",),
        why="a modality token right after the cut is not noticed",
    ),
    Mutant(
        name="threshold-itself-moves",
        file=MIMO + "comm/plan/balance.py",
        old="if before > balance.threshold:",
        new="if before >= balance.threshold:",
        tests=(UNIT + "test_balance.py::test_items_stay_at_home",),
        why="a spread equal to the threshold is balanced",
    ),
    Mutant(
        name="balance-digest-without-home",
        file=MIMO + "comm/plan/balance.py",
        old="table = np.stack([self.tokens, self.home, self.replica])",
        new="table = np.stack([self.tokens, self.replica])",
        tests=(UNIT + "test_balance.py::test_digest_tells_plans_apart",),
        why="ranks that disagree about who reads an item exchange anyway",
    ),
    Mutant(
        name="threshold-default-one",
        file=MIMO + "comm/plan/balance.py",
        old="threshold: float = 1.1",
        new="threshold: float = 1.0",
        tests=(UNIT + "test_balance.py::test_items_stay_at_home",),
        why="by default pixels move for any difference",
    ),
    Mutant(
        name="holders-take-no-turns",
        file=MIMO + "comm/plan/routes.py",
        old="return (stretch + receiver) % copies",
        new="return stretch % copies",
        tests=(UNIT + "test_routes.py::test_bytes_of_uniform_tokens_are_the_lower_bound",),
        why="of a few rows the first copy sends all to everybody",
    ),
    Mutant(
        name="backward-moves-as-forward",
        file=MIMO + "comm/plan/routes.py",
        old="backward = self._leg(number[rows], receivers, incoming, self._moves[1])",
        new="backward = self._leg(number[rows], receivers, incoming, self._moves[0])",
        tests=(UNIT + "test_routes.py::test_every_pair_of_8_rank_grids_against_the_oracle",),
        why="gradients stay where rows need not move",
    ),
    Mutant(
        name="row-beyond-the-last",
        file=MIMO + "comm/plan/group_rows.py",
        old="start + length > self.total",
        new="start + length > self.total + 1",
        tests=(UNIT + "test_routes.py::test_what_does_not_match_is_refused",),
        why="an assignment one row too far is a bare IndexError",
    ),
    Mutant(
        name="item-guard-off-compares-once",
        file=MIMO + "comm/item_exchange.py",
        old='due = self.guard == "always" or (self.guard == "first" and not self._confirmed)',
        new='due = self.guard == "always" or not self._confirmed',
        tests=(UNIT + "test_balance.py::test_how_often_the_guard_compares",),
        why="guard='off' compares the first time; a rank that calls later waits",
    ),
    Mutant(
        name="item-shape-without-its-first-dim",
        file=MIMO + "comm/item_exchange.py",
        old="_brief(str(tuple(units.shape[1:])))",
        new="_brief(str(tuple(units.shape[2:])))",
        tests=(UNIT + "test_balance.py::test_a_rank_that_does_otherwise_is_named_on_all",),
        why="patches of other widths are exchanged as if they were alike",
    ),
    Mutant(
        name="items-padded-with-zero",
        file=MIMO + "comm/item_exchange.py",
        old="padded = np.full(int(counts.max()), -1, dtype=np.int64)",
        new="padded = np.full(int(counts.max()), 0, dtype=np.int64)",
        tests=(UNIT + "test_balance.py::test_copies_of_a_replica_that_read_other_items_are_named",),
        why="TP ranks that differ by an item of zero rows are taken as alike",
    ),
    Mutant(
        name="merge-of-other-ranks-plans",
        file=MIMO + "comm/plan/merged_routes.py",
        old="if plan.rank != plans[0].rank or not",
        new="if plan.rank != plans[0].rank and not",
        tests=(UNIT + "test_stage_routes.py::test_plans_that_do_not_belong_together_are_refused",),
        why="plans of two ranks of one group are merged",
    ),
    Mutant(
        name="rank-beyond-the-group",
        file=MIMO + "comm/plan/routed_layout.py",
        old="if place == self.size or self.ranks[place] != rank:",
        new="if self.ranks[place % self.size] != rank and place < self.size:",
        tests=(UNIT + "test_routes.py::test_ranks_outside_are_refused",),
        why="a rank above all of the group gets a place in it",
    ),
    Mutant(
        name="later-stages-own-rows",
        file=MIMO + "comm/plan/routed_layout.py",
        old="return np.where(at.dest_pp[self.members] == at.dest_stage, owner, -1)",
        new="return np.where(at.dest_pp[self.members] >= at.dest_stage, owner, -1)",
        tests=(UNIT + "test_stage_routes.py::test_every_layout_of_stages_against_the_oracle",),
        why="the last pipeline stage gets the rows",
    ),
    Mutant(
        name="plan-tensors-of-another-device",
        file=MIMO + "comm/routed_bridge.py",
        old="if known is None or known[0] != device:",
        new="if known is None:",
        tests=(UNIT + "test_routed_bridge.py::test_indices_are_those_of_the_device_that_asks",),
        why="indices stay on the device that asked first",
    ),
    Mutant(
        name="plan-cache-blind-for-held",
        file=MIMO + "comm/routed_bridge.py",
        old='key = agreed.key + b"".join(runs.tobytes() + b"|" for runs in held or ())',
        new="key = agreed.key",
        tests=(
            UNIT + "test_routed_bridge.py::"
            "test_batches_alike_but_for_who_holds_which_rows_are_planned_anew",
        ),
        why="a batch whose items are assigned otherwise gets the routes of an earlier one",
    ),
    Mutant(
        name="unguarded-problem-swallowed",
        file=MIMO + "comm/routed_bridge.py",
        old="        elif problem is not None:\n",
        new='        elif problem is not None and self.guard != "off":\n',
        tests=(
            UNIT + "test_routed_bridge.py::"
            "test_where_nothing_is_compared_a_rank_with_a_problem_raises_alone",
        ),
        why="without a guard a rank goes on with a plan of another batch",
    ),
    Mutant(
        name="host-group-not-released",
        file=MIMO + "comm/routed_bridge.py",
        old=(
            "        if control is not group:\n"
            "            release_group(control)\n"
        ),
        new="",
        tests=(UNIT + "test_routed_bridge.py::test_the_group_for_host_tensors_is_released_too",),
        why="each bridge over NCCL leaves a gloo group behind",
    ),
)
