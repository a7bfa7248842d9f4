# SPDX-License-Identifier: Apache-2.0
"""Tiny models of the real classes, sharded over grids, beside the same models unsharded."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from megatron.core.hyper_comm_grid import HyperCommGrid
from megatron.core.models.mimo.torch_native import full_gradients, parallelize
from tests.harness.backend import own_device

BOUND = 1e-5
# 99 is divided by neither 2 nor 4; the heads' width is not hidden / heads where a family allows it.
_SIZES: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 40,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 6,
    "pad_token_id": 3,
    "bos_token_id": None,
    "eos_token_id": None,
    "use_cache": False,
}
_TOWER: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 24,
    "patch_size": 8,
}
_LLAMA = {**_SIZES, "attention_bias": True, "mlp_bias": True}


def build(family: str, **changes: Any) -> Any:
    """A model, every parameter drawn at random, biases and norms too."""
    torch.manual_seed(7)
    models = {
        "qwen2": lambda: transformers.Qwen2ForCausalLM(
            transformers.Qwen2Config(**{**_SIZES, "tie_word_embeddings": False, **changes})
        ),
        "llama": lambda: transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**{**_LLAMA, **changes})
        ),
        "qwen3": lambda: transformers.Qwen3ForCausalLM(
            transformers.Qwen3Config(**{**_SIZES, **changes})
        ),
        "clip": lambda: transformers.CLIPVisionModel(
            transformers.CLIPVisionConfig(**{**_TOWER, **changes})
        ),
        "siglip": lambda: transformers.SiglipVisionModel(
            transformers.SiglipVisionConfig(**{**_TOWER, **changes})
        ),
    }
    model = models[family]()
    with torch.no_grad():
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.2)
            if parameter.ndim == 1:
                parameter += 0.5
    return model.to(own_device())


@contextlib.contextmanager
def grid_of(dp: int, tp: int, offset: int = 0, cp: int | None = None) -> Iterator[HyperCommGrid]:
    sizes = {"tp": tp, "cp": cp, "dp": dp}
    dims = [dim for dim, size in sizes.items() if size is not None]
    grid = HyperCommGrid([sizes[dim] for dim in dims], dims, rank_offset=offset)
    try:
        for dim in dims:
            grid.create_pg(dim)
        yield grid
    finally:
        dist.barrier()
        grid.destroy()


@contextlib.contextmanager
def side_by_side(dp: int, tp: int) -> Iterator[HyperCommGrid]:
    """Grids of ``dp * tp`` ranks that fill the world; this rank's.

    Inside :func:`kept_grids` they stay for the next test: PyTorch then remembers how operations
    on their tensors are placed, which takes most of the time of a first step.
    """
    if (dp, tp) in _kept:
        yield _kept[dp, tp]
        return
    with _new_grids(dp, tp) as grid:
        yield grid


_kept: dict[tuple[int, int], HyperCommGrid] = {}


@contextlib.contextmanager
def kept_grids(*sizes: tuple[int, int]) -> Iterator[None]:
    """Grids of these ``(dp, tp)`` for all tests inside; all ranks of the world enter."""
    with contextlib.ExitStack() as stack:
        for dp, tp in sizes:
            _kept[dp, tp] = stack.enter_context(_new_grids(dp, tp))
        stack.callback(_kept.clear)
        yield


@contextlib.contextmanager
def _new_grids(dp: int, tp: int) -> Iterator[HyperCommGrid]:
    size, count = dp * tp, dist.get_world_size() // (dp * tp)
    with contextlib.ExitStack() as stack:
        grids = [stack.enter_context(grid_of(dp, tp, size * n)) for n in range(count)]
        yield grids[dist.get_rank() // size]


@dataclass
class Pair:
    """A model twice.

    Attributes:
        whole: unsharded, given the samples of all data ranks.
        sharded: given this data rank's.
        grid: of the sharded one.
    """

    whole: Any
    sharded: Any
    grid: HyperCommGrid

    def own(self, batch: Tensor) -> Tensor:
        """This data rank's part of a batch."""
        coords = self.grid.coords(dist.get_rank())
        return batch.chunk(self.grid.dim_size("dp"))[coords["dp"]]

    def differences(self) -> dict[str, float]:
        """Parameter -> distance of its gradients, by the larger of its norm and the mean norm."""
        expected = {
            name: parameter.grad
            for name, parameter in self.whole.named_parameters()
            if parameter.grad is not None
        }
        found = full_gradients(self.sharded)
        assert {name for name, grad in found.items() if grad is not None} == set(expected)
        mean = sum(float(grad.norm()) for grad in expected.values()) / len(expected)
        return {
            name: float((found[name] - grad).norm()) / max(float(grad.norm()), 0.01 * mean)
            for name, grad in expected.items()
        }

    def check_gradients(self, bound: float = BOUND) -> None:
        differences = self.differences()
        worst = max(differences, key=lambda name: differences[name])
        assert differences[worst] <= bound, (worst, differences[worst])

    def zero_grad(self) -> None:
        self.whole.zero_grad()
        self.sharded.zero_grad()


def pair(
    family: str, grid: HyperCommGrid, options: dict[str, Any] | None = None, **changes: Any
) -> Pair:
    whole = build(family, **changes)
    return Pair(whole, parallelize(copy.deepcopy(whole), grid, **(options or {})), grid)


def tokens(samples: int, length: int, vocabulary: int = 99, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Ids and labels; of the labels some do not count, more in the first samples."""
    generator = torch.Generator().manual_seed(seed + 1000 * length)
    ids = torch.randint(0, vocabulary, (samples, length), generator=generator)
    labels = ids.clone()
    labels[0, : length // 2] = -100
    if length > 4:
        ids[:, 2] = 3  # the padding token, which the embedding must not learn from
    return ids.to(own_device()), labels.to(own_device())


def plain(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
