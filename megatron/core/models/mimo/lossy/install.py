# SPDX-License-Identifier: Apache-2.0
"""``lossy_links``: make the links of a model lose packets, for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch.distributed as dist
from torch import nn

from megatron.core.models.mimo.lossy.bridges import (
    change_bridge,
    check_bridge,
    holder,
    places_of_bridge,
)
from megatron.core.models.mimo.lossy.gradients import (
    PLACE,
    buckets_of,
    change_buckets,
    check_buckets,
    reducing_group,
    replica_of,
)
from megatron.core.models.mimo.lossy.layers import (
    Remove,
    Where,
    change_layer,
    check_layer,
    places_of,
)
from megatron.core.models.mimo.lossy.place import Place
from megatron.core.models.mimo.lossy.recomputation import follow
from megatron.core.models.mimo.lossy.spec import RECEIVER, LinkRule, LossySpec
from megatron.core.models.mimo.training.agreement import gathered
from megatron.core.models.mimo.training.global_names import global_modules


def lossy_links(model: nn.Module, spec: LossySpec) -> LossyLinks:
    """Make the links of a model lose packets, until the result is removed or its block is left.

    All ranks call it, and train, evaluate and remove together, as they do without.

    Args:
        model: a ``MimoModel``, or one of Megatron's models; wrapped by DDP or not. Layers have
            the names of ``named_modules`` without wrappers, counted over all pipeline stages;
            bridges are called ``bridge.`` and their modality; what a DDP wrapper reduces
            ``gradients.``, the name of what it wraps, and the number of its buckets.
        spec: the same on all ranks.

    Raises:
        ValueError: the same on all ranks, before anything is changed: their specs differ; a rule
            fits nothing that sends; a layer or bridge has lossy links already, or cannot have any.
    """
    candidates = list(_candidates(model))
    _agree(spec, candidates)
    return LossyLinks(model, spec, candidates)


class LossyLinks:
    """Links that are installed in a model; a context manager that removes them at its end.

    Attributes:
        spec: what they were made of.
        places: this rank's, in the model's order.
    """

    def __init__(self, model: Any, spec: LossySpec, candidates: list[_Candidate]) -> None:
        self.spec, self._rank = spec, dist.get_rank()
        self.places: list[Place] = []
        self._undo: list[Remove] = []
        made = [(each, each.make_places(model, spec)) for each in candidates]
        for each, places in made:
            if places:
                self.places += places.values()
                self._undo.append(_CHANGES[each.kind](each.owner, places))
        links = [link for place in self.places for link in place.links.values()]
        self._undo.append(follow(links))

    def __enter__(self) -> LossyLinks:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Leave the model as it was found; idempotent. Counts stay to be read."""
        while self._undo:
            self._undo.pop()()

    @contextlib.contextmanager
    def lossless(self) -> Iterator[None]:
        """Lose nothing within the block, and count nothing: for evaluation, on all ranks."""
        before = [place.lossless for place in self.places]
        for place in self.places:
            place.lossless = True
        try:
            yield
        finally:
            for place, lossless in zip(self.places, before, strict=True):
                place.lossless = lossless

    def statistics(self) -> list[dict[str, Any]]:
        """Return this rank's counts, a row for each link; see :meth:`.Counts.row`."""
        return [{"rank": self._rank, **row} for place in self.places for row in place.rows()]

    def gathered_statistics(self) -> list[dict[str, Any]]:
        """Return the rows of all ranks, in rank order; all ranks call it. See ``sum_counts``."""
        return [row for rows in gathered(self.statistics()) for row in rows]

    def state_dict(self) -> dict[str, Any]:
        """Return this rank's states for a checkpoint, which each rank saves by itself."""
        return {
            "spec": repr(self.spec),
            "rank": self._rank,
            "places": {place.key: place.state_dict() for place in self.places},
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Go on from what ``state_dict`` returned on the same rank of the same layout.

        Raises:
            ValueError: another spec, rank or layout; nothing is changed then.
        """
        own = self.state_dict()
        for what in ("spec", "rank"):
            if saved[what] != own[what]:
                raise ValueError(
                    f"these links are of {what} {saved[what]}, this run has {own[what]}; go on "
                    "with the same, or start links anew without their state"
                )
        if {k: set(v) for k, v in saved["places"].items()} != {
            k: set(v) for k, v in own["places"].items()
        }:
            raise ValueError(
                f"these links are of places {sorted(saved['places'])}, this rank has "
                f"{sorted(own['places'])} with other peers or names; go on in the same layout"
            )
        for place in self.places:
            place.load_state_dict(saved["places"][place.key])


_LAYER, _BRIDGE, _BUCKETS = "layer", "bridge", "buckets"
_CHANGES = {_LAYER: change_layer, _BRIDGE: change_bridge, _BUCKETS: change_buckets}


class _Candidate:
    """A layer, bridge or group of gradient buckets that could have lossy links."""

    def __init__(self, name: str, owner: Any, where: list[Where], kind: str) -> None:
        self.name, self.owner, self.where, self.kind = name, owner, where, kind

    def rules(self, spec: LossySpec) -> dict[Where, LinkRule]:
        found = {where: spec.rule(self.name, *where) for where in self.where}
        return {where: rule for where, rule in found.items() if rule is not None}

    def problem(self, spec: LossySpec) -> str | None:
        rules = self.rules(spec)
        at_receiver = any(rule.side == RECEIVER for rule in rules.values())
        try:
            if rules and self.kind == _BRIDGE:
                check_bridge(self.name, self.owner, at_receiver)
            elif rules and self.kind == _BUCKETS:
                check_buckets(self.name, self.owner, at_receiver)
            elif rules:
                check_layer(self.name, self.owner)
        except ValueError as error:
            return str(error)
        return None

    def make_places(self, model: Any, spec: LossySpec) -> dict[Where, Place]:
        rules = self.rules(spec)
        if not rules or (self.kind != _BRIDGE and self._group().size() == 1):
            return {}  # one rank alone sends nothing
        return {
            where: Place(self.name, where, rule, spec.seed, *self._ends(model, where, rule))
            for where, rule in rules.items()
        }

    def _group(self) -> Any:
        return reducing_group(self.owner) if self.kind == _BUCKETS else self.owner.tp_group

    def _ends(self, model: Any, where: Where, rule: LinkRule) -> tuple[Any, ...]:
        """Who sends, and from whom a receiver receives, as far as it tells them apart."""
        if self.kind == _BUCKETS:
            return replica_of(model, self.owner), range(len(self.owner.buckets))
        rank, is_bridge = dist.get_rank(), self.kind == _BRIDGE
        if rule.side == RECEIVER and not is_bridge:
            ranks = dist.get_process_group_ranks(self.owner.tp_group)
            return rank, [each for each in ranks if each != rank]
        if rule.side == RECEIVER or not is_bridge:
            return rank, ()
        grids = model.mimo_config.module_to_grid_map
        if where[0] == "forward":
            return holder(grids[self.name.removeprefix("bridge.")], False), ()
        layout = getattr(self.owner, "layout", None)
        return holder(grids["language"], getattr(layout, "sequence_parallel", False)), ()


def _candidates(model: Any) -> Iterator[_Candidate]:
    """All that sends, on this rank; a layer that stands in several places once."""
    known: set[int] = set()
    for name, module in global_modules(model):
        where = places_of(module)
        if where and id(module) not in known:
            known.add(id(module))
            yield _Candidate(name, module, where, _LAYER)
        for bucket_name, buckets in buckets_of(module, name):
            yield _Candidate(bucket_name, buckets, [PLACE], _BUCKETS)
    for (modality, _), bridge in getattr(model, "colocated_comms", {}).items():
        yield _Candidate(f"bridge.{modality}", bridge, places_of_bridge(bridge), _BRIDGE)


def _agree(spec: LossySpec, candidates: list[_Candidate]) -> None:
    """Refuse on all ranks what is wrong on one."""
    fits = [any(rule in each.rules(spec).values() for each in candidates) for rule in spec.rules]
    problems = [each.problem(spec) for each in candidates]
    problem = next((each for each in problems if each is not None), None)
    names = [each.name for each in candidates]
    told = gathered((repr(spec), fits, problem, names))
    if len({text for text, *_ in told}) > 1:
        raise ValueError(f"ranks have different specs of lossy links: {[t[0] for t in told]}")
    for rank, (_, _, problem, _) in enumerate(told):
        if problem is not None:
            raise ValueError(f"on rank {rank} {problem}")
    for i, rule in enumerate(spec.rules):
        if not any(fits[i] for _, fits, _, _ in told):
            known = sorted({name for *_, names in told for name in names})
            raise ValueError(
                f"rule {i} fits nothing that sends: {rule}. An earlier rule may hold everywhere; "
                f"layers and bridges are {known}"
            )
