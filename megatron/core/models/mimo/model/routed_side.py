# SPDX-License-Identifier: Apache-2.0
"""The routed bridge in the model: the fused sequence is built in its cut form only.

Token places are looked for on the host before the encoders run; a route plan that is given says
them without looking. Then the rows are sent off, the text tokens of this rank's part are embedded
meanwhile, and the rows are put among them as they arrive.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from torch.distributed import ProcessGroup

from megatron.core.models.mimo.comm.collectives import sum_gradients
from megatron.core.models.mimo.comm.exchange import to_device
from megatron.core.models.mimo.comm.input_balance import InputBalance
from megatron.core.models.mimo.comm.plan_guard import problem_of
from megatron.core.models.mimo.comm.routed_bridge import RoutedBridge
from megatron.core.models.mimo.comm.routes import RoutePlan, RowCountError
from megatron.core.models.mimo.comm.token_runs import Runs, TokenRuns
from megatron.core.models.mimo.config.base_configs import option_of
from megatron.core.models.mimo.config.role import MIMO_LANGUAGE_MODULE_KEY
from megatron.core.models.mimo.memory.activations import latest_offloaded
from megatron.core.models.mimo.memory.offload import reload_when_needed
from megatron.core.models.mimo.model.attention_masks import check_mask
from megatron.core.models.mimo.model.encoder_side import (
    missing_inputs,
    refuse_tokens_of_nothing,
    refuse_unknown_modalities,
    refuse_unknown_names,
)
from megatron.core.models.mimo.model.local_text import LocalText
from megatron.core.models.mimo.model.token_rows import TEXT, fill_places
from megatron.core.models.mimo.partition.utils import Sharded, cuts_as_ours
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from mimo_colocated import phases


@dataclass(frozen=True, eq=False)
class Brought:
    """What one microbatch brings to the routed bridges; by modality.

    Attributes:
        rows: this rank's encoder output ``(n, H)``.
        plans: where the rows go.
        tokens: where the tokens of the rank's language replica stand.
        moving: the modalities whose exchange the rank enters.
        packed: of a packed batch.
    """

    rows: dict[str, torch.Tensor]
    plans: dict[str, RoutePlan]
    tokens: dict[str, TokenRuns]
    moving: list[str]
    packed: PackedSeqParams | None


class Arriving(Protocol):
    """Rows on their way: a :class:`.Flight`, or rows that are there."""

    place: torch.Tensor

    def arrive(self) -> torch.Tensor:
        """The own rows ``(own, H)``, in the order of ``place``."""


class RoutedSide:
    """Mixin of :class:`MimoModel`: from encoder inputs and token ids to the cut fused sequence."""

    def _routed_bridges(self) -> dict[str, RoutedBridge]:
        """Modality -> its bridge; empty with another kind of bridge and without any."""
        return {
            modality: bridge
            for (modality, _), bridge in self.colocated_comms.items()
            if isinstance(bridge, RoutedBridge)
        }

    def _refuse_plan_without_routes(self, route_plan: Mapping[str, RoutePlan] | None) -> None:
        if route_plan is not None and not self._routed_bridges():
            bridge = option_of(self.mimo_config, "bridge")
            raise ValueError(
                f"route_plan was given, but this model has no routed bridge (bridge={bridge!r}); "
                "build it with bridge='routed' and grids over the same ranks, or leave "
                "route_plan out"
            )

    def _fuse_routed(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        modality_inputs: Mapping[str, Any] | None,
        packing_kwargs: Mapping[str, Any] | None,
        route_plan: Mapping[str, RoutePlan] | None,
    ) -> tuple[torch.Tensor, PackedSeqParams | None]:
        """This rank's part of the fused sequence, ``(S/(cp*tp), B, H)``; tp with SP only.

        Raises:
            ValueError: on every rank of an exchange group, if one of them cannot go on or their
                rows, tokens or plans do not match.
            RuntimeError: special tokens of a modality of which no rank of the group has inputs.
        """
        brought = self._bring_rows(
            input_ids, attention_mask, modality_inputs, packing_kwargs, route_plan
        )
        flights = {
            name: self._routed_bridges()[name].issue(brought.rows.pop(name), brought.plans[name])
            for name in brought.moving
        }
        fused = self._place_local(input_ids, position_ids, brought.tokens, flights)
        return fused, brought.packed

    def _bring_rows(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        modality_inputs: Mapping[str, Any] | None,
        packing_kwargs: Mapping[str, Any] | None,
        route_plan: Mapping[str, RoutePlan] | None,
    ) -> Brought:
        """Run the encoders on one microbatch and agree on where their rows go; moves nothing.

        Args:
            input_ids, attention_mask, modality_inputs, packing_kwargs, route_plan: as for
                ``forward``.

        Raises:
            ValueError, RuntimeError: as :meth:`_fuse_routed`.
        """
        plans = dict(route_plan or {})
        packed, lengths, problem = self._try_to_cut(input_ids, attention_mask, packing_kwargs)
        tokens = self._places_on_host(input_ids, lengths, plans)
        problem = problem or self._names_problem(tokens, modality_inputs, plans)
        modality_inputs, held = self._balance_inputs(modality_inputs, plans)
        rows, failure = self._try_to_encode(modality_inputs)
        problem = problem or (failure and problem_of(failure, "an encoder"))
        phases.mark(phases.BRIDGE_FORWARD)
        moving = []
        for name, bridge in self._routed_bridges().items():
            own_problem = (
                problem
                or self._inputs_problem(name, modality_inputs)
                or self._plan_problem(name, plans.get(name), input_ids, lengths)
            )
            try:
                plans[name] = self._agree_on_plan(
                    name, bridge, rows[name], tokens, plans, own_problem, held.get(name)
                )
            except ValueError as error:
                raise error from (failure or error.__cause__)
            tokens[name] = plans[name].tokens
            if plans[name].group_rows or self._encoder_takes_part(name, modality_inputs):
                moving.append(name)
        return Brought(rows, plans, tokens, moving, packed)

    @property
    def encoder_spread(self) -> dict[str, tuple[float, float]]:
        """How even the encoders' work was in the last batch, before and after balancing.

        Modality -> (before, after): the heaviest encoder replica's cost over the mean cost, of
        this rank's exchange group. Empty before the first batch and without ``encoder_balance``;
        a batch whose routes were planned ahead is not counted.
        """
        balances = self._input_balances.items()
        return {name: each.spread for name, each in balances if each.spread is not None}

    @cached_property
    def _input_balances(self) -> dict[str, InputBalance]:
        bridges = self._routed_bridges()
        wanted = option_of(self.mimo_config, "encoder_balance").items()
        return {name: InputBalance(bridges[name], how) for name, how in wanted if name in bridges}

    def _balance_inputs(
        self, modality_inputs: Mapping[str, Any] | None, plans: Mapping[str, RoutePlan]
    ) -> tuple[Mapping[str, Any] | None, dict[str, Sequence[Runs]]]:
        """(what this rank encodes, rows per encoder replica of modalities that are balanced)."""
        held: dict[str, Sequence[Runs]] = {}
        for name, items in self._input_balances.items():
            if name in plans:
                continue
            phases.mark(phases.INPUT_EXCHANGE)
            device = self._empty_encoder_output(name).device
            inputs, plan = items.balance((modality_inputs or {}).get(name), device)
            modality_inputs = {**(modality_inputs or {}), name: inputs}
            held[name] = plan.held_rows()
        return modality_inputs, held

    def _try_to_cut(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        packing_kwargs: Mapping[str, Any] | None,
    ) -> tuple[PackedSeqParams | None, list[int] | None, str | None]:
        """(packing, cumulative lengths of a packed batch under CP, why it cannot be cut)."""
        packed = lengths = problem = None
        try:
            self._refuse_own_adapter_under_cp()
            packed = self._build_packed_seq_params(packing_kwargs)
            lengths = self._check_batch(input_ids, packed)
            check_mask(self, attention_mask, input_ids, packing_kwargs)
        except ValueError as error:
            # The replicas that share an exchange group with this one hear of it.
            problem = str(error)
        return packed, lengths, problem

    def _try_to_encode(
        self, modality_inputs: Mapping[str, Any] | None
    ) -> tuple[dict[str, torch.Tensor], Exception | None]:
        """(rows by modality, what an encoder raised); with an error no rows at all.

        An encoder that fails does so on all TP ranks of a replica, which have the same inputs.
        The replicas that wait for its rows hear of it.
        """
        dtype = self._embedding_dtype()
        try:
            return self._rows_to_bring(modality_inputs, dtype), None
        except Exception as error:
            if problem_of(error, "") is None:
                raise
            return self._rows_to_bring(None, dtype), error

    def _places_on_host(
        self,
        input_ids: torch.Tensor,
        lengths: list[int] | None,
        plans: Mapping[str, RoutePlan],
    ) -> dict[str, TokenRuns]:
        """Token places of every special token; those of plans without looking at ``input_ids``.

        Looking is one copy from the device, and a wait for it.
        """
        if plans and all(name in plans for name in self.special_token_ids):
            return {name: plans[name].tokens for name in self.special_token_ids}
        codes = torch.zeros_like(input_ids, dtype=torch.int16)
        ids = list(dict.fromkeys(self.special_token_ids.values()))
        for code, token_id in enumerate(ids, start=1):
            codes.masked_fill_(input_ids == token_id, code)
        host = codes.numpy(force=True)
        names = {**dict.fromkeys(self._routed_bridges(), None), **self.special_token_ids}
        return {
            name: TokenRuns.from_mask(
                host == (ids.index(token_id) + 1 if token_id is not None else -1), lengths
            )
            for name, token_id in names.items()
        }

    def _names_problem(
        self,
        tokens: Mapping[str, TokenRuns],
        modality_inputs: Mapping[str, Any] | None,
        plans: Mapping[str, RoutePlan],
    ) -> str | None:
        """Why some tokens of the batch get no rows, or some inputs or plans no use."""
        known = self._routed_bridges()
        try:
            refuse_tokens_of_nothing({name: each.count for name, each in tokens.items()}, known)
            refuse_unknown_names("modality_inputs", modality_inputs, known)
            refuse_unknown_names("route_plan", plans, known)
        except ValueError as error:
            return str(error)
        return None

    def _inputs_problem(self, name: str, modality_inputs: Mapping[str, Any] | None) -> str | None:
        """Why this rank has no place for the rows of a modality."""
        if (modality_inputs or {}).get(name) is not None:
            try:
                refuse_unknown_modalities([name], self.special_token_ids)
            except ValueError as error:
                return str(error)
        return None

    def _plan_problem(
        self,
        name: str,
        plan: RoutePlan | None,
        input_ids: torch.Tensor,
        lengths: list[int] | None,
    ) -> str | None:
        """Why a plan that was given is not one for this batch."""
        if plan is None:
            return None
        bridge, planned = self._routed_bridges()[name], plan.tokens
        advice, shape = "give the plan of this batch", tuple(input_ids.shape)
        if (planned.batch, planned.seq_len) != shape:
            return (
                f"the route plan of {name} is for a batch {(planned.batch, planned.seq_len)}, "
                f"input_ids is {shape}; {advice}"
            )
        packed = None if lengths is None else tuple(lengths)
        if bridge.layout.dest_cp_size > 1 and planned.cu_seqlens != packed:
            return (
                f"the route plan of {name} is for cumulative lengths {planned.cu_seqlens}, the "
                f"batch has {packed}; {advice}"
            )
        # Compared once, and always where no device has to be waited for.
        if bridge.guard != "off" and (bridge.never_confirmed or input_ids.is_cpu):
            found = np.flatnonzero((input_ids == self.special_token_ids[name]).numpy(force=True))
            if not np.array_equal(found, planned.positions()):
                return (
                    f"the route plan of {name} has {planned.count} tokens in other places than "
                    f"input_ids ({found.size} tokens); {advice}"
                )
        return None

    def _agree_on_plan(
        self,
        name: str,
        bridge: RoutedBridge,
        rows: torch.Tensor,
        tokens: Mapping[str, TokenRuns],
        plans: Mapping[str, RoutePlan],
        problem: str | None,
        held: Sequence[Runs] | None,
    ) -> RoutePlan:
        """The plan that was given, compared with the group's; else one made with the group."""
        if name in plans:
            bridge.confirm(plans[name], rows, problem)
            return plans[name]
        try:
            return bridge.plan(tokens[name], rows, problem, held)
        except RowCountError as error:
            if error.rows == 0:
                raise RuntimeError(missing_inputs(name, error.tokens)) from error
            raise

    def _shard_routed(
        self,
        fused: torch.Tensor,
        labels: torch.Tensor | None,
        loss_mask: torch.Tensor | None,
        packed: PackedSeqParams | None,
    ) -> Sharded:
        """Cut what goes with a fused sequence that its routes have cut.

        A partition adapter that the user put in place gets the whole sequence, as in stock.
        """
        layout = next(iter(self._routed_bridges().values())).layout
        adapter = getattr(self, "partition_adapter", None)
        if adapter is None or cuts_as_ours(adapter):
            _, labels, loss_mask, packed = self._shard_language_inputs(
                embeddings=None, labels=labels, loss_mask=loss_mask, packed_seq_params=packed
            )
            return fused, labels, loss_mask, packed
        if layout.sequence_parallel and layout.dest_tp_size > 1:
            fused = gather_from_sequence_parallel_region(
                fused, tensor_parallel_output_grad=False, group=self._language_tp_group()
            )
        return self._shard_language_inputs(
            embeddings=fused, labels=labels, loss_mask=loss_mask, packed_seq_params=packed
        )

    def _refuse_own_adapter_under_cp(self) -> None:
        """Over routes only the model's own adapter cuts for CP, since rows travel by its rule.

        Raises:
            ValueError: there is another one.
        """
        layout = next(iter(self._routed_bridges().values())).layout
        adapter = getattr(self, "partition_adapter", None)
        if layout.dest_cp_size > 1 and adapter is not None and not cuts_as_ours(adapter):
            raise ValueError(
                f"partition_adapter is a {type(adapter).__name__} with a shard of its own, but "
                f"with bridge='routed' and CP {layout.dest_cp_size} rows go to the positions that "
                "PartitionAdapter.shard keeps; build the model with bridge='gather'"
            )

    def _language_tp_group(self) -> ProcessGroup:
        """The language model's TP group, also where the adapter in place does not say one."""
        group = self._partitioning("tp_group")
        grids = self.mimo_config.module_to_grid_map
        return grids[MIMO_LANGUAGE_MODULE_KEY].get_pg("tp") if group is None else group

    def _encoder_takes_part(self, name: str, modality_inputs: Mapping[str, Any] | None) -> bool:
        """Whether an encoder without rows has a backward pass: it ran, or is waited for."""
        ran = (modality_inputs or {}).get(name) is not None
        return ran or self._needs_empty_rows(name)

    def _place_local(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor | None,
        tokens: Mapping[str, TokenRuns],
        flights: Mapping[str, Arriving],
    ) -> torch.Tensor:
        """Text of this rank's part, and among it the rows that arrive: ``(S_local, B, H)``."""
        phases.mark(phases.LANGUAGE_FORWARD)
        self._refuse_embedding_scatter()
        layout = next(iter(self._routed_bridges().values())).layout
        rank = next(iter(self._routed_bridges().values())).current_rank - layout.rank_offset
        cp = int(layout.dest_cp[rank]), layout.dest_cp_size
        scattered = layout.sequence_parallel
        tp = (int(layout.dest_tp[rank]), layout.dest_tp_size) if scattered else None
        batch = next(iter(tokens.values()))
        text = LocalText.find(batch, tokens.values(), cp, tp)
        kept = np.empty(0, dtype=np.int64) if text.kept is None else text.kept
        index, kept, place = to_device([text.index, kept, text.place], input_ids.device)
        embedded = self._embed_tokens(input_ids, position_ids, index)
        if text.kept is not None:
            # Each TP rank keeps other tokens, so each has another part of the gradient.
            if layout.dest_tp_size > 1:
                embedded = sum_gradients(embedded, self._language_tp_group())
            embedded = embedded.index_select(0, kept)
        rows, places = {TEXT: embedded}, {TEXT: place}
        for name, flight in flights.items():
            offloaded = latest_offloaded(self.modality_submodules[name])
            rows[name] = reload_when_needed(flight.arrive(), offloaded)
            places[name] = flight.place
        length = batch.seq_len // (cp[1] * (tp[1] if tp else 1))
        return fill_places(rows, places, length * batch.batch).view(length, batch.batch, -1)
