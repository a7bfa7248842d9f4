# SPDX-License-Identifier: Apache-2.0
"""Train a Hugging Face language model as it is, on (fsdp, tp) ranks.

    torchrun --nproc-per-node 4 examples/mimo/torch_native_sft.py --tp 2

trains a small model in the shape of Qwen2.5 on made-up samples, each a count upwards whose first
half is the prompt; ``--model FOLDER`` takes a model of your own, ``--save FOLDER`` writes what
``from_pretrained`` reads. The ranks that ``--tp`` leaves over are data ranks.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.distributed as dist
import transformers
from torch import Tensor

from megatron.core.hyper_comm_grid import HyperCommGrid
from megatron.core.models.mimo.torch_native import clip_grad_norm, full_state, parallelize

_SHAPE: dict[str, Any] = {
    "vocab_size": 151,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": None,
}


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Return the options of a command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", help="folder of transformers; small random weights without")
    parser.add_argument("--save", help="folder for the trained model")
    parser.add_argument("--tp", type=int, default=1, help="ranks that share every layer")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=16, help="samples of all data ranks")
    parser.add_argument("--length", type=int, default=23, help="tokens of a sample")
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--bf16", action="store_true", help="compute in bf16, sum in fp32")
    parser.add_argument("--recompute", action="store_true", help="activation checkpointing")
    return parser.parse_args(argv)


def build(folder: str | None) -> Any:
    """Return the model, the same on every rank."""
    if folder:
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.manual_seed(1)
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**_SHAPE))


def batches(options: argparse.Namespace, vocabulary: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield ids and labels of all data ranks; the first half of a sample is not learnt."""
    generator = torch.Generator().manual_seed(2)
    for _ in range(options.steps):
        first = torch.randint(vocabulary, (options.batch, 1), generator=generator)
        ids = (first + torch.arange(options.length)) % vocabulary
        labels = ids.clone()
        labels[:, : options.length // 2] = -100
        yield ids, labels


def train(options: argparse.Namespace, grid: HyperCommGrid) -> list[float]:
    """Train and return the losses of all steps, the same on every rank.

    Args:
        options: see :func:`parse`.
        grid: with dims ``tp`` and ``dp``.

    Raises:
        ValueError: the data ranks cannot share the batch evenly.
    """
    ranks, own = grid.dim_size("dp"), grid.coords(dist.get_rank())["dp"]
    if options.batch % ranks:
        raise ValueError(f"--batch {options.batch} must be a multiple of the {ranks} data ranks")
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    precision = torch.bfloat16 if options.bf16 else None
    model = build(options.model).to(device).train()
    parallelize(model, grid, precision=precision, activation_checkpointing=options.recompute)
    adam = torch.optim.AdamW(model.parameters(), lr=options.lr, foreach=False)
    losses = []
    for batch in batches(options, model.config.vocab_size):
        ids, labels = (part.chunk(ranks)[own].to(device) for part in batch)
        loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        loss.backward()
        clip_grad_norm(model, 1.0)
        adam.step()
        adam.zero_grad()
        losses.append(float(loss.detach()))
    if options.save:
        state = full_state(model)
        if dist.get_rank() == 0:
            build(options.model).save_pretrained(options.save, state_dict=state)
    return losses


def main(argv: Sequence[str]) -> None:
    """Train on the ranks that torchrun started."""
    options = parse(argv)
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None:
        torch.accelerator.set_device_index(int(torch.distributed.get_node_local_rank()))
    dist.init_process_group()
    size = dist.get_world_size()
    if size % options.tp:
        raise SystemExit(f"--tp {options.tp} must divide the {size} ranks")
    grid = HyperCommGrid([options.tp, size // options.tp], ["tp", "dp"])
    losses = train(options, grid)
    if dist.get_rank() == 0:
        for step, loss in enumerate(losses, start=1):
            print(f"step {step}: loss {loss:.4f}")
    grid.destroy()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
