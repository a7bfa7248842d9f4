# SPDX-License-Identifier: Apache-2.0
"""A step of a model whose language model has pipeline stages, in three phases.

1. The encoders run forward on all microbatches, on every rank; one exchange brings their rows to
   the ranks of the first language stage.
2. Megatron-Core's own schedule (1F1B, interleaved with virtual stages) runs the language stages
   on all microbatches. The encoders' rows are leaves there, whose gradients are kept.
3. One exchange brings the gradients back and the encoders run backward.

Then gradients are finalised, once, for all modules. With ``encode_ahead`` the phases alternate
instead: a few microbatches are encoded at a time, and their gradients go back as soon as the first
stage has all of them, so that what the encoders keep does not grow with the microbatches. With
``encode_in_bubbles`` the last microbatches are encoded while a stage waits for others. With one
stage the exchanges then run beside the language model: rows and gradients of other microbatches are
on their way while it works on one.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from megatron.core.enums import ModelType
from megatron.core.models.mimo.comm.plan_guard import problem_of
from megatron.core.models.mimo.memory.layer_recompute import gradients_come_apart
from megatron.core.models.mimo.model.base import MimoModel
from megatron.core.models.mimo.model.ddp_methods import first_microbatch_layers
from megatron.core.models.mimo.model.encoded import EncodedMicrobatch, EncodedMicrobatches
from megatron.core.models.mimo.model.later import LaterMicrobatches
from megatron.core.models.mimo.model.no_samples import (
    padded_shape,
    padding_for,
    padding_problem,
)
from megatron.core.models.mimo.pipeline.between_stages import EncodingP2P, NotedP2P
from megatron.core.models.mimo.pipeline.checks import check_bubbles, check_step
from megatron.core.models.mimo.pipeline.windows import Windows, before_the_first_input
from megatron.core.pipeline_parallel.schedules import (
    forward_backward_no_pipelining,
    forward_backward_pipelining_with_interleaving,
    forward_backward_pipelining_without_interleaving,
)
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.utils import unwrap_model
from mimo_colocated import phases

# The argument of a stage's forward that stands for the encoders' inputs.
ENCODED = "encoded"
_READ_BY_ENCODERS = ("modality_inputs", "route_plan")

Microbatch = Mapping[str, Any]


def forward_backward_pipelined(
    *,
    forward_step_func: Callable[..., Any],
    data_iterator: Iterator[Microbatch],
    model: MimoModel | Sequence[MimoModel],
    num_microbatches: int,
    pg_collection: ProcessGroupCollection,
    encode_ahead: int | None = None,
    encode_in_bubbles: int = 0,
    forward_only: bool = False,
    collect_non_loss_data: bool = False,
    force_all_reduce: bool = False,
) -> list[Any]:
    """Forward, backward and finalised gradients of one step; takes a schedule's place.

    Every rank calls it together. The language model may have one stage, too.

    Args:
        forward_step_func: as for Megatron-Core's schedules: ``(data_iterator, model)`` ->
            ``(output, loss_func)``. It hands on what it gets: ``model(**next(data_iterator))``
            returns (output, CP-local loss mask). On all but the last stage the output is for the
            next stage, and ``loss_func`` is not called. The sum of token weights that it returns
            may have fractions, which Megatron-Core's schedules by themselves refuse.
        data_iterator: microbatches of this rank: ``MimoModel.forward``'s keyword arguments by
            name. The language side's are those of the rank's language replica, on every stage;
            ``modality_inputs`` those of its encoder replica. All have the same shape of
            ``input_ids``, unless the language config has ``variable_seq_lengths``.
        model: the ``MimoModel``, its modules wrapped in DDP or bare.
        num_microbatches: how many to take from the iterator.
        pg_collection: the language model's groups.
        encode_ahead: with ``p > 1`` stages, microbatches that are encoded together; encoder
            activations of at most ``p - 2 + 2 * encode_ahead`` microbatches are kept at a time.
            With one stage, microbatches that are encoded and sent off before the language model
            needs them; those of at most ``encode_ahead + 2`` are kept. ``None`` encodes all of the
            step together, which virtual stages need.
        encode_in_bubbles: of ``p > 1`` stages, how many of the step's last microbatches are
            encoded while a stage waits for the others to fill the pipeline, at most
            ``num_microbatches - p``. They need route plans made ahead. It fits in the bubbles
            where encoding them takes no longer than ``p - 1`` forward passes of a stage. In
            evaluation, whose first stage never waits, all are encoded before, as with 0.
        forward_only: for evaluation: no backward, no gradients.
        collect_non_loss_data: as for the schedules.
        force_all_reduce: handed on to ``finalize_model_grads_func``.

    Returns:
        What ``loss_func`` reported for each microbatch, on ranks of the last stage; else nothing.

    Raises:
        ValueError: arguments that do not fit the model; on every rank, naming the rank: too few
            microbatches, an iterator that raised, microbatches of different shapes; what the
            routed bridge refuses.
    """
    (mimo,) = model if isinstance(model, Sequence) else (model,)
    mimo = unwrap_model(mimo)
    check_step(mimo, num_microbatches, pg_collection, encode_ahead)
    backward = not forward_only and torch.is_grad_enabled()
    counted: list[torch.Tensor | None] = []
    fractions: list[torch.Tensor] = []
    config = _schedule_config(mimo, counted, backward)
    windows = Windows.of(num_microbatches, pg_collection.pp.size(), encode_ahead)
    check_bubbles(mimo, num_microbatches, pg_collection, encode_ahead, encode_in_bubbles)
    later = encode_in_bubbles if backward else 0
    share = before_the_first_input(later, pg_collection.pp.rank(), pg_collection.pp.size())
    encoders = _Encoders(mimo, data_iterator, windows, backward, later, share)
    encoders.ask(0)
    samples, length = encoders.shape
    schedule, keywords = _schedule(mimo, encoders, config, pg_collection)
    with torch.set_grad_enabled(backward), encoders.settled():
        reports = schedule(
            forward_step_func=_counting(forward_step_func, fractions),
            model=[LanguageStage(mimo, stage, config) for stage in mimo.language_stages()],
            num_microbatches=num_microbatches,
            seq_length=length,
            micro_batch_size=samples,
            forward_only=not backward,
            collect_non_loss_data=collect_non_loss_data,
            pg_collection=pg_collection,
            **keywords,
        )
    encoders.finish()
    mimo.finish_param_gathers()
    if backward and mimo.config.finalize_model_grads_func is not None:
        if fractions:
            counted = [sum(fractions, tokens.double()) for tokens in counted if tokens is not None]
        mimo.config.finalize_model_grads_func(
            [mimo], *counted, pg_collection=pg_collection, force_all_reduce=force_all_reduce
        )
    return reports


def _counting(
    forward_step_func: Callable[..., Any], fractions: list[torch.Tensor]
) -> Callable[..., Any]:
    """The user's function, of whose token counts those in a float dtype go to ``fractions``.

    Schedules add counts up in an int tensor, which raises on the last stage alone where a count is
    a float, while the other stages wait for it.
    """

    def forward_step(*args: Any, **kwargs: Any) -> tuple[Any, Callable[..., Any]]:
        output, loss_func = forward_step_func(*args, **kwargs)

        def counted_loss(*args: Any, **kwargs: Any) -> Any:
            found = loss_func(*args, **kwargs)
            if not (isinstance(found, tuple) and len(found) == len(("loss", "tokens", "report"))):
                return found
            loss, tokens, report = found
            if torch.is_tensor(tokens) and tokens.is_floating_point():
                fractions.append(tokens.detach())
                tokens = torch.zeros_like(tokens, dtype=torch.int)
            return loss, tokens, report

        return output, counted_loss

    return forward_step


def _schedule(
    mimo: MimoModel, encoders: _Encoders, config: Any, groups: ProcessGroupCollection
) -> tuple[Callable[..., list[Any]], dict[str, Any]]:
    """Megatron-Core's schedule for the model's stages, and what else it is called with."""
    virtual = len(mimo.language_stages())
    if virtual > 1:
        # Its first stage begins microbatches in groups, so all of them were encoded before.
        return forward_backward_pipelining_with_interleaving, {
            "data_iterator": encoders.batches_for(virtual),
            "p2p_communicator": NotedP2P(groups.pp, config),
        }
    if groups.pp.size() > 1:
        return forward_backward_pipelining_without_interleaving, {
            "data_iterator": encoders.batches(ask=False),
            "p2p_communicator": EncodingP2P(groups.pp, config, encoders),
        }
    return forward_backward_no_pipelining, {"data_iterator": encoders.batches(ask=True)}


class LanguageStage(MegatronModule):
    """One stage of the language model, as Megatron-Core's schedules call it.

    Args:
        model: the whole model.
        stage: the part of its language model, bare or wrapped.
        config: the schedule's.
    """

    model_type = ModelType.encoder_or_decoder

    def __init__(self, model: MimoModel, stage: nn.Module, config: Any) -> None:
        super().__init__(config)
        # Schedules look through ``module`` for what they do not find here.
        self.module = stage
        self.vp_stage = getattr(unwrap_model(stage), "vp_stage", None)
        self._model = (model,)  # in a tuple: it is no part of the stage

    def set_input_tensor(self, input_tensor: Any) -> None:
        """Hand what came from the stage before to the stage; one that is alone may not ask."""
        stage = unwrap_model(self.module)
        if hasattr(stage, "set_input_tensor"):
            stage.set_input_tensor(input_tensor)

    def forward(self, **batch: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See :meth:`.StageSide.forward_stage`."""
        return self._model[0].forward_stage(self.module, batch.pop(ENCODED), **batch)


class _Encoders:
    """The encoders' share of a step: windows of microbatches, encoded and taken back in time.

    All ranks ask for microbatch 0, 1, ... in turn, each before it does anything for it: see
    :meth:`ask`. Before 1F1B lets the first of ``p`` stages begin microbatch ``n``, that stage has
    run backward on all up to ``n - p``, so windows that end there go back then. Every rank asks
    before it waits for the stage before it to send microbatch ``n``, and everything that another
    rank waits for until it asks as well has been sent by then; so nobody waits in vain.

    Windows that are encoded ahead leave their exchange running, and so do the gradients that go
    back then: they are waited for when the next window is asked for.

    The ``later`` last microbatches of a step that is one window are encoded in bubbles, of them
    ``before_input`` before this stage's first input.
    """

    def __init__(
        self,
        model: MimoModel,
        data: Iterator[Microbatch],
        windows: Windows,
        backward: bool,
        later: int = 0,
        before_input: int = 0,
    ) -> None:
        self._model, self._data, self._windows = model, data, windows
        self._later, self._before_input = later, before_input
        self._in_bubbles: LaterMicrobatches | None = None
        self._count, self._window, self._backward = windows.count, windows.size, backward
        # Microbatches go back together, the first one last: none may overwrite the others' sum, as
        # Transformer Engine has the first one do where its kernels add to gradients.
        for module in model.modality_submodules.values():
            for _, part in first_microbatch_layers(module):
                part.is_first_microbatch = False
        # A stage has to know the shape that it receives; one alone receives nothing.
        self._variable = bool(model.config.variable_seq_lengths) or windows.stages == 1
        self._language: dict[int, dict[str, Any]] = {}
        self._sent: list[tuple[list[Microbatch], EncodedMicrobatches]] = []  # of further windows
        self._under_way: dict[int, EncodedMicrobatches] = {}
        self._asked = self._encoded = 0
        self._empty: dict[int, tuple[int, ...]] = {}
        self.shape: Any = None  # (samples, tokens) of the first microbatch that has any

    def ask(self, number: int) -> None:
        """To be called before microbatch ``number``; runs encoders where it is their turn."""
        if self._in_bubbles is not None and number == self._count - self._later:
            self._hand_on(number, self._in_bubbles.land())
        window = number // self._window
        if window != self._asked:
            return
        self._asked += 1
        done = window - 1 - self._windows.lag
        if self._windows.ahead:
            self._send_back(done)
            done -= 1
        self._take_back(done)
        while self._encoded < self._windows.upto(window):
            self._encode(self._encoded)
            self._encoded += 1
        self._land(window)

    def encode_later(self, *, first_wait: bool) -> None:
        """Encode what is left for bubbles: this stage's share before its first input, or all."""
        if self._in_bubbles is not None:
            with torch.set_grad_enabled(self._backward):
                self._in_bubbles.encode(self._before_input if first_wait else self._later)

    def send_later(self) -> None:
        """Send off the rows of what was left for bubbles; nothing waits for them."""
        if self._in_bubbles is not None:
            self._in_bubbles.send()

    def settled(self) -> AbstractContextManager[Any]:
        """Return a context at whose end ranks hear how encoders did on what was left."""
        return nullcontext() if self._in_bubbles is None else self._in_bubbles.settled()

    def batches(self, *, ask: bool) -> Iterator[dict[str, Any]]:
        """The language side of every microbatch; with ``ask`` each is asked for before."""
        for number in range(self._count):
            if ask:
                self.ask(number)
            yield self._language.pop(number)

    def batches_for(self, chunks: int) -> list[Iterator[dict[str, Any]]]:
        """The same for every virtual stage, of a step that was encoded as a whole."""
        batches = list(self.batches(ask=False))
        return [map(dict, batches) for _ in range(chunks)]

    def finish(self) -> None:
        """Take back what is still under way."""
        under_way = sorted(self._under_way)
        for window in under_way:
            self._send_back(window)
        for window in under_way:
            self._take_back(window)

    def _encode(self, window: int) -> None:
        first = window * self._window
        batches, problem = self._read(first, min(self._window, self._count - first))
        with torch.set_grad_enabled(self._backward):
            encoded = self._model.encode_microbatches(batches, problem, self._later)
        self._in_bubbles = encoded.later
        self._sent.append((batches, encoded))
        if self._backward:
            self._under_way[window] = encoded

    def _land(self, window: int) -> None:
        """The language model is to begin with a window, so its rows have to be there."""
        batches, encoded = self._sent.pop(0)
        first = window * self._window
        for number, batch in enumerate(batches, first):
            self._language[number] = {k: v for k, v in batch.items() if k not in _READ_BY_ENCODERS}
        self._hand_on(first, encoded.microbatches)

    def _hand_on(self, first: int, encoded: Sequence[EncodedMicrobatch]) -> None:
        """Rows have landed: the language model gets them with the rest of their microbatch."""
        for number, rows in enumerate(encoded, first):
            empty = self._empty.pop(number, None)
            self._language[number][ENCODED] = replace(rows, number=number, stands_for=empty)

    def _send_back(self, window: int) -> None:
        encoded = self._under_way.get(window)
        if encoded is not None:
            encoded.send_back()

    def _take_back(self, window: int) -> None:
        encoded = self._under_way.pop(window, None)
        if encoded is None:
            return
        last = (window + 1) * self._window >= self._count
        modules = self._model.modality_submodules
        # DDP knows a gradient to be whole by how often it came in the first step. Recomputed layers
        # give it once per microbatch with images and gather bridges once per microbatch, of which
        # later windows may have more or fewer. So they are counted afterwards.
        late = [
            name
            for name, module in modules.items()
            if name in encoded.backward_per_microbatch or gradients_come_apart(module)
        ]
        with _no_sync([modules[name] for name in modules if not last or name in late]):
            encoded.backward()
        for name in late if last else ():
            self._model.give_zero_gradients(name)

    def _read(self, first: int, count: int) -> tuple[list[Microbatch], str | None]:
        """(the next microbatches, what is wrong with them); every rank hears what is wrong."""
        batches: list[Microbatch] = []
        try:
            self._data = iter(self._data)
            with phases.during(phases.DATA):
                batches += itertools.islice(self._data, count)
            batches = self._padded(first, batches)
            shapes = [tuple(batch["input_ids"].shape) for batch in batches]
        except Exception as error:  # the user's loader
            problem = problem_of(error, "reading data_iterator")
            if problem is None:
                raise
            return batches, problem
        if len(batches) < count:
            return batches, (
                f"data_iterator ended before {self._count} microbatches were read; give as many "
                "as num_microbatches"
            )
        self.shape = self.shape or shapes[0]
        other = [shape for shape in shapes if shape != self.shape]
        if other and not self._variable:
            return batches, (
                f"microbatches of a pipelined step must have one shape, got input_ids {other[0]} "
                f"after {self.shape}; pad them, or set variable_seq_lengths in the language config"
            )
        return batches, None


    def _padded(self, first: int, batches: list[Microbatch]) -> list[Microbatch]:
        """Padding of the step's shape in the place of microbatches without samples."""
        ids = [batch["input_ids"] for batch in batches]
        shapes = [tuple(each.shape) for each in ids if each.numel()]
        made = list(batches)
        for number, (batch, each) in enumerate(zip(batches, ids, strict=True)):
            if each.numel() == 0:
                problem = padding_problem(self._model)
                if problem is not None:
                    raise ValueError(problem)
                default = padded_shape(self._model, each)
                shape = self.shape or next(iter(shapes), default)
                made[number] = padding_for(self._model, batch, shape)
                self._empty[first + number] = tuple(each.shape)
        return made


@contextmanager
def _no_sync(modules: Any) -> Iterator[None]:
    """Gradients only accumulate inside: modules that reduce in backward wait."""
    with ExitStack() as stack:
        for module in modules:
            if getattr(getattr(module, "ddp_config", None), "overlap_grad_reduce", False):
                stack.enter_context(module.no_sync())
        yield


def _schedule_config(mimo: MimoModel, counted: list[torch.Tensor | None], backward: bool) -> Any:
    """The language config as the schedule is to have it.

    Gradients are finalised after phase 3, not by the schedule; it tells the counted tokens. The
    wrappers of the language model alone wait for its last microbatch, and start their gathers and
    reductions by themselves: functions of the whole model would start those of the encoders too.
    """
    config = copy.copy(mimo.config)

    def keep_tokens(_model: Any, num_tokens: torch.Tensor | None = None, **_: Any) -> None:
        counted.append(num_tokens)

    config.finalize_model_grads_func = keep_tokens
    config.no_sync_func = (lambda: _no_sync(mimo.language_stages())) if backward else None
    config.grad_sync_func = config.param_sync_func = None
    return config
