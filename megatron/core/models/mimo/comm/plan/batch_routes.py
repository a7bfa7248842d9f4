# SPDX-License-Identifier: Apache-2.0
"""Routes of a microbatch that both sides cut evenly, from its token mask: for data loaders."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron.core.models.mimo.comm.plan.routed_layout import RouteLayout
from megatron.core.models.mimo.comm.plan.routes import RoutePlan, plan_routes
from megatron.core.models.mimo.comm.plan.token_runs import TokenRuns


def plan_even_batch(
    layout: RouteLayout,
    rank: int,
    mask: np.ndarray,
    *,
    packed: bool | Sequence[int] | np.ndarray | None = None,
) -> RoutePlan:
    """Return one rank's routes, if each side's replicas take equal runs of samples, in DP order.

    An encoder replica makes the rows of its own samples. Samples may have different numbers of
    tokens, none among them.

    >>> from megatron.core.hyper_comm_grid import GridShape
    >>> src, dest = GridShape((1, 2), ("tp", "dp")), GridShape((1, 2, 1), ("tp", "cp", "dp"))
    >>> layout = RouteLayout.from_grids(src, dest)
    >>> mask = np.array([[1, 1, 0, 0], [0, 0, 1, 0]], dtype=bool)
    >>> plan = plan_even_batch(layout, 1, mask)  # encodes sample 1, owns tokens 1 and 2
    >>> plan.held, plan.own, plan.forward.received
    (1, 2, 1)

    Args:
        layout: of the bridge (``RoutedBridge.layout``).
        rank: global rank.
        mask: bool ``(B, S)`` of the whole microbatch, all replicas' samples in order: true where
            a token stands for a row.
        packed: each language replica packs its samples, in order, into one sequence: ``True`` as
            they are, or cut to these many tokens each, padding included, ``(B,)``.

    Returns:
        The plan, for ``MimoModel.forward(..., route_plan={modality: plan})``.

    Raises:
        ValueError: ``B`` cannot be divided by a DP size, a sequence cannot be cut, ``packed`` does
            not fit the samples, or the rank is not on the bridge.
    """
    if isinstance(packed, bool) or packed is None:
        lengths = np.full(len(mask), mask.shape[1]) if packed else None
    else:
        lengths = np.asarray(packed, dtype=np.int64)
        _check_lengths(lengths, mask)
    group = layout.group_of(rank)
    dest = [_part(mask, dp, layout.dest_dp_size, layout.dest_name) for dp in group.dest_dps]
    if lengths is None:
        tokens = [TokenRuns.from_mask(part) for part in dest]
    else:
        kept = [_part(lengths, dp, layout.dest_dp_size, layout.dest_name) for dp in group.dest_dps]
        tokens = [_pack(*pair) for pair in zip(dest, kept, strict=True)]
    src = [_part(mask, dp, layout.src_dp_size, layout.src_name) for dp in group.src_dps]
    return plan_routes(layout, rank, tokens, [int(part.sum()) for part in src])


def _check_lengths(lengths: np.ndarray, mask: np.ndarray) -> None:
    if lengths.shape != mask.shape[:1] or lengths.min() < 0 or lengths.max() > mask.shape[1]:
        raise ValueError(
            f"packed must have a length of 0 to {mask.shape[1]} for each of the {len(mask)} "
            f"samples, got {lengths.tolist()}"
        )
    lost = np.flatnonzero((mask & (np.arange(mask.shape[1]) >= lengths[:, None])).any(axis=1))
    if lost.size:
        raise ValueError(
            f"packed cuts sample {lost[0]} to {lengths[lost[0]]} tokens, but later ones of it "
            "stand for rows; cut samples where their content ends"
        )


def _pack(part: np.ndarray, lengths: np.ndarray) -> TokenRuns:
    kept = np.concatenate([row[:length] for row, length in zip(part, lengths, strict=True)])
    return TokenRuns.from_mask(kept[None], np.cumsum([0, *lengths]).tolist())


def _part(mask: np.ndarray, dp: int, dp_size: int, name: str) -> np.ndarray:
    if len(mask) % dp_size:
        raise ValueError(
            f"A microbatch of {len(mask)} samples cannot be divided evenly over the {dp_size} DP "
            f"replicas of {name}; use a multiple of {dp_size}, or plan_routes with each replica's "
            "own samples"
        )
    size = len(mask) // dp_size
    return mask[dp * size : (dp + 1) * size]
