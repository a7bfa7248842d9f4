# SPDX-License-Identifier: Apache-2.0
"""The kinds of ways that rows can go, by the name of their bridge; and the choice among them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron.core.models.mimo.config.base_configs import register_bridge
from megatron.core.models.mimo.model.gathered_path import GatheredPath
from megatron.core.models.mimo.model.mixed_path import MixedPath
from megatron.core.models.mimo.model.routed_path import RoutedPath
from megatron.core.models.mimo.model.row_path import RowPath, Runners

_PATHS: dict[str, Any] = {"gather": GatheredPath, "routed": RoutedPath}


def register_path(name: str, path: Any) -> None:
    """Make a kind of way known: ``MimoModelConfig.bridge`` may then name it.

    Args:
        name: of its bridges, in ``MimoModelConfig.bridge``.
        path: a class as :class:`.RowPath`, with ``bridge_kind``, the class of its bridges,
            ``make_bridge(config, options, **ends)``, which makes one on every rank, and
            ``build(names, runners, options)``, which makes the way for some modalities.

    Raises:
        ValueError: the name is taken.
    """
    register_bridge(name)
    _PATHS[name] = path


def path_named(name: str) -> Any:
    """Return the class of a way."""
    return _PATHS[name]


def choose_path(runners: Runners, options: Mapping[str, Any]) -> RowPath:
    """Return the way of a model's rows, by the bridges that it has.

    Args:
        runners: the rank's.
        options: of ``MimoModelConfig``: ``encoder_balance``.

    Raises:
        ValueError: bridges of kinds that cannot be mixed.
    """
    names: dict[Any, list[str]] = {}
    for (name, _), bridge in runners.modules.bridges.items():
        names.setdefault(_kind_of(bridge), []).append(name)
    if not names:
        return GatheredPath(None, runners)
    paths = [kind.build(of, runners, options) for kind, of in names.items()]
    if len(paths) == 1:
        return paths[0]
    mixed = {type(path): path for path in paths}
    if set(mixed) != {GatheredPath, RoutedPath}:
        kinds = sorted(kind.__name__ for kind in names)
        raise ValueError(
            f"one model has ways of the kinds {kinds}; only 'gather' and 'routed' can be mixed, "
            "give its modalities these, or one kind for all"
        )
    return MixedPath(mixed[GatheredPath], mixed[RoutedPath])


def _kind_of(bridge: Any) -> Any:
    kinds = (path for path in _PATHS.values() if isinstance(bridge, path.bridge_kind))
    # A stand-in for a bridge communicates as the gather bridge does.
    return next(kinds, GatheredPath)
