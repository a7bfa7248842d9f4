# SPDX-License-Identifier: Apache-2.0
"""What torch and transformers answer in one interpreter, as a table of texts.

Run as ``python torch_table.py first|last folder``: import the package before anything else asks
torch, or after the table was made once by an interpreter that has never imported it. Prints JSON:
the tables ``before`` and ``after`` the import, the names in torch that the import ``replaced``
and, for ``last``, the table of a ``control`` that replaces torch's functions for everybody. No
GPU; gloo with one rank.
"""

from __future__ import annotations

import functools
import hashlib
import json
import pickle
import re
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode

CASES: dict[str, Callable[[], Any]] = {}


def case(function: Callable[[], Any]) -> Callable[[], Any]:
    """Add a case to the table."""
    CASES[function.__name__] = function
    return function


def digest(value: Any) -> Any:
    """Tensors as device, dtype and bytes; modules as their parameters and *all* their buffers."""
    if isinstance(value, nn.Module):
        tensors = [*value.named_parameters(), *value.named_buffers()]
        return {name: digest(tensor.detach()) for name, tensor in tensors}
    if not isinstance(value, torch.Tensor):
        return value
    text = f"{value.device} {value.dtype} {tuple(value.shape)}"
    if value.device.type != "cpu" or type(value) is not torch.Tensor:
        return text
    content = value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return f"{text} {hashlib.blake2b(content, digest_size=8).hexdigest()}"


def outcome(call: Callable[[], Any]) -> Any:
    """A call's answer, or the error's type and first line."""
    try:
        return digest(call())
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[:1]}"


CONSTRUCTORS = {
    "empty": ((2,),),
    "zeros": (2,),
    "ones": (2,),
    "full": ((2,), 3.0),
    "arange": (3,),
    "eye": (2,),
    "rand": (2,),
    "randn": (2,),
    "randint": (3, (2,)),
    "randperm": (3,),
    "linspace": (0, 1, 3),
    "tensor": ([1.0],),
    "as_tensor": ([1.0],),
    "asarray": ([1.0],),
    "scalar_tensor": (1.0,),
    "empty_strided": ((2,), (1,)),
    "empty_like": (torch.ones(2),),
    "zeros_like": (torch.ones(2),),
}


def made(**options: Any) -> dict[str, str]:
    """The device of every constructor's tensor."""
    return {
        name: outcome(lambda n=name, a=args: str(getattr(torch, n)(*a, **options).device))
        for name, args in CONSTRUCTORS.items()
    }


@case
def with_device_meta() -> Any:
    with torch.device("meta"):
        return made(), digest(nn.Linear(2, 2)), digest(nn.Embedding(3, 2))


@case
def default_device_meta() -> Any:
    torch.set_default_device("meta")
    try:
        return made(), digest(nn.LayerNorm(2)), str(torch.get_default_device())
    finally:
        torch.set_default_device(None)


@case
def meta_inside_cpu() -> Any:
    with torch.device("cpu"), torch.device("meta"):
        inner = made()
    return inner, made(), made(device="meta")


@case
def device_decorator() -> Any:
    return torch.utils._device.set_device("meta")(lambda: str(torch.zeros(2).device))()


@case
def cached_constructors() -> Any:
    return {name: getattr(torch, name) in _device_constructors() for name in CONSTRUCTORS}


@case
def fake_tensors() -> Any:
    with FakeTensorMode():
        tensor = torch.zeros(2)
        moved = outcome(lambda: str(tensor.to("cuda").device))
        called = outcome(lambda: str(tensor.cuda().device))
        return made(), made(device="cuda"), moved, called, tensor.type()


@case
def fake_layer_on_cuda() -> Any:
    with FakeTensorMode(), torch.device("cuda"):
        return str(nn.Linear(2, 2).weight.device)


@case
def compiled() -> Any:
    seen = []

    def backend(graph: torch.fx.GraphModule, _inputs: list) -> Callable:
        seen.append([re.sub(" at 0x.*", "", str(node.target)) for node in graph.graph.nodes])
        return graph.forward

    def function(x: torch.Tensor) -> torch.Tensor:
        y = torch.zeros(2) + torch.empty_like(x).fill_(1) + torch.tensor([1.0, 2.0])
        return (x.to(torch.float64) + y).to("cpu") * torch.ones(2, device=x.device)

    answer = digest(torch.compile(function, backend=backend, fullgraph=True)(torch.ones(2)))
    layer = torch.compile(nn.Linear(2, 2), backend=backend, fullgraph=True)
    return answer, digest(layer(torch.ones(1, 2)).isfinite()), seen, torch._dynamo.config.disable


@case
def functorch() -> Any:
    layer = nn.Linear(2, 2)
    zeros = {name: torch.zeros_like(p) for name, p in layer.named_parameters()}
    rows = torch.arange(6.0).view(3, 2)
    return (
        digest(torch.func.vmap(lambda row: row.to(torch.float64) + torch.zeros(2))(rows)),
        digest(torch.func.grad(lambda x: (x.to(torch.float64) * torch.ones(2)).sum())(rows[0])),
        digest(torch.func.jacrev(lambda x: torch.tensor(2.0) * x)(rows[0])),
        digest(torch.func.functional_call(layer, zeros, rows).detach()),
    )


@case
def skip_init() -> Any:
    layer = nn.utils.skip_init(nn.Linear, 3, 2)
    return str(layer.weight.device), str(nn.Linear(2, 2, device="meta").to_empty(device="cpu"))


@case
def accelerates_empty_weights() -> Any:
    """As ``accelerate.init_empty_weights(include_buffers=True)`` does it."""
    register = nn.Module.register_parameter
    plain = {name: getattr(torch, name) for name in ("empty", "zeros", "ones", "full")}

    def on_meta(module: nn.Module, name: str, parameter: Any) -> None:
        register(module, name, parameter)
        if parameter is not None:
            module._parameters[name] = nn.Parameter(parameter.to("meta"))

    nn.Module.register_parameter = on_meta
    for name, function in plain.items():
        setattr(torch, name, functools.partial(function, device="meta"))
    try:
        return digest(nn.Linear(2, 2)), digest(nn.BatchNorm1d(2)), str(torch.zeros(2).device)
    finally:
        nn.Module.register_parameter = register
        for name, function in plain.items():
            setattr(torch, name, function)


@case
def function_modes() -> Any:
    seen: list[Any] = []

    class Recorder(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append((resolve_name(func) or func.__name__, func in HANDLED))
            return func(*args, **(kwargs or {}))

    with Recorder():
        tensor = torch.zeros(2)
        tensor.to(torch.float64), tensor.type(), torch.empty_like(tensor), torch.tensor([1.0])
    return seen


@case
def dispatch_modes() -> Any:
    seen = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Recorder():
        torch.ones(2).to(torch.float64)
    return seen


@case
def tables_of_subclasses() -> Any:
    """A table by function, made before any import of ours, as quantized tensors have one."""
    return [
        outcome(lambda call=call: call(torch.zeros(2).as_subclass(Quantized)))
        for call in (
            lambda x: x.to(torch.float64),
            lambda x: x.cuda(),
            lambda x: x.type(),
            torch.empty_like,
        )
    ]


@case
def traced() -> Any:
    class Layer(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.zeros_like(x) + x.to(torch.float64) + torch.empty_like(x)

    scripted = torch.jit.script(adds_zeros)
    return str(torch.fx.symbolic_trace(Layer()).graph), digest(scripted(torch.ones(2)))


def adds_zeros(x: torch.Tensor) -> torch.Tensor:
    return x + torch.zeros(2) + torch.ones(2).to(x.dtype)


@case
def cuda_requests() -> Any:
    """What a program meets that asks for a GPU where none is: errors, all of them."""
    tensor, layer, cuda = torch.zeros(2), nn.Linear(2, 2), torch.cuda
    calls = {
        "zeros": lambda: torch.zeros(2, device="cuda"),
        "tensor": lambda: torch.tensor([1.0], device="cuda:1"),
        "pinned": lambda: torch.empty(2, pin_memory=True),
        "to": lambda: tensor.to("cuda"),
        "to_device": lambda: tensor.to(device=torch.device("cuda", 0)),
        "cuda": lambda: tensor.cuda(),
        "module_cuda": lambda: layer.cuda(),
        "module_to": lambda: layer.to("cuda"),
        "type": lambda: tensor.type("torch.cuda.FloatTensor"),
        "current_device": lambda: cuda.current_device(),
        "synchronize": lambda: cuda.synchronize(),
        "current_stream": lambda: str(type(cuda.current_stream())),
        "default_stream": lambda: str(type(cuda.default_stream())),
        "stream": lambda: str(type(cuda.Stream())),
        "event": lambda: cuda.Event().record(),
        "no_stream": lambda: str(cuda.stream(None).__class__),
        "rng": lambda: cuda.get_rng_state(),
        "push": lambda: cuda.nvtx.range_push("range"),
        "pop": lambda: cuda.nvtx.range_pop(),
        "count": lambda: (cuda.is_available(), cuda.device_count(), cuda.is_initialized()),
        "autocast": lambda: str(torch.autocast("cpu").fast_dtype),
        "scaler": lambda: torch.amp.GradScaler("cuda").is_enabled(),
    }
    return {name: outcome(call) for name, call in calls.items()}


@case
def generators() -> Any:
    torch.manual_seed(1)
    torch.cuda.manual_seed(2)
    torch.cuda.manual_seed_all(3)
    drawn = digest(torch.rand(3))
    with torch.random.fork_rng():
        torch.manual_seed(4)
    x = torch.ones(2, requires_grad=True)
    again = torch.utils.checkpoint.checkpoint(nn.functional.dropout, x, use_reentrant=False)
    return drawn, digest(torch.rand(3)), digest(again.detach())


@case
def names() -> Any:
    picklable = [torch.zeros, torch.tensor, torch.empty_like, torch.Tensor.to, torch.Tensor.cuda]
    context = torch.multiprocessing.get_context("spawn")
    return [pickle.dumps(picklable).hex(), str(context.Process), torch.zeros(2).type()]


@case
def typed_tensors() -> Any:
    """Meta weights that are sharded and then made real, as FSDP and ``DTensor`` do."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard, distribute_tensor, zeros

    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh("cpu", (1,))
    with torch.device("meta"):
        layer = fully_shard(nn.Linear(4, 2), mesh=mesh)
    devices = [str(p.device) for p in layer.parameters()]
    layer.to_empty(device="cpu")
    devices += [str(p.to_local().device) for p in layer.parameters()]
    whole = distribute_tensor(torch.arange(4.0), mesh, [Shard(0)]).to(torch.float64)
    parts = [torch.empty(2)]
    dist.all_gather(parts, torch.ones(2))
    local = zeros(2, device_mesh=mesh).to_local()
    return devices, digest(whole.full_tensor()), digest(local), digest(parts[0])


FOLDER = Path(sys.argv[2]) if len(sys.argv) > 2 else Path()


@case
def from_pretrained() -> Any:
    """Tiny saved models, with rotary angles and with position numbers that are not saved."""
    from transformers import CLIPVisionConfig, CLIPVisionModel, Qwen2Config, Qwen2Model

    small = {"hidden_size": 16, "intermediate_size": 16}
    sizes = {**small, "num_hidden_layers": 1, "num_attention_heads": 2}
    language = Qwen2Config(vocab_size=32, num_key_value_heads=1, **sizes)
    vision = CLIPVisionConfig(image_size=8, patch_size=4, **sizes)
    torch.manual_seed(0)
    answers = []
    for built in (Qwen2Model(language), CLIPVisionModel(vision)):
        folder = FOLDER / type(built).__name__
        built.save_pretrained(folder)
        loaded = type(built).from_pretrained(folder)
        half = type(built).from_pretrained(folder, dtype=torch.bfloat16)
        answers.append([digest(loaded) == digest(built), digest(loaded), digest(half)])
    return answers


class Quantized(torch.Tensor):
    """Answers the functions of a table made when it was defined."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        handled = HANDLED.get(func)
        return handled if handled else super().__torch_function__(func, types, args, kwargs)


def identities() -> dict[str, int]:
    """Every attribute of torch's modules and of their classes, by name."""
    found = {}
    for name, module in list(sys.modules.items()):
        if f"{name}.".startswith(("torch.", "multiprocessing.", "numpy.", "random.")):
            spaces = {name: module}
            spaces |= {f"{name}.{k}": v for k, v in vars(module).items() if isinstance(v, type)}
            for space, owner in spaces.items():
                found |= {f"{space}.{k}": v for k, v in vars(owner).items()}
    return found


SETTINGS = (type(None), bool, int, float, str, bytes, torch.dtype, torch.device)
FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, types.MethodDescriptorType, type)


@contextmanager
def replacements() -> Iterator[list[str]]:
    """Collect the names whose function, type or setting was replaced in the body."""
    before, changed = identities(), []
    yield changed
    after = identities()
    for name, value in before.items():
        now = after.get(name)
        if isinstance(value, FUNCTIONS):
            same = now is value
        else:  # NaN is not itself.
            same = not isinstance(value, SETTINGS) or value != value or now == value
        if not same:
            changed.append(name)


HANDLED = {
    torch.Tensor.to: "to",
    torch.Tensor.cuda: "cuda",
    torch.Tensor.type: "type",
    torch.empty_like: "empty_like",
}


def table() -> dict[str, Any]:
    torch.manual_seed(0)
    return {name: outcome(function) for name, function in CASES.items()}


def import_package() -> list[str]:
    with replacements() as changed:
        import megatron.core.models.mimo  # noqa: F401
        from megatron.core.models.gpt import GPTModel  # noqa: F401
        from megatron.core.models.mimo import MimoModel, get_mimo_optimizer  # noqa: F401
    return changed


def control() -> dict[str, Any]:
    """The table where torch's functions are replaced for everybody, before torch looks at them."""

    def to_cpu(function: Callable) -> Callable:
        return functools.wraps(function)(lambda *args, **kwargs: function(*args, **kwargs))

    plain = {
        **{(torch, name): to_cpu for name in ("tensor", "zeros", "ones", "empty", "empty_like")},
        (torch.Tensor, "to"): to_cpu,
        (torch.Tensor, "cuda"): lambda _f: lambda self: self,
        (torch.cuda, "manual_seed"): lambda _f: torch.default_generator.manual_seed,
        (torch.cuda, "current_device"): lambda _f: lambda: torch.device("cpu"),
    }
    originals = {(owner, name): getattr(owner, name) for owner, name in plain}
    for (owner, name), make in plain.items():
        setattr(owner, name, make(originals[owner, name]))
    _device_constructors.cache_clear()
    try:
        return table()
    finally:
        for (owner, name), function in originals.items():
            setattr(owner, name, function)


def main(order: str) -> None:
    warnings.simplefilter("ignore")
    answers: dict[str, Any] = {}
    if order == "last":
        answers["before"] = table()
    answers["replaced"] = import_package()
    answers["after"] = table()
    if order == "last":
        answers["control"] = control()
    print(json.dumps(answers, default=str))


if __name__ == "__main__":
    main(sys.argv[1])
