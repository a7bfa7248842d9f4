# SPDX-License-Identifier: Apache-2.0
"""What a model, a plan and a grid must fulfil, before anything is changed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor

from megatron.core.models.mimo.torch_native.plans import Plan, Style, matching

_KINDS: dict[Style, type[nn.Module]] = {
    Style.COLUMN: nn.Linear,
    Style.ROW: nn.Linear,
    Style.LOGITS: nn.Linear,
    Style.VOCABULARY: nn.Embedding,
}


def base_prefix(model: Any) -> str:
    """Return the name of the base model in a model: ``"model"``, "" if it is one itself."""
    base = getattr(model, "base_model_prefix", "")
    return base if base and isinstance(getattr(model, base, None), nn.Module) else ""


def styled(model: nn.Module, plan: Plan) -> dict[str, Style]:
    """Return every module that a plan names, with its style."""
    names = [name for name, _ in model.named_modules()]
    found = plan.under(base_prefix(model)).items()
    return {name: style for pattern, style in found for name in matching(pattern, names)}


def blocks_of(model: nn.Module, plan: Plan) -> list[nn.Module]:
    """Return the blocks that a plan names, in order."""
    pattern = f"{base_prefix(model)}.{plan.blocks}".strip(".")
    found = dict(model.named_modules())
    return [found[name] for name in matching(pattern, found)]


def model_problem(model: nn.Module, plan: Plan, tp: int) -> str:
    """Return the first thing in which model, plan and TP do not fit together; empty if none."""
    return next(_problems(model, plan, tp), "")


def _problems(model: nn.Module, plan: Plan, tp: int) -> Iterator[str]:
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        yield "the model is sharded already; parallelize takes one as transformers builds it"
    devices = sorted({str(parameter.device) for parameter in model.parameters()})
    if len(devices) != 1:
        yield f"the model lies on devices {devices}; move all of it to one"
    yield from _unmatched(model, plan)
    if not blocks_of(model, plan):
        yield f"the plan's blocks {plan.blocks!r} are no module of this {type(model).__name__}"
    if tp > 1:
        yield from _unplaced(model, plan)
        yield from _indivisible(model, plan, tp)


def _unmatched(model: nn.Module, plan: Plan) -> Iterator[str]:
    names = [name for name, _ in model.named_modules()]
    optional = {f"{base_prefix(model)}.{name}".strip(".") for name in plan.optional}
    for pattern in plan.under(base_prefix(model)):
        if not matching(pattern, names) and pattern not in optional | plan.optional:
            yield (
                f"the plan names {pattern!r}, which this {type(model).__name__} does not have; a "
                "plan is for one family of models"
            )


def _unplaced(model: nn.Module, plan: Plan) -> Iterator[str]:
    found = styled(model, plan)
    whole = tuple(f"{name}." for name, style in found.items() if style is Style.REPLICATED)
    for name, module in model.named_modules():
        style = found.get(name)
        if style in _KINDS and not isinstance(module, _KINDS[style]):
            yield (
                f"{name} is a {type(module).__name__}, and style {style.value!r} is for a "
                f"{_KINDS[style].__name__}"
            )
        own = sorted(kind for kind, each in module._parameters.items() if each is not None)
        if own and style is None and not f"{name}.".startswith(whole or ("\0",)):
            yield (
                f"the plan has no style for {name} ({type(module).__name__}) with parameters "
                f"{own}; its gradients would be wrong. Add a line for it to a plan: plan=..."
            )


def _indivisible(model: Any, plan: Plan, tp: int) -> Iterator[str]:
    for name in plan.divisible:
        size = getattr(model.config, name)
        if size % tp:
            fitting = [n for n in range(1, size + 1) if size % n == 0]
            yield (
                f"tp {tp} does not divide {name} {size} of this {type(model).__name__}; tp can be "
                f"one of {fitting}"
            )
    modules = dict(model.named_modules())
    for name, style in styled(model, plan).items():
        module: Any = modules[name]
        if style in (Style.COLUMN, Style.ROW):
            size = module.out_features if style is Style.COLUMN else module.in_features
            if size % tp:
                yield f"tp {tp} does not divide the {size} features of {name} ({style.value})"
        elif style in (Style.VOCABULARY, Style.LOGITS) and len(module.weight) < tp:
            yield f"{name} has {len(module.weight)} rows, fewer than tp {tp}; take a smaller tp"
