# SPDX-License-Identifier: Apache-2.0
"""A language model in pipeline stages: encoders run ahead of it, their gradients come back after.

The encoders of all ranks run on several microbatches and one exchange per modality brings the
rows to the first stage. There they become *leaves*, one per microbatch: the pipeline's backward
passes end at them. Once the gradients of all microbatches are there, one exchange takes them back
and the encoders run backward.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.autograd.function import once_differentiable

from megatron.core.models.mimo.comm.plan_guard import words_of
from megatron.core.models.mimo.comm.routed_bridge import RoutedBridge
from megatron.core.models.mimo.comm.token_runs import TokenRuns
from megatron.core.models.mimo.config.role import MIMO_LANGUAGE_MODULE_KEY, ModuleLayout
from megatron.core.models.mimo.memory.activations import latest_offloaded
from megatron.core.models.mimo.memory.offload import reload_when_needed
from megatron.core.models.mimo.model.attention_masks import check_mask
from megatron.core.models.mimo.model.language_groups import known_size
from megatron.core.models.mimo.model.no_samples import cut_back, without_items
from megatron.core.models.mimo.model.routed_side import Brought
from megatron.core.utils import unwrap_model
from mimo_colocated import phases

# The attributes of a model that hold its language model, and the further virtual stages of it.
LANGUAGE_MODEL, VIRTUAL_STAGES = "language_model", "virtual_stages"
VIRTUAL_SIZE = "virtual_pipeline_model_parallel_size"


@dataclass(frozen=True, eq=False)
class LandedRows:
    """A modality's rows of one microbatch that have arrived.

    Attributes:
        rows: a leaf ``(own, H)``; no rows on later stages.
        place: as of :class:`.RoutePlan`, on the device.
    """

    rows: torch.Tensor
    place: torch.Tensor

    def arrive(self) -> torch.Tensor:
        """The rows."""
        return self.rows


@dataclass(frozen=True, eq=False)
class EncodedMicrobatch:
    """One microbatch, encoded: what the first language stage reads instead of encoder inputs.

    Attributes:
        tokens: modality -> where its tokens stand in the rank's language batch.
        rows: modality -> its rows, for modalities that brought any.
        gathered: over gather bridges: modality -> all rows of the language replica, a leaf.
        number: of the microbatch in its step, -1 if nobody counts.
        stands_for: of padding, the shape of the ``input_ids`` without elements that it replaces.
    """

    tokens: dict[str, TokenRuns]
    rows: dict[str, LandedRows]
    gathered: dict[str, torch.Tensor] | None = None
    number: int = -1
    stands_for: tuple[int, ...] | None = None


class EncodedMicrobatches:
    """Several microbatches, encoded together, and the way back for their gradients.

    Attributes:
        microbatches: in the order in which they were given.
        comes_apart: whether encoders run backward once per microbatch, not once for all of them.
    """

    def __init__(
        self,
        microbatches: list[EncodedMicrobatch],
        ends: list[torch.Tensor],
        comes_apart: bool = False,
    ) -> None:
        self.microbatches, self.comes_apart = microbatches, comes_apart
        self._ends = ends

    def backward(self) -> None:
        """Send the leaves' gradients to the encoders and run these backward.

        All ranks call it together, once, when the first stages have run backward on every one of
        the microbatches. Without encoders that train it does nothing.
        """
        ends, self._ends = self._ends, []
        if ends:
            phases.mark(phases.BRIDGE_BACKWARD)
        # One modality after the other: all ranks enter the exchanges in one order.
        for end in reversed(ends):
            end.backward()


class StageSide:
    """Mixin of :class:`MimoModel`: the two ends of a pipelined language model."""

    @property
    def is_pipelined(self) -> bool:
        """Whether this rank holds some of the language model's stages only."""
        # Not all that its methods are called on has a role.
        modules = getattr(getattr(self, "role", None), "modules", None) or {}
        stage = modules.get(MIMO_LANGUAGE_MODULE_KEY)
        return stage is not None and not (stage.is_first_stage and stage.is_last_stage)

    def encode_microbatches(
        self, microbatches: Sequence[Mapping[str, Any]], problem: str | None = None
    ) -> EncodedMicrobatches:
        """Run the encoders on microbatches and bring their rows to the first language stage.

        Every rank calls it with the same number of microbatches, whatever its stage. Encoders run
        once per microbatch; then there is one exchange per modality. Parameter gathers that it
        starts are to be finished (``finish_param_gathers``) before the optimizer's step.

        Args:
            microbatches: ``forward``'s keyword arguments of each. Read are ``input_ids``,
                ``attention_mask``, ``modality_inputs``, ``packing_kwargs`` and ``route_plan``.
            problem: why this rank cannot go on (its data ended, say). Told before any encoder
                runs; the ranks that it exchanges rows with raise it too.

        Raises:
            ValueError, RuntimeError: as ``forward`` over a routed bridge; a rank has a problem;
                ranks have different numbers of microbatches.
        """
        self.start_param_gathers()
        self._refuse_problems(problem, len(microbatches))
        if not self._routed_bridges():
            return self._encode_gathered(microbatches)
        brought = [
            self._bring_rows(
                batch["input_ids"],
                batch.get("attention_mask"),
                without_items(batch.get("modality_inputs")),
                batch.get("packing_kwargs"),
                batch.get("route_plan"),
            )
            for batch in microbatches
        ]
        landed: list[dict[str, LandedRows]] = [{} for _ in brought]
        ends = []
        for name, bridge in self._routed_bridges().items():
            # That of the last microbatch, which runs backward first.
            offloaded = latest_offloaded(self.modality_submodules[name])
            if any(name in each.moving for each in brought):
                end, rows = _move_together(name, bridge, brought)
                for each, row in zip(landed, rows, strict=True):
                    each[name] = row
                if end.requires_grad:
                    ends.append(reload_when_needed(end, offloaded))
        encoded = [EncodedMicrobatch(b.tokens, r) for b, r in zip(brought, landed, strict=True)]
        return EncodedMicrobatches(encoded, ends)

    def forward_stage(
        self,
        language_model: nn.Module,
        encoded: EncodedMicrobatch,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        loss_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        packing_kwargs: Mapping[str, Any] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """One microbatch through one stage of the language model.

        Args:
            language_model: the stage, bare or wrapped. A later one than the first was given its
                input by ``set_input_tensor``.
            encoded: the microbatch, from :meth:`encode_microbatches`.
            input_ids, position_ids, attention_mask, loss_mask, labels, packing_kwargs: as for
                ``forward``; the same on all stages.

        Returns:
            (output, CP-local loss mask). The output is hidden states before the last stage.
        """
        phases.mark(phases.LANGUAGE_FORWARD, encoded.number)
        check_mask(self, attention_mask, input_ids, packing_kwargs)
        fused = None
        packed, whole = self._build_packed_seq_params(packing_kwargs), None
        if getattr(unwrap_model(language_model), "pre_process", True):
            if encoded.gathered is None:
                fused = self._place_local(input_ids, position_ids, encoded.tokens, encoded.rows)
            else:
                whole = self._fuse_gathered(dict(encoded.gathered), input_ids, position_ids)
        if fused is None:
            fused, labels, loss_mask, packed = self._shard_language_inputs(
                embeddings=whole, labels=labels, loss_mask=loss_mask, packed_seq_params=packed
            )
        else:
            fused, labels, loss_mask, packed = self._shard_routed(fused, labels, loss_mask, packed)
        output = self._call_language_model(
            fused, position_ids, attention_mask, labels, packed, language_model=language_model
        )
        if encoded.stands_for is not None:
            loss_mask = cut_back(loss_mask, encoded.stands_for)
            if getattr(unwrap_model(language_model), "post_process", True):
                output = cut_back(output, encoded.stands_for)
        return output, loss_mask


    def _encode_gathered(self, microbatches: Sequence[Mapping[str, Any]]) -> EncodedMicrobatches:
        """:meth:`encode_microbatches` over gather bridges: all rows of a replica on all stages."""
        encoded, ends = [], []
        for batch in microbatches:
            input_ids = batch["input_ids"]
            packed = self._build_packed_seq_params(batch.get("packing_kwargs"))
            self._check_batch(input_ids, packed)
            mask = batch.get("attention_mask")
            check_mask(self, mask, input_ids, batch.get("packing_kwargs"))
            gathered = {}
            inputs = without_items(batch.get("modality_inputs"))
            rows = self._encode_for_language(input_ids, inputs)
            self._rows_memo = None
            for name, moved in rows.items():
                whole = torch.arange(moved.size(0), device=moved.device)
                leaves = _Leaves([whole], moved.requires_grad)
                end = _HandOver.apply(moved, leaves)
                (gathered[name],) = leaves.rows
                if end.requires_grad:
                    ends.append(end)
            encoded.append(EncodedMicrobatch({}, {}, gathered))
        return EncodedMicrobatches(encoded, ends, comes_apart=True)

    def _refuse_problems(self, problem: str | None, count: int) -> None:
        """Raise what any rank has to say against encoding so many microbatches.

        Raises:
            ValueError: on every rank of an exchange group (over gather bridges: of a coarser
                replica) that has one with a problem in it.
        """
        rank = dist.get_rank()
        problems = {} if problem is None else {rank: problem}
        # Groups differ between modalities: what was heard in one is told in the next.
        for bridge in self.colocated_comms.values():
            problems = bridge.hear(problems, count)
        if problems:
            raise ValueError(f"Nothing was encoded. {words_of(problems)}")

    def _refuse_pipeline(self) -> None:
        if self.is_pipelined:
            raise ValueError(
                "forward runs a whole language model, this rank has some pipeline stages of it "
                f"(it is {self._stage_words()}); run steps with "
                "megatron.core.models.mimo.training.pipeline_step.forward_backward_pipelined"
            )

    def _refuse_other_stages(self) -> None:
        """The stages that were built must be those that the grid puts here.

        Raises:
            ValueError: one embeds or has a head where it must not, or the other way round; or
                their number is not the config's.
        """
        if getattr(self.role, "mode", None) is not ModuleLayout.COLOCATED:
            return
        stage, built = self.role.modules[MIMO_LANGUAGE_MODULE_KEY], stages_of(self)
        virtual = known_size(getattr(self.config, VIRTUAL_SIZE, None)) or 1
        if len(built) != virtual:
            raise ValueError(
                f"The language config has virtual_pipeline_model_parallel_size {virtual}, but "
                f"{len(built)} stages are given (language_model_spec and virtual_stage_specs); "
                "give one spec per virtual stage"
            )
        for number, each in enumerate(map(unwrap_model, built)):
            wanted = {
                "pre_process": stage.is_first_stage and number == 0,
                "post_process": stage.is_last_stage and number == virtual - 1,
            }
            for flag, value in wanted.items():
                found = getattr(each, flag, value)
                if isinstance(found, bool) and found != value:
                    raise ValueError(
                        f"The language model's virtual stage {number} was built with "
                        f"{flag}={found}, but by its grid this rank is {self._stage_words()}; "
                        f"build it with {flag}={value}"
                    )

    def _stage_words(self) -> str:
        stage = self.role.modules[MIMO_LANGUAGE_MODULE_KEY]
        names = [
            name
            for name, holds in (("first", stage.is_first_stage), ("last", stage.is_last_stage))
            if holds
        ]
        return f"on the {' and '.join(names)} stage" if names else "on a stage in the middle"


def stages_of(model: Any) -> list[nn.Module]:
    """The language model's stages on this rank, in order; see ``MimoModel.language_stages``."""
    first = getattr(model, LANGUAGE_MODEL, None)
    further = getattr(model, VIRTUAL_STAGES, None)
    # A mock answers to any name.
    further = further if isinstance(further, nn.ModuleList) else ()
    return [] if first is None else [first, *further]


def _move_together(
    name: str, bridge: RoutedBridge, brought: Sequence[Brought]
) -> tuple[torch.Tensor, list[LandedRows]]:
    """Exchange one modality's rows of all microbatches; (where backward starts, the leaves)."""
    plans = [each.plans[name] for each in brought]
    merged = bridge.merge(plans)
    rows = torch.cat([each.rows.pop(name) for each in brought])
    own = bridge.move(rows, merged)
    indices = bridge.tensors(merged, own.device).place.split([i.size for i in merged.own_index])
    leaves = _Leaves(list(indices), own.requires_grad)
    end = _HandOver.apply(own, leaves)
    places = [bridge.tensors(plan, own.device).place for plan in plans]
    return end, [LandedRows(*pair) for pair in zip(leaves.rows, places, strict=True)]


class _Leaves:
    """The own rows of all microbatches, cut into one leaf per microbatch."""

    def __init__(self, indices: list[torch.Tensor], requires_grad: bool) -> None:
        self.indices, self.requires_grad = indices, requires_grad
        self.rows: list[torch.Tensor] = []
        self._size: torch.Size | None = None

    def cut(self, own: torch.Tensor) -> None:
        """Copy each microbatch's rows out of all of them."""
        self._size = own.size()
        cut = [own.detach().index_select(0, index) for index in self.indices]
        self.rows = [rows.requires_grad_(self.requires_grad) for rows in cut]

    def take_gradients(self) -> torch.Tensor:
        """Those of all own rows; zeros where a microbatch's loss does not depend on a row."""
        whole = self.rows[0].new_zeros(self._size)
        for index, rows in zip(self.indices, self.rows, strict=True):
            if rows.grad is not None:
                whole.index_copy_(0, index, rows.grad)
                rows.grad = None
        return whole


class _HandOver(torch.autograd.Function):
    """Own rows -> a scalar to start backward from.

    forward:  the rows become leaves; they themselves are not kept
    backward: the leaves' gradients, put together
    """

    @staticmethod
    def forward(ctx: Any, own: torch.Tensor, leaves: _Leaves) -> torch.Tensor:
        ctx.leaves = leaves
        leaves.cut(own)
        return own.new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.leaves.take_gradients(), None
