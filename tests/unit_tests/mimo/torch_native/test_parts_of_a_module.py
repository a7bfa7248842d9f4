# SPDX-License-Identifier: Apache-2.0
"""What a rank keeps of a module with torch-native parts, on one process: refusals and state."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.models.mimo.huggingface.cuts import Heads, Whole
from megatron.core.models.mimo.huggingface.tables import Table, line
from megatron.core.models.mimo.huggingface.weights import Part, held_by
from megatron.core.models.mimo.torch_native.data_parallel import TorchNativeParallel
from megatron.core.models.mimo.torch_native.styles import _place_gradient, joined
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.transformer_config import TransformerConfig
from tests.harness.backend import own_device

pytestmark = pytest.mark.once

CONFIG = TransformerConfig(
    num_layers=1,
    hidden_size=8,
    num_attention_heads=2,
    use_cpu_initialization=True,
    perform_initialization=False,
    gradient_accumulation_fusion=False,
)


@pytest.fixture(autouse=True)
def _one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def groups(size: int = 1, **ranks: int | None) -> Any:
    """Groups of so many ranks, of which this is the first, or the one that is named."""

    def one(rank: int | None) -> Any:
        return None if rank is None else SimpleNamespace(rank=lambda: rank, size=lambda: size)

    each = {"tp": 0, "cp": 0, "dp": 0, "dp_cp": 0, **ranks}
    return SimpleNamespace(**{name: one(rank) for name, rank in each.items()})


def wrapped(projector: nn.Module, tp: int) -> TorchNativeParallel:
    module = nn.Sequential(nn.Linear(4, 8), projector)
    return TorchNativeParallel(CONFIG, DistributedDataParallelConfig(), module, groups(tp))


def megatron_s(bias: bool) -> nn.Module:
    return ColumnParallelLinear(
        8,
        8,
        config=CONFIG,
        init_method=nn.init.zeros_,
        bias=bias,
        tp_group=dist.group.WORLD,
    )


def marked() -> nn.Module:
    """A layer of another kind, such as TransformerEngine's, that says so."""
    layer = nn.Linear(8, 8)
    layer.weight.tensor_model_parallel = True  # type: ignore[assignment]
    return layer


@pytest.mark.parametrize("projector", [marked, lambda: megatron_s(bias=False)])
def test_layers_that_megatron_cuts_over_tp_are_refused(projector: Any) -> None:
    words = r"^1\.weight is cut over tp 2 by Megatron's layers, beside .*take a projector that is"
    with pytest.raises(ValueError, match=words):
        wrapped(projector(), tp=2)
    assert len(wrapped(nn.Linear(8, 8), tp=2).local_shards.places) == 4


def test_at_tp_1_megatron_s_layers_are_saved_and_loaded() -> None:
    module = wrapped(megatron_s(bias=True), tp=1)
    names = {f"module.{n}.{kind}" for n in (0, 1) for kind in ("weight", "bias")}
    assert set(module.sharded_state_dict()) == names
    assert names <= set(module.state_dict())
    with pytest.raises(ValueError, match=r"sharded_offsets=\(\(0, 1, 2\),\): a torch-native mod"):
        module.sharded_state_dict(sharded_offsets=((0, 1, 2),))
    module.load_state_dict({name: torch.ones_like(t) for name, t in module.named_parameters()})
    assert all(bool((t == 1).all()) for t in module.parameters())


def split(tensor: torch.Tensor) -> nn.Parameter:
    mesh = init_device_mesh(own_device().type, (1,), mesh_dim_names=("tp",))
    return nn.Parameter(distribute_tensor(tensor, mesh, [Shard(0)]))


@pytest.mark.parametrize(
    ("ranks", "first"),
    [({}, True), ({"cp": None}, True), ({"tp": 1}, False), ({"cp": 1}, False), ({"dp": 1}, False)],
)
def test_a_gathered_weight_is_kept_on_one_rank(ranks: dict[str, Any], first: bool) -> None:
    owner = nn.Module()
    owner.weight = split(torch.ones(4, 2, device=own_device()))
    table = Table((line("weight", "theirs.weight", Whole()),))
    part = Part("language", (owner,), table, groups(2, **ranks), Heads(1, 1, 1))
    assert [held.first_copy for held in held_by([part])] == [True] * first


def test_a_gradient_is_placed_as_its_parameter() -> None:
    parameter = split(torch.ones(4, 2, device=own_device()))
    whole: Any = parameter.detach()
    parameter.grad = whole.redistribute(placements=[Replicate()])
    _place_gradient(parameter)
    assert parameter.grad.placements == parameter.placements


def test_outputs_of_any_form_become_whole_and_plain() -> None:
    """Within one another, too; what is no tensor stays, and what is kept of the outermost."""
    named = namedtuple("named", "rows counts")
    tensor = torch.arange(8.0, device=own_device()).view(4, 2)
    part: Any = split(tensor).detach()
    found = joined({"kept": part, "rows": [part, (part, {"kept": part}), None], "n": 3}, ("kept",))
    assert found.pop("kept") is part
    first, (second, third), nothing = found["rows"]
    assert [type(found["rows"]), type(found["rows"][1])] == [list, tuple]
    assert (nothing, found["n"]) == (None, 3)
    both = joined(named(part, [part]), ())
    assert isinstance(both, named)
    for each in (first, second, third["kept"], joined(part, ()), both.rows, *both.counts):
        assert type(each) is torch.Tensor
        assert torch.equal(each, tensor)
