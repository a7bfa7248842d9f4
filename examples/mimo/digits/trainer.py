# SPDX-License-Identifier: Apache-2.0
"""Training steps and held-out reading of the digits model, on Megatron-Core's own schedule."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from data import (
    DIGITS_PER_SAMPLE,
    READING_POSITIONS,
    SEQUENCE_LENGTH,
    VOCABULARY_SIZE,
    Batch,
    DigitsBatches,
    Token,
    with_answer,
)
from encoders import AUDIO, MODALITIES, VISION
from model import LANGUAGE, DigitsModel

from megatron.core.models.mimo.comm.batch_routes import plan_even_batch
from megatron.core.models.mimo.comm.routed_bridge import RoutedBridge
from megatron.core.models.mimo.comm.routes import RoutePlan
from megatron.core.models.mimo.optimizer import get_mimo_optimizer
from megatron.core.models.mimo.partition.sequence_order import (
    dense_positions,
    packed_positions,
    shard_factor,
)
from megatron.core.models.mimo.training.grad_finalize import iter_modules
from megatron.core.models.mimo.training.nonfinite import (
    find_nonfinite_outputs,
    gradients_sentence,
    outputs_sentence,
)
from megatron.core.models.mimo.training.pipeline_step import forward_backward_pipelined
from megatron.core.optimizer import OptimizerConfig
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel.schedules import forward_backward_no_pipelining
from mimo_colocated import phases

LossFunction = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class StepResult:
    """What one training step reports, the same on every rank.

    Attributes:
        loss: mean over the global batch's counted tokens.
        grad_norm: L2 norm over both modules before clipping.
        counted_tokens: tokens in the loss, over all ranks and microbatches.
        learning_rate: used by this step.
        success: False if the step was skipped because of an inf or nan.
        problem: why it was skipped, in words: what was not finite, and where.
        modules: whose gradients were not finite.
        scaling: the step was skipped, but only to find the loss scale of float16.
    """

    loss: float
    grad_norm: float
    counted_tokens: int
    learning_rate: float
    success: bool
    problem: str = ""
    modules: tuple[str, ...] = ()
    scaling: bool = False


@dataclass(frozen=True)
class TrainOptions:
    """How the weights are moved.

    ``steps`` is the length of the learning-rate schedule; a run may stop earlier. ``encode_ahead``
    is for a pipelined language model: microbatches that are encoded together, all of them by
    default.
    """

    steps: int
    global_batch_size: int
    micro_batches: int = 1
    encode_ahead: int | None = None
    lr: float = 1.5e-3
    min_lr: float = 1.5e-4
    warmup_steps: int = 20
    weight_decay: float = 0.01
    clip_grad: float = 1.0
    # Of float16; dynamic: halved after gradients that are not finite, doubled after a while.
    initial_loss_scale: float = 2.0**15


class Trainer:
    """Steps a :class:`DigitsModel` over batches.

    Args:
        built: the model.
        options: of the optimizer and the schedule.
        distributed_optimizer: shard the optimizer state over DP.
    """

    def __init__(
        self, built: DigitsModel, options: TrainOptions, distributed_optimizer: bool
    ) -> None:
        self.built, self.options = built, options
        self.model, self.groups = built.model, built.collections[LANGUAGE]
        self.device = next(self.model.parameters()).device
        bridges = getattr(self.model, "colocated_comms", {})
        self.bridges = {m: b for (m, _), b in bridges.items() if isinstance(b, RoutedBridge)}
        self.packed = built.packed
        # Often a modality's tokens stand where they stood, and its last plan serves again.
        self._planned: dict[str, tuple[np.ndarray, np.ndarray | None, RoutePlan]] = {}
        config = built.configs[LANGUAGE]
        # What the length of a packed sample is padded to.
        self.multiple = shard_factor(
            self.groups.cp.size(), self.groups.tp.size() if config.sequence_parallel else 1
        )
        self.optimizer = get_mimo_optimizer(
            self.model,
            OptimizerConfig(
                optimizer="adam",
                lr=options.lr,
                min_lr=options.min_lr,
                weight_decay=options.weight_decay,
                adam_beta1=0.9,
                adam_beta2=0.95,
                clip_grad=options.clip_grad,
                use_distributed_optimizer=distributed_optimizer,
                bf16=built.configs[LANGUAGE].bf16,
                fp16=built.configs[LANGUAGE].fp16,
                initial_loss_scale=options.initial_loss_scale,
                params_dtype=built.configs[LANGUAGE].params_dtype,
            ),
        )
        self.scheduler = self._make_scheduler()
        config = self.model.config
        config.finalize_model_grads_func = built.finalize
        config.no_sync_func = self.model.no_sync
        # Weak: through the distributed optimizer's views of the parameters, autograd's C++ holds
        # the configuration, and Python's collector would never see that nobody needs them.
        scale_loss = weakref.WeakMethod(self.optimizer.scale_loss)
        config.grad_scale_func = lambda loss: scale_loss()(loss)

    def _make_scheduler(self) -> OptimizerParamScheduler:
        options = self.options
        return OptimizerParamScheduler(
            self.optimizer,
            init_lr=0.0,
            max_lr=options.lr,
            min_lr=options.min_lr,
            lr_warmup_steps=min(options.warmup_steps, max(options.steps - 1, 0)),
            lr_decay_steps=max(options.steps, 1),
            lr_decay_style="cosine",
            start_wd=options.weight_decay,
            end_wd=options.weight_decay,
            wd_incr_steps=max(options.steps, 1),
            wd_incr_style="constant",
        )

    def resume_schedule(self, step: int) -> None:
        """Put the learning-rate schedule where it was after ``step`` steps, skipped ones aside."""
        self.scheduler.num_steps = 0
        self.scheduler.step(increment=step)

    # ---- training -------------------------------------------------------------------------

    def gradients(self, batches: DigitsBatches, step: int) -> tuple[float, int]:
        """Forward, backward and finalised gradients of ``step``; returns (loss, counted tokens).

        The loss is the mean over the global batch, the same on every rank.
        """
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        microbatches = map(self._inputs, self._microbatches(batches, step))
        outputs = self._schedule(microbatches, self.options.micro_batches)
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        if outputs:
            sums = torch.stack(outputs).sum(dim=0)
        dist.all_reduce(sums, group=self.groups.dp_cp)
        loss_sum, tokens = self._from_last_stage(sums).tolist()
        return loss_sum / max(tokens, 1.0), int(tokens)

    def _schedule(
        self, microbatches: Iterator[dict[str, Any]], count: int, *, forward_only: bool = False
    ) -> list[torch.Tensor]:
        """One step of Megatron-Core's schedule; what the last stage reports, or its logits."""
        keywords: dict[str, Any] = {
            "forward_step_func": self._forward_step,
            "data_iterator": microbatches,
            "model": [self.model],
            "num_microbatches": count,
            "pg_collection": self.groups,
            "forward_only": forward_only,
            "collect_non_loss_data": forward_only,
        }
        if self.groups.pp.size() > 1:
            ahead = self.options.encode_ahead
            return forward_backward_pipelined(**keywords, encode_ahead=ahead)
        return forward_backward_no_pipelining(**keywords, seq_length=0, micro_batch_size=0)

    def _from_last_stage(self, value: torch.Tensor) -> torch.Tensor:
        """What the last pipeline stage has, on all stages; of one shape everywhere."""
        pp = self.groups.pp
        if pp.size() > 1:
            dist.broadcast(value, dist.get_global_rank(pp, pp.size() - 1), group=pp)
        return value

    def step(self, batches: DigitsBatches, step: int) -> StepResult:
        """One training step."""
        phases.at_step(step + 1)  # as the console counts them
        self.model.train()
        loss, tokens = self.gradients(batches, step)
        learning_rate = self.optimizer.param_groups[0]["lr"]
        success, grad_norm, _ = self.optimizer.step()
        if success:
            self.scheduler.step(increment=1)
        norm = float("nan") if grad_norm is None else grad_norm
        result = StepResult(loss, norm, tokens, learning_rate, success)
        return result if success else self._explain(result, batches, step)

    def _explain(self, result: StepResult, batches: DigitsBatches, step: int) -> StepResult:
        """The result of a skipped step with what was not finite; all ranks together."""
        optimizer, said = self.optimizer, []
        # TP ranks compute the loss each, so one of them may be alone with what it has.
        losses = torch.full((), result.loss, dtype=torch.float64, device=self.device)
        dist.all_reduce(losses)
        result = replace(result, loss=result.loss if losses.isfinite() else math.nan)
        if not math.isfinite(result.loss):
            outputs = self._nonfinite_outputs(batches, step)
            said.append(f"the loss is not finite: {outputs_sentence(outputs)}")
        if optimizer.nonfinite_modules:
            found = optimizer.nonfinite_gradients
            said.append(gradients_sentence(optimizer.nonfinite_modules, found))
        scale, lowest = float(optimizer.get_loss_scale()), optimizer.config.min_loss_scale
        # Lowering the scale mends gradients, not a loss.
        scaling = optimizer.config.fp16 and math.isfinite(result.loss) and scale > lowest
        if optimizer.config.fp16:
            said.append(f"the loss scale is {scale:g} now")
        return replace(
            result,
            problem="; ".join(said),
            modules=optimizer.nonfinite_modules,
            scaling=scaling,
        )

    @torch.no_grad()
    def _nonfinite_outputs(self, batches: DigitsBatches, step: int) -> dict[str, tuple[int, ...]]:
        """Modules with such outputs, and on which ranks, in another forward pass of the step."""
        self.model.eval()  # no dropout: random states stay as they are
        microbatches, count = self._microbatches(batches, step), self.options.micro_batches
        inputs = map(self._inputs, microbatches)
        return find_nonfinite_outputs(
            iter_modules(self.model), lambda: self._schedule(inputs, count, forward_only=True)
        )

    def _microbatches(self, batches: DigitsBatches, step: int) -> Iterator[Batch]:
        for microbatch in range(self.options.micro_batches):
            yield self._local_batch(batches, step, microbatch, self.options.micro_batches)

    def _local_batch(
        self, batches: DigitsBatches, step: int, microbatch: int, count: int
    ) -> Batch:
        """This rank's part of a microbatch, on its device."""
        with phases.during(phases.DATA):
            batch = batches.local_batch(step, microbatch, count, **self._dp_coordinates())
            if self.bridges:
                at = (step, microbatch, count)
                lengths = batches.lengths(*at) if self.packed else None
                tokens = {
                    name: batches.tokens(MODALITIES[name].token, *at) for name in self.bridges
                }
                routes = {
                    name: self._route(name, where, lengths) for name, where in tokens.items()
                }
                batch = replace(batch, routes=routes)
            return batch.to(self.device)

    def _route(self, modality: str, tokens: np.ndarray, lengths: np.ndarray | None) -> RoutePlan:
        """Planned on the host with the batch, so that the model does not look at its tokens."""
        known = self._planned.get(modality)
        if known and np.array_equal(known[0], tokens) and np.array_equal(known[1], lengths):
            return known[2]
        padded = None if lengths is None else padded_lengths(lengths, self.multiple)
        layout = self.bridges[modality].layout
        plan = plan_even_batch(layout, dist.get_rank(), tokens, packed=padded)
        self._planned[modality] = (tokens, lengths, plan)
        return plan

    def _dp_coordinates(self) -> dict[str, int]:
        groups, dest = self.built.collections, self.groups.dp
        names = {"src": VISION, "audio": AUDIO}
        sources = {side: groups[name].dp for side, name in names.items() if name in groups}
        ranks = {f"{side}_dp_rank": dp.rank() for side, dp in sources.items()}
        sizes = {f"{side}_dp": dp.size() for side, dp in sources.items()}
        return {**ranks, **sizes, "dest_dp_rank": dest.rank(), "dest_dp": dest.size()}

    def _forward_step(
        self, data_iterator: Iterator[dict[str, Any]], model: torch.nn.Module
    ) -> tuple[torch.Tensor, LossFunction]:
        output, loss_mask = model(**next(data_iterator))

        def loss_func(token_losses: torch.Tensor, non_loss_data: bool = False) -> Any:
            """(sum of token losses, counted tokens, what is reported), all of this rank."""
            if non_loss_data:
                return token_losses
            mask = loss_mask.to(token_losses.dtype)
            loss, tokens = (token_losses * mask).sum(), mask.sum()
            report = torch.stack([loss.detach(), tokens]).double()
            return loss, tokens.to(torch.int), report

        return output, loss_func

    def _inputs(self, batch: Batch) -> dict[str, Any]:
        """What the model is called with."""
        inputs: dict[str, Any] = {
            "input_ids": batch.input_ids,
            "position_ids": batch.position_ids,
            "labels": batch.labels,
            "loss_mask": batch.loss_mask,
        }
        if self.packed:
            padded = padded_lengths(batch.lengths, self.multiple)
            inputs = {k: None if v is None else pack(v, padded) for k, v in inputs.items()}
            inputs["packing_kwargs"] = packing(batch.lengths, padded, self.device)
        shown = {VISION: MODALITIES[VISION].inputs(batch.images)}
        if AUDIO in self.built.collections:
            spectra = torch.from_numpy(batch.clips.spectra).to(self.device)
            shown[AUDIO] = MODALITIES[AUDIO].inputs(spectra)
        return {**inputs, "modality_inputs": shown, "route_plan": batch.routes}

    @torch.no_grad()
    def logits(self, batch: Batch) -> torch.Tensor:
        """``(b, S, V)`` of this rank's samples, on every stage; zeros where a packed one is cut."""
        inputs = self._inputs(replace(batch, labels=None, loss_mask=None))
        # Virtual stages work on as many microbatches as there are stages; one answer is enough.
        virtual = self.model.config.virtual_pipeline_model_parallel_size
        count = self.groups.pp.size() if virtual else 1
        outputs = self._schedule(iter([inputs] * count), count, forward_only=True)
        if outputs:
            whole = self._whole_logits(outputs[0], batch.lengths)
            return self._from_last_stage(whole.contiguous())
        shape = (*batch.input_ids.shape, VOCABULARY_SIZE)
        dtype = self.model.config.params_dtype
        return self._from_last_stage(torch.empty(shape, dtype=dtype, device=self.device))

    # ---- reading --------------------------------------------------------------------------

    @torch.no_grad()
    def read(self, batches: DigitsBatches, step: int) -> torch.Tensor:
        """Digits that the model answers for the held-out batch ``step``, ``(B, 4)`` int64.

        The answer is produced token by token: each digit is fed back before the next is asked
        for. Every rank returns the whole batch's answers; -1 stands for a token that is no digit.
        """
        phases.at_step(step, "evaluation batch")
        self.model.eval()
        batch = self._local_batch(batches, step, 0, 1)
        read = batch.input_ids.new_zeros((len(batch.input_ids), 0))
        for position in READING_POSITIONS:
            input_ids = with_answer(batch.input_ids, read.clamp(min=0))
            logits = self.logits(replace(batch, input_ids=input_ids))
            token = logits[:, position].argmax(dim=-1)
            digit = token - int(Token.ZERO)
            digit = torch.where((digit >= 0) & (digit <= 9), digit, -1)
            read = torch.cat([read, digit[:, None]], dim=1)
        assert read.shape[1] == DIGITS_PER_SAMPLE
        return _gather(read, self.groups.dp, dim=0)

    def _whole_logits(self, logits: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
        """(b, S/cp, V/tp) on each rank -> (b, S, V), positions in their natural order.

        Of a packed batch (1, T/cp, V/tp), whose ``T`` tokens are those of samples that were cut.
        """
        logits = _gather(logits, self.groups.tp, dim=2)
        parts, cp = _gather(logits, self.groups.cp, dim=1), self.groups.cp.size()
        ends = np.cumsum([0, *padded_lengths(lengths, self.multiple)]).tolist()
        order = [
            position
            for rank in range(cp)
            for position in (
                packed_positions(ends, rank, cp)
                if self.packed
                else dense_positions(parts.shape[1], rank, cp)
            )
        ]
        whole = torch.empty_like(parts)
        whole[:, order] = parts
        if not self.packed:
            return whole
        samples = whole.new_zeros(len(lengths), SEQUENCE_LENGTH, whole.size(2))
        for sample, start, length in zip(samples, ends, lengths, strict=False):
            sample[:length] = whole[0, start : start + length]
        return samples


def padded_lengths(lengths: Sequence[int] | np.ndarray, multiple: int) -> np.ndarray:
    """Tokens of packed samples with the padding that CP and SP need, int64 ``(samples,)``.

    >>> padded_lengths([11, 32, 17], 4).tolist()
    [12, 32, 20]
    """
    return -(-np.asarray(lengths) // multiple) * multiple


def pack(values: torch.Tensor, padded: np.ndarray) -> torch.Tensor:
    """Samples ``(b, S)``, each cut to its padded length, one after another: ``(1, T)``."""
    rows = zip(values, padded.tolist(), strict=True)
    return torch.cat([row[:length] for row, length in rows]).unsqueeze(0)


def packing(
    lengths: Sequence[int], padded: np.ndarray, device: torch.device
) -> dict[str, Any]:
    """Fields of ``PackedSeqParams`` for samples one after another.

    Args:
        lengths: tokens of each sample that are no padding.
        padded: tokens of each sample in the packed sequence.
        device: of the cumulative lengths.
    """
    fields: dict[str, Any] = dict.fromkeys(("max_seqlen_q", "max_seqlen_kv"), int(padded.max()))
    for suffix, counts in (("", lengths), ("_padded", padded)):
        ends = torch.tensor(np.cumsum([0, *counts]), dtype=torch.int32, device=device)
        fields |= {f"cu_seqlens_q{suffix}": ends, f"cu_seqlens_kv{suffix}": ends}
    return fields


def _gather(tensor: torch.Tensor, group: dist.ProcessGroup, dim: int) -> torch.Tensor:
    """Concatenate the group's tensors along ``dim``; no gradient."""
    if group.size() == 1:
        return tensor
    parts = [torch.empty_like(tensor.contiguous()) for _ in range(group.size())]
    dist.all_gather(parts, tensor.contiguous(), group=group)
    return torch.cat(parts, dim=dim)
