# SPDX-License-Identifier: Apache-2.0
"""Every number that is refused beyond a bound: the last one that fits, and the first that does not.

Pure calls, one line each; what needs a model or ranks is tested at its bounds beside it.
"""

from __future__ import annotations

import argparse
import math
import shutil
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from megatron.core.hyper_comm_grid import GridShape, HyperCommGrid
from megatron.core.models.mimo import VisionModalitySubmodules
from megatron.core.models.mimo.checkpoint.history import History
from megatron.core.models.mimo.checkpoint.store import CheckpointStore
from megatron.core.models.mimo.comm.plan.balance import EncoderBalance, plan_balance
from megatron.core.models.mimo.comm.plan.batch_routes import plan_even_batch
from megatron.core.models.mimo.comm.plan.gather_layout import SliceInfo
from megatron.core.models.mimo.comm.plan.routed_layout import RouteLayout
from megatron.core.models.mimo.comm.plan.routes import plan_routes
from megatron.core.models.mimo.comm.plan.token_runs import TokenRuns
from megatron.core.models.mimo.config import checks
from megatron.core.models.mimo.gradients.finalize import check_token_count
from megatron.core.models.mimo.huggingface import fits
from megatron.core.models.mimo.huggingface.positions import multimodal_positions
from megatron.core.models.mimo.huggingface.target import Target
from megatron.core.models.mimo.job.samples import even_slice
from megatron.core.models.mimo.memory.plan import Step
from megatron.core.models.mimo.memory.policy import EncoderMemory
from megatron.core.models.mimo.partition.packed_lengths import check_packing
from megatron.core.models.mimo.partition.sequence_order import check_packed, cp_chunks
from megatron.core.models.mimo.pipeline.microbatches import narrow_language_batch
from megatron.core.models.mimo.towers.feature_transformer import Features
from megatron.core.models.mimo.towers.hugging_face import Rows
from megatron.core.models.mimo.towers.image_grids import checked_grids
from megatron.core.models.mimo.training.initial_weights import per_shard_seed
from megatron.core.models.mimo.transformer.layer_specs import _check_query_groups
from megatron.core.packed_seq_params import PackedSeqParams
from mimo_colocated._startup import is_supported
from mimo_colocated.launch import choose_backend
from mimo_colocated.launch import options as parsers
from mimo_colocated.launch.errors import JobError, one_sentence
from mimo_colocated.launch.layouts import MAX_RANKS, Layout
from mimo_colocated.process_groups import _own_ranks

TOKENS = TokenRuns.from_mask(np.ones((1, 8), dtype=bool))
ENDS = GridShape((1, 2), ("tp", "dp")), GridShape((1, 2), ("tp", "dp"))
PAIR = RouteLayout.from_grids(*ENDS)
TOGETHER = RouteLayout.from_grids(*ENDS, one_group=True)


def grid(offset: int = 0, shape: Sequence[int] = (2, 2), world: int = 8) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORLD_SIZE", str(world))
        return HyperCommGrid(list(shape), ["tp", "dp"], rank_offset=offset)


def balanced(counts: Sequence[int] = (1, 1), cost: float = 1.0) -> Any:
    return plan_balance([3, 4], counts, EncoderBalance(cost=lambda tokens: tokens * 0 + cost))


def packed_to(length: int) -> Any:
    mask = np.zeros((2, 4), dtype=bool)
    return plan_even_batch(PAIR, 0, mask, packed=[length, length])


def held(first: int) -> Any:
    return plan_routes(TOGETHER, 0, [TOKENS, TOKENS], [[(first, 8)], [(8 - first, 8)]])


def token(number: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        checks._warn_outside({"images": number}, 40)


def part_of(number: int) -> None:
    composite: Any = SimpleNamespace(
        language=SimpleNamespace(config=SimpleNamespace(vocab_size=40)),
        encoders=(SimpleNamespace(modality="images", token_id=number),),
    )
    fits._check_tokens(composite)


def levels(*layers: int) -> None:
    language: Any = SimpleNamespace(params={"config": SimpleNamespace(num_layers=8)})
    checks._check_levels({"images": layers}, {"images": None}, language)


def predicted(layers: int) -> None:
    spec: Any = SimpleNamespace(params={"config": SimpleNamespace(mtp_num_layers=layers)})
    checks._refuse_token_prediction(spec)


def narrowed(start: int, size: int) -> Any:
    return narrow_language_batch({"input_ids": torch.zeros(4, 2)}, SliceInfo(start, size))


def states(depth: int) -> Any:
    hidden = {"hidden_states": tuple(torch.zeros(1, 2, 3) for _ in range(4))}
    return Rows(layers=depth).of(hidden, {})


def packed(real: Sequence[int], padded: Sequence[int], longest: int | None = None) -> Any:
    lengths = {"cu_seqlens_q": real, "cu_seqlens_q_padded": padded}
    tensors = {name: torch.tensor(each, dtype=torch.int32) for name, each in lengths.items()}
    params = PackedSeqParams(qkv_format="thd", max_seqlen_q=longest, **tensors)
    return check_packing(params, 1, padded[-1])


def groups(count: int) -> None:
    config: Any = SimpleNamespace(num_query_groups=count, tensor_model_parallel_size=4)
    _check_query_groups(config)


def modality(rows: int) -> Any:
    encoders = {"e": torch.nn.Identity()}
    return VisionModalitySubmodules(encoders=encoders, rows_per_item={"e": rows})


def image_in(length: int) -> Any:
    """An image of four tokens behind a word, in a sequence of so many tokens."""
    vision = SimpleNamespace(spatial_merge_size=2)
    config = SimpleNamespace(vision_config=vision, image_token_id=1, video_token_id=2)
    ids = torch.tensor([[0, 1, 1, 1, 1]])[:, :length]
    return multimodal_positions(config, ids, torch.tensor([[1, 4, 4]]))


def supported(version: str) -> None:
    if not is_supported(version):
        raise ValueError("not supported")


def room(free: int, call: Callable[[], Any]) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
        return call()


BEYOND = math.nextafter(1.0, 0.0)
BOUNDS: dict[str, tuple[Callable[..., Any], list[Any], list[Any], str]] = {
    "offset": (grid, [0, 4], [-1], "rank_offset must be non-negative"),
    "box": (GridShape, [((1, 1), "ab")], [((0, 1), "ab"), ((1, -1), "ab")], "positive ints"),
    "keep": (lambda n: CheckpointStore("x", {}, keep=n), [1, 2], [0, -1], "give at least 1"),
    "threshold": (EncoderBalance, [1, 1.0, 9], [BEYOND, 0, math.nan], "must be at least 1"),
    "counts": (balanced, [((2, 0),), ((1, 1),)], [((3, -1),), ((1, 2),)], "items_per_replica"),
    "cost": (lambda c: balanced(cost=c), [0.0, 1.0], [-1e-9, math.inf, math.nan], "not negative"),
    "packed": (packed_to, [0, 1, 4], [-1, 5], "length of 0 to 4 for each"),
    "held": (held, [0, 8], [-1, 9], "but the exchange group's rows are 0 to 15"),
    "token": (token, [0, 39], [-1, 40], "outside the vocabulary of 40 ids"),
    "part": (part_of, [0, 39], [-1, 40], "is not one of the vocabulary's 40"),
    "levels": (levels, [(0, 7), (3,)], [(-1, 3), (0, 8), (8,)], "8 layers, 0 to 7"),
    "predicted": (predicted, [0], [1], "Multi-token prediction"),
    "samples": (narrowed, [(0, 4), (4, 0), (3, 1)], [(-1, 2), (3, 2), (0, 5)], "has 4 samples"),
    "microbatches": (Step, [1], [0], "microbatches must be 1 or more"),
    "window": (lambda n: Step(encode_ahead=n), [1, None], [0], "encode_ahead must be 1 or more"),
    "offload": (lambda n: EncoderMemory(offload_from=n), [0], [-1], "must be 0 bytes or more"),
    "layers": (lambda n: Features.of([1, n], 4), [-5, 4], [-6, 5], "hidden states -5 to 4"),
    "states": (states, [-4, 3, 0], [-5, 4], "has 4 hidden states"),
    "seed rank": (lambda n: per_shard_seed(1, n, 0, 0), [0, 99], [-1], "tp_rank must be from 0"),
    "seed layer": (lambda n: per_shard_seed(1, 0, n, 0), [0, 9999], [-1, 10000], "layer must be"),
    "seed module": (lambda n: per_shard_seed(1, 0, 0, n), [0, 99], [-1, 100], "module_id must be"),
    "chunks": (cp_chunks, [(0, 1), (3, 4)], [(-1, 4), (4, 4), (0, 0)], "cp rank must be in range"),
    "lengths": (check_packed, [([0, 0], 1), ([0, 4, 4], 2)], [([0], 1), ([1, 4], 1)], "start with"),
    "decreasing": (check_packed, [([0, 4, 4], 1)], [([0, 4, 3], 1)], "must not decrease"),
    "real": (
        packed,
        [([0, 4, 8], [0, 4, 8]), ([0, 0, 4], [0, 4, 8])],
        [([0, 5, 8], [0, 4, 8]), ([0, 4, 3], [0, 4, 8])],
        "does not fit into cu_seqlens_q_padded",
    ),
    "longest": (lambda n: packed([0, 3, 6], [0, 4, 12], n), [8, 9, None], [7], "max_seqlen_q is 7"),
    "slice": (
        lambda at, parts=2: even_slice(4, at, parts, "batch", "replicas"),
        [0, 1, (0, 1), (3, 4)],
        [-1, 2, (0, 0), (0, 3)],
        r"is not in 0..1|cannot be divided",
    ),
    "whole": (
        parsers.whole(3),
        ["3", f"{2**31 - 1}"],
        ["2", f"{2**31}", "-3"],
        "whole number from",
    ),
    "above": (parsers.real(0.0, low_included=False), ["1e-9"], ["0", "-1", "inf"], "above 0"),
    "from": (parsers.real(0.0, low_included=True), ["0"], ["-1e-9", "nan"], "at least 0"),
    "share": (parsers.share, ["0", f"{BEYOND!r}"], ["1", "1.5"], "from 0 to below 1"),
    "size": (
        lambda n: Layout.parse(f"tp={n}", "language"),
        [1, MAX_RANKS],
        [0, MAX_RANKS + 1, 10**9, 10**10],
        f"whole number from 1 to {MAX_RANKS}",
    ),
    "gpus": (lambda n: choose_backend("nccl", 4, n), [4, 5], [3, 0], "needs a GPU per rank"),
    "groups": (groups, [4, 5], [3], "must be at least tensor_model_parallel_size"),
    "rows": (modality, [1], [0, -1], "must be a positive number"),
    "ranks": (lambda n: _own_ranks([[n]], 0, 8), [0, 7], [-1, 8], "are not in the world"),
    "weights": (check_token_count, [0.0, 1e-30, 1e300], [-1e-30, math.inf, math.nan], "sum up to"),
    "patches": (
        lambda *sides: checked_grids(torch.tensor([sides]), 2, math.prod(sides)),
        [(1, 2, 2)],
        [(0, 2, 2), (1, 0, 2), (1, 2, 0), (1, 3, 2), (1, 2, 1)],
        "must be positive",
    ),
    "image": (image_in, [5], [4, 2], "must not be cut within an image"),
    "version": (supported, ["0.16.1", "0.19.0", "0.19"], ["0.16.0", "0.16.2", "0.20.0"], "not"),
}


@pytest.mark.parametrize("name", BOUNDS)
def test_the_last_number_fits_and_the_next_does_not(name: str) -> None:
    call, inside, outside, words = BOUNDS[name]
    errors = (ValueError, JobError, argparse.ArgumentTypeError, UserWarning)
    for given in inside:
        call(*given) if isinstance(given, tuple) else call(given)
    for given in outside:
        with pytest.raises(errors, match=words):
            call(*given) if isinstance(given, tuple) else call(given)


def test_a_grid_may_reach_the_end_of_the_world() -> None:
    assert grid(4).coords(7) == {"tp": 1, "dp": 1}
    with pytest.raises(RuntimeError, match="it needs 4 ranks and 3 are there"):
        grid(5)


@pytest.mark.parametrize("lacking", [0, 1], ids=["enough", "one_byte_short"])
def test_a_disk_with_just_enough_room_is_enough(lacking: int, tmp_path: Path) -> None:
    refused = pytest.raises(OSError, match="make room|are free")
    needed = int(1000 * 1.05) + (4 << 20)
    history, target = History(tmp_path / "run", 1), Target(tmp_path / "out")
    for free, call in (
        (needed, lambda: history.begin(5, 1000)),
        (1000, lambda: target.begin(1000)),
    ):
        if lacking:
            with refused:
                room(free - 1, call)
        else:
            room(free, call)
    target.abandon()


@pytest.mark.parametrize("length", [400, 401])
def test_a_sentence_is_cut_where_it_is_longer_than_its_room(length: int) -> None:
    said = one_sentence(ValueError("x" * length), "")
    assert said == "ValueError: " + ("x" * 400 if length == 400 else "x" * 397 + "...")
