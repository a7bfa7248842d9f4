# SPDX-License-Identifier: Apache-2.0
"""Seconds of a step, part by part. Pure floats.

What a part takes is its FLOPs or its bytes over what the machine reaches of them. Transformer
Engine's context parallel attention overlaps its ring with its products, and gradients are reduced
beside the backward pass, so of these only what the machine does not hide behind products counts.
Each layer's pass starts its operations, each collective itself, whatever their sizes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron.core.models.mimo.memory.policy import OFFLOAD, RECOMPUTE
from megatron.core.models.mimo.plan.bridge import direction, gather_rows, routed_rows
from megatron.core.models.mimo.plan.candidates import Candidate
from megatron.core.models.mimo.plan.encoder_parts import items_per_replica, offloaded
from megatron.core.models.mimo.plan.flops import (
    BACKWARD_ATTENTION,
    BACKWARD_MATMUL,
    attention_flops,
    encoder_flops,
    layer_flops,
    patch_flops,
    projector_flops,
    seen_pairs,
)
from megatron.core.models.mimo.plan.machine import Machine
from megatron.core.models.mimo.plan.pipeline import Passes, pipeline_seconds
from megatron.core.models.mimo.plan.shapes import ENCODER, PROJECTOR, Shapes, Stack, Work
from mimo_colocated.launch.layouts import LANGUAGE, Layout

GRADIENT_BYTES = 4
"""Gradients are summed in float32."""
# Adam reads weight, two moments and gradient in float32, writes three of them and the weight in 16
# bits; the gradients' norm reads them once more.
_OPTIMIZER_BYTES = 4 * 4 + 3 * 4 + 2 + 4
_TP_CALLS = 4
# Inputs that a backward pass gathers once more, with sequence parallelism.
_TP_AGAIN = 2
# Weights of a bucket that DDP reduces at once, Megatron-Core's defaults.
_BUCKET, _BUCKET_PER_RANK = 40e6, 1e6


@dataclass(frozen=True)
class StepSeconds:
    """Seconds of a step on its slowest rank.

    Attributes:
        encoder: products of all encoders, waiting for the replica with most items, and copies to
            the host and back beyond the language model's time.
        language: products of the language model.
        tp: collectives over TP of all modules.
        cp: what the ring of keys and values takes beyond the attention that it runs beside, or,
            without Transformer Engine, gathering them; all-to-alls around an encoder's attention.
        ep: tokens to their experts and back.
        bubble: waiting for other pipeline stages, and sending to them.
        bridge: rows to the language model and gradients back.
        dp: reducing gradients and gathering weights, beyond the passes that they run beside.
        optimizer: the update.
    """

    encoder: float
    language: float
    tp: float
    cp: float
    ep: float
    bubble: float
    bridge: float
    dp: float
    optimizer: float

    @property
    def passes(self) -> float:
        """All but the optimizer: what benchmarks of forward and backward passes show."""
        return self.total - self.optimizer

    @property
    def total(self) -> float:
        """All of it."""
        return sum(vars(self).values())


@dataclass(frozen=True)
class _Pass:
    """Seconds of a module's passes of one microbatch on one rank: products, TP, CP, EP."""

    products: float
    tp: float = 0.0
    cp: float = 0.0
    ep: float = 0.0

    @property
    def seconds(self) -> float:
        return self.products + self.tp + self.cp + self.ep

    def __add__(self, other: _Pass) -> _Pass:
        mine, theirs = vars(self), vars(other)
        return _Pass(**{name: mine[name] + theirs[name] for name in mine})

    def __mul__(self, factor: float) -> _Pass:
        return _Pass(**{name: value * factor for name, value in vars(self).items()})


_NOTHING = _Pass(0.0)


def step_seconds(
    candidate: Candidate, shapes: Shapes, work: Work, machine: Machine
) -> StepSeconds:
    """Return the parts of a step's time.

    A colocated step encodes on all ranks, then runs the language model, then goes back through
    the encoders. In a homogeneous step the encoders are a part of the first pipeline stage.

    Args:
        candidate: one that :func:`~.candidates.problem` has nothing against.
        shapes, work, machine: what runs, on what, and where.
    """
    m, at = candidate.microbatches, candidate.language
    language = _LanguageTime(candidate, shapes, work, machine)
    forward = backward = _NOTHING
    for name in shapes.encoders:
        there, back = encoder_passes(name, candidate, shapes, work, machine)
        forward, backward = forward + there, backward + back
    ends = language.output()
    ends_back = ends * BACKWARD_MATMUL if language.backward.seconds else 0.0
    passes = Passes(
        forward=language.forward.seconds,
        backward=language.backward.seconds,
        first_forward=forward.seconds if candidate.homogeneous else 0.0,
        first_backward=backward.seconds if candidate.homogeneous else 0.0,
        last_forward=ends,
        last_backward=ends_back,
    )
    encoding, all_of_it = (forward + backward) * m, (language.forward + language.backward) * m
    output = m * (ends + ends_back)
    whole = pipeline_seconds(passes, m, at.pp, candidate.virtual_stages) + language.sends()
    copies = 0.0
    if candidate.memory.uses(OFFLOAD):
        # Copies run while the language model does.
        copied = sum(offloaded(name, candidate, shapes, work) for name in shapes.encoders)
        copies = max(0.0, copied / machine.host - all_of_it.seconds)
    if not candidate.homogeneous:
        whole += encoding.seconds
    busy = encoding.seconds + all_of_it.seconds + output
    return StepSeconds(
        encoder=encoding.products + copies,
        language=all_of_it.products + output,
        tp=encoding.tp + all_of_it.tp,
        cp=encoding.cp + all_of_it.cp,
        ep=all_of_it.ep,
        # Less than nothing where a homogeneous encoder runs while its stage would have waited.
        bubble=whole - busy,
        bridge=m * bridge_seconds(candidate, shapes, work, machine),
        dp=_reducing(candidate, shapes, work, machine, language, backward),
        optimizer=_updating(candidate, shapes, work, machine),
    )


class _LanguageTime:
    """Passes of one microbatch of the language model on one rank."""

    def __init__(
        self, candidate: Candidate, shapes: Shapes, work: Work, machine: Machine
    ) -> None:
        self.at, self.stack, self.machine = candidate.language, shapes.language.stack, machine
        self.work, self.candidate, self.vocab = work, candidate, shapes.language.vocab
        self.samples = work.samples // (self.at.dp * candidate.microbatches)
        # Tokens of a rank before TP cuts them.
        self.tokens = self.samples * work.sequence / self.at.cp
        self.layers = self.stack.layers / self.at.pp
        own = work.trains(LANGUAGE)
        self.forward = self._pass(1.0, 1.0, back=False)
        # A frozen model's activations still have gradients, as encoders train through them.
        if not own.any and not any(work.encoder_trains(name) for name in shapes.encoders):
            self.backward = _NOTHING
            return
        self.backward = self._pass(1.0 + own.share, BACKWARD_ATTENTION, back=True)
        again = {"none": _NOTHING, "full": self.forward}
        if candidate.recompute == "selective":
            again["selective"] = _Pass(self._attention())
        self.backward += again[candidate.recompute]

    def _attention(self) -> float:
        """Seconds of the products of one forward pass's attention."""
        pairs = self.samples * seen_pairs([self.work.sequence], causal=True)
        flops = attention_flops(self.stack, pairs) / (self.at.tp * self.at.cp)
        return self.layers * flops / self.machine.attention

    def _pass(self, products: float, attention: float, *, back: bool) -> _Pass:
        """Of ``products`` and ``attention`` times a forward pass's."""
        at, work, machine = self.at, self.work, self.machine
        linear = layer_flops(self.stack, self.tokens) / (at.tp * at.pp) / machine.matmul
        linear = (linear + self.layers * machine.layer_start) * products
        scores = self._attention() * attention
        bytes_ = self.tokens * self.stack.hidden * work.itemsize
        tp = self.layers * tp_seconds(bytes_, at.tp, machine)
        if back:
            again = tp * _TP_AGAIN / _TP_CALLS
            tp += machine.seen(again, again)
        return _Pass(
            products=linear + scores,
            tp=tp,
            cp=self.layers * self._ring(scores / self.layers, 2 if back else 1),
            ep=self.stack.expert_layers / at.pp * self._to_experts(bytes_),
        )

    def _ring(self, attention: float, tensors: int) -> float:
        """Seconds that a layer waits for keys and values, whose products take ``attention``."""
        at, stack = self.at, self.stack
        if at.cp == 1:
            return 0.0
        bytes_ = 2 * self.tokens * stack.groups * stack.head / at.tp * self.work.itemsize
        if not self.machine.fused:
            # This project's attention gathers them at once, and nothing runs beside it.
            rate, latency = self.machine.link(at.tp * at.cp, at.cp)
            return latency + (at.cp - 1) * bytes_ / rate
        rate, latency = self.machine.link(at.tp * at.cp)
        step = latency + tensors * bytes_ / rate
        return (at.cp - 1) * self.machine.seen(step, attention / at.cp)

    def _to_experts(self, bytes_: float) -> float:
        """Seconds of both all-to-alls of one layer's pass."""
        at = self.at
        if at.ep == 1:
            return 0.0
        rate, latency = self.machine.link(at.ep * at.expert_tp, at.ep)
        sent = bytes_ / at.tp * self.stack.chosen * (at.ep - 1) / at.ep
        return 2 * (latency + sent / rate)

    def output(self) -> float:
        """Return seconds of the output layer's forward pass."""
        flops = 2 * self.tokens * self.stack.hidden * self.vocab / self.at.tp
        return flops / self.machine.matmul + self.machine.layer_start

    def sends(self) -> float:
        """Return seconds in which stages send to each other."""
        at = self.at
        if at.pp == 1:
            return 0.0
        rate, latency = self.machine.link(self.at.size)
        bytes_ = self.tokens * self.stack.hidden * self.work.itemsize / at.tp
        times = 2 * (self.candidate.microbatches + at.pp - 1) * self.candidate.virtual_stages
        return times * (latency + bytes_ / rate)


def tp_seconds(bytes_: float, tp: int, machine: Machine) -> float:
    """Return seconds of one layer's TP collectives in one pass.

    Attention and MLP gather their inputs and scatter sums of their outputs; an all-reduce without
    sequence parallelism moves as much (Korthikanti et al. 2022, "Reducing Activation Recomputation
    in Large Transformer Models", 4.2.2). Backward moves as much again; what it gathers once more
    with sequence parallelism runs beside its products and is not in here.

    Args:
        bytes_: of the hidden states that TP ranks share.
        tp: ranks that share them, neighbours.
        machine: where.
    """
    if tp == 1:
        return 0.0
    rate, latency = machine.link(tp, tp)
    return _TP_CALLS * (latency + bytes_ * (tp - 1) / tp / rate)


def encoder_passes(
    name: str, candidate: Candidate, shapes: Shapes, work: Work, machine: Machine
) -> tuple[_Pass, _Pass]:
    """Return the forward and the backward pass of one microbatch on the rank with most items.

    Args:
        name: of the encoder.
        candidate, shapes, work, machine: as of :func:`step_seconds`.
    """
    shape, at = shapes.encoders[name], candidate.encoder(name)
    items = items_per_replica(name, candidate, shape, work)
    flops = encoder_flops(shape, items, shapes.width)
    # Embedding and projector start about as much as a layer does.
    start = (shape.stack.layers + 1) * machine.layer_start
    # Every CP rank embeds whole items, and has its part of what follows.
    embedding = patch_flops(shape, items) * (1 - 1 / at.cp)
    cut = at.tp * at.cp
    bytes_ = items * shape.tokens * work.itemsize / at.cp
    products = (flops.layers + flops.ends + flops.attention) / cut + embedding / at.tp
    forward = _Pass(
        products=start + products / machine.encoder,
        tp=_encoder_tp(shape.stack, bytes_, at.tp, machine),
        cp=shape.stack.layers * exchange_seconds(shape.stack, bytes_, at, machine),
    )
    encoder, projector = (work.trains(name, part) for part in (ENCODER, PROJECTOR))
    if not encoder.any and not projector.any:
        return forward, _NOTHING
    joined = projector_flops(shape, items, shapes.width)
    if not encoder.any:
        # Gradients stop at what the projector reads.
        seconds = joined * projector.share / cut / machine.encoder + machine.layer_start
        return forward, _Pass(seconds)
    layers = flops.layers + flops.ends - joined
    products = layers * (1 + encoder.share) + joined * (1 + projector.share)
    products += BACKWARD_ATTENTION * flops.attention
    products = products / cut + embedding * (1 + encoder.share) / at.tp
    products = products / machine.encoder + (1 + encoder.share) * start
    backward = _Pass(products, forward.tp, forward.cp)
    if candidate.memory.encoder == RECOMPUTE:
        backward += forward
    return forward, backward


def exchange_seconds(stack: Stack, bytes_: float, at: Layout, machine: Machine) -> float:
    """Return seconds of both all-to-alls around one layer's attention in one pass.

    Queries, keys and values go out and the attention's output comes back, each rank's all but the
    part that it keeps (DeepSpeed-Ulysses, Jacobs et al. 2023, 3.2).

    Args:
        stack: the layers.
        bytes_: of one channel of a CP rank's tokens.
        at: the encoder's layout.
        machine: where.
    """
    if at.cp == 1:
        return 0.0
    rate, latency = machine.link(at.tp * at.cp, at.cp)
    channels = 2 * (stack.heads + stack.groups) * stack.head / at.tp
    return 2 * latency + bytes_ * channels * (at.cp - 1) / at.cp / rate


def _encoder_tp(stack: Stack, itembytes: float, tp: int, machine: Machine) -> float:
    return stack.layers * tp_seconds(itembytes * stack.hidden, tp, machine)


def bridge_seconds(
    candidate: Candidate, shapes: Shapes, work: Work, machine: Machine
) -> float:
    """Return seconds of one microbatch's rows on their way, forward and backward."""
    if candidate.homogeneous:
        return 0.0
    seconds, at = 0.0, candidate.language
    samples = work.samples // (at.dp * candidate.microbatches)
    for name, shape in shapes.encoders.items():
        way, scale = direction(candidate.encoder(name), at)
        if candidate.bridge == "gather":
            rows = gather_rows(way, scale, at.cp)
        else:
            rows = routed_rows(way, scale, at.cp * at.tp, candidate.encoder(name).cp)
        moved = float(rows.forward + rows.backward) * samples * work.items(name, shape) * shape.rows
        low = min(candidate.encoder(name).dp, at.dp)
        span = at.size // (math.gcd(low, at.dp) * at.pp)
        rate, latency = machine.link(span, span)
        if moved:
            seconds += 2 * latency + moved * shapes.width * work.itemsize / rate
    return seconds


def language_weights(candidate: Candidate, shapes: Shapes) -> tuple[float, float]:
    """Return one rank's weights of the language model: those that DP ranks share, and experts'.

    An end, embedding or output layer, is on the first or the last stage; with one stage both are.
    """
    at, shape = candidate.language, shapes.language
    ends = shape.vocab * shape.stack.hidden * (2 if at.pp == 1 and not shape.tied else 1)
    dense = (shape.stack.dense_weights / at.pp + ends) / at.tp
    return dense, shape.stack.expert_weights / (at.pp * at.ep * at.expert_tp)


def replicas(candidate: Candidate, name: str) -> int:
    """Return the ranks that reduce the same gradients of a module."""
    if name == LANGUAGE or candidate.homogeneous:
        return candidate.language.dp * candidate.language.cp
    return candidate.encoder(name).dp * candidate.encoder(name).cp


@dataclass(frozen=True)
class Held:
    """Weights of one kind on a rank.

    Attributes:
        name: of their module.
        weights: of the kind, adapters among them.
        trained: those that train.
        ranks: that reduce the same gradients.
    """

    name: str
    weights: float
    trained: float
    ranks: int


def held_weights(candidate: Candidate, shapes: Shapes, work: Work) -> list[Held]:
    """Return one rank's weights: the language model's, its experts', encoders', projectors'.

    Args:
        candidate, shapes, work: what runs.
    """
    at, all_of_it = candidate.language, work.trains(LANGUAGE)
    dense, experts = language_weights(candidate, shapes)
    # Experts have fewer replicas than the rest: EP ranks hold different ones.
    expert_ranks = max(1, at.dp * at.cp * at.tp // (at.ep * at.expert_tp))
    added = all_of_it.added / (at.tp * at.pp)
    kinds = [
        (LANGUAGE, dense, all_of_it.share, added, at.dp * at.cp),
        (LANGUAGE, experts, all_of_it.share, 0.0, expert_ranks),
    ]
    for name, shape in shapes.encoders.items():
        tp, ranks = candidate.encoder(name).tp, replicas(candidate, name)
        joined = shape.projector_weights(shapes.width)
        parts = {ENCODER: shape.weights(shapes.width) - joined, PROJECTOR: joined}
        for part, weights in parts.items():
            each = work.trains(name, part)
            kinds.append((name, weights / tp, each.share, each.added / tp, ranks))
    return [
        Held(name, weights + more, share * weights + more, ranks)
        for name, weights, share, more, ranks in kinds
    ]


def _reducing(
    candidate: Candidate, shapes: Shapes, work: Work, machine: Machine,
    language: _LanguageTime, encoding: _Pass,
) -> float:  # fmt: skip
    """Seconds of DP collectives that no pass hides.

    The last microbatch's backward pass hides the sums of gradients, the first one's forward pass
    the gathering of weights; an encoder's own passes hide its own.
    """
    seconds = 0.0
    at = candidate.language
    trained: dict[str, float] = {}
    for each in held_weights(candidate, shapes, work):
        trained[each.name] = trained.get(each.name, 0.0) + each.trained
    hiding = {LANGUAGE: (language.backward.seconds, language.forward.seconds)}
    for name, weights in trained.items():
        ranks = replicas(candidate, name)
        if not weights or ranks == 1:
            continue
        stride = at.tp if name == LANGUAGE else candidate.encoder(name).tp
        rate, latency = machine.group_link(ranks, stride)
        part = (ranks - 1) / ranks / rate
        # A ring's first byte goes from node to node, for every bucket anew.
        nodes = max(1, ranks * stride // machine.node)
        buckets = math.ceil(weights / max(_BUCKET, _BUCKET_PER_RANK * ranks))
        begins = buckets * nodes * latency
        backward, forward = hiding.get(name, (encoding.seconds, encoding.seconds / 2))
        summing = GRADIENT_BYTES * weights * part + begins
        gathering = work.itemsize * weights * part + begins
        seconds += machine.seen(summing, backward) + machine.seen(gathering, forward)
    return seconds


def _updating(candidate: Candidate, shapes: Shapes, work: Work, machine: Machine) -> float:
    """Seconds of the optimizer's update of a rank's shards."""
    weights = sum(each.trained / each.ranks for each in held_weights(candidate, shapes, work))
    return weights * _OPTIMIZER_BYTES / machine.memory_rate
