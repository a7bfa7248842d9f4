# SPDX-License-Identifier: Apache-2.0
"""Small models of every dtype and kind, one per row of the optimizer table.

An encoder of two linear layers around a norm, a language model of one layer. What of them is in
which dtype, and what trains, is the row's.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.models.mimo import (
    MimoModel,
    MimoModelConfig,
    VisionModalitySubmodules,
    get_mimo_optimizer,
)
from megatron.core.models.mimo.checkpoint.store import CheckpointStore
from megatron.core.models.mimo.gradients.finalize import (
    MimoGradFinalizer,
    iter_modules,
    wrap_modules_with_ddp,
)
from megatron.core.models.mimo.optimizer import MimoOptimizer
from megatron.core.models.mimo.randomness import seed_everything
from megatron.core.models.mimo.training.groups import create_process_groups, make_grid
from megatron.core.models.mimo.training.initial_weights import initialize_weights
from megatron.core.models.mimo.transformer.layer_specs import language_layer_spec
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig

IMAGE, VOCABULARY, LENGTH, SAMPLES, WIDTH = 31, 32, 16, 2, 16
OPTIMIZERS = ("adam", "sgd", "muon")
# between: an fp32 encoder beside a bf16 language model; inside: fp32 norms and routers in bf16.
DTYPES = ("fp32", "bf16", "fp16", "between", "inside")
KINDS = ("dense", "experts", "tied")


@dataclass(frozen=True)
class Row:
    """One row of the table."""

    optimizer: str
    distributed: bool
    dtype: str
    kind: str

    def __str__(self) -> str:
        sharding = "sharded" if self.distributed else "whole"
        return "-".join((self.optimizer, sharding, self.dtype, self.kind))

    def config(self, **changes: Any) -> OptimizerConfig:
        """The right one for the dtype."""
        settings = {
            "optimizer": self.optimizer,
            "lr": 0.01,
            "clip_grad": 1.0,
            "use_distributed_optimizer": self.distributed,
            "bf16": self.dtype in ("bf16", "between", "inside"),
            "fp16": self.dtype == "fp16",
            "initial_loss_scale": 256.0,
            "params_dtype": self.language_dtype,
        }
        return OptimizerConfig(**{**settings, **changes})

    @property
    def language_dtype(self) -> torch.dtype:
        """Of the language model's weights."""
        return {"fp32": torch.float32, "fp16": torch.float16}.get(self.dtype, torch.bfloat16)

    @property
    def encoder_dtype(self) -> torch.dtype:
        """Of the encoder's linear layers."""
        return torch.float32 if self.dtype == "between" else self.language_dtype


def rows() -> list[Row]:
    """All of them."""
    return list(itertools.starmap(Row, itertools.product(OPTIMIZERS, (False, True), DTYPES, KINDS)))


class Encoder(MegatronModule):
    """Two linear layers around a norm, whose weights may be of another dtype."""

    def __init__(self, config: TransformerConfig, dtype: torch.dtype, norm: torch.dtype) -> None:
        super().__init__(config)
        self.before = torch.nn.Linear(8, WIDTH, dtype=dtype)
        self.norm = torch.nn.LayerNorm(WIDTH, dtype=norm)
        self.after = torch.nn.Linear(WIDTH, WIDTH, dtype=dtype)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """(images, 4, 8) -> (images, 4, WIDTH)."""
        hidden = self.before(pixels.to(self.before.weight.dtype))
        return self.after(self.norm(hidden.to(self.norm.weight.dtype)).to(hidden.dtype))


@dataclass
class Built:
    """A model of a row, on this rank."""

    row: Row
    model: MimoModel
    finalize: MimoGradFinalizer
    optimizer: MimoOptimizer
    losses: list[float] = field(default_factory=list)

    def step(self, number: int, broken: bool = False) -> bool:
        """One step on the batch of that number; its loss is noted."""
        generator = torch.Generator().manual_seed(100 * number + dist.get_rank())
        text = torch.randint(0, IMAGE, (SAMPLES, LENGTH - 4), generator=generator)
        ids = torch.cat([torch.full((SAMPLES, 4), IMAGE), text], dim=1)
        pixels = torch.randn(SAMPLES, 4, 8, generator=generator)
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        mask = (ids != IMAGE).float()
        losses, mask = self.model(
            input_ids=ids,
            position_ids=torch.arange(LENGTH).expand(SAMPLES, LENGTH),
            labels=ids.roll(-1, dims=1),
            loss_mask=mask,
            modality_inputs={"images": {"patches": {"pixels": pixels}}},
        )
        loss = (losses * mask).sum()
        self.losses.append(float(loss.detach()))
        self.optimizer.scale_loss(loss * (float("inf") if broken else 1.0)).backward()
        self.finalize([self.model], mask.sum())
        return self.optimizer.step()[0]

    def steps(self, first: int, last: int) -> list[float]:
        """Losses of the steps [first, last)."""
        self.losses.clear()
        assert all(self.step(number) for number in range(first, last))
        return list(self.losses)

    def store(self, root: Path) -> CheckpointStore:
        """The row's checkpoints; the layouts are those of any run here."""
        return CheckpointStore(root, {"images": {}, "language": {}})


@contextlib.contextmanager
def built(row: Row, seed: int, *, frozen: tuple[str, ...] = (), **changes: Any) -> Iterator[Built]:
    """A fresh model and optimizer over all ranks; groups are gone afterwards.

    Args:
        row: of the table.
        seed: of the weights.
        frozen: beginnings of the names of what does not train, by ``<module>.<parameter>``.
        **changes: of the optimizer's configuration.
    """
    world = dist.get_world_size()
    experts = {"ep": world} if row.kind == "experts" else {}
    grids = {"images": make_grid(dp=world), "language": make_grid(dp=world, **experts)}
    groups = {name: create_process_groups(grid) for name, grid in grids.items()}
    seed_everything(seed)
    config = language_config(row, row.kind == "experts")
    encoder = language_config(row, False)
    specs = language_spec(row, config, groups), image_spec(row, encoder, groups)
    model = MimoModel(
        MimoModelConfig(*specs, {"images": IMAGE}, grids),
        cp_group=groups["language"].cp,
        tp_group=groups["language"].tp,
    )
    for name, module in iter_modules(model):
        initialize_weights(module, seed, name_prefix=f"{name}.", tp_group=groups[name].tp)
        for key, parameter in module.named_parameters():
            if f"{name}.{key}".startswith(frozen or ("-",)):
                parameter.requires_grad_(False)
            if row.dtype == "inside" and "router" in key:
                parameter.data = parameter.data.float()
    ddp = DistributedDataParallelConfig(use_distributed_optimizer=row.distributed)
    wrap_modules_with_ddp(model, {"images": encoder, "language": config}, ddp, groups)
    try:
        optimizer = get_mimo_optimizer(model, row.config(**changes))
        yield Built(row, model, MimoGradFinalizer(groups), optimizer)
    finally:
        dist.barrier()
        model.destroy()
        for grid in grids.values():
            grid.destroy()


def language_config(row: Row, has_experts: bool) -> TransformerConfig:
    """Of the language model; the encoder has only its dtype of it."""
    dtype = row.language_dtype
    experts = {
        "num_moe_experts": 4,
        "moe_router_topk": 2,
        "moe_token_dispatcher_type": "alltoall",
        "moe_router_dtype": "fp32" if row.dtype == "inside" else None,
        "expert_model_parallel_size": dist.get_world_size(),
    }
    return TransformerConfig(
        num_layers=1,
        hidden_size=WIDTH,
        num_attention_heads=2,
        add_bias_linear=False,
        params_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        fp16=dtype is torch.float16,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        calculate_per_token_loss=True,
        cross_entropy_loss_fusion=True,
        cross_entropy_fusion_impl="native",
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        **(experts if has_experts else {}),
    )


def language_spec(row: Row, config: TransformerConfig, groups: dict) -> ModuleSpec:
    """Stock's GPT."""
    params = {
        "config": config,
        "transformer_layer_spec": language_layer_spec(config),
        "vocab_size": VOCABULARY,
        "max_sequence_length": LENGTH,
        "position_embedding_type": "rope",
        "share_embeddings_and_output_weights": row.kind == "tied",
        "scatter_embedding_sequence_parallel": False,
        "pg_collection": groups["language"],
    }
    return ModuleSpec(module=GPTModel, params=params)


def image_spec(row: Row, config: TransformerConfig, groups: dict) -> dict[str, ModuleSpec]:
    """One modality of one encoder."""
    norm = torch.float32 if row.dtype == "inside" else row.encoder_dtype
    params = {"config": config, "dtype": row.encoder_dtype, "norm": norm}
    encoders = {"patches": ModuleSpec(module=Encoder, params=params)}
    return {
        "images": ModuleSpec(
            module=VisionModalitySubmodules,
            params={"pg_collection": groups["images"]},
            submodules={"encoders": encoders},
        )
    }
