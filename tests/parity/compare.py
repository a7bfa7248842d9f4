# SPDX-License-Identifier: Apache-2.0
"""A parallel run held against its reference: what is compared, and how far apart it may be.

Tolerances follow from the arithmetic:

- Initial weights and counted tokens are moved or counted, never rounded: bit-exact.
- fp32 gradients are sums of the same terms in another order. Each element is off by a few units in
  the last place (2**-24) times the length of the chain of sums, well below 1e-5 of its tensor's
  norm. A lost or doubled contribution is of order 1.
- The gradient norm is one number made of the gradients: the same bound.
- Logits, losses, weights after some steps and the loss curve follow through the layers and through
  Adam, whose first steps turn the smallest gradients' rounding into steps of full size: THRESH.
  Of the weights the *change* is compared. Held against the weights themselves, a change of
  3 x 1e-3 in weights of 0.1 would pass although it were wrong altogether.
- bf16 rounds to 2**-8 at every one of some 60 operations on the way through this model and back;
  independent roundings add up to sqrt(60) * 2**-8 = 3e-2 of a tensor. fp16 rounds to 2**-11, so
  4e-3; twice that is allowed, since PyTorch's layer norm on CPU adds the gradients of its weights
  up in fp16, which by itself is off by 3e-3 over the 512 rows of these batches.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

GRADIENTS = 1e-5
# Of one operation, by the digits of a number.
ROUNDING = {"bfloat16": 2.0**-8, "float16": 2 * 2.0**-11}
# Elements of the smallest weights.
_FEWEST = 32


@dataclass(frozen=True)
class Tolerances:
    """Largest relative error of each kind of check."""

    initial: float
    gradients: float
    grad_norm: float
    logits: float
    loss: float
    change: float
    curve: float


def tolerances(dtype: str, thresh: float) -> Tolerances:
    """Bounds for runs in ``dtype``; ``thresh`` is the user's THRESH, for fp32."""
    if dtype == "float32":
        return Tolerances(0.0, GRADIENTS, GRADIENTS, thresh, thresh, thresh, thresh)
    rounding = math.sqrt(60) * ROUNDING[dtype]
    # A step of Adam has the sign of its gradient; of gradients that are off by r, a share of about
    # r has the wrong one, which is off by 2: sqrt(4 r) of the change's norm.
    # At least one element of the smallest weights may have it.
    change = math.sqrt(4 * max(rounding, 1 / _FEWEST))
    return Tolerances(0.0, rounding, rounding, rounding, rounding / 3, change, rounding)


@dataclass
class Measurement:
    """What one run shows. Tensors are whole, under global names; a pipeline stage has its own.

    Attributes:
        initial: weights before the first step.
        logits: ``(b, S, V)`` of the first step's samples from ``logits_start``; None on stages
            without a head.
        logits_start: first of those samples in the global batch.
        loss, tokens: of the first step, over the global batch.
        gradients: of the first step, finalised, before the optimizer.
        grad_norm: the optimizer's, in the first step.
        change: weights after some steps minus ``initial``.
        curve: loss of every step.
    """

    initial: dict[str, torch.Tensor]
    logits: torch.Tensor | None
    logits_start: int
    loss: float
    tokens: int
    gradients: dict[str, torch.Tensor]
    grad_norm: float
    change: dict[str, torch.Tensor]
    curve: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Check:
    """One comparison; ``where`` is the tensor, or what else was compared."""

    kind: str
    where: str
    error: float
    allowed: float

    @property
    def passed(self) -> bool:
        """Whether the error is within what is allowed (NaN is not)."""
        return self.error <= self.allowed

    @property
    def badness(self) -> float:
        """Orders checks: error in units of what is allowed, infinite where it is none."""
        if math.isnan(self.error):
            return math.inf
        if self.allowed == 0.0:
            return math.inf if self.error > 0 else 0.0
        return self.error / self.allowed

    def as_dict(self) -> dict[str, Any]:
        """For the records."""
        return asdict(self)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm of what is expected; inf for another shape or NaN.

    Where zeros are expected only zeros will do.

    >>> relative_error(torch.tensor([2.0, 0.0]), torch.tensor([1.0, 0.0]))
    1.0
    """
    if actual.shape != expected.shape:
        return math.inf
    actual, expected = actual.double(), expected.double()
    difference, scale = float((actual - expected).norm()), float(expected.norm())
    if not math.isfinite(difference):
        return math.inf
    if scale == 0.0:
        return 0.0 if difference == 0.0 else math.inf
    return difference / scale


def _scalar(kind: str, actual: float, expected: float, allowed: float, where: str = "") -> Check:
    error = relative_error(torch.tensor([actual]), torch.tensor([expected]))
    return Check(kind, where or kind, error, allowed)


def tensor_checks(
    kind: str,
    actual: dict[str, torch.Tensor],
    expected: dict[str, torch.Tensor],
    allowed: float,
) -> Iterator[Check]:
    """One check per tensor of ``actual``; one that is not expected fails."""
    for name, tensor in actual.items():
        if name in expected:
            yield Check(kind, name, relative_error(tensor, expected[name]), allowed)
        else:
            yield Check(kind, f"{name} (not in the reference)", math.inf, allowed)


def compare(run: Measurement, reference: Measurement, bounds: Tolerances) -> list[Check]:
    """All checks of this rank's part of a run.

    That no tensor is missing is for :func:`missing` to say: a stage holds some of them only.
    """
    checks = [
        Check("tokens", "counted tokens", float(abs(run.tokens - reference.tokens)), 0.0),
        *tensor_checks("initial weights", run.initial, reference.initial, bounds.initial),
        _scalar("loss", run.loss, reference.loss, bounds.loss),
        *tensor_checks("gradients", run.gradients, reference.gradients, bounds.gradients),
        _scalar("grad norm", run.grad_norm, reference.grad_norm, bounds.grad_norm),
        *tensor_checks("change of weights", run.change, reference.change, bounds.change),
        *_curve(run.curve, reference.curve, bounds.curve),
    ]
    if run.logits is not None:
        rows = slice(run.logits_start, run.logits_start + len(run.logits))
        error = relative_error(run.logits, reference.logits[rows])
        checks.append(Check("logits", "logits", error, bounds.logits))
    return checks


def _curve(curve: list[float], expected: list[float], allowed: float) -> Iterator[Check]:
    """The losses follow the reference's, and fall."""
    if len(curve) != len(expected):
        yield Check("curve", f"{len(curve)} steps instead of {len(expected)}", math.inf, allowed)
        return
    for step, (loss, other) in enumerate(zip(curve, expected, strict=True)):
        yield _scalar("curve", loss, other, allowed, f"loss of step {step}")
    # A step without a counted token has the loss 0.
    counted = [loss for loss in curve if loss != 0.0]
    fell = counted[-1] / counted[0] if counted else math.nan
    # Strictly below where it began; NaN is not.
    yield Check("loss falls", "last loss over first", fell, math.nextafter(1.0, 0.0))


def missing(found: set[str], reference: Measurement) -> list[Check]:
    """Checks that fail, one per tensor that no rank has.

    Args:
        found: names of gradients and changes over all ranks, as ``kind/name``.
        reference: which names there must be.
    """
    wanted = {f"gradients/{name}" for name in reference.gradients}
    wanted |= {f"change of weights/{name}" for name in reference.change}
    return [
        Check(item.partition("/")[0], f"{item.partition('/')[2]} (missing)", math.inf, 0.0)
        for item in sorted(wanted - found)
    ]


def names(run: Measurement) -> set[str]:
    """What :func:`missing` asks of each rank."""
    return {f"gradients/{n}" for n in run.gradients} | {
        f"change of weights/{n}" for n in run.change
    }


def worst_by_kind(checks: list[Check]) -> list[Check]:
    """The worst check of each kind, the worst of all first."""
    worst: dict[str, Check] = {}
    for check in checks:
        if check.kind not in worst or check.badness > worst[check.kind].badness:
            worst[check.kind] = check
    return sorted(worst.values(), key=lambda check: -check.badness)
