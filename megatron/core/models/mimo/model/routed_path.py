# SPDX-License-Identifier: Apache-2.0
"""The routed way: each row goes to the ranks that own its place; the cut sequence alone is built.

Token places are looked for on the host before the encoders run; a route plan that is given says
them without looking. Then the rows are sent off, the text tokens of this rank's part are embedded
meanwhile, and the rows are put among them as they arrive.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from megatron.core.models.mimo.comm.collectives import sum_gradients
from megatron.core.models.mimo.comm.exchange import to_device
from megatron.core.models.mimo.comm.input_balance import InputBalance
from megatron.core.models.mimo.comm.plan.routes import RoutePlan, RowCountError
from megatron.core.models.mimo.comm.plan.token_runs import Runs, TokenRuns
from megatron.core.models.mimo.comm.plan_guard import problem_of
from megatron.core.models.mimo.comm.routed_bridge import RoutedBridge
from megatron.core.models.mimo.config.base_configs import option_of
from megatron.core.models.mimo.memory.activations import latest_offloaded
from megatron.core.models.mimo.memory.offload import reload_when_needed
from megatron.core.models.mimo.model.announced_plans import AnnouncedPlans
from megatron.core.models.mimo.model.deepstack import DeepStack, LevelRows
from megatron.core.models.mimo.model.input_checks import (
    check_adapter_cuts_by_routes,
    missing_inputs,
    names_problem,
)
from megatron.core.models.mimo.model.language_batch import LanguageBatch
from megatron.core.models.mimo.model.leaves import Leaves
from megatron.core.models.mimo.model.local_text import LocalText
from megatron.core.models.mimo.model.routed_rows import (
    ComparedMicrobatch,
    Encoded,
    Known,
    LandedRows,
    PlannedRows,
    RowsForPlaces,
)
from megatron.core.models.mimo.model.row_path import Runners
from megatron.core.models.mimo.model.token_positions import TEXT, BatchReading, fill_places
from megatron.core.models.mimo.partition.utils import Sharded, cuts_as_ours
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from mimo_colocated import phases


class RoutedPath:
    """The way over routed bridges.

    Args:
        names: the modalities whose rows go this way.
        runners: the rank's.
        balance: modality -> how its items are spread over encoder replicas.

    Attributes:
        input_balances: modality -> what spreads its items, of balanced ones.
    """

    bridge_kind = RoutedBridge
    takes_route_plans = True
    # One exchange takes the gradients of all microbatches back.
    backward_per_microbatch: frozenset[str] = frozenset()

    def __init__(
        self, names: list[str], runners: Runners, balance: Mapping[str, Any]
    ) -> None:
        self._runners = runners
        self._bridges: dict[str, RoutedBridge] = {
            name: runners.modules.bridge(name) for name in names
        }
        self._announced = AnnouncedPlans(self._bridges, runners)
        self.input_balances = {
            name: InputBalance(self._bridges[name], how)
            for name, how in balance.items()
            if name in self._bridges
        }

    @staticmethod
    def make_bridge(config: Any, options: Any, **ends: Any) -> RoutedBridge:
        """Make the bridge of a modality; all ranks of the grids call it.

        Args:
            config: the language model's.
            options: the ``MimoModelConfig``.
            ends: grids and names of both ends.
        """
        return RoutedBridge(
            **ends,
            sequence_parallel=config.sequence_parallel,
            guard=option_of(options, "bridge_guard"),
            later_stages=DeepStack.of(options).later_stages(ends["src_module_name"]),
        )

    @classmethod
    def build(cls, names: list[str], runners: Runners, options: Mapping[str, Any]) -> RoutedPath:
        """Make the way for some modalities."""
        return cls(names, runners, options["encoder_balance"])

    # -- planning --------------------------------------------------------------------------

    def plan(
        self,
        batch: LanguageBatch,
        modality_inputs: Mapping[str, Any] | None,
        route_plan: Mapping[str, RoutePlan] | None,
    ) -> PlannedRows:
        """Run the encoders and agree on where their rows go, see :meth:`.RowPath.plan`.

        Raises:
            ValueError: on every rank of an exchange group, if one of them cannot go on or their
                rows, tokens or plans do not match. With plans of all modalities it is raised here
                for what is known before the encoders run, for the rest by :meth:`settle`.
            RuntimeError: special tokens of a modality of which no rank of the group has inputs.
        """
        plans = dict(route_plan or {})
        reading = self._start_reading(batch, plans)
        given = modality_inputs
        known: Known | None = None
        if reading.on_host:
            known = self._know(batch, given, plans, reading)
            self._announced.announce(known.batch, given, plans, known.problem, known.seen)
        modality_inputs, held = self._balance_inputs(modality_inputs, plans)
        encoded = self._try_to_encode(modality_inputs)
        # What only the device knows is waited for while it has the encoders to run.
        known = known or self._know(batch, given, plans, reading)
        return self._agree(known, modality_inputs, plans, encoded, held)

    def later_problem(self, route_plan: Mapping[str, RoutePlan] | None) -> str | None:
        """Return why a microbatch cannot be encoded later than its plans are compared."""
        if not self._deepstack.width:
            return "the language config must say hidden_size before rows of later microbatches do"
        missing = sorted(self._bridges.keys() - (route_plan or {}).keys())
        return None if not missing else (
            f"a microbatch that is encoded in a bubble has no route plan of {', '.join(missing)}; "
            "plan each modality's routes with the batch (route_plan), or set encode_in_bubbles=0"
        )

    def compare(
        self,
        batch: LanguageBatch,
        modality_inputs: Mapping[str, Any] | None,
        route_plan: Mapping[str, RoutePlan],
    ) -> ComparedMicrobatch:
        """Start comparing the plans of a microbatch that is encoded later; all ranks call it.

        Args:
            batch, modality_inputs, route_plan: as for :meth:`plan`, with plans of all modalities.
        """
        plans = dict(route_plan)
        known = self._know(batch, modality_inputs, plans, self._start_reading(batch, plans))
        self._announced.announce(known.batch, modality_inputs, plans, known.problem, known.seen)
        aside = {name: bridge.set_aside() for name, bridge in self._bridges.items()}
        return ComparedMicrobatch(known, modality_inputs, plans, aside)

    def encode_compared(self, compared: ComparedMicrobatch) -> Encoded:
        """Run the encoders on a microbatch whose plans were compared; wait for no other rank."""
        return self._try_to_encode(compared.modality_inputs)

    def plan_compared(self, compared: ComparedMicrobatch, encoded: Encoded) -> PlannedRows:
        """Return what is to move; call it right before :meth:`move_together`.

        A rank whose encoder failed goes on with zeros and says so in :meth:`settle`.
        """
        for name, bridge in self._bridges.items():
            bridge.resume(compared.announced[name])
        return self._agree(compared.known, compared.modality_inputs, compared.plans, encoded, {})

    def connect(self) -> None:
        """Connect the ranks of all exchange groups; all ranks call it."""
        for name, bridge in self._bridges.items():
            bridge.connect(self._runners.encoders.device_of(name))

    def _agree(
        self,
        known: Known,
        modality_inputs: Mapping[str, Any] | None,
        plans: dict[str, RoutePlan],
        encoded: Encoded,
        held: Mapping[str, Sequence[Runs]],
    ) -> PlannedRows:
        """What is to move where, agreed in the groups: what was encoded, by which plans."""
        rows, part, items, failure = encoded
        batch, tokens = known.batch, known.tokens
        problem = known.problem or (failure and problem_of(failure, "an encoder"))
        self._announced.failure = self._announced.failure or failure
        phases.mark(phases.BRIDGE_FORWARD)
        moving = []
        for name in self._bridges:
            own_problem = (
                problem
                or self._deepstack.width_problem(name, rows[name])
                or self._announced.problem(name, known.batch, modality_inputs, plans, known.seen)
            )
            try:
                plans[name], rows[name] = self._agree_on_plan(
                    name, rows[name], tokens, plans, own_problem, held.get(name), items.get(name)
                )
            except ValueError as error:
                raise error from (failure or error.__cause__)
            tokens[name] = plans[name].tokens
            if plans[name].group_rows or name in part:
                moving.append(name)
        return PlannedRows(batch, rows, plans, tokens, moving)

    def _know(
        self,
        batch: LanguageBatch,
        modality_inputs: Mapping[str, Any] | None,
        plans: Mapping[str, RoutePlan],
        reading: BatchReading,
    ) -> Known:
        """What the host has to know of a batch, and why this rank cannot go on with it."""
        seen = reading.arrive()
        batch, problem = self._try_to_prepare(batch)
        tokens = self._places(batch, plans, seen)
        encoders = self._runners.modules.encoders
        problem = problem or names_problem(tokens, modality_inputs, plans, encoders, self._bridges)
        return Known(batch, tokens, seen, problem)

    def _try_to_prepare(self, batch: LanguageBatch) -> tuple[LanguageBatch, str | None]:
        """The batch, prepared as far as it goes, and why it cannot be cut."""
        language = self._runners.language
        try:
            check_adapter_cuts_by_routes(self._runners.modules.partition_adapter, self._layout)
            batch = language.prepared(batch)
            language.check_mask(batch)
        except ValueError as error:
            # The replicas that share an exchange group with this one hear of it.
            return batch, str(error)
        return batch, None

    def _start_reading(
        self, batch: LanguageBatch, plans: Mapping[str, RoutePlan]
    ) -> BatchReading:
        """Copies to the host, started: of token places, unless plans say them, and of lengths."""
        special = self._runners.modules.special_token_ids
        if self._planned_ahead(plans):
            # Compared once, and always where no device has to be waited for.
            special = {
                name: special[name]
                for name, bridge in self._bridges.items()
                if bridge.guard != "off" and (bridge.never_confirmed or batch.input_ids.is_cpu)
                and name in special
            }
        return BatchReading(batch.input_ids, special, batch.packing_kwargs)

    def _planned_ahead(self, plans: Mapping[str, RoutePlan]) -> bool:
        special = self._runners.modules.special_token_ids
        return bool(plans) and all(name in plans for name in special)

    def _places(
        self,
        batch: LanguageBatch,
        plans: Mapping[str, RoutePlan],
        seen: Mapping[str, np.ndarray],
    ) -> dict[str, TokenRuns]:
        """Token places of every special token: of the plans, or as they were seen."""
        if self._planned_ahead(plans):
            return {name: plans[name].tokens for name in self._runners.modules.special_token_ids}
        nowhere = np.zeros(tuple(batch.input_ids.shape), dtype=bool)
        return {
            name: TokenRuns.from_mask(seen.get(name, nowhere), batch.lengths)
            for name in {**self._bridges, **seen}
        }

    def _balance_inputs(
        self, modality_inputs: Mapping[str, Any] | None, plans: Mapping[str, RoutePlan]
    ) -> tuple[Mapping[str, Any] | None, dict[str, Sequence[Runs]]]:
        """(what this rank encodes, rows per encoder replica of modalities that are balanced)."""
        held: dict[str, Sequence[Runs]] = {}
        for name, items in self.input_balances.items():
            if name in plans:
                continue
            phases.mark(phases.INPUT_EXCHANGE)
            device = self._runners.encoders.device_of(name)
            inputs, plan = items.balance((modality_inputs or {}).get(name), device)
            modality_inputs = {**(modality_inputs or {}), name: inputs}
            held[name] = plan.held_rows()
        return modality_inputs, held

    def _try_to_encode(
        self, modality_inputs: Mapping[str, Any] | None
    ) -> Encoded:
        """(rows by modality, who has a backward pass, whole items that CP cuts, what was raised).

        With an error there are no rows. An encoder that fails does so on all TP and CP ranks of a
        replica, which have the same inputs. The replicas that wait for its rows hear of it.
        """
        names, dtype = list(self._bridges), self._runners.language.embedding_dtype()
        encoders = self._runners.encoders
        try:
            encoded = encoders.run_all(names, modality_inputs, dtype)
            cut = [name for name in names if self._bridges[name].layout.src_cp_size > 1]
            return *encoded, {n: encoders.whole_items(n, modality_inputs) for n in cut}, None
        except Exception as error:
            if problem_of(error, "") is None:
                raise
            return *encoders.run_all(names, None, dtype), {}, error

    def _agree_on_plan(
        self,
        name: str,
        rows: torch.Tensor,
        tokens: Mapping[str, TokenRuns],
        plans: Mapping[str, RoutePlan],
        problem: str | None,
        held: Sequence[Runs] | None,
        items: Sequence[int] | None,
    ) -> tuple[RoutePlan, torch.Tensor]:
        """The plan that was given, compared with the group's; else one made with the group.

        And the rows to move by it.
        """
        bridge = self._bridges[name]
        if name in plans:
            return plans[name], bridge.confirm(plans[name], rows, problem)
        try:
            return bridge.plan(tokens[name], rows, problem, held, items or ()), rows
        except RowCountError as error:
            if error.rows == 0:
                raise RuntimeError(missing_inputs(name, error.tokens)) from error
            raise

    def exchange_problems(self, problems: Mapping[int, str], count: int) -> dict[int, str]:
        """Tell and hear, in the exchange group of one modality after the other."""
        found = dict(problems)
        for bridge in self._bridges.values():
            found = bridge.hear(found, count)
        return found

    def start_settling(self) -> None:
        """Start telling how they did, which :meth:`settle` does as well; all ranks call it."""
        self._announced.start_settling()

    def settle(self) -> None:
        """Hear how the encoders of announced plans did, see :meth:`.AnnouncedPlans.settle`."""
        self._announced.settle()

    def forget(self) -> None:
        """Drop what was to be heard, after an error."""
        self._announced.forget()

    # -- moving ----------------------------------------------------------------------------

    def move(self, planned: PlannedRows) -> RowsForPlaces:
        """Send the rows off; they are waited for when they are put in their places."""
        flights = {
            name: self._bridges[name].issue(planned.rows.pop(name), planned.plans[name])
            for name in planned.moving
        }
        return RowsForPlaces(planned.tokens, flights)

    def move_together(self, planned: Iterable[PlannedRows], leaves: Leaves) -> list[RowsForPlaces]:
        """Start moving the rows of all microbatches, in one exchange per modality."""
        planned = list(planned)
        landed: list[dict[str, LandedRows]] = [{} for _ in planned]
        for name in self._bridges:
            # That of the last microbatch, which runs backward first.
            offloaded = latest_offloaded(self._runners.modules.encoders[name])
            if any(name in each.moving for each in planned):
                rows = self._exchange(name, planned, leaves, offloaded)
                for each, row in zip(landed, rows, strict=True):
                    each[name] = row
        pairs = zip(planned, landed, strict=True)
        return [RowsForPlaces(each.tokens, rows) for each, rows in pairs]

    def _exchange(
        self, name: str, planned: Sequence[PlannedRows], leaves: Leaves, offloaded: Any
    ) -> list[LandedRows]:
        """One modality's rows of all microbatches, exchanged as one."""
        bridge = self._bridges[name]
        rows = torch.cat([each.rows.pop(name) for each in planned])
        first = [each.plans[name] for each in planned]
        stages = [0, *bridge.layout.later_stages]
        plans = [first, *zip(*(plan.later for plan in first), strict=True)]
        merged = [bridge.merge(each) for each in plans]
        # On the ranks of other stages, which get nothing, it is the first stage's.
        at = stages.index(self._stage) if self._stage in stages else 0
        flights = [
            bridge.issue(self._deepstack.columns(name, stage, rows), routes)
            for stage, routes in zip(stages, merged, strict=True)
        ]
        parts = [
            (flight, list(flight.place.split([i.size for i in routes.own_index])))
            for flight, routes in zip(flights, merged, strict=True)
        ]
        pieces = leaves.cut_when_landed(parts, offloaded, name)[at]
        places = [bridge.tensors(plan, rows.device).place for plan in plans[at]]
        return [LandedRows(pieces, number, place) for number, place in enumerate(places)]

    # -- fusing ----------------------------------------------------------------------------

    def fuse(self, batch: LanguageBatch, moved: RowsForPlaces) -> Sharded:
        """Fuse this rank's part of the sequence; ``(S/(cp*tp), B, H)``, tp with SP only."""
        return self._cut(batch, self._place_local(batch, moved))

    def _place_local(self, batch: LanguageBatch, moved: RowsForPlaces) -> torch.Tensor:
        """Text of this rank's part, and among it the rows that arrive: ``(S_local, B, H)``."""
        phases.mark(phases.LANGUAGE_FORWARD)
        language, layout = self._runners.language, self._layout
        cp, tp = self._coordinates()
        runs = next(iter(moved.tokens.values()))
        text = LocalText.find(runs, moved.tokens.values(), cp, tp)
        kept = np.empty(0, dtype=np.int64) if text.kept is None else text.kept
        device = batch.input_ids.device
        index, kept, place = to_device([text.index, kept, text.place], device)
        embedded = language.embed_tokens(batch.input_ids, batch.position_ids, index)
        if text.kept is not None:
            # Each TP rank keeps other tokens, so each has another part of the gradient.
            if layout.dest_tp_size > 1:
                embedded = sum_gradients(embedded, language.tp_group())
            embedded = embedded.index_select(0, kept)
        rows, places = self._arrived(moved)
        length = runs.seq_len // (cp[1] * (tp[1] if tp else 1))
        fused = fill_places(
            {TEXT: embedded, **rows}, {TEXT: place, **places}, length * runs.batch
        )
        return fused.view(length, runs.batch, -1)

    def _arrived(
        self, moved: RowsForPlaces
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        rows, places = {}, {}
        for name, flight in moved.rows.items():
            offloaded = latest_offloaded(self._runners.modules.encoders[name])
            whole = reload_when_needed(flight.arrive(), offloaded)
            rows[name], places[name] = self._deepstack.main(name, whole), flight.place
            if name in self._deepstack.layers:
                moved.arrived[name] = whole
        self._announced.start_settling()  # on its way while the language model runs
        return rows, places

    def levels(
        self, batch: LanguageBatch, moved: RowsForPlaces, layers: tuple[int, ...]
    ) -> LevelRows | None:
        """Return the levels of the rows that this rank owns."""
        deepstack, found = self._deepstack, []
        for name, flight in moved.rows.items():
            whole = moved.arrived.pop(name, None)
            if set(layers) & set(deepstack.layers.get(name, ())):
                # On later stages, and in their first one's later parts, the rows have landed.
                whole = flight.arrive() if whole is None else whole
                blocks = deepstack.blocks(name, self._stage)
                levels = deepstack.levels(name, whole, blocks, layers)
                found.append(LevelRows(levels, flight.place))
        found = [each for each in found if each.rows.size(0)]
        return LevelRows.joined(found)

    def put_into(self, sharded: Sharded, moved: RowsForPlaces) -> Sharded:
        """Put rows into a cut sequence that another way has built, zeros in their places."""
        local, labels, loss_mask, packed = sharded
        assert local is not None
        rows, places = self._arrived(moved)
        flat = local.reshape(-1, local.size(-1))
        for name, row in rows.items():
            flat = flat.index_copy(0, places[name], row.to(flat.dtype))
        return flat.view_as(local), labels, loss_mask, packed

    def _cut(self, batch: LanguageBatch, fused: torch.Tensor) -> Sharded:
        """Cut what goes with a fused sequence that its routes have cut.

        A partition adapter that the user put in place gets the whole sequence, as in stock.
        """
        layout, language = self._layout, self._runners.language
        adapter = self._runners.modules.partition_adapter
        if adapter is None or cuts_as_ours(adapter):
            return (fused, *language.cut(batch, None)[1:])
        if layout.sequence_parallel and layout.dest_tp_size > 1:
            fused = gather_from_sequence_parallel_region(
                fused, tensor_parallel_output_grad=False, group=language.tp_group()
            )
        return language.cut(batch, fused)

    @property
    def _deepstack(self) -> DeepStack:
        return self._runners.modules.deepstack

    @property
    def _stage(self) -> int:
        return self._runners.modules.language_stage

    @property
    def _layout(self) -> Any:
        return next(iter(self._bridges.values())).layout

    def _coordinates(self) -> tuple[tuple[int, int], tuple[int, int] | None]:
        """This rank's (rank, size) of CP, and of TP with sequence parallelism."""
        layout = self._layout
        rank = next(iter(self._bridges.values())).current_rank - layout.rank_offset
        cp = int(layout.dest_cp[rank]), layout.dest_cp_size
        scattered = layout.sequence_parallel
        return cp, (int(layout.dest_tp[rank]), layout.dest_tp_size) if scattered else None
