# SPDX-License-Identifier: Apache-2.0
"""The device that is played: which operations wait for it, and where."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.harness.host_waits import GPU, PlayedDevice

WAITS: dict[str, Callable[[torch.Tensor], Any]] = {
    "item": lambda x: x[0, 0].item(),
    "tolist": lambda x: x.tolist(),
    "bool": lambda x: bool(x[0, 0] > 0),
    "if": lambda x: 1 if x.sum() > 0 else 0,
    "int": lambda x: int(x[0, 0]),
    "float": lambda x: float(x[0, 0]),
    "slice": lambda x: torch.arange(9)[: x.long()[0, 1]],
    "range": lambda x: list(range(x.long()[0, 0])),
    "numpy": lambda x: x.numpy(force=True),
    "in": lambda x: 3.0 in x,
    "cpu": lambda x: x.cpu(),
    "to host": lambda x: x.to("cpu"),
    "to host and dtype": lambda x: x.to("cpu", torch.float64),
    "copy to host": lambda x: torch.empty(2, 3).copy_(x),
    "copy to pageable host": lambda x: torch.empty(2, 3).copy_(x, non_blocking=True),
    "copy from host": lambda x: x.copy_(torch.ones(2, 3)),
    "upload": lambda x: torch.ones(2).to(x.device),
    "upload of pageable": lambda x: torch.ones(2).to(x.device, non_blocking=True),
    "upload that waits": lambda x: torch.ones(2).pin_memory().to(x.device),
    "tensor": lambda x: torch.tensor([1, 2], device=x.device),
    "nonzero": lambda x: x.nonzero(),
    "where": lambda x: torch.where(x > 0),
    "masked_select": lambda x: x.masked_select(x > 0),
    "index by bools": lambda x: x[x > 0],
    "put by bools": lambda x: x.index_put((x > 0,), x.view(-1)[1:]),
    "unique": lambda x: x.unique(),
    "equal": lambda x: torch.equal(x, x + 1),
    "allclose": lambda x: torch.allclose(x, x),
    "repeat_interleave": lambda x: x[0].repeat_interleave(torch.ones_like(x[0]).long()),
    "event": lambda x: torch.cuda.Event().synchronize(),
}

FREE: dict[str, Callable[[torch.Tensor], Any]] = {
    "computing": lambda x: (x @ x.t()).softmax(-1).sum(),
    "fill": lambda x: x.masked_fill(x > 0, 1.0),
    "one value by bools": lambda x: x.clone().__setitem__(x > 0, 0.0),
    "index": lambda x: x[:, [0, 2]].index_select(1, torch.zeros_like(x[0, :1]).long()),
    "shape": lambda x: x.view(x.shape[0], -1).size(),
    "made there": lambda x: torch.zeros(3, device=x.device) + x,
    "uploaded": lambda x: x + torch.ones(3).pin_memory().to(x.device, non_blocking=True),
    "repeat_interleave": lambda x: x.repeat_interleave(2, dim=1),
    "downloaded": lambda x: x.to("cpu", non_blocking=True).tolist(),
    "into pinned": lambda x: torch.empty(2, 3, pin_memory=True).copy_(x, non_blocking=True),
    "dtype": lambda x: x.to(torch.float64),
    "host": lambda x: torch.arange(5).tolist(),
    "record": lambda x: torch.cuda.Event().record(),
}


def on(device: PlayedDevice) -> torch.Tensor:
    return device.upload(torch.arange(6.0).view(2, 3))


@pytest.mark.parametrize("name", list(WAITS))
def test_what_waits_is_noted_once_with_its_place(name):
    device = PlayedDevice()
    x = on(device)
    with device.watch():
        WAITS[name](x)
    assert len(device.host_waits) == 1, [str(each) for each in device.host_waits]
    assert "test_host_waits.py" in device.host_waits[0].where[0]


@pytest.mark.parametrize("name", list(FREE))
def test_what_does_not_wait_is_not(name):
    device = PlayedDevice()
    x = on(device)
    with device.watch():
        FREE[name](x)
    assert [str(each) for each in device.host_waits] == []


def test_all_that_is_computed_is_there_backward_too():
    device, layer = PlayedDevice(), torch.nn.Linear(3, 2)
    device.hold(layer)
    x = on(device)

    class Looks(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, y: torch.Tensor) -> torch.Tensor:
            return y.view_as(y)

        @staticmethod
        def backward(ctx: Any, dy: torch.Tensor) -> torch.Tensor:
            assert dy.device == GPU
            dy.sum().item()
            return dy

    with device.watch():
        y = Looks.apply(layer(x).relu())
        assert y.device == layer.weight.device == GPU
        assert not device.host_waits
        y.sum().backward()
    assert device.holds(layer.weight.grad)
    assert [each.what for each in device.host_waits] == ["item"]
    assert "backward" in device.host_waits[0].where[0]
    assert layer.weight.device.type == "cpu", "outside nobody sees the device"


def test_values_are_those_of_the_host():
    device = PlayedDevice()
    x = on(device)
    with device.watch():
        back = (2 * x + torch.ones(3).pin_memory().to(GPU, non_blocking=True)).cpu()
        assert back.device.type == "cpu"
    assert torch.equal(back, 2 * torch.arange(6.0).view(2, 3) + 1)
