# SPDX-License-Identifier: Apache-2.0
"""Hugging Face's own models against ours, built from the folders that they save.

A :class:`Task` is a tiny model of a real class with every parameter drawn at random, and one batch.
:func:`oracle` runs transformers on the whole batch in one process; :func:`compare` runs ours in any
layout. Gradients are compared under the names and shapes that the folder has: those of
transformers are put in the place of its weights and saved, those of ours go back through the table.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.models.mimo.gradients.finalize import iter_modules
from megatron.core.models.mimo.huggingface.build import BuildOptions, ImportedModel, from_folder
from megatron.core.models.mimo.huggingface.cuts import Run
from megatron.core.models.mimo.huggingface.export import to_folder
from megatron.core.models.mimo.huggingface.folder import ModelFolder
from megatron.core.models.mimo.huggingface.weights import Held, held_by
from megatron.core.models.mimo.job.built_model import LANGUAGE
from megatron.core.models.mimo.job.logits import gather
from megatron.core.models.mimo.job.packing import packed_inputs
from megatron.core.models.mimo.job.trainer import Trainer, TrainOptions
from megatron.core.models.mimo.wrappers import is_torch_native
from mimo_colocated.launch.layouts import Layout

LOGITS = 1e-5
"""Bound of |difference| over the largest |logit|; fp32 rounding of a few layers is 1e-6."""
GRADIENTS = 1e-5
"""Bound of the norm of a difference over the norm of the gradient."""
BF16_TIMES = 4.0
"""Bound in bf16: so many times transformers' own error in bf16. Both round in other places, and
sums over TP round once more. The worst row is at 2.4; a wrong layer is at 20 and more."""
CHANGE = 1e-3
"""What a control adds to one weight."""

Samples = range
"""Numbers of samples of the whole batch, those of one replica."""


@dataclass
class Task:
    """A model, and a batch for it.

    Attributes:
        model: transformers' own, random weights.
        input_ids: ``(B, S)``.
        loss_mask: ``(B, S)``; weights of token losses. Padding has none.
        position_ids: ``(B, S)`` or ``(3, B, S)``.
        lengths: tokens of each sample that are no padding; ``S`` each by default.
        items: modality -> from a replica's samples to the encoder's inputs of its items, None
            without any: what ``modality_inputs`` has under the modality.
        theirs: from nothing to the further inputs of transformers' model for the whole batch.
    """

    model: nn.Module
    input_ids: Tensor
    loss_mask: Tensor
    position_ids: Tensor
    lengths: list[int] = field(default_factory=list)
    items: Mapping[str, Callable[[Samples], Any]] = field(default_factory=dict)
    theirs: Callable[[], dict[str, Any]] = dict

    def __post_init__(self) -> None:
        self.lengths = self.lengths or [self.input_ids.shape[1]] * len(self.input_ids)

    @property
    def labels(self) -> Tensor:
        """The next token of each."""
        return self.input_ids.roll(-1, dims=1)


@dataclass(frozen=True)
class Case:
    """A layout and how the model runs in it.

    Attributes:
        language: layout of the language model.
        encoders: modality -> layout.
        settings: of :class:`BuildOptions`.
    """

    language: Layout
    encoders: Mapping[str, Layout] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def layouts(self) -> dict[str, Layout]:
        """All of them."""
        return {**self.encoders, LANGUAGE: self.language}

    def __str__(self) -> str:
        layouts = " ".join(f"{name} {layout}" for name, layout in self.layouts.items())
        return f"{layouts} {' '.join(f'{k}={v}' for k, v in self.settings.items())}"


@dataclass
class Oracle:
    """What transformers has to say of a task.

    Attributes:
        logits: ``(B, S, V)``.
        gradients: name in the folder -> gradient; none of parameters that took no part.
        loss: mean over the mask's weights.
    """

    logits: Tensor
    gradients: dict[str, Tensor]
    loss: float


def randomise(model: nn.Module, seed: int, scale: float = 0.2) -> nn.Module:
    """Draw every parameter anew, so that none is zero or one; norms stay around one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator) * scale
            norm = parameter.ndim == 1 and name.endswith("weight")
            parameter.copy_(1.0 + drawn if norm else drawn)
    return model.eval()


def text_task(model: nn.Module, vocabulary: int, batch: int = 4, length: int = 16) -> Task:
    """A batch of text for a language model; lengths, mask and tokens differ by sample."""
    generator = torch.Generator().manual_seed(3)
    input_ids = torch.randint(0, vocabulary, (batch, length), generator=generator)
    loss_mask = (torch.rand(batch, length, generator=generator) < 0.7).float()
    lengths = [length - 3 * (sample % 3) for sample in range(batch)]
    for sample, own in enumerate(lengths):
        loss_mask[sample, own - 1 :] = 0
    positions = torch.arange(length).expand(batch, length)
    return Task(model, input_ids, loss_mask, positions, lengths)


def oracle(task: Task, scratch: Path) -> Oracle:
    """Run transformers on the whole batch.

    Args:
        task: what to run.
        scratch: folder for the gradients, which are saved as if they were weights.
    """
    task.model.zero_grad()
    logits = task.model(input_ids=task.input_ids, **task.theirs()).logits.float()
    losses = nn.functional.cross_entropy(logits.transpose(1, 2), task.labels, reduction="none")
    loss = (losses * task.loss_mask).sum() / task.loss_mask.sum()
    loss.backward()
    weights = {name: p.detach().clone() for name, p in task.model.named_parameters()}
    trained = set()
    with torch.no_grad():
        for name, parameter in task.model.named_parameters():
            if parameter.grad is not None:
                trained.add(name)
            parameter.copy_(
                torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            )
        task.model.save_pretrained(scratch)
        for name, parameter in task.model.named_parameters():
            parameter.copy_(weights[name])
    return Oracle(logits.detach(), whole_folder(scratch), loss.item())


@torch.no_grad()
def bf16_error(task: Task, expected: Oracle) -> float:
    """The error of transformers' own logits in bf16 against those in fp32."""
    halved = copy.deepcopy(task.model).to(torch.bfloat16)
    found = halved(input_ids=task.input_ids, **task.theirs()).logits
    return logits_error(found, expected, task, norm=has_experts(task.model))


def has_experts(model: Any) -> bool:
    """Whether rounding may send a token to another expert: a jump, wherever it is rounded."""
    config = model.config.get_text_config()
    return any(hasattr(config, name) for name in ("num_experts", "num_local_experts"))


def whole_folder(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder."""
    with ModelFolder(folder) as opened:
        return {name: opened.read(name) for name in opened.tensors}


class HarnessTrainer(Trainer):
    """Steps over a task's one batch."""

    def samples(self, module: str) -> Samples:
        """The samples of this rank's replica of a module."""
        rank, size = self.parts()[module]
        each = self.batch // size
        return range(rank * each, (rank + 1) * each)

    def microbatches(self, data: Task, step: int) -> Iterator[Mapping[str, Any]]:
        yield self.inputs(data, training=True)

    def inputs(self, task: Task, *, training: bool) -> dict[str, Any]:
        """What the model is called with on this rank."""
        own = slice((mine := self.samples(LANGUAGE)).start, mine.stop)
        inputs: dict[str, Any] = {
            "input_ids": task.input_ids[own],
            "position_ids": task.position_ids[..., own, :],
            "labels": task.labels[own] if training else None,
            "loss_mask": task.loss_mask[own] if training else None,
        }
        if self.packed:
            inputs = self._packed(inputs, task.lengths[own])
        encoded = {name: of(self.samples(name)) for name, of in task.items.items()}
        return {**inputs, "modality_inputs": encoded or None}

    def _packed(self, inputs: dict[str, Any], lengths: list[int]) -> dict[str, Any]:
        positions = inputs.pop("position_ids")
        if positions.ndim == 2:
            return packed_inputs({**inputs, "position_ids": positions}, lengths, self.multiple)
        each = [packed_inputs({"x": axis}, lengths, self.multiple)["x"] for axis in positions]
        made = packed_inputs(inputs, lengths, self.multiple)
        return {**made, "position_ids": torch.stack(each)}

    @property
    def batch(self) -> int:
        """Samples over all replicas."""
        return self.options.global_batch_size


def built_case(
    folder: Path, case: Case, tick: Callable[[int], None] = lambda _size: None
) -> ImportedModel:
    """A model in a case's layouts, whose gradients are whole after the step."""
    plain = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, overlap_grad_reduce=False, check_for_nan_in_grad=False
    )
    options = BuildOptions(ddp=plain, **case.settings)
    return from_folder(folder, case.layouts, options, tick=tick)


def trainer_of(built: ImportedModel, task: Task) -> HarnessTrainer:
    """Steps of a built model over a task's batch."""
    options = TrainOptions(steps=10, global_batch_size=len(task.input_ids), warmup_steps=0)
    return HarnessTrainer(built, options, distributed_optimizer=False)


def logits_of(trainer: HarnessTrainer, task: Task) -> Tensor:
    """``(B, S, V)`` of the whole batch on every rank; a sample's padding is not to be read."""
    trainer.model.eval()
    inputs = trainer.inputs(task, training=False)
    own = trainer.samples(LANGUAGE)
    vocabulary = (
        trainer.built.parts[0].modules[0].vocab_size if trainer.built.parts[0].modules else 0
    )
    shape = (len(own), task.input_ids.shape[1], vocabulary)
    lengths = [task.lengths[sample] for sample in own]
    return gather(trainer.whole_logits(inputs, lengths, shape), trainer.groups.dp, dim=0)


def logits_error(found: Tensor, expected: Oracle, task: Task, *, norm: bool = False) -> float:
    """Largest |difference| over the largest |logit|, of tokens that are no padding.

    With ``norm`` the norm of the difference over the norm of the logits: of bf16 with experts,
    where the largest difference is that of whichever token goes to another expert.
    """
    real = expected.logits.shape[-1]
    there = torch.zeros_like(task.loss_mask, dtype=torch.bool)
    for sample, length in enumerate(task.lengths):
        there[sample, :length] = True
    difference = (found[..., :real].float() - expected.logits)[there]
    if norm:
        return (difference.norm() / expected.logits[there].norm()).item()
    return (difference.abs().max() / expected.logits.abs().max()).item()


def gradients_of(built: ImportedModel) -> dict[str, Tensor] | None:
    """Every gradient under its name in the folder, on rank 0; None on the others."""
    with ModelFolder(built.source) as folder:
        described = folder.tensors
        pieces = list(_native_pieces(built))
        for held in held_by(built.parts):
            if not hasattr(held.parameter, "main_grad"):  # whole, of a torch-native module
                continue
            if held.first_copy and held.parameter.requires_grad:
                for run in held.runs(described):
                    name = held.source.names[run.source]
                    where = held.where(run, described[name])
                    pieces.append((name, where, _gradient(held, run).clone()))
        return assembled(pieces, {name: d.shape for name, d in described.items()})


def _native_pieces(built: ImportedModel) -> Iterator[tuple[str, tuple[slice, ...], Tensor]]:
    """(name, place, gradient) of this rank's parts of torch-native modules."""
    tables = {part.name: part.table for part in built.parts}
    for name, module in iter_modules(built.model):
        if not is_torch_native(module):
            continue
        for ours, plain in module.local_shards.named_parameters():
            if plain.requires_grad:
                source = tables[name].find(ours)
                yield source.names[0], module.local_shards.places[ours].slices(), plain.main_grad


def _gradient(held: Held, run: Run) -> Tensor:
    return held.view(run, held.parameter.main_grad)


@dataclass(frozen=True)
class Found:
    """Errors of a model in a layout, the same on all ranks.

    Attributes:
        logits: of :func:`logits_error`.
        bound: that holds for them, by the dtype.
        gradient: the worst of :func:`gradient_errors`.
        tensor: whose it is.
    """

    logits: float
    bound: float
    gradient: float
    tensor: str


def compared(task: Task, case: Case, folder: Path) -> tuple[ImportedModel, Found]:
    """Save a task's model, build it in a case's layouts, and compare; all ranks call it together.

    Args:
        task: what to compare.
        case: the layouts.
        folder: that all ranks see; the model is saved below it as ``model``.

    Returns:
        The model, for the caller to destroy, and its errors.
    """
    expected, found = None, None
    if dist.get_rank() == 0:
        task.model.save_pretrained(folder / "model")
        expected = oracle(task, folder / "gradients")
    dist.barrier()
    built = built_case(folder / "model", case)
    trainer = trainer_of(built, task)
    logits = logits_of(trainer, task)
    trainer.model.train()
    trainer.gradients(task, 0)
    gradients = gradients_of(built)
    if expected is not None:
        bound, norm = LOGITS, False
        if case.settings.get("dtype") is torch.bfloat16:
            bound, norm = BF16_TIMES * bf16_error(task, expected), has_experts(task.model)
        tensor, gradient = worst(gradient_errors(gradients, expected.gradients))
        error = logits_error(logits, expected, task, norm=norm)
        found = Found(error, bound, gradient, tensor)
    return built, agreed(found)


def changed_by_a_round_trip(built: ImportedModel, folder: Path) -> list[str]:
    """Tensors that come back otherwise than they were; all ranks call it together.

    Args:
        built: of :func:`compared`.
        folder: as given there; the export goes below it.
    """
    to_folder(built, folder / "out")
    changed = None
    if dist.get_rank() == 0:
        changed = differing(whole_folder(folder / "model"), whole_folder(folder / "out"))
    return agreed(changed)


def differing(
    before: Mapping[str, Tensor], after: Mapping[str, Tensor], bound: float = 0.0
) -> list[str]:
    """Return the names of tensors whose difference is above the bound.

    Args:
        before, after: the tensors of two folders.
        bound: of the difference's norm over the norm; with 0 every byte counts.
    """
    assert before.keys() == after.keys()
    return [
        name
        for name, one in before.items()
        if not torch.equal(one, after[name])
        and not (bound and (one - after[name]).norm() <= bound * one.norm())
    ]


def assembled(
    pieces: list[tuple[str, tuple[slice, ...], Tensor]], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Tensor] | None:
    """Put pieces of all ranks into whole tensors, on rank 0."""
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.gather_object(pieces, everywhere if dist.get_rank() == 0 else None)
    if dist.get_rank() != 0:
        return None
    whole: dict[str, Tensor] = {}
    for name, where, piece in (each for rank in everywhere for each in rank):
        if name not in whole:
            whole[name] = torch.full(shapes[name], torch.nan)
        whole[name][where] = piece.float()
    return whole


def gradient_errors(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> dict[str, float]:
    """Norm of the difference over the norm, by name; nan where an element is missing.

    A tensor that the model has no place for (an unused layer) must have no gradient either.
    """
    errors = {}
    for name, reference in expected.items():
        if name not in found:
            errors[name] = 0.0 if not reference.any() else float("nan")
            continue
        norm = _norm(name, expected)
        errors[name] = ((found[name] - reference).norm() / norm).item()
    return errors


def _norm(name: str, expected: Mapping[str, Tensor]) -> float:
    """What a difference is measured by.

    Without rotary embeddings attention does not depend on the keys' bias, whose gradient is then
    rounding alone: it is measured by the gradient of the queries' bias.
    """
    norm = expected[name].norm().item()
    queries = expected.get(name.replace("k_proj.bias", "q_proj.bias"), expected[name])
    if norm < 1e-4 * queries.norm().item():
        return queries.norm().item()
    return norm or 1.0


def agreed(value: Any) -> Any:
    """Rank 0's value, on all ranks, so that they fail together."""
    told = [value]
    dist.broadcast_object_list(told, src=0)
    return told[0]


def worst(errors: Mapping[str, float]) -> tuple[str, float]:
    """The largest error and its tensor; nan is the largest of all."""
    return max(errors.items(), key=lambda item: float("inf") if item[1] != item[1] else item[1])


def change_one(built: ImportedModel, ours: str, at: tuple[int, ...], by: float) -> bool:
    """Add to one element of a weight on every rank that holds it: a control's deliberate error.

    Args:
        built: the model.
        ours: end of the parameter's global name.
        at: its element on the first rank of those that share it.
        by: how much.

    Returns:
        Whether any rank holds such a weight.
    """
    found = False
    with torch.no_grad():
        for held in held_by(built.parts):
            if held.name.endswith(ours) and held.shard.rank == 0:
                held.parameter[at] += by
                found = True
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, found)
    return any(everywhere)


def saved_as_copies(built: ImportedModel) -> list[str]:
    """Weights of encoders that are cut over TP and that a checkpoint would take for whole ones."""
    wrong = []
    for part in built.parts[1:]:
        for module in part.modules if part.groups.tp.size() > 1 else ():
            for each in module.sharded_state_dict().values():
                weight = each.data if isinstance(each, ShardedTensor) else None
                cut = getattr(weight, "tensor_model_parallel", False)
                if cut and tuple(each.global_shape[-weight.ndim :]) == tuple(weight.shape):
                    wrong.append(each.key)
    return wrong
