# SPDX-License-Identifier: Apache-2.0
"""The CPU backend: what it redirects, that Megatron-Core needs it, and its absence on GPUs.

One process. The redirections exist only where CUDA does not, so their behaviour is tested there
and the table, the import rules and the literals everywhere. Call sites are read out of the
installed Megatron-Core's syntax tree.
"""

from __future__ import annotations

import ast
import functools
import importlib.abc
import importlib.metadata
import importlib.util
import logging
import queue
import re
import subprocess
import sys
import threading
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch

import megatron.core.models.mimo  # noqa: F401 - its import switches the backend on
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.models.mimo.stock_view import StockView
from megatron.core.optimizer import optimizer as stock_optimizer
from megatron.core.tensor_parallel.random import (
    CudaRNGStatesTracker,
    get_cuda_rng_tracker,
    model_parallel_cuda_manual_seed,
)
from megatron.core.transformer.moe import token_dispatcher

if not torch.cuda.is_available():
    from megatron.core.models.mimo import cpu_backend

REPOSITORY = Path(__file__).resolve().parents[3]
PACKAGE = REPOSITORY / "megatron" / "core" / "models" / "mimo"
# PyTorch's kernels by device: a table.
KERNELS_FILE = PACKAGE / "torch_native" / "ring_attention.py"
BACKEND_FILE = PACKAGE / "cpu_backend.py"
SOURCES = sorted((REPOSITORY / "megatron").rglob("*.py"))
VERSION = ".".join(importlib.metadata.version("megatron-core").split(".")[:2])
CPU = torch.device("cpu")
CUDA_NAMES = ["cuda", "cuda:1", torch.device("cuda"), torch.device("cuda", 0)]
FACTORIES = {
    "tensor": ([1.0, 2.0],),
    "zeros": (2,),
    "ones": (2, 3),
    "empty": ((4,),),
    "empty_like": (torch.arange(3),),
}

# With a GPU there is nothing to redirect; the static and subprocess tests below run on both.
if torch.cuda.is_available():
    WITHOUT_CUDA: list = []
    KEYS: list[str] = []
else:
    WITHOUT_CUDA = list(cpu_backend.REDIRECTS)
    KEYS = [
        f"{getattr(redirect.owner, '__name__', redirect.owner)}.{redirect.name}"
        for redirect in WITHOUT_CUDA
    ]


# ---- the table against the installed Megatron-Core --------------------------------------------


def dotted(node: ast.AST) -> str:
    """``a.b.c`` of a name or attribute chain, else an empty string."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def says_cuda(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and str(node.value).startswith("cuda")


def asks_for_a_device(call: ast.Call) -> bool:
    """Whether a factory is told what has no meaning without a GPU."""
    return any(
        k.arg == "pin_memory" or (k.arg == "device" and says_cuda(k.value)) for k in call.keywords
    )


def uses(function: ast.AST, key: str) -> bool:
    """Whether the function's body has the call that the entry ``key`` redirects."""
    nodes = list(ast.walk(function))
    calls = [n for n in nodes if isinstance(n, ast.Call)]
    methods = [c for c in calls if isinstance(c.func, ast.Attribute)]
    owner, _, name = key.rpartition(".")
    if key in ("Tensor.to", "ShardedTensor.init_data"):
        return any(c.func.attr == name and any(map(says_cuda, c.args)) for c in methods)
    if owner == "Tensor" and name == "cuda":
        return any(c.func.attr == "cuda" for c in methods)
    if owner == "Tensor" and name == "type":
        names = [n.value for n in nodes if isinstance(n, ast.Constant)]
        asked = any(c.func.attr == "type" and not c.args for c in methods)
        return asked and "torch.cuda.FloatTensor" in names
    if key == "torch.compile":
        return any(dotted(n) == key for n in nodes)
    if owner == "torch":
        return any(dotted(c.func) == key and asks_for_a_device(c) for c in calls)
    if owner.startswith("megatron."):
        return any(dotted(c.func).split(".")[0] == name for c in calls)
    return any(dotted(n) == key for n in nodes)


def definitions(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, ast.AST]]:
    """(qualified name, node) of every function of a module."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef):
            yield from definitions(node, f"{prefix}{node.name}.")
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield f"{prefix}{node.name}", node
            yield from definitions(node, f"{prefix}{node.name}.")
        else:
            yield from definitions(node, prefix)


def function_of(site: str) -> ast.AST:
    """The syntax tree of "dir/file.py: function" in the installed Megatron-Core."""
    file, _, function = site.partition(": ")
    module = "megatron.core." + file.removesuffix(".py").replace("/", ".")
    spec = importlib.util.find_spec(module)
    assert spec is not None, f"{site}: the installed {VERSION} has no module {module}"
    tree = ast.parse(Path(spec.origin).read_text())
    found = [n for name, n in definitions(tree) if f".{name}".endswith(f".{function}")]
    assert found, f"{site}: {spec.origin} has no function {function}"
    return ast.Module(body=found, type_ignores=[])


def test_the_installed_version_is_one_that_the_table_can_speak_of() -> None:
    assert VERSION in ("0.16", "0.19")


def test_no_call_is_redirected_twice() -> None:
    assert len(set(KEYS)) == len(KEYS)


@pytest.mark.parametrize("index", range(len(KEYS)), ids=KEYS)
def test_every_redirect_names_a_call_site_that_still_needs_it(index: int) -> None:
    redirect = WITHOUT_CUDA[index]
    assert redirect.call_sites
    versions = set()
    for site in redirect.call_sites:
        match = re.fullmatch(r"(?:(0\.16|0\.19) )?([\w/]+\.py: [\w.]+)", site)
        assert match, f"{site!r} is not '[version ]dir/file.py: function'"
        versions |= {match[1]} if match[1] else {"0.16", "0.19"}
        if match[1] in (None, VERSION):
            assert uses(function_of(match[2]), KEYS[index]), f"{site} does not use {KEYS[index]}"
    assert versions


def test_a_redirect_that_nobody_calls_is_noticed() -> None:
    function = function_of("tensor_parallel/layers.py: ColumnParallelLinear.__init__")
    assert uses(function, "torch.cuda.current_device")
    assert not uses(function, "torch.cuda.current_stream")
    assert not uses(function, "torch.zeros")
    assert not uses(function, "Tensor.to")


# ---- what each redirection does ---------------------------------------------------------------


def entries(*names: str) -> pytest.MarkDecorator:
    """Parametrises over those of ``names`` that are redirected: none where CUDA is there."""
    here = [n for n in names if n in KEYS]
    assert here == (list(names) if KEYS else [])
    return pytest.mark.parametrize("key", here)


STOCK_TORCH = stock_optimizer.torch  # as Megatron's modules see it


class MadeUpModules(importlib.abc.MetaPathFinder):
    """Finds ``megatron.core.made_up_*`` in a folder of its own, as a stock module that is new."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> object:
        file = self.folder / f"{fullname}.py"
        return importlib.util.spec_from_file_location(fullname, file) if file.exists() else None


Define = Callable[..., Callable[..., object]]
Ask = Callable[..., object]


@pytest.fixture
def define(tmp_path: Path) -> Iterator[Define]:
    """Defines a function by its expression in a Megatron module that is loaded afterwards."""
    finder = MadeUpModules(tmp_path)
    sys.meta_path.append(finder)

    def define(code: str, *names: str) -> Callable[..., object]:
        module = f"megatron.core.made_up_{len(list(tmp_path.iterdir()))}"
        source = f"import torch\n\ndef answer({', '.join(names)}):\n    return {code}\n"
        (tmp_path / f"{module}.py").write_text(source)
        try:
            return importlib.import_module(module).answer
        finally:
            sys.modules.pop(module, None)

    yield define
    sys.meta_path.remove(finder)


@pytest.fixture
def ask(define: Define) -> Ask:
    """Evaluates an expression inside a Megatron module that is loaded after the redirects."""
    return lambda code, **names: define(code, *names)(**names)


def seen_by_stock(key: str) -> object:
    """What an entry's name means in Megatron's modules."""
    owner, _, name = key.rpartition(".")
    whole = STOCK_TORCH if owner.startswith("torch") else sys.modules[owner]
    path = owner.split(".")[1:] if owner.startswith("torch") else []
    return getattr(functools.reduce(getattr, path, whole), name)


@entries("torch.cuda.current_device")
def test_current_device_serves_as_a_device(key: str) -> None:
    device = STOCK_TORCH.cuda.current_device()
    assert torch.zeros(1, device=device).device == CPU
    assert torch.zeros(1).to(device).device == CPU


@entries(*(f"torch.{name}" for name in FACTORIES))
def test_factories_make_cpu_tensors_of_cuda_requests(key: str) -> None:
    name = key.removeprefix("torch.")
    factory, args = getattr(STOCK_TORCH, name), FACTORIES[name]
    plain = factory(*args)
    for device in CUDA_NAMES:
        made = factory(*args, device=device, dtype=torch.float64)
        assert (made.device, made.dtype, made.shape) == (CPU, torch.float64, plain.shape)
    assert not factory(*args, pin_memory=True).is_pinned()
    assert factory(*args, device="meta").device.type == "meta"
    assert factory.__name__ == name


@entries("torch.zeros")
def test_megatron_uses_what_others_put_in_place_of_torchs_functions(
    key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As accelerate's ``init_empty_weights(include_buffers=True)`` does."""
    for name in ("zeros", "full"):  # one with a redirect, one without
        monkeypatch.setattr(torch, name, functools.partial(getattr(torch, name), device="meta"))
    assert STOCK_TORCH.zeros(2).device.type == "meta"
    assert STOCK_TORCH.full((2,), 1.0).device.type == "meta"


@entries("torch.zeros")
def test_assignments_to_torch_in_megatron_reach_torch(
    key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = torch.zeros
    monkeypatch.setattr(STOCK_TORCH, "zeros", None)
    monkeypatch.setattr(STOCK_TORCH, "a_new_name", 1, raising=False)
    assert torch.zeros is plain, "replaced in Megatron's view only"
    assert torch.a_new_name == 1
    monkeypatch.undo()
    assert not hasattr(torch, "a_new_name")
    assert STOCK_TORCH.zeros(1).tolist() == [0.0]


@entries("torch.compile")
def test_compilers_trace_megatrons_functions(key: str, define: Define) -> None:
    """A user's ``torch.compile`` of a model with Megatron's layers sees through the view."""
    code = "torch.nn.functional.gelu(x) + torch.zeros(2, device=torch.cuda.current_device())"
    layer = torch.compile(define(code, "x"), backend="eager", fullgraph=True)
    x = torch.tensor([1.0, -2.0])
    torch.testing.assert_close(layer(x), torch.nn.functional.gelu(x))


@entries("torch.compile")
def test_megatrons_functions_are_not_compiled(key: str) -> None:
    def function() -> None:
        return None

    assert STOCK_TORCH.compile(function) is function
    assert STOCK_TORCH.compile(fullgraph=True)(function) is function
    loaded = [m for name, m in list(sys.modules.items()) if name.startswith("megatron.core.")]
    types_seen = [c for m in loaded for c in vars(m).values() if isinstance(c, type)]
    spaces = [*loaded, *(c for c in types_seen if c.__module__.startswith("megatron."))]
    values = [v for space in spaces for v in vars(space).values()]
    functions = [v for v in values if isinstance(v, types.FunctionType)]
    assert len(functions) > 1000
    left = [f for f in functions if f is torch.compile or "_torchdynamo_orig_callable" in vars(f)]
    assert not left


def test_functions_that_were_compiled_already_are_made_plain() -> None:
    """Without its compiler, as where ranks are forked for tests, PyTorch compiles none at all."""

    def plain() -> None: ...

    def compiled() -> None: ...

    plain.__module__ = "megatron.core.played"
    compiled._torchdynamo_orig_callable = plain
    module = types.ModuleType("megatron.core.played")
    module.Layer = type("Layer", (), {"step": compiled, "__module__": module.__name__})
    module.own = compiled
    StockView([], [], leave=frozenset()).change(module)
    assert module.own is plain
    assert module.Layer.step is plain


@entries("ShardedTensor.init_data")
def test_sharded_tensors_get_their_data_on_the_cpu(key: str, ask: Ask) -> None:
    def fresh() -> ShardedTensor:
        return ShardedTensor.from_rank_offsets("key", torch.zeros(2, 3)).without_data()

    tensor = fresh()
    ask("tensor.init_data('cuda')", tensor=tensor)
    assert (tensor.data.device, tensor.data.shape) == (CPU, (2, 3))
    tensor = fresh()
    ask("tensor.init_data(device='cuda:1', init_fn=torch.ones)", tensor=tensor)
    assert tensor.data.tolist() == [[1.0] * 3] * 2
    tensor = fresh()
    ask("tensor.init_data('meta')", tensor=tensor)
    assert tensor.data.device.type == "meta"


@entries("Tensor.to")
def test_tensors_stay_on_the_cpu(key: str, ask: Ask) -> None:
    tensor = torch.arange(3)
    assert ask("tensor.to('cuda')", tensor=tensor) is tensor
    assert ask("tensor.to(device='cuda:1', non_blocking=True)", tensor=tensor) is tensor
    assert ask("tensor.to('cuda', torch.float64)", tensor=tensor).dtype == torch.float64
    assert ask("tensor.to(torch.float16)", tensor=tensor).dtype == torch.float16
    assert ask("tensor.to('meta')", tensor=tensor).device.type == "meta"
    layer = torch.nn.Linear(2, 2)
    assert ask("layer.to('cuda', torch.float64)", layer=layer).weight.dtype == torch.float64


@entries("Tensor.cuda")
def test_cuda_keeps_tensors_and_modules(key: str, ask: Ask) -> None:
    tensor = torch.arange(3)
    assert ask("tensor.cuda()", tensor=tensor) is tensor
    assert (
        ask("tensor.cuda(torch.cuda.current_device(), non_blocking=True)", tensor=tensor) is tensor
    )
    module = torch.nn.Linear(2, 2)
    weight = module.weight
    assert ask("module.cuda()", module=module) is module
    assert module.weight is weight
    other = types.SimpleNamespace(cuda=lambda *args, **kwargs: (args, kwargs))
    assert ask("other.cuda(1, a=2)", other=other) == ((1,), {"a": 2})


@entries("Tensor.type")
def test_only_code_that_compares_type_names_is_told_a_cuda_type(key: str, ask: Ask) -> None:
    compared = "tensor.type() if 'torch.cuda.FloatTensor' else None"
    assert ask(compared, tensor=torch.zeros(1)) == "torch.cuda.FloatTensor"
    assert ask(compared, tensor=torch.zeros(1).half()) == "torch.cuda.HalfTensor"
    assert ask(compared, tensor=torch.zeros(1).bfloat16()) == "torch.cuda.BFloat16Tensor"
    assert ask("tensor.type()", tensor=torch.zeros(1)) == "torch.FloatTensor"
    other = compared.replace("type()", "type(torch.float64)")
    assert ask(other, tensor=torch.zeros(1)).dtype == torch.float64


@entries("Tensor.type")
def test_megatrons_mixed_precision_optimizer_accepts_cpu_parameters(key: str) -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        parameter = torch.nn.Parameter(torch.zeros(2, dtype=dtype))
        optimizer = stock_optimizer.Float16OptimizerWithFloat16Params(
            torch.optim.SGD([parameter], lr=0.1),
            stock_optimizer.OptimizerConfig(bf16=True),
            None,
            lambda *_: None,
        )
        halves = [p for group in optimizer.float16_groups for p in group]
        assert len(halves) == (dtype is not torch.float32)


@pytest.fixture
def cpu_generator() -> Iterator[None]:
    """The process's generator is put back after the test."""
    state = torch.get_rng_state()
    yield
    torch.set_rng_state(state)


@entries(
    "torch.cuda.get_rng_state",
    "torch.cuda.random.get_rng_state",
    "torch.cuda.set_rng_state",
    "torch.cuda.manual_seed",
    "megatron.core.tensor_parallel.random._set_cuda_rng_state",
)
def test_the_generator_round_trips(key: str, cpu_generator: None) -> None:
    function = seen_by_stock(key)
    torch.default_generator.manual_seed(5)
    start, drawn = torch.get_rng_state(), torch.rand(4)
    if key.endswith("manual_seed"):
        function(5)
    elif key.endswith("get_rng_state"):
        torch.set_rng_state(start)
        assert torch.equal(function(), start)
        assert torch.equal(function(device="cuda"), start)
    else:
        function(start)
    assert torch.equal(torch.rand(4), drawn)


@entries("torch.cuda.manual_seed")
def test_seeding_through_torch_does_not_recurse(key: str, cpu_generator: None) -> None:
    torch.manual_seed(3)
    drawn = torch.rand(2)
    seen_by_stock(key)(3)
    assert torch.equal(torch.rand(2), drawn)


@entries("megatron.core.tensor_parallel.random._set_cuda_rng_state")
def test_a_tracker_forks_and_comes_back(
    key: str, cpu_generator: None, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(1)
    tracker = CudaRNGStatesTracker()
    outside = torch.get_rng_state()
    tracker.add("inner", 99)
    assert torch.equal(torch.get_rng_state(), outside)
    with tracker.fork("inner"):
        first = torch.rand(3)
    assert torch.equal(torch.get_rng_state(), outside)
    with tracker.fork("inner"):
        second = torch.rand(3)
    assert not torch.equal(first, second)
    torch.manual_seed(99)
    assert torch.equal(torch.rand(6).view(2, 3), torch.stack([first, second]))
    assert "RNG state changed" not in caplog.text
    logging.getLogger(CudaRNGStatesTracker.__module__).warning("something else")
    assert "something else" in caplog.text


@entries("torch.cuda.manual_seed")
def test_megatron_seeds_its_global_tracker(key: str, cpu_generator: None) -> None:
    before = get_cuda_rng_tracker().get_states()
    try:
        model_parallel_cuda_manual_seed(17, tp_rank=0, ep_rank=0, etp_rank=0)
        drawn = torch.rand(2)
        model_parallel_cuda_manual_seed(17, tp_rank=0, ep_rank=0, etp_rank=0)
        assert torch.equal(torch.rand(2), drawn)
        assert get_cuda_rng_tracker().get_states()
    finally:
        get_cuda_rng_tracker().set_states(before)


@entries("torch.cuda.Stream", "torch.cuda.current_stream", "torch.cuda.default_stream")
def test_streams_have_nothing_outstanding(key: str) -> None:
    stream = seen_by_stock(key)()
    stream.wait_stream(STOCK_TORCH.cuda.current_stream())
    stream.synchronize()
    assert stream.query() is True
    event = stream.record_event()
    event.record(stream)
    event.wait(stream)
    stream.wait_event(event)
    with stream as entered:
        assert entered is stream


@entries("torch.cuda.Stream")
def test_a_stream_can_be_a_class_and_take_a_device(key: str) -> None:
    stream = seen_by_stock(key)
    assert isinstance(stream(device=STOCK_TORCH.cuda.current_device()), stream)


@entries("torch.cuda.stream")
def test_stream_contexts_run_their_body(key: str) -> None:
    context = seen_by_stock(key)
    with context(STOCK_TORCH.cuda.Stream()):
        value = torch.ones(1)
    assert value.item() == 1
    with pytest.raises(KeyError, match="passes through"), context(None):
        raise KeyError("passes through")


@entries("torch.cuda.synchronize", "torch.cuda.nvtx.range_push", "torch.cuda.nvtx.range_pop")
def test_calls_without_meaning_here_return_nothing(key: str) -> None:
    arguments = ("a range",) if key.endswith("range_push") else ()
    assert seen_by_stock(key)(*arguments) is None


@entries("megatron.core.dist_checkpointing.strategies.filesystem_async.mp")
def test_checkpoint_writers_are_threads_of_this_process(key: str) -> None:
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    for method in ("fork", "spawn"):
        context = filesystem_async.mp.get_context(method)
        results, work = context.Manager().Queue(), context.JoinableQueue()
        work.put("token")
        writer = context.Process(
            target=lambda done, token: done.put((token.get(), token.task_done())),
            args=(results, work),
        )
        assert isinstance(writer, threading.Thread)
        writer.start()
        work.join()
        writer.join()
        assert results.get_nowait()[0] == "token"
        with pytest.raises(queue.Empty):
            results.get_nowait()
    # Annotations of the file go on naming multiprocessing's types; the module itself is whole.
    assert hasattr(filesystem_async.mp, "SimpleQueue")
    assert torch.multiprocessing.get_context("spawn").Process is not threading.Thread


@entries("torch.zeros")
def test_names_that_tools_patch_through_stocks_view_are_put_back(key: str) -> None:
    """pytest's monkeypatch and unittest's mock look into ``__dict__`` for what they replace."""
    rank, zeros = torch.distributed.get_rank, STOCK_TORCH.zeros
    view = STOCK_TORCH.distributed
    assert view is not torch.distributed
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(view, "get_rank", lambda: 7)
        patch.setattr(STOCK_TORCH, "zeros", None)
        assert torch.distributed.get_rank() == 7
    with mock.patch.object(view, "get_rank", return_value=8), mock.patch.object(
        STOCK_TORCH, "zeros"
    ):
        assert torch.distributed.get_rank() == 8
    assert torch.distributed.get_rank is view.get_rank is rank
    assert STOCK_TORCH.zeros is zeros is not torch.zeros


@entries("megatron.core.transformer.moe.token_dispatcher.maybe_move_tensor_to_cpu")
def test_split_sizes_are_sequences(key: str) -> None:
    move = token_dispatcher.maybe_move_tensor_to_cpu
    sizes = torch.tensor([2, 0, 3])
    assert move(sizes, as_numpy=True, record_stream=True).tolist() == [2, 0, 3]
    assert move(sizes) is sizes
    assert move(None, as_numpy=True) is None


class PlayedGroup:
    """Collectives of two ranks with 1 and 3 rows, as this rank (the second) sees them."""

    OTHER, OWN = torch.full((1, 2), 5.0), torch.arange(6.0).view(3, 2)

    def all_gather(self, parts: list, tensor: torch.Tensor, group=None, async_op=False) -> None:
        assert len({part.shape for part in parts}) == 1
        assert parts[0].shape == tensor.shape
        parts[0].zero_()
        parts[0][:1] = self.OTHER
        parts[1].copy_(tensor)

    def all_reduce(self, tensor: torch.Tensor, op=None, group=None) -> None:
        self.reduced = (op, group)
        tensor.mul_(2)


@entries("torch.distributed.all_gather")
def test_parts_of_different_sizes_are_gathered(key: str) -> None:
    gather = WITHOUT_CUDA[KEYS.index(key)].make(PlayedGroup().all_gather)
    parts = [torch.empty(1, 2), torch.empty(3, 2)]
    gather(parts, PlayedGroup.OWN, group=object())
    assert torch.equal(parts[0], PlayedGroup.OTHER)
    assert torch.equal(parts[1], PlayedGroup.OWN)


@entries("torch.distributed.reduce_scatter")
def test_parts_of_different_sizes_are_reduced(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    scatter = WITHOUT_CUDA[KEYS.index(key)].make(lambda *a, **k: asked.append((a, k)))
    played, group, most = PlayedGroup(), object(), torch.distributed.ReduceOp.MAX
    monkeypatch.setattr(torch.distributed, "all_reduce", played.all_reduce)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda group: 1)
    output = torch.empty(3, 2)
    scatter(output, [PlayedGroup.OTHER, PlayedGroup.OWN], op=most, group=group)
    assert torch.equal(output, 2 * PlayedGroup.OWN)
    assert played.reduced == (most, group)
    assert not asked
    equal = [PlayedGroup.OWN, PlayedGroup.OWN]
    scatter(output, equal)
    ((args, _),) = asked
    assert args[0] is output
    assert args[1] is equal


@entries("torch.zeros")
def test_enabling_twice_changes_nothing(key: str) -> None:
    names = [k for k in KEYS if not k.startswith(("Tensor.", "ShardedTensor."))]
    before, finders = [seen_by_stock(k) for k in names], list(sys.meta_path)
    assert cpu_backend.enable() is True
    assert cpu_backend.is_enabled()
    assert [r.name for r in cpu_backend.REDIRECTS] == [r.name for r in WITHOUT_CUDA]
    assert all(a is b for a, b in zip(map(seen_by_stock, names), before, strict=True))
    assert sys.meta_path == finders


BEHAVIOUR_TESTS = {
    name: mark.args[1]
    for name, function in list(globals().items())
    for mark in getattr(function, "pytestmark", [])
    if mark.name == "parametrize" and mark.args[0] in ("key", "index")
}
TESTED = {key for keys in BEHAVIOUR_TESTS.values() for key in keys if isinstance(key, str)}
if not KEYS:
    # No redirection, nothing to test: pytest would report each as skipped.
    for name in BEHAVIOUR_TESTS:
        del globals()[name]


def test_every_redirect_has_a_behaviour_test() -> None:
    assert set(KEYS) == TESTED


def test_the_backend_is_on_exactly_without_cuda() -> None:
    assert bool(KEYS) is not torch.cuda.is_available()
    assert ("megatron.core.models.mimo.cpu_backend" in sys.modules) is bool(KEYS)


# ---- inert and unimported where CUDA is there -------------------------------------------------

_WITH_CUDA = """
import inspect, sys, torch
torch.cuda.is_available = lambda: True
names = ("tensor", "zeros", "ones", "empty", "empty_like")
factories = [getattr(torch, name) for name in names]
methods = [torch.Tensor.to, torch.Tensor.cuda, torch.Tensor.type, torch.nn.Module.cuda]
cuda = [v for v in vars(torch.cuda).values() if callable(v)]
dynamo = sys.modules.get("torch._dynamo")
import megatron.core.models.mimo as mimo
assert mimo.__file__.endswith("models/mimo/__init__.py"), mimo.__file__
backend = "megatron.core.models.mimo.cpu_backend"
assert backend not in sys.modules, "imported"
def unchanged():
    assert all(getattr(torch, n) is f for n, f in zip(names, factories))
    now = [torch.Tensor.to, torch.Tensor.cuda, torch.Tensor.type, torch.nn.Module.cuda]
    assert all(a is b for a, b in zip(now, methods))
    after = [v for v in vars(torch.cuda).values() if callable(v)]
    assert all(a is b for a, b in zip(after, cuda))
unchanged()
"""


def run_with_cuda(more: str) -> None:
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _WITH_CUDA + more],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=REPOSITORY,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["inert"]


def test_where_cuda_is_available_the_backend_is_not_imported_and_refuses_to_act() -> None:
    """The public names and, through them, the whole package; then ``enable`` itself."""
    run_with_cuda(
        "import pkgutil, importlib\n"
        "pure = ('config', 'partition', 'comm')\n"
        "for info in pkgutil.walk_packages(mimo.__path__, mimo.__name__ + '.'):\n"
        "    if info.name.split('.')[4] in pure:\n"
        "        importlib.import_module(info.name)\n"
        "assert backend not in sys.modules, 'imported'\n"
        "unchanged()\n"
        "cpu_backend = importlib.import_module(backend)\n"
        "assert cpu_backend.enable() is False\n"
        "assert not cpu_backend.is_enabled() and cpu_backend.REDIRECTS == []\n"
        "unchanged()\n"
        "print('inert')\n"
    )


def imports_of(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [f"{node.module or ''}.{alias.name}" for alias in node.names]
    return []


def mentions_backend(tree: ast.AST) -> list[ast.AST]:
    """Imports of the backend, and strings that could import it."""
    return [
        n
        for n in ast.walk(tree)
        if any("cpu_backend" in name for name in imports_of(n))
        or (isinstance(n, ast.Name | ast.Attribute) and dotted(n).endswith("cpu_backend"))
        or (isinstance(n, ast.Constant) and n.value == "cpu_backend")
    ]


def test_only_the_package_imports_the_backend_and_only_without_cuda() -> None:
    importers = {path for path in SOURCES if path != BACKEND_FILE and mentions_backend(parse(path))}
    assert importers == {PACKAGE / "__init__.py"}
    tree = parse(PACKAGE / "__init__.py")
    guards = [
        n
        for n in tree.body
        if isinstance(n, ast.If) and ast.unparse(n.test) == "not torch.cuda.is_available()"
    ]
    assert len(guards) == 1
    assert not guards[0].orelse
    inside = mentions_backend(guards[0])
    assert inside
    assert len(inside) == len(mentions_backend(tree))


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


# ---- no literal anywhere else -----------------------------------------------------------------

_DEVICE = re.compile(r"cuda(:\d+)?|nccl|gloo|cpu:gloo.*|.*cuda:nccl.*")


def docstrings(tree: ast.AST) -> set[int]:
    """Ids of the constants that are documentation."""
    statements = (n.value for n in ast.walk(tree) if isinstance(n, ast.Expr))
    return {id(value) for value in statements if isinstance(value, ast.Constant)}


def literals(tree: ast.AST) -> list[str]:
    """Backend and device names, and calls that move to a device by name."""
    documentation = docstrings(tree)
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if id(node) not in documentation and _DEVICE.fullmatch(node.value.lower()):
                found.append(f"line {node.lineno}: {node.value!r}")
        elif isinstance(node, ast.Call) and dotted(node.func).endswith("cuda"):
            found.append(f"line {node.lineno}: .cuda()")
    return found


@pytest.mark.parametrize(
    "code",
    [
        "group = new_group(backend='nccl')",
        "init('gloo')",
        "torch.zeros(1, device='cuda')",
        "x.to('cuda:0')",
        "x.cuda()",
        "x.cuda(non_blocking=True)",
        "torch.device('cuda', 1)",
        "init('cpu:gloo,cuda:nccl')",
    ],
)
def test_the_search_finds_literals(code: str) -> None:
    assert literals(ast.parse(code))


def test_the_search_leaves_what_names_no_device() -> None:
    code = "'''About gloo: cuda.'''\nuse_gloo_process_groups = torch.cuda.is_available()"
    assert not literals(ast.parse(code))


def test_no_backend_or_device_is_named_outside_the_cpu_backend() -> None:
    assert BACKEND_FILE in SOURCES
    assert len(SOURCES) > 20
    found = {
        str(path.relative_to(REPOSITORY)): here
        for path in SOURCES
        if path not in (BACKEND_FILE, KERNELS_FILE) and (here := literals(parse(path)))
    }
    assert found == {}
    assert literals(parse(KERNELS_FILE)) == ["line 59: 'cuda'"]
