# SPDX-License-Identifier: Apache-2.0
"""Windows of a pipelined step: when encoders reduce their gradients. One process."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from megatron.core.models.mimo.pipeline.step import _Encoders
from megatron.core.models.mimo.pipeline.windows import Windows

pytestmark = pytest.mark.once

COUNT = 6


class Encoder(torch.nn.Module):
    """An encoder that reduces during backward, except inside ``no_sync``."""

    def __init__(self) -> None:
        super().__init__()
        self.ddp_config = SimpleNamespace(overlap_grad_reduce=True)
        self.reduces = True

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        self.reduces = False
        yield
        self.reduces = True


@pytest.mark.parametrize("window", range(1, COUNT + 1))
def test_encoders_reduce_beside_the_backward_pass_of_the_last_window(window: int) -> None:
    """Of no other one, and of that one whether it is full or not."""
    encoder, reduced = Encoder(), []
    config = SimpleNamespace(variable_seq_lengths=False)
    model = SimpleNamespace(modality_submodules={"images": encoder}, config=config)
    encoders = _Encoders(model, iter(()), Windows.of(COUNT, 2, window), True)
    encoded = SimpleNamespace(
        backward_per_microbatch=(),
        send_back=lambda: None,
        backward=lambda: reduced.append(encoder.reduces),
    )
    windows = math.ceil(COUNT / window)
    encoders._under_way = dict.fromkeys(range(windows), encoded)
    encoders.finish()
    assert reduced == [False] * (windows - 1) + [True]
