# SPDX-License-Identifier: Apache-2.0
"""``python -m megatron.core.models.mimo.memory``: what each memory policy would save."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from megatron.core.models.mimo.memory.plan import (
    ATTENTIONS,
    LAYER_RECOMPUTE,
    Step,
    TransformerShape,
    transformer_bytes,
)
from megatron.core.models.mimo.memory.table import print_plan


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; 2 for a wrong command line."""
    given = _parser().parse_args(argv)
    try:
        shape = TransformerShape(
            layers=given.layers,
            hidden=given.hidden,
            ffn=given.ffn or 4 * given.hidden,
            heads=given.heads,
            tokens=given.tokens,
            patch=given.patch,
            projected=given.projected,
            tp=given.tp,
            itemsize=given.bytes,
            dropout=given.dropout,
            recompute=given.recompute,
            attention=given.attention,
            mask=given.mask,
        )
        step = Step(
            given.micro_batches,
            given.pp,
            given.encode_ahead,
            "encoder" not in given.frozen,
            "projector" not in given.frozen,
        )
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print_plan(transformer_bytes(shape, given.items), step)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m megatron.core.models.mimo.memory",
        description="What each way to hold an encoder's activations would save on one rank.",
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--items", type=int, required=True, help="items (images) of one microbatch on one rank")
    add("--tokens", type=int, required=True, help="tokens of an item")
    add("--layers", type=int, required=True, help="of the encoder")
    add("--hidden", type=int, required=True, help="the encoder's width")
    add("--heads", type=int, required=True, help="attention heads")
    add("--projected", type=int, required=True, help="the language model's width")
    add("--ffn", type=int, default=0, help="the MLP's width, 0 for four times the encoder's")
    add("--patch", type=int, default=588, help="numbers of one token that the embedding reads")
    add("--tp", type=int, default=1, help="tensor parallelism of the encoder")
    add("--bytes", type=int, default=2, help="of a number")
    add("--dropout", action="store_true", help="there is dropout")
    add("--recompute", choices=LAYER_RECOMPUTE, default="none", help="by Megatron-Core's layers")
    add("--attention", choices=ATTENTIONS, default="fused", help="kernel")
    add("--mask", type=int, default=1, help="bytes of a dropout mask's element")
    add("--micro-batches", type=int, default=1, help="of a step")
    add("--pp", type=int, default=1, help="pipeline stages of the language model")
    add("--encode-ahead", type=int, help="microbatches that are encoded together, all by default")
    add("--frozen", nargs="*", choices=("encoder", "projector"), default=[], help="does not train")
    return parser


if __name__ == "__main__":
    sys.exit(main())
