# SPDX-License-Identifier: Apache-2.0
"""Which settings count when a run goes on from saved optimizer state.

State is the checkpoint's: moments, step counts, the fp32 copies, the loss scale. Of the settings,
those that the new run's ``OptimizerConfig`` *changes* are the new run's; the rest goes on from
where it was, so that a run that changes nothing continues to the bit, also in the middle of a
learning-rate schedule. To tell the two apart, what every parameter group was built with is saved
beside what it had come to.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import torch
import torch.distributed as dist

from megatron.core.models.mimo.training.parameter_groups import GROUP
from megatron.core.optimizer.optimizer import MegatronOptimizer

RECORD = "_mimo_settings"
RUN, CHECKPOINT = "run", "checkpoint"
# Fields of OptimizerConfig that parameter groups carry. Of the others this run's count always.
_IN_GROUPS = frozenset(
    {
        "lr",
        "min_lr",
        "decoupled_lr",
        "decoupled_min_lr",
        "weight_decay",
        "decoupled_weight_decay",
        "apply_wd_to_qk_layernorm",
        "adam_beta1",
        "adam_beta2",
        "adam_eps",
        "sgd_momentum",
        "muon_momentum",
    }
)
# What only begins with a setting and is state from then on.
_STATE = frozenset({"initial_loss_scale"})
# What tells groups apart, whatever else is set in them.
_GROUP_KEYS = (
    *("wd_mult", "lr_mult", "is_expert_parallel", "is_decoupled_lr", "default_config"),
    GROUP,
)
_ABSENT = object()

Group = dict[str, Any]


def check_choice(settings: str) -> None:
    """Raise unless ``settings`` is one of the two choices.

    Raises:
        ValueError: it is another.
    """
    if settings not in (RUN, CHECKPOINT):
        raise ValueError(
            f"settings={settings!r}; give 'run' (what this run's OptimizerConfig changes counts) "
            "or 'checkpoint' (the saved parameter groups count)"
        )


def described(config: Any) -> dict[str, Any]:
    """Return an ``OptimizerConfig``'s fields as JSON values, dtypes by name, without others."""
    if not dataclasses.is_dataclass(config):
        return {}
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    values = {k: str(v) if isinstance(v, torch.dtype) else v for k, v in values.items()}
    return {k: v for k, v in values.items() if v is None or isinstance(v, (bool, int, float, str))}


def note_built(inner: Any) -> None:
    """Remember the settings that the groups were built with, before a schedule moves them."""
    inner.mimo_built = [_without_params(group) for group in getattr(inner, "param_groups", ())]


def record(inner: MegatronOptimizer) -> dict[str, Any]:
    """Return what a saved state says of its settings."""
    return {"config": described(inner.config), "built": getattr(inner, "mimo_built", None)}


def merged_groups(
    inner: MegatronOptimizer, saved: list[Group], recorded: dict[str, Any] | None, settings: str
) -> tuple[list[Group], int]:
    """Return the settings of this run's groups after loading, and how many the saved state has too.

    Args:
        inner: whose groups they are.
        saved: groups of the saved state.
        recorded: what :func:`record` said when it was saved; ``None`` in older states, of which
            the saved settings count.
        settings: ``"run"`` or ``"checkpoint"``.
    """
    built_then = (recorded or {}).get("built")
    known: dict[tuple, list[tuple[Group, Group | None]]] = {}
    for group, built in zip(saved, built_then or [None] * len(saved), strict=True):
        known.setdefault(_key(built or group), []).append((group, built))
    steps = {key: value for group in saved for key, value in group.items() if key == "step"}
    mine = inner.optimizer.param_groups
    built_now = getattr(inner, "mimo_built", None) or mine
    found, common = [], 0
    for group, built in zip(mine, built_now, strict=True):
        own = _without_params(group)
        counterparts = known.get(_key(built))
        if not counterparts:
            found.append({**own, **steps})
            continue
        then, built_before = counterparts.pop(0)
        kept = _without_params(then)
        if settings == RUN and built_before is not None:
            changed = _changed(built_before, built)
            kept = {key: value for key, value in kept.items() if key not in changed}
        found.append({**own, **kept})
        common += 1
    return found, common


def multipliers(groups: list[Group]) -> list[tuple]:
    """Return what tells the groups apart, for errors: values of ``_GROUP_KEYS``."""
    return sorted(map(_key, groups), key=str)


def say_differences(then: dict[str, Any] | None, now: dict[str, Any], settings: str) -> None:
    """Log on rank 0 which settings differ from the saved ones and which of both count.

    Args:
        then: ``described`` of the run that saved; ``None`` in older states.
        now: ``described`` of this run.
        settings: ``"run"`` or ``"checkpoint"``.
    """
    sentence = differences_sentence(then, now, settings)
    if sentence and dist.get_rank() == 0:
        logging.getLogger(__name__).warning(sentence)


def differences_sentence(
    then: dict[str, Any] | None, now: dict[str, Any], settings: str
) -> str | None:
    """Return the sentence that :func:`say_differences` logs; ``None`` if nothing differs."""
    if then is None:
        return (
            "optimizer settings were not recorded when this state was saved; the saved ones count"
        )
    changed = {k: (then[k], now[k]) for k in now if k in then and then[k] != now[k]}
    said = [
        f"{name} {old} -> {new} ({_who_counts(name, settings)})"
        for name, (old, new) in sorted(changed.items())
    ]
    return f"optimizer settings differ from the saved ones: {', '.join(said)}" if said else None


def _who_counts(name: str, settings: str) -> str:
    if name in _STATE:
        return "the saved loss scale goes on"
    if name in _IN_GROUPS and settings == CHECKPOINT:
        return "the saved one counts; settings='run' would take this run's"
    return "this run's counts"


def _changed(then: Group, now: Group) -> set[str]:
    return {k for k in {*then, *now} if then.get(k, _ABSENT) != now.get(k, _ABSENT)}


def _key(group: Group) -> tuple:
    """A group's identity, under either of the names that Megatron-Core uses."""
    return tuple(group.get(key, group.get(f"pre_{key}")) for key in _GROUP_KEYS)


def _without_params(group: Group) -> Group:
    return {key: value for key, value in group.items() if key != "params"}
