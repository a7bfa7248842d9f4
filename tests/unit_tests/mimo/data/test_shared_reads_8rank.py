# SPDX-License-Identifier: Apache-2.0
"""What one rank of a group reads all of it get, and all learn of what it could not read."""

from __future__ import annotations

import numpy as np
import pytest
import torch.distributed as dist

from megatron.core.models.mimo.data.readers import Inputs, ReadError
from megatron.core.models.mimo.data.shared_reads import SharedReads
from megatron.core.models.mimo.training.agreement import gathered
from mimo_colocated.process_groups import make_groups

pytestmark = [pytest.mark.ranks(8), pytest.mark.once]

PAIRS = [[0, 1], [2, 3], [4, 5], [6, 7]]


@pytest.fixture(scope="module")
def share() -> SharedReads:
    group = make_groups(PAIRS, "gloo")
    assert group is not None
    return SharedReads(group)


def inputs(number: int) -> Inputs:
    draw = np.random.default_rng(number)
    return {
        "pixel_values": draw.normal(size=(number, 3, 4, 4)).astype(np.float32)[:, ::2],
        "image_grid_thw": draw.integers(9, size=(number, 3)),
        "short": draw.integers(9, size=number).astype(np.uint16),
        "flags": draw.integers(2, size=(2, number)).astype(bool),
        "none": np.empty((0, 5)),
        "one": np.array(2.5),
    }


def test_both_ranks_of_a_pair_get_what_the_first_reads(share: SharedReads) -> None:
    rank, read = dist.get_rank(), []

    def make(number: int) -> Inputs:
        read.append(number)
        return inputs(number)

    for number in (3, 1, 7):
        found = share(lambda number=number: make(number + rank // 2))
        wanted = inputs(number + rank // 2)
        assert list(found) == list(wanted)
        for name, value in wanted.items():
            assert found[name].dtype == value.dtype
            assert found[name].shape == value.shape
            assert (found[name] == value).all()
    # Each of them is read once in a pair, and other pairs read others.
    assert gathered(len(read)) == [3, 0] * 4


def test_what_cannot_be_read_is_one_sentence_on_both(share: SharedReads) -> None:
    rank = dist.get_rank()

    def make() -> Inputs:
        if rank == 2:
            raise ReadError("a.png cannot be read")
        if rank == 4:
            raise ValueError("too small")
        return inputs(1)

    said = ""
    try:
        share(make)
    except ReadError as error:
        said = str(error)
    third, fifth = "a.png cannot be read", "ValueError: too small"
    assert gathered(said) == ["", "", third, third, fifth, fifth, "", ""]
    # And they go on together.
    assert share(lambda: inputs(2))["short"].tolist() == inputs(2)["short"].tolist()
