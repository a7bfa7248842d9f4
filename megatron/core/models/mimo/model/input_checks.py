# SPDX-License-Identifier: Apache-2.0
"""Checks of tokens, inputs, names and route plans that do not belong together.

Problems are texts: the ranks of an exchange group tell each other before anything moves.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any, NoReturn

import numpy as np

from megatron.core.models.mimo.comm.plan.routed_layout import RouteLayout
from megatron.core.models.mimo.comm.plan.routes import RoutePlan
from megatron.core.models.mimo.comm.plan.token_runs import TokenRuns
from megatron.core.models.mimo.comm.routed_bridge import RoutedBridge
from megatron.core.models.mimo.model.language_batch import LanguageBatch
from megatron.core.models.mimo.model.token_positions import TEXT
from megatron.core.models.mimo.partition.utils import cuts_as_ours


def check_modalities(
    modalities: Mapping[str, Any] | list[str], special_token_ids: Mapping[str, int]
) -> None:
    """Refuse rows of a modality without a token that stands for them.

    Raises:
        ValueError: a modality has none.
    """
    for name in modalities:
        if name != TEXT and name not in special_token_ids:
            raise ValueError(
                f"No special token ID defined for modality {name}; special_token_ids has "
                f"{sorted(special_token_ids)}"
            )


def check_names(
    argument: str, given: Mapping[str, Any] | None, known: Collection[str]
) -> None:
    """Refuse what is given for a modality that the model does not have: nobody would read it.

    Raises:
        ValueError: such a name, whose value is not ``None``.
    """
    unknown = sorted(name for name, value in (given or {}).items() if value is not None)
    unknown = [name for name in unknown if name not in known]
    if unknown:
        raise ValueError(
            f"{argument} has {unknown}, but this model's modalities are {sorted(known)}; leave out "
            "what nobody reads"
        )


def check_tokens_have_modality(tokens: Mapping[str, int], modalities: Iterable[str]) -> None:
    """Refuse tokens of a modality that brings no rows: they would become zero rows.

    Args:
        tokens: modality -> how many of its tokens a batch has.
        modalities: those that bring rows.

    Raises:
        ValueError: there are such tokens.
    """
    for name in sorted(set(tokens) - set(modalities)):
        if tokens[name]:
            raise ValueError(
                f"input_ids has {tokens[name]} tokens of '{name}', a modality of special_token_ids "
                f"that brings no rows (those that do: {sorted(modalities)}); give the model that "
                "modality or take the tokens out"
            )


def check_inputs_given(name: str, tokens: int | None) -> None:
    """Refuse special tokens of a modality without inputs.

    Args:
        tokens: how many there are; ``None``: some.

    Raises:
        RuntimeError: there are some.
    """
    if tokens != 0:
        raise RuntimeError(missing_inputs(name, tokens))


def missing_inputs(name: str, tokens: int | None = None) -> str:
    """Return the sentence for special tokens of a modality without inputs."""
    count = "" if tokens is None else f" ({tokens} of them)"
    return (
        f"{name} inputs are missing, but matching special tokens exist{count}; pass "
        f"modality_inputs['{name}'] or take the tokens out of input_ids"
    )


def refuse_route_plans(bridge: Any) -> NoReturn:
    """Refuse a route plan that nobody would read.

    Args:
        bridge: the model's ``bridge``.

    Raises:
        ValueError: always.
    """
    raise ValueError(
        f"route_plan was given, but this model has no routed bridge (bridge={bridge!r}); "
        "build it with bridge='routed' and grids over the same ranks, or leave route_plan out"
    )


def check_adapter_cuts_by_routes(adapter: Any, layout: RouteLayout) -> None:
    """Refuse a partition adapter of the user's own under CP: rows travel by our rule.

    Raises:
        ValueError: there is one.
    """
    if layout.dest_cp_size > 1 and adapter is not None and not cuts_as_ours(adapter):
        raise ValueError(
            f"partition_adapter is a {type(adapter).__name__} with a shard of its own, but "
            f"with bridge='routed' and CP {layout.dest_cp_size} rows go to the positions that "
            "PartitionAdapter.shard keeps; build the model with bridge='gather'"
        )


def names_problem(
    tokens: Mapping[str, TokenRuns],
    modality_inputs: Mapping[str, Any] | None,
    plans: Mapping[str, RoutePlan],
    modalities: Collection[str],
    routed: Collection[str],
) -> str | None:
    """Return why some tokens of the batch get no rows, or some inputs or plans no use.

    Args:
        tokens: modality -> its token places.
        modality_inputs, plans: what was given.
        modalities: of the model.
        routed: those of them with a routed bridge.
    """
    try:
        check_tokens_have_modality({n: each.count for n, each in tokens.items()}, modalities)
        check_names("modality_inputs", modality_inputs, modalities)
        check_names("route_plan", plans, routed)
    except ValueError as error:
        return str(error)
    return None


def inputs_problem(
    name: str, modality_inputs: Mapping[str, Any] | None, special_token_ids: Mapping[str, int]
) -> str | None:
    """Return why this rank has no place for the rows of a modality."""
    if (modality_inputs or {}).get(name) is not None:
        try:
            check_modalities([name], special_token_ids)
        except ValueError as error:
            return str(error)
    return None


def plan_problem(
    name: str,
    plan: RoutePlan | None,
    batch: LanguageBatch,
    bridge: RoutedBridge,
    seen: np.ndarray | None,
) -> str | None:
    """Return why a plan that was given is not one for this batch.

    Args:
        name, plan: the modality, and what was given for it.
        batch: the language replica's, prepared.
        bridge: of the modality.
        seen: where its tokens stand, bool ``(B, S)``; ``None`` where nobody looked.
    """
    if plan is None:
        return None
    planned, shape = plan.tokens, tuple(batch.input_ids.shape)
    advice = "give the plan of this batch"
    if (planned.batch, planned.seq_len) != shape:
        return (
            f"the route plan of {name} is for a batch {(planned.batch, planned.seq_len)}, "
            f"input_ids is {shape}; {advice}"
        )
    later = bridge.layout.later_stages
    if len(planned_for := plan.later) != len(later):
        return (
            f"the route plan of {name} has routes to {len(planned_for)} later pipeline stages, "
            f"levels of its rows are added on {len(later)} ({later}); plan with the layout of the "
            "model's bridge (colocated_comms)"
        )
    packed = None if batch.lengths is None else tuple(batch.lengths)
    if bridge.layout.dest_cp_size > 1 and planned.cu_seqlens != packed:
        return (
            f"the route plan of {name} is for cumulative lengths {planned.cu_seqlens}, the "
            f"batch has {packed}; {advice}"
        )
    if seen is not None and bridge.guard != "off":
        found = np.flatnonzero(seen)
        if not np.array_equal(found, planned.positions()):
            return (
                f"the route plan of {name} has {planned.count} tokens in other places than "
                f"input_ids ({found.size} tokens); {advice}"
            )
    return None
