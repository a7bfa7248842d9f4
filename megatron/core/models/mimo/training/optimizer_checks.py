# SPDX-License-Identifier: Apache-2.0
"""What is refused when an optimizer is built, instead of in its first step or its first save."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec

import torch

from megatron.core.models.mimo.torch_native.part import native_parts
from megatron.core.optimizer.optimizer_config import OptimizerConfig

_FIELDS = {torch.bfloat16: "bf16", torch.float16: "fp16"}


def check_optimizer(config: OptimizerConfig) -> None:
    """Raise unless the optimizer's state can be saved and loaded in every dtype and layout.

    Raises:
        ValueError: it cannot; says which optimizers can.
    """
    if config.bf16 and config.fp16:
        raise ValueError(
            "OptimizerConfig has bf16=True and fp16=True; set the one that the modules have"
        )
    name, sharded = config.optimizer, config.use_distributed_optimizer
    advice = "use 'adam', or 'sgd' with use_distributed_optimizer=False"
    if name == "muon" and _has_muon():
        sharded = sharded or getattr(config, "use_layer_wise_distributed_optimizer", False)
        if sharded or config.fp16:
            raise ValueError(
                "optimizer 'muon' works with use_distributed_optimizer=False, "
                "use_layer_wise_distributed_optimizer=False and fp16=False; set them so, or "
                "use 'adam'"
            )
    elif name not in ("adam", "sgd"):
        raise ValueError(f"optimizer {name!r} is not supported here; {advice}")
    elif name == "sgd" and sharded:
        raise ValueError(
            "optimizer 'sgd' with use_distributed_optimizer=True could not be saved, since "
            f"Megatron-Core's distributed optimizer keeps Adam's state only; {advice}"
        )


def _has_muon() -> bool:
    """Whether the base builds Muon by its own factory and finds what it needs for that."""
    needed = ("megatron.core.optimizer.emerging_optimizers", "emerging_optimizers")
    return all(map(find_spec, needed))


def problem_of_dtypes(
    modules: Iterable[tuple[str, torch.nn.Module]], config: OptimizerConfig
) -> tuple[str | None, set[str]]:
    """Compare the dtypes of what trains on this rank with ``config``.

    fp32 parameters fit any: an fp32 encoder may stand beside a bf16 language model, and fp32 norms
    in a bf16 encoder.

    Args:
        modules: (name, module) of those on this rank.
        config: of the optimizer.

    Returns:
        What is wrong, if anything; the fields of ``config`` that some parameter has use for.
    """
    used: set[str] = set()
    for name, module in modules:
        used |= {_FIELDS[p.precision] for p in native_parts(module) if p.precision in _FIELDS}
        for key, parameter in module.named_parameters():
            field = _FIELDS.get(parameter.dtype)
            if not (parameter.requires_grad and field):
                continue
            used.add(field)
            if not getattr(config, field):
                return (
                    f"parameter '{key}' of module '{name}' is {parameter.dtype} and "
                    f"OptimizerConfig has bf16={config.bf16}, fp16={config.fp16}: set "
                    f"{field}=True, or build the module in another dtype"
                ), used
    return None, used


def check_fields_are_used(used: set[str], config: OptimizerConfig) -> None:
    """Raise where ``config`` is for a dtype that no rank's parameters have.

    Raises:
        ValueError: the field to set.
    """
    for dtype, field in _FIELDS.items():
        if getattr(config, field) and field not in used:
            raise ValueError(
                f"OptimizerConfig has {field}=True and no parameter that trains is {dtype}: set "
                f"{field}=False, or build the modules in that dtype"
            )
