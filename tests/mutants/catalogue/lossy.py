# SPDX-License-Identifier: Apache-2.0
"""Mistakes in links that lose packets."""

from tests.mutants.catalogue.places import MIMO, UNIT
from tests.mutants.mutant import Mutant

_LOSSY = MIMO + "lossy/"
_PLACES = UNIT + "test_lossy_places.py::"
_GRADIENTS = UNIT + "test_lossy_gradients_8rank.py::"
_LINK = UNIT + "test_lossy_link.py::"
_EACH = (_PLACES + "test_each_place_loses_what_its_links_say",)
_BITS = (_PLACES + "test_without_loss_bits_are_those_of_megatron",)

LOSSY = (
    Mutant(
        name="links-start-anew-at-each-message",
        file=_LOSSY + "link.py",
        old="            messages=before.messages + 1,",
        new="            messages=0,",
        tests=(_LINK + "test_what_was_lost_changes_from_message_to_message",),
        why="the same packets are lost in every message, as if some weights did not exist",
    ),
    Mutant(
        name="the-bias-is-summed-over-tp",
        file=_LOSSY + "layers.py",
        old="layer.explicit_expert_comm = layer.skip_bias_add = True",
        new="layer.explicit_expert_comm, layer.skip_bias_add = True, found[1]",
        tests=_BITS,
        why="a bias comes into the sum once per TP rank",
    ),
    Mutant(
        name="ones-own-contribution-is-lost-at-the-receiver",
        file=_LOSSY + "collectives.py",
        old="block if i == own else place.carry(block, ranks[i])",
        new="place.carry(block, ranks[i]) if place.links.get(ranks[i]) else block * 0",
        tests=_EACH,
        why="a rank loses what never left it",
    ),
    Mutant(
        name="what-a-stale-link-keeps-is-written-by-the-sum",
        file=_LOSSY + "link.py",
        old="last=arrived.detach().clone() if",
        new="last=arrived.detach() if",
        tests=(_PLACES + "test_what_a_stale_link_keeps_is_not_the_sum",),
        why="a lost packet is replaced by the sum over all ranks instead of one's own last message",
    ),
    Mutant(
        name="recomputed-layers-lose-other-packets",
        file=_LOSSY + "recomputation.py",
        old="            link.state = state",
        new="            pass",
        tests=(UNIT + "test_lossy_recomputed.py::test_gradients_are_those_of_what_is_kept",),
        why="gradients are those of another forward pass than the one that gave the loss",
    ),
    Mutant(
        name="rescaled-by-what-was-lost",
        file=_LOSSY + "replacements.py",
        old="return kept * (packets / arrived) if arrived else kept",
        new="return kept * (packets / max(packets - arrived, 1)) if arrived else kept",
        tests=(_LINK + "test_rescaled_is_unbiased_over_all_masks_of_a_number",),
        why="activations grow with the share that arrives",
    ),
    Mutant(
        name="a-chain-steps-before-its-first-packet",
        file=_LOSSY + "loss_models.py",
        old="        bad = states[:-1]\n",
        new="        bad = states[1:]\n",
        tests=(UNIT + "test_lossy_models.py::test_start_states",),
        why="the first packet of a link never meets the state that the link starts in",
    ),
    Mutant(
        name="gradients-are-lost-by-their-order-of-arrival",
        file=_LOSSY + "bridges.py",
        old='        return np.argsort(plan.place, kind="stable")',
        new="        return np.arange(plan.place.size)",
        tests=(UNIT + "test_lossy_bridges.py::test_bridges_over_links",),
        why="the TP ranks of an encoder replica get different gradients, and their weights part",
    ),
    Mutant(
        name="holders-of-one-row-lose-different-packets",
        file=_LOSSY + "bridges.py",
        old='if dim != "tp" or sequence_parallel)',
        new="if dim or sequence_parallel)",
        tests=(UNIT + "test_lossy_bridges.py::test_bridges_over_links",),
        why="TP ranks of the language model see different images, and their weights part",
    ),
    Mutant(
        name="tp-ranks-lose-different-gradients",
        file=_LOSSY + "gradients.py",
        old='    return f"replica {reducing_group(buckets).rank()} of',
        new='    return f"replica {id(buckets)} of',
        tests=(_GRADIENTS + "test_each_replica_loses_what_its_links_say",),
        why="weights that the TP ranks of a replica hold alike get different gradients, and part",
        ranks=8,
    ),
    Mutant(
        name="gradients-are-lost-once-more-after-the-sum",
        file=_LOSSY + "gradients.py",
        old="        if buckets.grad_reduce_handle is None:",
        new="        if buckets is not None:",
        tests=(_GRADIENTS + "test_overlapping_reductions_lose_once_a_step",),
        why="in the first step what is summed loses packets as well",
        ranks=8,
    ),
    Mutant(
        name="links-start-anew-where-a-run-goes-on",
        file=MIMO + "checkpoint/store.py",
        old='        if self.rank_state is not None and "rank_state" in loaded:',
        new='        if self.rank_state is None and "rank_state" in loaded:',
        tests=("tests/functional/test_recipes.py::"
               "test_a_run_that_loses_packets_goes_on_bit_for_bit",),
        why="a run that was stopped loses the packets of its first steps again",
    ),
)
