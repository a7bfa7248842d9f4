# SPDX-License-Identifier: Apache-2.0
"""A modality's encoder inputs, as ``modality_inputs`` has them, balanced over encoder replicas.

Ranks tell each other what they read (tokens per item, and names, dtypes and shapes of tensors),
so that a rank without items can make the empty tensors that the exchange wants, all ranks plan the
same, and what does not fit is one error on all of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron.core.models.mimo.comm.item_exchange import ItemExchange
from megatron.core.models.mimo.comm.plan.balance import BalancePlan, EncoderBalance, plan_balance
from megatron.core.models.mimo.comm.routed_bridge import RoutedBridge
from megatron.core.models.mimo.uploads import upload

# Keyword arguments of each encoder.
EncoderInputs = Mapping[str, Mapping[str, Any]]
_Path = tuple[str, str]


@dataclass(frozen=True)
class _Told:
    """What a rank says of its inputs.

    Attributes:
        tokens, units: per item; units are rows along dim 0 of the packed tensors.
        tensors: (encoder, argument) -> (dtype, shape after dim 0).
        rows: (encoder, argument) -> whether dim 0 has (one row per item, one per unit); where
            there are as many units as items, both.
        others: arguments that are no tensors.
        problem: why the rank cannot take part.
    """

    tokens: list[int]
    units: list[int]
    tensors: dict[_Path, tuple[torch.dtype, tuple[int, ...]]]
    rows: dict[_Path, tuple[bool, bool]]
    others: dict[_Path, Any]
    problem: str = ""


class InputBalance:
    """Balances one modality's inputs; all ranks of its exchange group call :meth:`balance`.

    Args:
        bridge: the modality's.
        balance: with ``tokens_per_item``.

    Attributes:
        spread: of the last batch, the heaviest encoder replica's cost over the mean cost, as the
            items were read and as they were encoded; 1 is even. ``None`` before the first one.

    Raises:
        ValueError: ``tokens_per_item`` is missing.
    """

    def __init__(self, bridge: RoutedBridge, balance: EncoderBalance) -> None:
        if balance.tokens_per_item is None:
            raise ValueError(
                "EncoderBalance needs tokens_per_item, a function of a modality's encoder inputs "
                "that returns the rows of each item (e.g. lambda inputs: [16] * number of images)"
            )
        self._settings, self._tokens_per_item = balance, balance.tokens_per_item
        self.spread: tuple[float, float] | None = None
        # What it would compare is compared here.
        self._items = ItemExchange(bridge, balance, guard="off")

    def balance(
        self, inputs: EncoderInputs | None, device: torch.device
    ) -> tuple[EncoderInputs | None, BalancePlan]:
        """Send what this rank reads; return what it encodes (``None``: no items), and the plan.

        One all-gather of Python objects on the host, then one all-to-all per tensor if items move.

        Args:
            inputs: ``modality_inputs`` of the modality; ``None`` if this rank reads no item.
            device: for tensors of a rank that reads none.

        Raises:
            ValueError: the same on every rank: what they read does not fit together.
        """
        try:
            mine = self._describe(inputs)
        except Exception as error:  # the user's functions; the other ranks hear of it
            mine = _Told([], [], {}, {}, {}, f"cannot describe its inputs: {error!r}")
        told = self._tell(mine)
        plan, units = self._plan(told)
        self.spread = plan.before, plan.after
        if not plan.moves:
            return inputs, plan
        tensors, others = self._common(told)
        packed = {path: self._packed(path, told) for path in tensors}
        kinds = {fits: units if fits else None for fits in packed.values()}
        self._items.prepare(plan, device, list(kinds.values()))
        me = self._items.exchange.index(self._items.rank)
        encodes = bool((plan.replica == self._items.exchange.src_of[me]).any())
        moved: dict[str, dict[str, Any]] = {}
        for (encoder, argument), (dtype, shape) in tensors.items():
            value = None if inputs is None else inputs[encoder][argument]
            if value is None:
                value = torch.empty((0, *shape), dtype=dtype, device=device)
            # All on the device over which the group communicates: a loader may leave sizes and
            # lengths on the host, and a rank that reads nothing cannot know.
            moved.setdefault(encoder, {})[argument] = self._items.move(
                upload(value, device), plan, kinds[packed[encoder, argument]]
            )
        for (encoder, argument), value in others.items():
            moved.setdefault(encoder, {})[argument] = value
        return (moved if encodes else None), plan

    def _describe(self, inputs: EncoderInputs | None) -> _Told:
        if inputs is None:
            return _Told([], [], {}, {}, {})
        tokens = [int(count) for count in self._tokens_per_item(inputs)]
        per_item = self._settings.units_per_item
        units = [int(n) for n in per_item(inputs)] if per_item is not None else [1] * len(tokens)
        tensors, rows, others, problem = {}, {}, {}, ""
        if len(units) != len(tokens):
            problem = f"has units of {len(units)} items and tokens of {len(tokens)}"
        for encoder, arguments in inputs.items():
            for argument, value in arguments.items():
                if not isinstance(value, torch.Tensor):
                    others[encoder, argument] = value
                    continue
                length = value.size(0) if value.ndim else -1
                if length not in (len(tokens), sum(units)):
                    problem = (
                        f"has {argument} of {encoder} with {length} along dim 0; wanted one per "
                        f"item ({len(tokens)}) or per unit ({sum(units)})"
                    )
                rows[encoder, argument] = (length == len(tokens), length == sum(units))
                tensors[encoder, argument] = (value.dtype, tuple(value.shape[1:]))
        return _Told(tokens, units, tensors, rows, others, problem)

    def _tell(self, mine: _Told) -> list[_Told]:
        """Everybody's, by place in the group; raises if one has a problem."""
        told: list[Any] = [mine] * self._items.exchange.size
        if self._items.control is not None:
            dist.all_gather_object(told, mine, group=self._items.control)
        problems = [
            f"rank {rank} {each.problem}"
            for rank, each in zip(self._items.exchange.ranks.tolist(), told, strict=True)
            if each.problem
        ]
        if problems:
            raise ValueError(f"Balancing {self._items.name}: {'; '.join(problems)}")
        return told

    def _plan(self, told: Sequence[_Told]) -> tuple[BalancePlan, np.ndarray]:
        """The plan and all items' units, from the first TP rank of every replica."""
        exchange = self._items.exchange
        for copies in exchange.src_ranks.tolist():
            alike = {(tuple(told[c].tokens), tuple(told[c].units)) for c in copies}
            if len(alike) > 1:
                raise ValueError(
                    f"Balancing {self._items.name}: ranks {exchange.ranks[copies].tolist()} are "
                    "copies of one encoder replica and must read the same items, but tokens are "
                    f"{[told[c].tokens for c in copies]} and units "
                    f"{[told[c].units for c in copies]}. Give these ranks the same batch."
                )
        first = [told[place] for place in exchange.src_ranks[:, 0]]
        tokens = [count for each in first for count in each.tokens]
        units = [count for each in first for count in each.units]
        counts = [len(each.tokens) for each in first]
        return plan_balance(tokens, counts, self._settings), np.array(units, dtype=np.int64)

    def _common(self, told: Sequence[_Told]) -> tuple[dict[_Path, Any], dict[_Path, Any]]:
        """Tensors and other arguments of those that read items, which must be alike."""
        reading = [(place, each) for place, each in enumerate(told) if each.tensors]
        place, model = reading[0]
        for other, each in reading[1:]:
            if (each.tensors, each.others) != (model.tensors, model.others):
                ranks = self._items.exchange.ranks
                raise ValueError(
                    f"Balancing {self._items.name}: inputs of rank {ranks[other]} are "
                    f"{each.tensors} {each.others}, of rank {ranks[place]} {model.tensors} "
                    f"{model.others}; all ranks give the same arguments, dtypes and item shapes"
                )
        return model.tensors, model.others

    def _packed(self, path: _Path, told: Sequence[_Told]) -> bool:
        """Whether an argument has one row per unit: one rank may not see it, all of them do."""
        rows = [each.rows[path] for each in told if each.rows]
        per_item, per_unit = (all(fits) for fits in zip(*rows, strict=True))
        alike = all(count == 1 for each in told for count in each.units)
        if per_item == per_unit and not alike:
            encoder, argument = path
            raise ValueError(
                f"Balancing {self._items.name}: cannot tell whether {argument} of {encoder} has "
                f"one row per item or one per unit; units are {[each.units for each in told]}. "
                "Give it one of both on all ranks, and items at least one unit"
            )
        return not per_item
