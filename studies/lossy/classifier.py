# SPDX-License-Identifier: Apache-2.0
"""Trains the GPT-2-shaped classifier over TP and DP, with or without lossy links.

Weights are drawn by Hugging Face from the cell's seed, so every TP size begins with the same model.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.mimo.lossy.install import LossyLinks, lossy_links
from megatron.core.models.mimo.lossy.spec import LossySpec
from megatron.core.models.mimo.training.groups import create_process_groups, make_grid
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from studies.lossy.digits import CLASSES, LENGTH, VOCABULARY, Digits, load
from studies.lossy.gpt2 import classifier

BATCH, LR, WARMUP = 64, 3e-3, 10
# GPT-2's own 0.02 is for widths of 768 and more; these sizes learn several times slower with it.
INITIAL = 0.08


@dataclass(frozen=True)
class Size:
    """Of the model."""

    width: int = 64
    layers: int = 2
    heads: int = 8


@dataclass
class Trained:
    """A run, all of it the same on every rank.

    Attributes:
        losses: of the steps, means over the global batch.
        curve: steps done -> held-out accuracy, evaluated without loss.
        accuracy, held_out_loss: at the end, evaluated without loss.
        accuracy_lossy: at the end, evaluated over the links as they are.
        rows: counts of all links of the training.
    """

    losses: list[float]
    curve: dict[int, float]
    accuracy: float
    held_out_loss: float
    accuracy_lossy: float
    rows: list[dict[str, Any]]


def reference(size: Size, seed: int) -> Any:
    """Return Hugging Face's model with drawn weights."""
    import transformers

    config = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=LENGTH,
        n_embd=size.width,
        n_layer=size.layers,
        n_head=size.heads,
        num_labels=CLASSES,
        initializer_range=INITIAL,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        pad_token_id=VOCABULARY - 1,  # no sample has it; without one Hugging Face takes no batch
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return transformers.GPT2ForSequenceClassification(config).eval()


@contextlib.contextmanager
def groups_of(tp: int) -> Iterator[ProcessGroupCollection]:
    """Groups of TP and DP over all ranks, gone afterwards."""
    grid = make_grid(tp=tp, dp=dist.get_world_size() // tp)
    groups = create_process_groups(grid)
    model_parallel_cuda_manual_seed(1, tp_rank=groups.tp.rank(), ep_rank=0, etp_rank=0)
    try:
        yield groups
    finally:
        dist.barrier()
        grid.destroy()


def train(
    tp: int, spec: LossySpec | None, steps: int, every: int, seed: int, size: Size | None = None
) -> Trained:
    """Train on all ranks together.

    Args:
        tp: TP size.
        spec: of the links; None: there are none.
        steps: of training.
        every: steps between looks at held-out accuracy.
        seed: of weights and the order of the data.
        size: of the model.
    """
    with groups_of(tp) as groups:
        model = classifier(reference(size or Size(), seed), groups)
        settings = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
        wrapped = DistributedDataParallel(model.config, settings, model, pg_collection=groups)
        run = _Run(wrapped, groups, steps, seed)
        links = None if spec is None else lossy_links(wrapped, spec)
        with links or contextlib.nullcontext():
            return run.whole(links, every)


class _Run:
    def __init__(
        self, model: Any, groups: ProcessGroupCollection, steps: int, seed: int
    ) -> None:
        self.model, self.groups, self.steps, self.seed = model, groups, steps, seed
        self.part, self.parts = groups.dp.rank(), groups.dp.size()
        self.data, self.held_out = load()
        parameters = list(model.parameters())
        self.device = parameters[0].device
        self.optimizer = torch.optim.AdamW(parameters, LR, (0.9, 0.95), weight_decay=0.01)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._share_of_peak)

    def whole(self, links: LossyLinks | None, every: int) -> Trained:
        losses, curve = [], {}
        for step in range(self.steps):
            losses.append(self.step(step))
            if (step + 1) % every == 0:
                curve[step + 1] = self.evaluate(links, lossy=False)[0]
        rows = [] if links is None else links.gathered_statistics()
        accuracy, loss = self.evaluate(links, lossy=False)
        return Trained(losses, curve, accuracy, loss, self.evaluate(links, lossy=True)[0], rows)

    def step(self, step: int) -> float:
        batch = self.data.batch(step, BATCH, self.seed, self.part, self.parts).to(self.device)
        self.model.zero_grad_buffer()
        loss = F.cross_entropy(self.model(batch.ids), batch.classes)
        loss.backward()
        self.model.finish_grad_sync()
        for parameter in self.model.parameters():
            parameter.grad = parameter.main_grad
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()  # DDP adds what it finds there to its buffers
        total = loss.detach().clone()
        dist.all_reduce(total, group=self.groups.dp)
        return total.item() / self.parts

    @torch.no_grad()
    def evaluate(self, links: LossyLinks | None, *, lossy: bool) -> tuple[float, float]:
        """Accuracy and mean loss on what is held out, of which each replica sees a part."""
        quiet = contextlib.nullcontext() if links is None or lossy else links.lossless()
        each = slice(self.part, None, self.parts)
        mine = Digits(self.held_out.ids[each], self.held_out.classes[each]).to(self.device)
        with quiet:
            scores = self.model(mine.ids)
        right = (scores.argmax(1) == mine.classes).sum()
        loss = F.cross_entropy(scores, mine.classes, reduction="sum")
        sums = torch.stack([right.double(), loss.double()])
        dist.all_reduce(sums, group=self.groups.dp)
        count = len(self.held_out.classes)
        return sums[0].item() / count, sums[1].item() / count

    def _share_of_peak(self, step: int) -> float:
        if step < WARMUP:
            return (step + 1) / WARMUP
        return 0.5 * (1 + math.cos(math.pi * (step - WARMUP) / max(self.steps - WARMUP, 1)))
