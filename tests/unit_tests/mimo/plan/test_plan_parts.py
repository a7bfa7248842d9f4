# SPDX-License-Identifier: Apache-2.0
"""Time and memory of one candidate: parts that can be worked out by hand, and what they follow."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron.core.models.mimo.memory.plan import Step, TransformerShape, predict, transformer_bytes
from megatron.core.models.mimo.memory.policy import EncoderMemory
from megatron.core.models.mimo.plan.candidates import Candidate
from megatron.core.models.mimo.plan.encoder_parts import microbatches_kept, spread
from megatron.core.models.mimo.plan.estimates import estimate
from megatron.core.models.mimo.plan.flops import encoder_flops, language_flops
from megatron.core.models.mimo.plan.footprint import MARGIN, groups, layer_bytes
from megatron.core.models.mimo.plan.machine import PRESETS
from megatron.core.models.mimo.plan.shapes import LanguageShape, Shapes, Stack, Trained, Work
from mimo_colocated.launch.layouts import Layout
from tests.unit_tests.mimo.plan.plan_cases import (
    ENCODER,
    H100,
    LANGUAGE,
    SHAPES,
    SMALL,
    SMALL_WORK,
    WORK,
    free_links,
)

# Nothing of Megatron-Core is in them.
pytestmark = pytest.mark.once

ONE_TP = Candidate(Layout(tp=1, cp=8, dp=4), {"vision": Layout(dp=32)}, 1)
COLOCATED = Candidate(Layout(tp=2, cp=8, dp=2), {"vision": Layout(dp=32)}, 2)
HOMOGENEOUS = Candidate(Layout(tp=4, cp=8, dp=1), {}, 2)


def seconds_of(candidate: Candidate, machine=H100, work=WORK, shapes=SHAPES):
    return estimate(candidate, shapes, work, machine).seconds


def bytes_of(candidate: Candidate, work=WORK, shapes=SHAPES, machine=H100):
    return estimate(candidate, shapes, work, machine).memory


def test_products_are_the_flops_of_the_step_over_what_is_reached() -> None:
    """Nothing repeated, nothing waited for: FLOPs of the whole step over all ranks."""
    machine = free_links(replace(H100, attention=H100.matmul, encoder=H100.matmul))
    got = seconds_of(ONE_TP, machine)
    language = language_flops(LANGUAGE, [WORK.sequence] * WORK.samples)
    vision = encoder_flops(ENCODER, 48 * WORK.samples, SHAPES.width)
    # Kernels of attention form the scores again: 3.5 times the forward pass, not 3 times.
    whole = language.of_step() + language.attention / 2
    assert got.language == pytest.approx(whole / 32 / machine.matmul)
    whole = vision.of_step() + vision.attention / 2
    assert got.encoder == pytest.approx(whole / 32 / machine.encoder)
    assert got.total == pytest.approx(got.language + got.encoder + got.dp + got.optimizer)


def test_a_homogeneous_encoder_runs_once_per_cp_rank() -> None:
    ratio = seconds_of(HOMOGENEOUS).encoder / seconds_of(COLOCATED).encoder
    assert ratio == pytest.approx(8)
    assert bytes_of(HOMOGENEOUS).bridge == 0 == seconds_of(HOMOGENEOUS).bridge


def test_tp_collectives_by_hand() -> None:
    """Four collectives a layer and pass, each of half of the hidden states with TP 2."""
    machine = replace(H100, inside_latency=0.0)
    tokens = WORK.sequence * WORK.samples / (8 * 2)
    bytes_ = tokens * LANGUAGE.stack.hidden * 2 / 2 * 4 * 2 * LANGUAGE.stack.layers
    assert seconds_of(COLOCATED, machine).tp == pytest.approx(bytes_ / machine.inside)
    slower = replace(machine, inside_latency=1e-5)
    calls = 4 * 2 * LANGUAGE.stack.layers * COLOCATED.microbatches
    more = seconds_of(COLOCATED, slower).tp - seconds_of(COLOCATED, machine).tp
    assert more == pytest.approx(calls * 1e-5)


def test_what_operations_take_to_start_by_hand() -> None:
    """Whatever their sizes: once in a layer's pass forward, twice in one back."""
    started = replace(H100, layer_start=1e-3)
    whole, more = seconds_of(COLOCATED), seconds_of(COLOCATED, started)
    m, layers = COLOCATED.microbatches, LANGUAGE.stack.layers
    # The output layer starts once more, and so do an encoder's embedding and projector.
    assert more.language - whole.language == pytest.approx(3e-3 * m * (layers + 1))
    again = 3e-3 * m * (ENCODER.stack.layers + 1)
    assert more.encoder - whole.encoder == pytest.approx(again)
    frozen = replace(WORK, frozen_modules=frozenset({"vision"}))
    tower = [seconds_of(COLOCATED, each, frozen).encoder for each in (H100, started)]
    assert tower[1] - tower[0] == pytest.approx(again / 3)


def test_collectives_of_more_ranks_begin_later() -> None:
    """Of local attention over CP 8 six ranks beyond two, one gather a layer and pass."""
    local = replace(H100, fused=False)
    before, later = (
        seconds_of(COLOCATED, each) for each in (local, replace(local, hop_latency=1e-3))
    )
    calls = 2 * LANGUAGE.stack.layers * COLOCATED.microbatches
    assert later.cp - before.cp == pytest.approx(6e-3 * calls)
    # Those of two begin as before.
    assert later.tp == before.tp


def test_links_that_need_the_cores_hide_nothing() -> None:
    shared = replace(H100, hidden=0.0)
    whole, seen = seconds_of(COLOCATED), seconds_of(COLOCATED, shared)
    assert whole.dp == 0
    weights = LANGUAGE.weights / 2
    bytes_ = weights * (15 / 16) * (4 + 2)
    assert seen.dp > bytes_ / min(H100.inside, 8 * H100.between)
    # What a pass back gathers again, two of four collectives of one pass.
    assert seen.tp == pytest.approx(whole.tp * 10 / 8)
    assert seen.cp > whole.cp
    half = seconds_of(COLOCATED, replace(H100, hidden=0.5))
    assert half.dp == pytest.approx(seen.dp / 2)


def test_a_ring_counts_beyond_the_attention_that_it_runs_beside() -> None:
    assert seconds_of(COLOCATED).cp > 0
    assert seconds_of(COLOCATED, replace(H100, between=1e15, between_latency=0.0)).cp == 0
    # Local attention gathers keys and values once in each pass, beside nothing.
    local = seconds_of(COLOCATED, replace(H100, fused=False, between_latency=0.0)).cp
    tokens = WORK.sequence * WORK.samples / (8 * 2)
    bytes_ = 7 * 2 * tokens * 4096 / 2 * 2 * 2 * LANGUAGE.stack.layers
    assert local == pytest.approx(bytes_ / H100.between)
    # Inside a node it is hidden.
    assert seconds_of(Candidate(Layout(tp=2, cp=4, dp=4), {"vision": Layout(dp=32)}, 1)).cp == 0


def test_gradients_count_beyond_the_pass_that_they_are_reduced_beside() -> None:
    slow = replace(H100, between=1e9)
    assert seconds_of(COLOCATED).dp == 0
    assert seconds_of(COLOCATED, slow).dp > 0.5
    frozen = replace(WORK, frozen_modules=frozenset({"language", "vision"}))
    assert seconds_of(COLOCATED, slow, frozen).dp == 0
    # Rings of more nodes begin later.
    late = replace(H100, between_latency=1.0)
    few, many = (
        seconds_of(Candidate(Layout(tp=8, dp=n), {"vision": Layout(tp=8, dp=n)}, 1), late,
                   replace(WORK, samples=n)).dp
        for n in (4, 16)
    )  # fmt: skip
    assert many > few > 10


def test_bubble_of_a_pipeline() -> None:
    encoders = {"vision": Layout(dp=32)}
    alike = [
        Candidate(Layout(tp=2, cp=4, pp=4, dp=1), encoders, 4, virtual) for virtual in (1, 2, 4)
    ]
    bubbles = [seconds_of(each, free_links(H100)).bubble for each in alike]
    assert bubbles[0] > bubbles[1] > bubbles[2] > 0
    # Less than 3 / 4 of the products: the output layer is on the last stage alone.
    language = seconds_of(alike[0], free_links(H100)).language
    assert bubbles[0] == pytest.approx(language * 3 / 4, rel=0.1)


def test_frozen_modules_have_no_backward_pass_of_their_own() -> None:
    whole = seconds_of(COLOCATED)
    tower = seconds_of(COLOCATED, work=replace(WORK, frozen_modules=frozenset({"vision"})))
    assert tower.encoder < whole.encoder / 2.9
    model = seconds_of(COLOCATED, work=replace(WORK, frozen_modules=frozenset({"language"})))
    assert whole.language * 0.6 < model.language < whole.language
    assert model.optimizer < whole.optimizer
    memory = bytes_of(COLOCATED, replace(WORK, frozen_modules=frozenset({"language"})))
    assert memory.optimizer < bytes_of(COLOCATED).optimizer / 4


def test_parts_that_train_in_part() -> None:
    """Gradients and optimizer of what trains; products of gradients of weights as many."""
    whole = bytes_of(COLOCATED)
    work = replace(WORK, trained={"language": Trained(0.25), "vision.encoder": Trained(0.0)})
    memory, language = bytes_of(COLOCATED, work), LANGUAGE.weights / 2
    projector = ENCODER.projector_weights(4096)
    assert memory.weights == whole.weights
    assert memory.gradients == pytest.approx(4 * (language / 4 + projector))
    assert memory.optimizer == pytest.approx(12 * (language / 4 / 16 + projector / 32))
    # A frozen encoder keeps nothing, its projector what it needs.
    assert 0 < memory.encoder < whole.encoder / 4
    free, all_of_it = (seconds_of(COLOCATED, H100, each) for each in (work, WORK))
    frozen = seconds_of(COLOCATED, H100, replace(WORK, frozen_modules=frozenset({"language"})))
    quarter = frozen.language + (all_of_it.language - frozen.language) / 4
    # The output layer's gradients are counted in full.
    assert free.language == pytest.approx(quarter, rel=0.02)
    assert free.encoder < all_of_it.encoder / 2
    tower = seconds_of(COLOCATED, H100, replace(WORK, frozen_modules=frozenset({"vision"})))
    assert free.encoder > tower.encoder


def test_adapters_train_alone() -> None:
    added = {"language": Trained(0.0, 1e6), "vision.encoder": Trained(0.0)}
    work = replace(WORK, trained=added | {"vision.projector": Trained(0.0)})
    memory, whole = bytes_of(COLOCATED, work), bytes_of(COLOCATED)
    assert memory.weights - whole.weights == pytest.approx(2 * 1e6 / 2)
    assert memory.gradients == pytest.approx(4 * 1e6 / 2)
    assert memory.optimizer == pytest.approx(12 * 1e6 / 2 / 16)
    frozen = replace(WORK, frozen_modules=frozenset({"language", "vision"}))
    none, through, all_of_it = (
        seconds_of(COLOCATED, H100, each).language for each in (frozen, work, WORK)
    )
    # Gradients go through all layers for them; where nothing trains, nothing goes back.
    assert 2 * none < through < 0.95 * all_of_it


def test_what_trains_by_name() -> None:
    work = Work(64, 8, {"vision": 0.5}, trained={"vision.encoder": Trained(0.0)})
    assert not work.trains("vision", part="encoder").any
    assert work.trains("vision", part="projector") == work.trains("language") == Trained()
    assert work.encoder_trains("vision")
    frozen = replace(work, frozen_modules=frozenset({"vision"}))
    assert not frozen.encoder_trains("vision")


def test_what_cannot_train() -> None:
    for wrong in ({"share": 1.5}, {"share": -0.1}, {"added": -1.0}):
        with pytest.raises(ValueError, match="share must be from 0 to 1 and added 0 or more"):
            Trained(**wrong)


def test_policies_trade_time_for_memory() -> None:
    kept = estimate(COLOCATED, SHAPES, WORK, H100)
    for change in (
        {"recompute": "selective"},
        {"recompute": "full"},
        {"memory": EncoderMemory("recompute", "recompute")},
    ):
        other = estimate(replace(COLOCATED, **change), SHAPES, WORK, H100)
        assert other.seconds.total > kept.seconds.total, change
        assert other.memory.total <= kept.memory.total, change
    staged = Candidate(Layout(tp=2, cp=4, pp=4, dp=1), {"vision": Layout(dp=32)}, 4)
    moved = replace(staged, memory=EncoderMemory("offload", "offload"))
    before, after = (bytes_of(each) for each in (staged, moved))
    assert after.encoder < before.encoder
    assert seconds_of(moved, replace(H100, host=1e6)).encoder > seconds_of(moved).encoder
    assert seconds_of(moved).encoder == seconds_of(staged).encoder


def test_states_are_six_bytes_and_twelve_over_the_replicas() -> None:
    memory = bytes_of(COLOCATED)
    language, vision = LANGUAGE.weights / 2, ENCODER.weights(4096)
    assert memory.weights == pytest.approx(2 * (language + vision))
    assert memory.gradients == pytest.approx(4 * (language + vision))
    assert memory.optimizer == pytest.approx(12 * (language / 16 + vision / 32))
    # Weights in float32 need no copy in float32.
    wide = bytes_of(COLOCATED, replace(WORK, itemsize=4))
    assert wide.optimizer == pytest.approx(memory.optimizer * 8 / 12)
    assert memory.margin == pytest.approx(MARGIN * memory.expected)
    assert memory.total == pytest.approx(memory.expected * (1 + MARGIN))


def test_encoder_activations_are_those_of_the_memory_plan() -> None:
    shape = TransformerShape(
        24, 1792, 7168, 16, tokens=1024, patch=588, projected=4096, sequence_parallel=False
    )
    parts = transformer_bytes(shape, items=3)
    memory = bytes_of(COLOCATED)
    assert memory.encoder == predict(parts, Step(2), EncoderMemory()).peak
    again = replace(COLOCATED, memory=EncoderMemory("recompute", "keep"))
    assert bytes_of(again).encoder == predict(parts, Step(2), again.memory).total


def test_an_encoder_cut_over_cp_by_hand() -> None:
    """Products, what is kept and TP's bytes over CP; two all-to-alls around every attention."""
    shapes = Shapes(LANGUAGE, {"vision": replace(ENCODER, cuts_items=True)})
    machine = replace(free_links(H100), inside=1e9, hop_latency=0.0)
    at = Layout(tp=2, cp=8, dp=2)
    whole, cut = (
        Candidate(at, {"vision": each}, 2) for each in (Layout(tp=2, dp=16), Layout(2, 4, 4))
    )
    both = [estimate(each, shapes, WORK, machine) for each in (whole, cut)]
    assert both[1].candidate.encoder("vision").size == 32
    # Every CP rank embeds whole images, 24 in place of 6: once forward, twice as much back.
    again = 2 * (24 - 6) * ENCODER.tokens * ENCODER.patch * ENCODER.stack.hidden / 2
    more = both[1].seconds.encoder - both[0].seconds.encoder
    assert more == pytest.approx(2 * 3 * again / machine.encoder)
    # 24 images of 1024 tokens: query, key, value and output, of half the heads; 3/4 leave.
    sent = 24 * 1024 / 4 * 4 * 1792 / 2 * 2 * 3 / 4
    passes = 2 * 2 * ENCODER.stack.layers
    exchanged = both[1].seconds.cp - both[0].seconds.cp
    assert exchanged == pytest.approx(passes * sent / machine.inside)
    slower = estimate(cut, shapes, WORK, replace(machine, inside_latency=1e-3)).seconds.cp
    ring = estimate(whole, shapes, WORK, replace(machine, inside_latency=1e-3)).seconds.cp
    assert slower - ring - exchanged == pytest.approx(passes * 2e-3)
    assert both[1].seconds.tp == pytest.approx(both[0].seconds.tp)
    # Optimizer states are sharded over all copies of a weight.
    assert both[1].memory.optimizer == pytest.approx(both[0].memory.optimizer)
    assert both[1].memory.batch > both[0].memory.batch


def test_cp_divides_what_an_encoder_keeps_but_its_inputs() -> None:
    one = TransformerShape(2, 64, 256, 8, tokens=10, patch=16, projected=64, tp=2)
    kept, cut = (transformer_bytes(replace(one, cp=cp), 6) for cp in (1, 4))
    embedded = 60 * 2 * 16
    assert cut.inputs == kept.inputs
    # The rank with most of an image has 3 of its 10 tokens.
    assert (cut.encoder - embedded) * 10 == (kept.encoder - embedded) * 3
    assert (cut.rows, cut.projector) == (kept.rows * 3 // 10, kept.projector * 3 // 10)
    with pytest.raises(ValueError, match=r"cp=3 takes heads=8 that tp=2 \* cp divides"):
        replace(one, cp=3)
    with pytest.raises(ValueError, match="cp=0|cp must be 1 or more"):
        replace(one, cp=0)


def test_the_encoders_own_backward_pass_may_be_the_fullest_moment() -> None:
    big = replace(ENCODER, stack=replace(ENCODER.stack, layers=200))
    shapes = Shapes(LANGUAGE, {"vision": big})
    again = replace(COLOCATED, memory=EncoderMemory("recompute", "recompute"))
    memory = bytes_of(again, shapes=shapes)
    assert memory.activations == memory.logits == 0
    assert memory.encoder > bytes_of(again).encoder > 0


def test_sequence_parallel_encoders_cut_their_norms_too() -> None:
    plain = TransformerShape(2, 64, 256, 8, tokens=4, patch=16, projected=64, tp=4)
    cut = replace(plain, sequence_parallel=True)
    alone = replace(plain, tp=1)
    kept = [transformer_bytes(each, 8).encoder for each in (plain, cut, alone)]
    assert kept[1] < kept[0] < kept[2]
    # Beside the layers there are the embedding's input and the last norm.
    tokens, ends = 32, 2 * 16 + 2 * 64 + 4
    assert kept[1] - tokens * ends == (kept[2] - tokens * ends) // 4
    full = [
        transformer_bytes(replace(each, recompute="full"), 8).encoder for each in (cut, alone)
    ]
    assert full[0] - tokens * ends == (full[1] - tokens * ends) // 4


def test_a_layer_keeps_34_bytes_per_channel_less_what_kernels_spare() -> None:
    """Korthikanti's 34 with dropout's masks, 2 bytes; flash attention adds a float per head."""
    dense = Stack.of(1, 1024, 4096, 16)
    assert layer_bytes(dense, 2, 1, 1, fused=True) == 1024 * 32 + 4 * 16
    assert layer_bytes(dense, 2, 4, 1, fused=True) == layer_bytes(dense, 2, 1, 1, fused=True) / 4
    gated = Stack(1, 1024, 4096, 16, 4, 64, gated=True)
    kept = 1024 * 8 + 2 * 64 * 2 * 20 + 64 + 2 * 3 * 4096
    assert layer_bytes(gated, 2, 1, 1, fused=True) == kept
    assert layer_bytes(gated, 2, 1, 1, fused=False) > 1.5 * kept
    # Local attention keeps a rank's own keys and values, and gathers the others' again.
    wider = [layer_bytes(gated, 2, 1, cp, fused=False) for cp in (2, 4)]
    assert wider[1] == wider[0] < layer_bytes(gated, 2, 1, 1, fused=False)
    assert layer_bytes(gated, 2, 1, 8, fused=True) == kept


def test_stages_hold_what_waits() -> None:
    staged = Candidate(Layout(tp=2, cp=4, pp=4, dp=1), {"vision": Layout(dp=32)}, 4)
    assert microbatches_kept(staged) == 4
    assert microbatches_kept(replace(staged, virtual_stages=2)) == 4
    assert microbatches_kept(Candidate(Layout(pp=4), {}, 16, 2)) == 5.5
    assert microbatches_kept(Candidate(Layout(pp=4), {}, 2)) == 2
    one = bytes_of(replace(staged, language=Layout(tp=2, cp=8, dp=1, pp=2)))
    assert one.logits > 0 or one.activations > 0


def test_process_groups_are_counted() -> None:
    """World; TP, CP, CP and DP of the language model; DP and the bridge's of the encoder."""
    assert groups(COLOCATED) == 6
    assert groups(replace(COLOCATED, bridge="gather")) == 6
    equal = Candidate(Layout(dp=8), {"vision": Layout(dp=8)}, 1, bridge="gather")
    assert groups(equal) == 3
    assert groups(HOMOGENEOUS) == 4
    # Experts, two beside each other: those of a pair are that of TP, a quad has one of its own.
    pair, quad = (Candidate(Layout(tp=2, dp=4, ep=ep, etp=1), {}, 1) for ep in (2, 4))
    assert groups(pair) == 3
    assert groups(quad) == 5
    without = bytes_of(COLOCATED, machine=replace(H100, communicator=0.0))
    assert bytes_of(COLOCATED).communicators - without.communicators == 6 * H100.communicator


def test_uneven_items_are_the_fullest_replicas() -> None:
    """Items that do not divide over the replicas leave some waiting."""
    work = replace(SMALL_WORK, samples=1, shares={"vision": 0.6})
    candidate = Candidate(Layout(tp=4, cp=2), {"vision": Layout(dp=8)}, 1)
    assert work.items("vision", SMALL.encoders["vision"]) == 9
    assert spread("vision", candidate, SMALL.encoders["vision"], work) == pytest.approx(16 / 9)
    even = replace(work, shares={"vision": 0.5})
    assert spread("vision", candidate, SMALL.encoders["vision"], even) == 1
    slow, fast = (estimate(candidate, SMALL, each, H100).seconds for each in (work, even))
    assert slow.encoder == pytest.approx(2 * fast.encoder)


def test_experts_take_their_part_of_products_and_weights() -> None:
    stack = Stack(4, 512, 1024, 8, 8, 64, True, experts=8, chosen=2, expert_ffn=256,
                  expert_layers=3)  # fmt: skip
    shapes = Shapes(LanguageShape(stack, 1000, tied=True), {})
    assert stack.expert_weights == 3 * 8 * 3 * 512 * 256
    assert shapes.language.weights == stack.weights + 512 * 1000
    work = Work(1024, 8, {})
    alone = estimate(Candidate(Layout(dp=8, ep=1, etp=1), {}, 1), shapes, work, H100)
    shared = estimate(Candidate(Layout(dp=8, ep=8, etp=1), {}, 1), shapes, work, H100)
    assert shared.seconds.language == alone.seconds.language
    assert shared.seconds.ep > 0 == alone.seconds.ep
    assert shared.memory.weights < alone.memory.weights
    # All in all as many bytes of optimizer: EP ranks have different experts.
    assert shared.memory.optimizer == pytest.approx(alone.memory.optimizer)


@pytest.mark.parametrize("name", PRESETS)
def test_better_machines_are_faster(name: str) -> None:
    slowest = seconds_of(COLOCATED, PRESETS["a100"]).total
    assert slowest >= seconds_of(COLOCATED, PRESETS[name]).total
