# SPDX-License-Identifier: Apache-2.0
"""Training steps on Megatron-Core's own schedule, and why one was skipped."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
import torch.distributed as dist

from megatron.core.models.mimo.gradients.finalize import iter_modules
from megatron.core.models.mimo.gradients.nonfinite import (
    find_nonfinite_outputs,
    gradients_sentence,
    outputs_sentence,
)
from megatron.core.models.mimo.job.built_model import LANGUAGE, BuiltModel
from megatron.core.models.mimo.job.key_value_cache import KeyValueCache
from megatron.core.models.mimo.job.logits import whole_logits, whole_packed_logits
from megatron.core.models.mimo.job.next_tokens import Choice, next_tokens, rows_at
from megatron.core.models.mimo.job.route_plans import RoutePlans
from megatron.core.models.mimo.optimizer import get_mimo_optimizer
from megatron.core.models.mimo.partition.sequence_order import (
    dense_positions,
    packed_positions,
    shard_factor,
)
from megatron.core.models.mimo.pipeline.step import forward_backward_pipelined
from megatron.core.optimizer import OptimizerConfig
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel.schedules import forward_backward_no_pipelining
from mimo_colocated import phases
from mimo_colocated.launch.parameter_groups import ParameterGroup
from mimo_colocated.launch.training_options import TrainingOptions

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
        learning_rates: by module, and by parameter group where a module has several.
    """

    loss: float
    grad_norm: float
    counted_tokens: int
    learning_rate: float
    success: bool
    problem: str = ""
    modules: tuple[str, ...] = ()
    scaling: bool = False
    learning_rates: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainOptions:
    """How the weights are moved.

    ``steps`` is the length of the learning-rate schedule; a run may stop earlier. ``encode_ahead``:
    see :func:`.forward_backward_pipelined`; without stages each microbatch is encoded when its turn
    comes by default. ``encode_in_bubbles``: see there, too. ``groups`` are other learning rates and
    weight decay for some parameters.
    """

    steps: int
    global_batch_size: int
    micro_batches: int = 1
    encode_ahead: int | None = None
    encode_in_bubbles: int = 0
    lr: float = 1.5e-3
    min_lr: float = 1.5e-4
    warmup_steps: int = 20
    weight_decay: float = 0.01
    clip_grad: float = 1.0
    # Of float16; dynamic: halved after gradients that are not finite, doubled after a while.
    initial_loss_scale: float = 2.0**15
    groups: Sequence[ParameterGroup] = ()

    @classmethod
    def of(cls, options: TrainingOptions) -> TrainOptions:
        """Return what a job's options say; the last learning rate is a tenth of the peak."""
        return cls(
            steps=options.steps,
            global_batch_size=options.global_batch_size,
            micro_batches=options.micro_batches,
            encode_ahead=options.encode_ahead,
            encode_in_bubbles=options.encode_in_bubbles,
            lr=options.lr,
            min_lr=options.lr / 10,
            clip_grad=options.clip_grad,
        )


class Runner:
    """Runs a :class:`BuiltModel` over microbatches, whatever its layouts; nothing is trained.

    Args:
        built: the model.
        options: of the schedule.

    Attributes:
        device: of the model.
        packed: the language model takes packed sequences.
        groups: the language model's.
        multiple: what the length of a packed sample is padded to.
    """

    def __init__(self, built: BuiltModel, options: TrainOptions) -> None:
        self.built, self.options = built, options
        self.model, self.groups = built.model, built.collections[LANGUAGE]
        self.device, self.packed = next(self.model.parameters()).device, built.packed
        config = built.configs[LANGUAGE]
        self.multiple = shard_factor(
            self.groups.cp.size(), self.groups.tp.size() if config.sequence_parallel else 1
        )

    def schedule(
        self, microbatches: Iterator[Mapping[str, Any]], count: int, *, forward_only: bool = False
    ) -> list[torch.Tensor]:
        """Run one step of Megatron-Core's schedule.

        Args:
            microbatches: what the model is called with.
            count: how many; virtual stages want a multiple of the stages.
            forward_only: without gradients.

        Returns:
            On the last stage what it reports of each microbatch, the sum of its losses and its
            counted tokens, float64 ``(2,)``; its output with ``forward_only``. Nothing on others.
        """
        keywords: dict[str, Any] = {
            "forward_step_func": self.forward_step,
            "data_iterator": microbatches,
            "model": [self.model],
            "num_microbatches": count,
            "pg_collection": self.groups,
            "forward_only": forward_only,
            "collect_non_loss_data": forward_only,
        }
        ahead = self.options.encode_ahead
        # Evaluation has other numbers of microbatches, and no bubble on the first stage.
        in_bubbles = 0 if forward_only else self.options.encode_in_bubbles
        if self.groups.pp.size() > 1 or ahead is not None or in_bubbles:
            return forward_backward_pipelined(
                **keywords, encode_ahead=ahead, encode_in_bubbles=in_bubbles
            )
        return forward_backward_no_pipelining(**keywords, seq_length=0, micro_batch_size=0)

    def from_last_stage(self, value: torch.Tensor) -> torch.Tensor:
        """Return on all stages what the last one has; ``value`` has one shape everywhere."""
        pp = self.groups.pp
        if pp.size() > 1:
            dist.broadcast(value, dist.get_global_rank(pp, pp.size() - 1), group=pp)
        return value

    def forward_step(
        self, data_iterator: Iterator[Mapping[str, Any]], model: torch.nn.Module
    ) -> tuple[torch.Tensor, LossFunction]:
        """Call the model with the next microbatch, as schedules want it.

        Returns:
            The output and the function that makes of it the loss, the tokens and what is reported.
        """
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

    @torch.no_grad()
    def whole_logits(
        self, inputs: Mapping[str, Any], lengths: Sequence[int], shape: tuple[int, int, int]
    ) -> torch.Tensor:
        """Return the whole logits of one microbatch's samples, on every stage.

        Args:
            inputs: what the model is called with, without labels and loss mask.
            lengths: tokens of this rank's samples; where a packed one is cut, logits are zero.
            shape: ``(b, S, V)`` of what is returned.
        """
        outputs = self._logits(inputs)
        if not outputs:
            dtype = self.model.config.params_dtype
            return self.from_last_stage(torch.empty(shape, dtype=dtype, device=self.device))
        if self.packed:
            packing = (lengths, self.multiple, shape[1])
            whole = whole_packed_logits(outputs[0], self.groups, *packing)
        else:
            whole = whole_logits(outputs[0], self.groups)
        return self.from_last_stage(whole.contiguous())

    @torch.no_grad()
    def next_tokens(
        self,
        inputs: Mapping[str, Any],
        places: Sequence[tuple[int, int]],
        choice: Choice,
        names: Sequence[Sequence[int]],
        ends: Sequence[int],
    ) -> torch.Tensor:
        """Return the tokens that follow some places of one microbatch, int64 ``(n,)``, everywhere.

        No rank has whole logits. Everywhere means all ranks of a language replica.

        Args:
            inputs: what the model is called with, without labels and loss mask.
            places: row and position of each.
            choice, names: see :func:`.next_tokens.next_tokens`.
            ends: of a pack's samples with their padding, and a 0 before; empty without packing.

        Returns:
            -1 where a logit is not a number.
        """
        outputs = self._logits(inputs)
        if not outputs:
            found = torch.empty(len(places), dtype=torch.int64, device=self.device)
            return self.from_last_stage(found)
        (logits, *_), cp = outputs, self.groups.cp
        if ends:
            positions = packed_positions(ends, cp.rank(), cp.size())
        else:
            positions = dense_positions(logits.shape[1] * cp.size(), cp.rank(), cp.size())
        rows, owned = rows_at(logits, places, positions)
        return self.from_last_stage(next_tokens(rows, owned, self.groups, choice, names))

    @torch.no_grad()
    def further_tokens(
        self,
        cache: KeyValueCache,
        tokens: torch.Tensor,
        positions: Sequence[int],
        choice: Choice,
        names: Sequence[Sequence[int]],
    ) -> torch.Tensor:
        """Return the tokens that follow one further token of each sample, as :meth:`next_tokens`.

        Args:
            cache: has all that comes before.
            tokens, positions: see :meth:`.KeyValueCache.logits`.
            choice, names: see :func:`.next_tokens.next_tokens`.
        """
        rows = cache.logits(tokens.to(self.device), positions)
        owned = torch.ones(len(rows), dtype=torch.bool, device=self.device)
        return next_tokens(rows, owned, self.groups, choice, names)

    def _logits(self, inputs: Mapping[str, Any]) -> list[torch.Tensor]:
        """This rank's logits of one microbatch, on the last stage."""
        # Virtual stages work on as many microbatches as there are stages; one answer is enough.
        virtual = self.model.config.virtual_pipeline_model_parallel_size
        count = self.groups.pp.size() if virtual else 1
        return self.schedule(iter([inputs] * count), count, forward_only=True)

    def parts(self) -> dict[str, tuple[int, int]]:
        """Return by module which part of the samples this rank has: (DP rank, DP size)."""
        groups = self.built.collections
        return {name: (each.dp.rank(), each.dp.size()) for name, each in groups.items()}


class Trainer(Runner):
    """Steps a :class:`BuiltModel` over data; a subclass says what a microbatch is.

    Args:
        built: the model.
        options: of the optimizer and the schedule.
        distributed_optimizer: shard the optimizer state over DP.

    Attributes:
        plans: of the routed bridges.
    """

    def __init__(
        self, built: BuiltModel, options: TrainOptions, distributed_optimizer: bool
    ) -> None:
        super().__init__(built, options)
        self.plans = RoutePlans(self.model, self.multiple)
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
            options.groups,
            built.named_parameters() if options.groups else None,
        )
        self.scheduler = self._make_scheduler()
        config = self.model.config
        config.finalize_model_grads_func = built.finalize
        config.no_sync_func = self.model.no_sync
        # Weak: through the distributed optimizer's views of the parameters, autograd's C++ holds
        # the configuration, and Python's collector would never see that nobody needs them.
        scale_loss = weakref.WeakMethod(self.optimizer.scale_loss)
        config.grad_scale_func = lambda loss: cast(Any, scale_loss())(loss)

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

    def microbatches(self, data: Any, step: int) -> Iterator[Mapping[str, Any]]:
        """Yield what the model is called with in each of a step's microbatches.

        Args:
            data: as :meth:`step` was given it.
            step: from 0.

        Raises:
            NotImplementedError: always; a subclass says it.
        """
        raise NotImplementedError(f"{type(self).__name__} has no microbatches for {data}, {step}")

    def gradients(self, data: Any, step: int) -> tuple[float, int]:
        """Run forward and backward of ``step`` and finalise gradients.

        Returns:
            The loss, a mean over the global batch, and the counted tokens; the same on every rank.
        """
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        outputs = self.schedule(self.microbatches(data, step), self.options.micro_batches)
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        if outputs:
            sums = torch.stack(outputs).sum(dim=0)
        loss_sum, tokens = self.summed(sums)
        return loss_sum / max(tokens, 1.0), round(tokens)

    def summed(self, sums: torch.Tensor) -> list[float]:
        """Return a step's loss and counted tokens, summed over the ranks; the same on every rank.

        Args:
            sums: of this rank, float64 ``(2,)``; zeros on stages before the last.
        """
        dist.all_reduce(sums, group=self.groups.dp_cp)
        return self.from_last_stage(sums).tolist()

    def step(self, data: Any, step: int) -> StepResult:
        """Make one training step.

        Args:
            data: for :meth:`microbatches`.
            step: from 0.
        """
        phases.at_step(step + 1)  # as the console counts them
        self.model.train()
        loss, tokens = self.gradients(data, step)
        learning_rate = float(self.scheduler.get_lr({}))
        rates = self.optimizer.learning_rates()
        success, grad_norm, _ = self.optimizer.step()
        if success:
            self.scheduler.step(increment=1)
        norm = float("nan") if grad_norm is None else grad_norm
        result = StepResult(loss, norm, tokens, learning_rate, success, learning_rates=rates)
        return result if success else self._explain(result, data, step)

    def _explain(self, result: StepResult, data: Any, step: int) -> StepResult:
        """The result of a skipped step with what was not finite; all ranks together."""
        optimizer, said = self.optimizer, []
        # TP ranks compute the loss each, so one of them may be alone with what it has.
        losses = torch.full((), result.loss, dtype=torch.float64, device=self.device)
        dist.all_reduce(losses)
        result = replace(result, loss=result.loss if losses.isfinite() else math.nan)
        if not math.isfinite(result.loss):
            outputs = self._nonfinite_outputs(data, step)
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
    def _nonfinite_outputs(self, data: Any, step: int) -> dict[str, tuple[int, ...]]:
        """Modules with such outputs, and on which ranks, in another forward pass of the step."""
        self.model.eval()  # no dropout: random states stay as they are
        inputs, count = self.microbatches(data, step), self.options.micro_batches
        return find_nonfinite_outputs(
            iter_modules(self.model), lambda: self.schedule(inputs, count, forward_only=True)
        )
