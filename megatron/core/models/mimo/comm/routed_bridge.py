# SPDX-License-Identifier: Apache-2.0
"""The routed bridge: each embedding row goes once, to the ranks that own its sequence position.

``RoutedBridge`` owns the process group of this rank's exchange group and executes ``RoutePlan``
with ``exchange``. A plan is made ahead, from integers (``plan_routes``), or by the bridge itself,
which then asks the other ranks for their token places (:meth:`RoutedBridge.plan`).
"""

from __future__ import annotations

import logging
import weakref
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import BackendConfig

from megatron.core.hyper_comm_grid import HyperCommGrid, box_of
from megatron.core.models.mimo.comm.exchange import Flight, PlanTensors, issue_exchange
from megatron.core.models.mimo.comm.gather_bridge import common_backend
from megatron.core.models.mimo.comm.plan.gather_layout import BridgeDirection
from megatron.core.models.mimo.comm.plan.merged_routes import MergedPlan, Routes
from megatron.core.models.mimo.comm.plan.routed_layout import RouteLayout
from megatron.core.models.mimo.comm.plan.routes import GroupRoutes, RoutePlan
from megatron.core.models.mimo.comm.plan.token_runs import Runs, TokenRuns, rows_of_parts
from megatron.core.models.mimo.comm.plan_guard import (
    Agreed,
    Announcement,
    Comparison,
    Statement,
    hear,
    items_of_replicas,
)
from mimo_colocated.process_groups import make_groups, release_group

logger = logging.getLogger(__name__)

GUARDS = ("always", "first", "off")
# Batches of other shapes than these are planned anew; that takes milliseconds.
_PLANS_KEPT = 8
_NOT_MOVED = "nothing was moved"


class RoutedBridge:
    """Moves rows from the ranks that encode them to the ranks that own their places, and back.

    Every rank of the world makes the same bridges in the same order (process groups are made);
    after that the ranks of an exchange group are among themselves. With sequence parallelism an
    owner is one TP rank, else all TP ranks of a CP rank get the row.

    Args:
        src_grid: the encoder's grid: tp, cp and dp, any other dim of size 1. With cp each of its
            ranks holds a part of every item.
        dest_grid: the language model's grid: tp, cp before dp; rows go to its first pp stage.
        src_module_name, dest_module_name: for messages.
        sequence_parallel: the language model cuts its sequence over TP too.
        guard: compare plan, dtype, width and ``requires_grad`` in the exchange group before rows
            move: ``"always"``, before the ``"first"`` exchange only, or ``"off"``. Costs one
            all-gather of 512 bytes per rank on the host, two that are not waited for where plans
            are announced (:meth:`announce`). A plan that the bridge makes itself is compared
            always, since its ranks talk anyway.
        one_group: all ranks of the grids in one exchange group, see ``RouteLayout``.
        later_stages: pipeline stages after the first that need a part of each row.

    Attributes:
        layout: the ``RouteLayout``.
        exchange: this rank's ``ExchangeGroup``; ``None`` on a rank outside the grids.
        group: its process group; ``None`` if the rank is alone in it, and after ``destroy``.
        control: the process group for host tensors over the same ranks; often the same one.

    Raises:
        ValueError: as ``RouteLayout.from_grids``; the grids' backends differ; unknown ``guard``.
    """

    def __init__(
        self,
        src_grid: HyperCommGrid,
        dest_grid: HyperCommGrid,
        src_module_name: str = "src",
        dest_module_name: str = "dest",
        *,
        sequence_parallel: bool = False,
        guard: str = "always",
        one_group: bool = False,
        later_stages: tuple[int, ...] = (),
    ) -> None:
        if guard not in GUARDS:
            raise ValueError(f"guard must be one of {GUARDS}, got {guard!r}")
        self.layout = RouteLayout.from_grids(
            box_of(src_grid),
            box_of(dest_grid),
            src_module_name,
            dest_module_name,
            sequence_parallel=sequence_parallel,
            one_group=one_group,
            later_stages=later_stages,
        )
        backend = common_backend(src_grid, dest_grid)
        self.guard, self.name = guard, f"{src_module_name} -> {dest_module_name}"
        self.current_rank = dist.get_rank()
        self.exchange: Any = None  # an ExchangeGroup on a rank of the grids
        self.group = self.control = None
        self._make_groups(backend)
        if self.current_rank in self.layout.ranks:
            self.exchange = self.layout.group_of(self.current_rank)
            logger.debug("Bridge %s: rank %d in %s", self.name, self.current_rank, self.exchange)
        self._confirmed, self._connected = 0, False
        self._announced: tuple[RoutePlan, torch.Tensor, Comparison] | None = None
        self._outcomes: list[Statement] = []
        self._settling: list[Comparison] = []
        self._plans: OrderedDict[bytes, RoutePlan] = OrderedDict()
        self._merged: OrderedDict[tuple[RoutePlan, ...], MergedPlan] = OrderedDict()
        self._tensors: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
        self._destroyed = False

    # -- what colocated communicators tell about themselves ---------------------------------

    @property
    def direction(self) -> BridgeDirection:
        """Which side has more DP replicas."""
        src, dest = self.layout.src_dp_size, self.layout.dest_dp_size
        if src == dest:
            return BridgeDirection.EQUAL
        return BridgeDirection.FAN_IN if src > dest else BridgeDirection.FAN_OUT

    def is_fan_in(self) -> bool:
        """Return whether the encoder has more DP replicas."""
        return self.direction is BridgeDirection.FAN_IN

    def is_fan_out(self) -> bool:
        """Return whether the language model has more DP replicas."""
        return self.direction is BridgeDirection.FAN_OUT

    @property
    def guard_due(self) -> bool:
        """Whether :meth:`confirm` is going to compare."""
        return self.guard == "always" or (self.guard == "first" and not self._confirmed)

    @property
    def never_confirmed(self) -> bool:
        """Whether no plan was given to :meth:`confirm` yet."""
        return not self._confirmed

    # -- one microbatch ----------------------------------------------------------------------

    def hear(self, problems: Mapping[int, str], count: int) -> dict[int, str]:
        """Return everybody's problems before encoders run; all ranks of the group call it.

        Encoders have collectives of their own, so a rank that cannot run its encoder must say so
        before the others run theirs.

        Args:
            problems: rank -> why it cannot go on, as far as this rank knows.
            count: of the microbatches that this rank is about to encode.

        Returns:
            The same of the whole exchange group; of this rank alone where ``guard`` is not due.
        """
        self._check_alive()
        return hear(self.exchange, self.control, problems, count) if self.guard_due else {
            **problems
        }

    def plan(
        self,
        tokens: TokenRuns,
        rows: torch.Tensor,
        problem: str | None = None,
        held: Sequence[Runs] | None = None,
        items: Sequence[int] = (),
    ) -> RoutePlan:
        """Plan a microbatch from what each rank knows by itself; all ranks of the group call it.

        The encoder replicas' rows are taken as consecutive: replica by replica, in DP order, as
        the language replicas' tokens are. Batches alike in places and row counts are planned once.

        Args:
            tokens: where the tokens of this rank's language replica stand.
            rows: this rank's encoder output ``(n, H)``; only its shape, dtype and
                ``requires_grad`` are read.
            problem: why this rank cannot take part, if it cannot: it becomes everybody's error.
            held: the rows of every encoder replica of the group, where they are not consecutive
                (:meth:`.BalancePlan.held_rows`); the same on all ranks.
            items: rows of each whole item that this rank's encoder replica encodes; read where the
                encoder's grid has CP, whose ranks hold the parts (:func:`.rows_of_parts`). Costs
                an all-gather of objects on the host.

        Raises:
            ValueError: the same on every rank of the group: a rank has a problem; dtypes, widths,
                ``requires_grad``, or batches of one replica differ; numbers of tokens and rows do
                not match; a sequence cannot be cut.
        """
        agreed = self._agree(Statement(rows, tokens, problem=problem))
        if held is None and self.layout.src_cp_size > 1:
            told = items_of_replicas(self.name, self.exchange, self.control, items)
            held = rows_of_parts(told, self.layout.src_cp_size)
        if held is not None:
            self._refuse_other_rows(agreed, held)
        key = agreed.key + b"".join(runs.tobytes() + b"|" for runs in held or ())
        plan = self._plans.get(key)
        if plan is None:
            holders = agreed.rows if held is None else held
            routes = GroupRoutes(self.exchange, agreed.tokens, holders)
            plan = self._plans[key] = routes.plan(self.current_rank)
        self._plans.move_to_end(key)
        if len(self._plans) > _PLANS_KEPT:
            self._plans.popitem(last=False)
        return plan

    def announce(
        self, plan: RoutePlan, like: torch.Tensor, problem: str | None = None
    ) -> Comparison | None:
        """Start comparing a plan that was made ahead, before its encoder runs; all ranks call it.

        Only with guard ``"always"``, otherwise nothing happens. The next :meth:`confirm` is that of
        the same plan, and awaits the comparison.

        Args:
            plan: this rank's.
            like: no rows, ``(0, H)``, of the width and dtype that the encoder is going to bring.
            problem: as for :meth:`plan`.

        Returns:
            The comparison that was started; nobody has to ask it for anything.
        """
        if self.guard != "always":
            return None
        problem = self._foreign(plan) or problem
        said = Announcement(like.detach(), plan.tokens, plan.digest(), plan.held, problem)
        comparison = self._compare(said, _NOT_MOVED)
        self._announced = plan, like, comparison
        return comparison

    def set_aside(self) -> Any:
        """Return what was announced last, for a later :meth:`resume`; None without any."""
        announced, self._announced = self._announced, None
        return announced

    def resume(self, announced: Any) -> None:
        """Let the next :meth:`confirm` be that of a plan that was announced and set aside."""
        self._announced = announced

    def connect(self, device: torch.device) -> None:
        """Connect the ranks of the group, once; all of them call it.

        NCCL connects ranks in a group's first collective, whose callers wait for one another.
        """
        if self.group is not None and not self._connected:
            dist.all_reduce(torch.zeros(1, device=device), group=self.group)
        self._connected = True

    def confirm(
        self, plan: RoutePlan, rows: torch.Tensor, problem: str | None = None
    ) -> torch.Tensor:
        """Compare a plan that was made ahead, if ``guard`` says so; all ranks call it.

        A plan that was announced is compared by now. What turned out otherwise since then (an
        encoder that raised, another number of rows) is said by :meth:`settle`, and until then the
        rank goes on with zeros, since its peers wait in the exchange and behind it.

        Args:
            plan: this rank's.
            rows, problem: as for :meth:`plan`.

        Returns:
            The rows to move: the given ones, or zeros in their place.

        Raises:
            ValueError: the same on every rank of the group: a rank has a problem, brings another
                number of rows than planned, or what must be equal differs. On this rank alone: a
                problem without a comparison; another plan than the one that was announced.
        """
        announced, self._announced = self._announced, None
        due, self._confirmed = self.guard_due, self._confirmed + 1
        if announced is not None and due:
            return self._confirm_announced(*announced, plan, rows, problem)
        problem = self._foreign(plan) or problem
        if due:
            self._agree(Statement(rows, plan.tokens, plan.digest(), plan.held, problem))
        elif problem is not None:
            raise ValueError(f"Bridge {self.name}: {problem}")
        return rows

    def start_settling(self) -> None:
        """Start telling how confirmed exchanges turned out; all ranks call it, then ``settle``."""
        self._settling += [
            self._compare(each, "what was moved is not used") for each in self._outcomes
        ]
        self._outcomes = []

    def settle(self) -> None:
        """Hear how the exchanges since the last call turned out on all ranks; all ranks call it.

        Raises:
            ValueError: the same on every rank of the group: what was moved is no rank's to use,
                as a rank could not bring its rows, or they need a gradient on some ranks only.
        """
        self.start_settling()
        settling, self._settling = self._settling, []
        for each in settling:
            each.result()  # an error ends it on all ranks alike

    def forget_unsettled(self) -> None:
        """Drop what a step that ended in an error has announced or not settled."""
        self._announced, self._outcomes, self._settling = None, [], []

    def merge(self, plans: Sequence[RoutePlan]) -> MergedPlan:
        """Return the plans of several microbatches as one exchange; kept for batches like these."""
        key = tuple(plans)
        merged = self._merged.pop(key, None) or MergedPlan.of(plans)
        self._merged[key] = merged
        if len(self._merged) > _PLANS_KEPT:
            self._merged.popitem(last=False)
        return merged

    def issue(self, rows: torch.Tensor, plan: Routes) -> Flight:
        """Start moving rows; ``arrive`` of what comes back waits for them. Differentiable.

        Args:
            rows: this rank's encoder output ``(held, H)``.
            plan: this rank's, of one microbatch or merged; of its ranks all call this, those
                without rows too.

        Raises:
            ValueError: another number of rows than planned.
            RuntimeError: the bridge was destroyed.
        """
        self._check_alive()
        return issue_exchange(rows, self.tensors(plan, rows.device), self.group)

    def move(self, rows: torch.Tensor, plan: Routes) -> torch.Tensor:
        """Issue and wait in one: rows ``(held, H)`` -> own rows ``(own, H)``."""
        return self.issue(rows, plan).arrive()

    def tensors(self, plan: Routes, device: torch.device) -> PlanTensors:
        """Return a plan's indices on a device, uploaded once per plan."""
        known = self._tensors.get(plan)
        if known is None or known[0] != device:
            known = self._tensors[plan] = (device, PlanTensors.of(plan, device))
        return known[1]

    def destroy(self) -> None:
        """Release the process groups; idempotent."""
        self._destroyed = True
        group, control, self.group, self.control = self.group, self.control, None, None
        release_group(group)
        if control is not group:
            release_group(control)

    # -- parts -------------------------------------------------------------------------------

    def _make_groups(self, backend: str | None) -> None:
        """The exchange group of this rank, and one for host tensors where that is another."""
        ranks = [group.ranks.tolist() for group in self.layout.groups() if group.size > 1]
        if not ranks:
            return
        self.group = self.control = make_groups(ranks, backend, group_desc=self.name)
        if not takes_host_tensors(backend):
            host = f"{self.name}, host"
            self.control = make_groups(ranks, dist.Backend.GLOO, group_desc=host)

    def _agree(self, mine: Statement) -> Agreed:
        return self._compare(mine, _NOT_MOVED).result()

    def _compare(self, mine: Statement, so_far: str) -> Comparison:
        self._check_alive()
        return Comparison(self.name, self.exchange, self.control, mine, so_far)

    def _foreign(self, plan: RoutePlan) -> str | None:
        if plan.rank == self.current_rank:
            return None
        return f"the plan is for rank {plan.rank}; plan each rank's own routes"

    def _confirm_announced(
        self,
        said: RoutePlan,
        like: torch.Tensor,
        comparison: Comparison,
        plan: RoutePlan,
        rows: torch.Tensor,
        problem: str | None,
    ) -> torch.Tensor:
        comparison.result()
        if plan is not said:
            raise ValueError(
                f"Bridge {self.name}: another plan is confirmed than was announced; announce the "
                "plan of the microbatch whose encoder runs next"
            )
        of_kind = (rows.size(-1), rows.dtype) == (like.size(-1), like.dtype)
        if not of_kind:
            problem = problem or (
                f"its rows are {rows.size(-1)} wide and {rows.dtype}, the language model's "
                f"{like.size(-1)} and {like.dtype}"
            )
        self._outcomes.append(Statement(rows, plan.tokens, plan.digest(), plan.held, problem))
        if problem is None and rows.size(0) == plan.held:
            return rows
        zeros = like.new_zeros((plan.held, like.size(-1)))
        return zeros.requires_grad_(rows.requires_grad)

    def _refuse_other_rows(self, agreed: Agreed, held: Sequence[Runs]) -> None:
        wanted, cut = [int(runs[:, 1].sum()) for runs in held], self.layout.src_cp_size > 1
        if agreed.rows != wanted:
            raise ValueError(
                f"Bridge {self.name}: the encoder replicas bring {agreed.rows} rows, assigned to "
                f"them are {wanted}; {'rows' if cut else 'tokens'}_per_item must say what the "
                "encoder makes of each item"
            )

    def _check_alive(self) -> None:
        if self._destroyed:
            raise RuntimeError(f"Bridge {self.name} was destroyed; make a new one.")
        # Refuses a rank outside the grids in the layout's words.
        self.exchange = self.exchange or self.layout.group_of(self.current_rank)


def takes_host_tensors(backend: str | None) -> bool:
    """Return whether groups of a backend (``None``: the default one) move tensors of the host.

    Ranks that are in none of the groups answer too, so it is asked of the backend's name.
    """
    if backend is None:
        return "cpu:" in dist.get_backend_config()
    return "cpu:" in str(BackendConfig(cast(Any, dist.Backend(backend))))
