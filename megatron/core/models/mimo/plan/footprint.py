# SPDX-License-Identifier: Apache-2.0
"""Bytes of the fullest rank, part by part.

Encoder activations are those of ``memory/plan.py``, rows of the bridge those of the route plan's
formula; what a language model keeps is counted here, as its layers are gated and share heads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from megatron.core.models.mimo.memory.plan import Step
from megatron.core.models.mimo.plan.candidates import Candidate
from megatron.core.models.mimo.plan.encoder_parts import (
    computed_again,
    encoder_prediction,
    items_per_replica,
    microbatches_kept,
)
from megatron.core.models.mimo.plan.machine import Machine
from megatron.core.models.mimo.plan.shapes import ENCODER, Shapes, Stack, Work
from megatron.core.models.mimo.plan.step_time import (
    GRADIENT_BYTES,
    held_weights,
)
from mimo_colocated.communicators import communicators
from mimo_colocated.grid_shape import GridShape
from mimo_colocated.launch.layouts import LANGUAGE, Layout

# Adam's two moments in float32, and a weight beside one of 16 bits.
_MOMENTS, _MASTER = 8, 4
_TOKEN_BYTES = 3 * 8 + 4
MARGIN = 0.05
"""Part of all else that is kept free: fragments of the allocator, kernels' workspaces, the context
of the driver. A run that does not fit costs more than a layout that was passed over."""


@dataclass(frozen=True)
class RankBytes:
    """Bytes of a rank at the fullest moment of a step.

    Attributes:
        weights, gradients, optimizer: of all modules.
        encoder: what encoders and projectors keep between their passes.
        activations: what layers of the language model keep.
        logits: of the output layer and the loss.
        bridge: rows of microbatches that wait, as they came and among the text.
        batch: what modules read of a step: this one's, and the next one's as it is loaded.
        communicators: of process groups.
        margin: kept free.
    """

    weights: float
    gradients: float
    optimizer: float
    encoder: float
    activations: float
    logits: float
    bridge: float
    batch: float
    communicators: float
    margin: float

    @property
    def total(self) -> float:
        """All of it, the margin too."""
        return sum(vars(self).values())

    @property
    def expected(self) -> float:
        """Without the margin: what a measurement is compared with."""
        return self.total - self.margin


def rank_bytes(candidate: Candidate, shapes: Shapes, work: Work, machine: Machine) -> RankBytes:
    """Return the parts of the fullest rank's memory at its fullest moment.

    That is on the first or on the last pipeline stage; without stages, while the language model
    runs or when an encoder goes back.

    Args:
        candidate: one that :func:`~.candidates.problem` has nothing against.
        shapes, work, machine: what runs, on what, and where.
    """
    moments = [_moment(candidate, shapes, work, machine, first=True)]
    if candidate.language.pp == 1:
        # The language model is through when the encoders go back.
        moments.append(_moment(candidate, shapes, work, machine, first=True, language=False))
    else:
        moments.append(_moment(candidate, shapes, work, machine, first=False))
    return max(moments, key=lambda each: each.total)


@dataclass(frozen=True)
class Peaks:
    """Bytes of a rank at the fullest moments of a step without pipeline stages.

    Attributes:
        encoder: of encoders and projectors, while they go back; weights, their gradients and the
            optimizer left out, and what the bridge holds.
        language: of the language model, while it runs, likewise; and the batch.
        whole: all of it, the margin left out.
    """

    encoder: float
    language: float
    whole: float


def peaks(candidate: Candidate, shapes: Shapes, work: Work, machine: Machine) -> Peaks:
    """Return the fullest moments of each module, and of a rank.

    Args:
        candidate: one without pipeline stages.
        shapes, work, machine: what runs, on what, and where.

    Raises:
        ValueError: pipeline stages, whose modules have no moments of their own.
    """
    if candidate.language.pp > 1:
        raise ValueError(f"peaks of modules are of one stage, got pp={candidate.language.pp}")
    runs = _moment(candidate, shapes, work, machine, first=True)
    back = _moment(candidate, shapes, work, machine, first=True, language=False)
    return Peaks(
        encoder=back.encoder,
        language=runs.activations + runs.logits + runs.batch,
        whole=max(runs.expected, back.expected),
    )


def _moment(
    candidate: Candidate,
    shapes: Shapes,
    work: Work,
    machine: Machine,
    *,
    first: bool,
    language: bool = True,
) -> RankBytes:
    """Of a rank of the first or of the last stage, while the language model runs or after it."""
    alone, encodes = candidate.language.pp == 1, first or not candidate.homogeneous
    waiting = microbatches_kept(candidate) if first else 1.0
    encoder = bridge = activations = logits = 0.0
    for name in shapes.encoders if encodes else ():
        kept = encoder_prediction(name, candidate, shapes, work)
        # With stages an encoder goes back while other microbatches are still in the stage.
        encoder += kept.total if alone and language else kept.peak
        if first and not candidate.homogeneous:
            bridge += _bridge_bytes(name, candidate, shapes, work)
        if not language and work.trains(name, ENCODER).any:
            encoder += _encoder_working(name, candidate, shapes, work)
    if language:
        fused = machine.fused
        stack = shapes.language.stack
        activations, working = _activations(candidate, stack, work, waiting, fused)
        logits = _logits(candidate, shapes, work, fused) if alone or not first else 0.0
        # When a layer goes back, what the loss kept is gone.
        activations += max(0.0, working - logits)
    parts = {
        **_states(candidate, shapes, work, encoders=encodes),
        "encoder": encoder,
        "activations": activations,
        "logits": logits,
        "bridge": bridge,
        "batch": 2.0 * _batch_bytes(candidate, shapes, work),
        "communicators": machine.communicator * groups(candidate),
    }
    return RankBytes(**parts, margin=MARGIN * sum(parts.values()))


def _states(
    candidate: Candidate, shapes: Shapes, work: Work, *, encoders: bool
) -> dict[str, float]:
    """Weights, gradients and optimizer of a rank, with the optimizer's state cut over DP and CP."""
    held = held_weights(candidate, shapes, work)
    if not encoders:
        held = [each for each in held if each.name == LANGUAGE]
    adam = _MOMENTS + (_MASTER if work.itemsize < 4 else 0)
    return {
        "weights": work.itemsize * sum(each.weights for each in held),
        "gradients": GRADIENT_BYTES * sum(each.trained for each in held),
        "optimizer": adam * sum(each.trained / each.ranks for each in held),
    }


def layer_bytes(stack: Stack, itemsize: int, tp: int, cp: int, *, fused: bool) -> float:
    """Return what one layer of a language model keeps per token, on one of its TP ranks.

    After Korthikanti et al. 2022, table 2, with sequence parallelism, without dropout, with
    attention that keeps no scores. With ``e`` bytes a number, width ``h``, heads ``a`` and ``g``
    groups of ``d`` channels, MLP ``f``, TP ``t``, in Transformer Engine's kernels (*fused*) and in
    the layers that this project runs without them, whose norms keep float32:

    ================================  =====================  ==========================
    kept                              fused                  without
    ================================  =====================  ==========================
    both norms, and what they return  ``4 e h``              ``16 h + 2 e h + 8``
    query, key, value                 ``e d (a + 2 g)``      the same, and ``e d (a + g)``
                                                             with rotary positions; with CP
                                                             ``e d a``
    attention's output                ``e d a + 4 a``        ``2 e d a + 4 a``
    gated MLP                         ``3 e f``              ``5 e f``
    other MLP                         ``2 e f``              ``2 e f``
    experts, ``k`` of them a token    as MLPs of ``k`` times their width, and ``2 k e h``
    ================================  =====================  ==========================

    all of it over ``t``.

    Args:
        stack: the layers.
        itemsize: bytes of a number.
        tp: ranks that share a layer.
        cp: ranks that share a sequence; each keeps its own keys and values.
        fused: the layers are Transformer Engine's.

    >>> layer_bytes(Stack.of(1, 1024, 4096, 16), 2, 1, 1, fused=True) / 1024
    32.0625
    """
    e, h = itemsize, stack.hidden
    wide = (3 if fused else 5) if stack.gated else 2
    queries, keys = e * stack.head * stack.heads, e * stack.head * stack.groups
    norms = 4 * e * h if fused else 16 * h + 2 * e * h + 8
    attention = queries + 2 * keys + queries + 4 * stack.heads
    if not fused:
        attention += queries + (0 if cp > 1 else queries + keys)
    part = stack.expert_layers / stack.layers
    experts = stack.chosen * (wide * stack.expert_ffn + 2 * h)
    mlp = e * ((1 - part) * wide * stack.ffn + part * experts)
    return (norms + attention + mlp) / tp


def _activations(
    candidate: Candidate, stack: Stack, work: Work, waiting: float, fused: bool
) -> tuple[float, float]:
    """What layers keep; and what the pass back of one needs, with what it computes again."""
    at = candidate.language
    samples = work.samples // (at.dp * candidate.microbatches)
    tokens = samples * work.sequence / at.cp
    layers = stack.layers / at.pp
    whole = layer_bytes(stack, work.itemsize, at.tp, at.cp, fused=fused)
    # One layer goes back at a time: gradients in its MLP, and of what goes into it and around it.
    working = 2 * stack.ffn + 2 * stack.hidden
    if not fused and not work.trains(LANGUAGE).any:
        whole -= _for_weights(stack, work.itemsize, at.tp)
        # Nothing that was kept for gradients of weights makes room for them.
        working = 4 * stack.ffn + stack.hidden
    each = whole
    if candidate.recompute == "full":
        each = work.itemsize * stack.hidden / at.tp
    elif candidate.recompute == "selective":
        output = work.itemsize * stack.head * stack.heads + 4 * stack.heads
        each = whole - output / at.tp
    working *= work.itemsize / at.tp
    return tokens * waiting * layers * each, tokens * (working + whole - each)


def _for_weights(stack: Stack, itemsize: int, tp: int) -> float:
    """Of what a layer keeps without Transformer Engine, what gradients of its weights alone need.

    Inputs of its four products, and of both norms' scales.
    """
    dense = 1 - stack.expert_layers / stack.layers
    products = 2 * stack.hidden + stack.head * stack.heads + dense * stack.ffn
    return (itemsize * products + 8 * stack.hidden) / tp


def _encoder_working(name: str, candidate: Candidate, shapes: Shapes, work: Work) -> float:
    """Gradients where a norm goes back, as one rank of TP has them, and a layer computed again."""
    shape = shapes.encoders[name]
    tokens = items_per_replica(name, candidate, shape, work) * shape.tokens
    tokens /= candidate.encoder(name).cp
    gradients = 4.0 * tokens * work.itemsize * shape.stack.hidden
    return gradients + computed_again(name, candidate, shapes, work)


def _logits(candidate: Candidate, shapes: Shapes, work: Work, fused: bool) -> float:
    """Logits as the output layer makes them, and in float32, where the loss keeps them.

    Before them comes the last norm, which keeps what a layer's does. Without Transformer Engine its
    pass back makes two gradients in float32 beside that of the logits, and one in 16 bits.
    """
    at = candidate.language
    samples = work.samples // (at.dp * candidate.microbatches)
    tokens = samples * work.sequence / at.cp
    h, e = shapes.width, work.itemsize
    norm = 2 * e * h if fused else 8 * h + e * h + 4
    if not fused:
        norm += 8 * h + 4 * shapes.language.vocab + (e * h if e < 4 else 0)
    # The place of its token in the vocabulary, and whether it is there.
    return tokens * (shapes.language.vocab * (e + 4) / at.tp + norm / at.tp + 9)


def _bridge_bytes(name: str, candidate: Candidate, shapes: Shapes, work: Work) -> float:
    """Rows that came and the same among the text, of every microbatch that waits."""
    at, shape = candidate.language, shapes.encoders[name]
    samples = work.samples // (at.dp * candidate.microbatches)
    rows = samples * work.items(name, shape) * shape.rows
    if candidate.bridge == "routed":
        rows /= at.cp * at.tp
    kept = Step(candidate.microbatches, at.pp, candidate.encode_ahead).kept
    return 2 * kept * rows * shapes.width * work.itemsize


def _batch_bytes(candidate: Candidate, shapes: Shapes, work: Work) -> float:
    """Tokens, positions and labels of 8 bytes, a loss mask of 4, and items of 4 bytes a number.

    Of a whole step, as loaders make it: a replica's samples, whole on all of its ranks.
    """
    size = work.tokens / candidate.language.dp * _TOKEN_BYTES
    for name, shape in shapes.encoders.items():
        items = items_per_replica(name, candidate, shape, work) * candidate.microbatches
        size += items * (shape.embedded or shape.tokens) * shape.patch * 4
    return size


def groups(candidate: Candidate) -> int:
    """Return how many communicators are connected on the first rank, the world's among them.

    Those of the grids as :func:`~mimo_colocated.communicators.communicators` lists them, and the
    bridges': the ranks that exchange rows, or replicas that gather them.
    """
    made = _connected(candidate.language, tuple(candidate.encoders.values()))
    return made + sum(_joined(candidate, each) > 1 for each in candidate.encoders.values())


@lru_cache(maxsize=4096)
def _connected(at: Layout, encoders: tuple[Layout, ...]) -> int:
    """Those of the grids, once for the many candidates that differ in other things."""
    axes = ("tp", "cp", "dp")
    grids = {str(n): GridShape((e.tp, e.cp, e.dp), axes) for n, e in enumerate(encoders)}
    grids[LANGUAGE] = GridShape((at.tp, at.cp, at.dp, at.pp), ("tp", "cp", "dp", "pp"))
    experts = {}
    if at.ep > 1 or at.expert_tp != at.tp:
        cut = (at.expert_tp, at.ep, at.tp * at.cp * at.dp // (at.expert_tp * at.ep), at.pp)
        experts[LANGUAGE] = GridShape(cut, ("expt_tp", "ep", "expt_dp", "pp"))
    return sum(each.connects for each in communicators(grids, experts))


def _joined(candidate: Candidate, encoder: Layout) -> int:
    """Ranks of a bridge's group."""
    low, high = sorted((encoder.dp, candidate.language.dp))
    if candidate.bridge == "gather":
        return high // low
    return candidate.language.size // math.gcd(low, high)
