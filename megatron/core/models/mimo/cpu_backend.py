# SPDX-License-Identifier: Apache-2.0
"""Lets stock Megatron-Core run on CPU over gloo where no CUDA device exists.

Megatron-Core names CUDA literally in a handful of places. On a machine without a CUDA device
every one of those calls can only raise, so redirecting them to the CPU takes nothing away.
``REDIRECTS`` lists each redirected call with a Megatron call site that needs it; there are no
others. They exist *inside Megatron's modules only* (``stock_view``): torch itself is not touched,
so users, transformers or accelerate get from torch what they would get without this package.
``enable()`` refuses to do anything where CUDA is available, and ``megatron.core.models.mimo``
does not even import this module there.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import logging
import queue
import sys
import threading
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from megatron.core.models.mimo.stock_view import MethodCall, StockView, View

_CPU = torch.device("cpu")
_TYPE_PREFIX = "torch."
_CUDA_TYPE_PREFIX = "torch.cuda."
_enabled = False


@dataclass(frozen=True)
class Redirect:
    """One redirected call.

    Attributes:
        owner: object that carries the attribute: a module of torch (replaced in Megatron's view
            of it), a type of torch (its method calls in Megatron's code are), or something of
            Megatron's own.
        name: attribute that is replaced.
        make: builds the replacement from the original.
        call_sites: Megatron-Core places that fail without it, as "file: function"; one that only
            a supported version has begins with that version ("0.16 ", "0.19 ").
    """

    owner: Any
    name: str
    make: Callable[[Any], Any]
    call_sites: tuple[str, ...]


class _NullStream:
    """Stands for a CUDA stream or event: on CPU all work is done when the call returns."""

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        self.device = _CPU

    def wait_stream(self, _stream: Any) -> None:
        """Nothing to wait for."""

    def wait_event(self, _event: Any) -> None:
        """Nothing to wait for."""

    def wait(self, _stream: Any = None) -> None:
        """Nothing to wait for."""

    def record(self, _stream: Any = None) -> None:
        """Nothing to record."""

    def record_event(self, _event: Any = None) -> _NullStream:
        """Return an event that has already happened."""
        return self

    def synchronize(self) -> None:
        """Nothing is outstanding."""

    def query(self) -> bool:
        """Everything is done."""
        return True

    def __enter__(self) -> _NullStream:
        return self

    def __exit__(self, *_exc: Any) -> None:
        return None


def _is_cuda(device: Any) -> bool:
    """True for ``"cuda"``, ``"cuda:1"`` and ``torch.device("cuda", …)``."""
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and (device == "cuda" or device.startswith("cuda:"))


def _constant(value: Any) -> Callable[[Any], Any]:
    return lambda _original: lambda *_args, **_kwargs: value


def _device_argument(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a tensor factory: a CUDA ``device=`` becomes the CPU, and memory is never pinned.

    Pinning is for copies to an accelerator; without one it can only raise.
    """

    @functools.wraps(original)
    def factory(*args: Any, **kwargs: Any) -> Any:
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = _CPU
        kwargs.pop("pin_memory", None)
        return original(*args, **kwargs)

    return factory


def _to_cpu(tensor: Any, *args: Any, method: str, **kwargs: Any) -> Any:
    """Call a method that takes a device at any place: CUDA becomes the CPU."""
    args = tuple(_CPU if _is_cuda(a) else a for a in args)
    if _is_cuda(kwargs.get("device")):
        kwargs["device"] = _CPU
    return getattr(tensor, method)(*args, **kwargs)


def _to(self: Any, *args: Any, **kwargs: Any) -> Any:
    return _to_cpu(self, *args, method="to", **kwargs)


def _init_data(self: Any, *args: Any, **kwargs: Any) -> None:
    _to_cpu(self, *args, method="init_data", **kwargs)


def _cuda(self: Any, *args: Any, **kwargs: Any) -> Any:
    """``.cuda()`` of a tensor or a module: already where it has to be."""
    if isinstance(self, torch.Tensor | torch.nn.Module):
        return self
    return self.cuda(*args, **kwargs)


def _type(self: Any) -> Any:
    """``tensor.type()`` with CUDA's name, the only one that Megatron's optimizers accept."""
    answer = self.type()
    if isinstance(answer, str) and answer.startswith(_TYPE_PREFIX):
        return _CUDA_TYPE_PREFIX + answer.removeprefix(_TYPE_PREFIX)
    return answer


def _says_cuda(call: ast.Call) -> bool:
    """True for a call with a literal CUDA device among its arguments."""
    values = [*call.args, *(keyword.value for keyword in call.keywords)]
    return any(isinstance(v, ast.Constant) and _is_cuda(v.value) for v in values)


def _is_method(call: ast.Call) -> bool:
    """False for a function of ``torch`` itself, as in ``torch.cuda(…)``."""
    owner = getattr(call.func, "value", None)
    return not (isinstance(owner, ast.Name) and owner.id == "torch")


# Method -> (what a file contains that may call it, which of its calls are meant).
_METHODS: dict[str, tuple[str, Callable[[ast.Call], bool]]] = {
    "to": (r"\.to\([^()]*['\"]cuda", _says_cuda),
    "init_data": (r"\.init_data\([^()]*['\"]cuda", _says_cuda),
    "cuda": (r"\.cuda\(", _is_method),
    "type": (r"['\"]torch\.cuda\.\w+Tensor", lambda call: not call.args and not call.keywords),
}


def _get_rng_state(_original: Any) -> Callable[..., torch.Tensor]:
    return lambda device=None: torch.get_rng_state()


def _set_rng_state(_original: Any) -> Callable[..., None]:
    return lambda state, device=None: torch.set_rng_state(state)


def _manual_seed(_original: Any) -> Callable[[int], None]:
    def seed(value: int) -> None:
        # As on a GPU, no other generator is seeded.
        torch.default_generator.manual_seed(int(value))

    return seed


def _set_megatron_rng_state(_original: Any) -> Callable[..., None]:
    return lambda new_state, device=-1, graph_safe=False: torch.set_rng_state(new_state)


@contextlib.contextmanager
def _null_context(*_args: Any, **_kwargs: Any) -> Iterator[None]:
    yield


class _ThreadContext:
    """A ``multiprocessing`` context whose processes are threads of this process.

    Checkpoint writers are forked by 0.16 so that an asynchronous save can go on beside training,
    and both bases start a manager process to carry their results. Saves here are synchronous; a
    fork of a process with gloo's threads can hang, and a manager outlives a killed rank.
    """

    Queue = queue.Queue
    JoinableQueue = queue.Queue
    Process = threading.Thread

    def Manager(self) -> _ThreadContext:
        """Whose ``Queue()`` is a queue of this process."""
        return self


def _writers_in_this_process(original: Any) -> Any:
    """``multiprocessing`` as ``filesystem_async`` sees it: names its types, starts threads."""
    seen = types.SimpleNamespace(**vars(original))
    seen.get_context = lambda method=None: _ThreadContext()
    return seen


def _splits_as_numpy(_original: Any) -> Callable[..., Any]:
    """What Megatron does to split sizes that lie on a GPU, for those that lie here already.

    ``all_to_all_single`` takes no tensors as split sizes.
    """

    def move(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    return move


def _all_gather_of_any_sizes(original: Callable[..., Any]) -> Callable[..., Any]:
    """NCCL gathers parts of different first dims, gloo does not: they travel padded to one size."""

    @functools.wraps(original)
    def gather(
        tensor_list: list[torch.Tensor],
        tensor: torch.Tensor,
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        rows = [part.shape[0] if part.dim() else 1 for part in tensor_list]
        if async_op or len(set(rows)) <= 1:
            return original(tensor_list, tensor, group=group, async_op=async_op)
        padded = tensor.new_zeros((max(rows), *tensor.shape[1:]))
        padded[: len(tensor)] = tensor
        whole = [torch.empty_like(padded) for _ in tensor_list]
        original(whole, padded, group=group)
        for part, found in zip(tensor_list, whole, strict=True):
            part.copy_(found[: len(part)])
        return None

    return gather


def _reduce_scatter_of_any_sizes(original: Callable[..., Any]) -> Callable[..., Any]:
    """The same for reductions: parts of different first dims are summed whole on every rank."""

    @functools.wraps(original)
    def scatter(
        output: torch.Tensor,
        input_list: list[torch.Tensor],
        op: Any = torch.distributed.ReduceOp.SUM,
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        rows = [part.shape[0] if part.dim() else 1 for part in input_list]
        if async_op or len(set(rows)) <= 1:
            return original(output, input_list, op=op, group=group, async_op=async_op)
        whole = torch.cat(input_list)
        torch.distributed.all_reduce(whole, op=op, group=group)
        output.copy_(whole.split(rows)[torch.distributed.get_rank(group)])
        return None

    return scatter


def _not_compiled(model: Any = None, **_kwargs: Any) -> Any:
    """``torch.compile`` of Megatron's fused functions: as they are written.

    Without a GPU the compiler has nothing to fuse for and would need a C++ toolchain.
    """
    return (lambda function: function) if model is None else model


def _redirect(owner: Any, name: str, make: Callable[[Any], Any], *call_sites: str) -> Redirect:
    return Redirect(owner, name, make, call_sites)


def _redirects() -> list[Redirect]:
    from megatron.core.dist_checkpointing.mapping import ShardedTensor
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.core.tensor_parallel import random as megatron_random
    from megatron.core.transformer.moe import token_dispatcher

    null_stream = _constant(_NullStream())
    cuda, to_cpu = torch.cuda, _device_argument
    random_py = "tensor_parallel/random.py"
    buffer_py = "distributed/param_and_grad_buffer.py"
    files_py = "dist_checkpointing/strategies/filesystem_async.py"
    exchange_py = "dist_checkpointing/exchange_utils.py"
    mappings_py = "tensor_parallel/mappings.py"
    own_random_py = "models/mimo/randomness.py"
    return [
        _redirect(
            cuda,
            "current_device",
            _constant(_CPU),
            "tensor_parallel/layers.py: ColumnParallelLinear.__init__",
        ),
        _redirect(cuda, "synchronize", _constant(None), f"{files_py}: preload_tensors"),
        _redirect(cuda, "current_stream", null_stream, f"0.19 {buffer_py}: start_grad_sync"),
        _redirect(cuda, "default_stream", null_stream, f"0.16 {buffer_py}: start_grad_sync"),
        _redirect(
            cuda,
            "Stream",
            lambda _o: _NullStream,
            "distributed/distributed_data_parallel.py: DistributedDataParallel.__init__",
        ),
        _redirect(cuda, "stream", lambda _o: _null_context, f"{buffer_py}: start_grad_sync"),
        _redirect(cuda, "get_rng_state", _get_rng_state, f"{random_py}: CudaRNGStatesTracker.add"),
        _redirect(
            cuda.random, "get_rng_state", _get_rng_state, f"{random_py}: _get_cuda_rng_state"
        ),
        _redirect(cuda, "set_rng_state", _set_rng_state, f"{own_random_py}: restore_states"),
        _redirect(
            cuda, "manual_seed", _manual_seed, f"{random_py}: model_parallel_cuda_manual_seed"
        ),
        _redirect(
            megatron_random,
            "_set_cuda_rng_state",
            _set_megatron_rng_state,
            f"{random_py}: CudaRNGStatesTracker.fork",
        ),
        _redirect(cuda.nvtx, "range_push", _constant(None), "utils.py: nvtx_range_push"),
        _redirect(cuda.nvtx, "range_pop", _constant(None), "utils.py: nvtx_range_pop"),
        _redirect(
            torch,
            "tensor",
            to_cpu,
            "models/common/embeddings/rope_utils.py: get_pos_emb_on_this_cp_rank",
        ),
        _redirect(
            torch, "zeros", to_cpu, "pipeline_parallel/schedules.py: forward_backward_no_pipelining"
        ),
        _redirect(torch, "ones", to_cpu, "transformer/utils.py: get_default_causal_mask"),
        _redirect(torch, "compile", lambda _o: _not_compiled, "jit.py: enable_jit_fuser"),
        _redirect(torch, "empty", to_cpu, f"{exchange_py}: exchange_loaded_tensors_gather_rounds"),
        _redirect(torch, "empty_like", to_cpu, f"{exchange_py}: _get_empty_tensor_for_exchange"),
        _redirect(
            ShardedTensor,  # which keeps the torch.empty of before, as a default
            "init_data",
            lambda _o: _init_data,
            f"{exchange_py}: _get_empty_tensor_for_exchange",
        ),
        _redirect(
            torch.Tensor,
            "to",
            lambda _o: _to,
            "optimizer/cpu_offloading/hybrid_optimizer.py: _move_new_state_to_right_device",
        ),
        _redirect(
            torch.Tensor,
            "cuda",
            lambda _o: _cuda,
            "models/common/embeddings/rope_utils.py: get_pos_emb_on_this_cp_rank",
        ),
        _redirect(
            torch.Tensor,
            "type",
            lambda _o: _type,
            "optimizer/optimizer.py: Float16OptimizerWithFloat16Params.__init__",
        ),
        _redirect(
            filesystem_async,
            "mp",
            _writers_in_this_process,
            f"0.16 {files_py}: write_preloaded_data_multiproc",
            f"0.16 {files_py}: _get_write_results_queue",
            f"0.19 {files_py}: get_write_results_queue",
        ),
        _redirect(
            token_dispatcher,
            "maybe_move_tensor_to_cpu",
            _splits_as_numpy,
            "transformer/moe/token_dispatcher.py: _maybe_dtoh_and_synchronize",
        ),
        _redirect(
            torch.distributed,
            "all_gather",
            _all_gather_of_any_sizes,
            f"{mappings_py}: _gather_along_first_dim",
        ),
        _redirect(
            torch.distributed,
            "reduce_scatter",
            _reduce_scatter_of_any_sizes,
            f"{mappings_py}: _reduce_scatter_along_first_dim",
        ),
    ]


REDIRECTS: list[Redirect] = []


def _drop_shared_generator_warning(record: logging.LogRecord) -> bool:
    """Megatron's tracker warns when the CPU generator moves while it guards the CUDA one.

    Here the two are the same generator, so it always moves; the tracker restores it at once.
    """
    return "CPU RNG state changed within GPU RNG context" not in record.getMessage()


def _current(owner: Any, name: str) -> Callable[..., Any]:
    """What ``owner.name`` is when the result is called: others may replace it, and put it back."""

    @functools.wraps(getattr(owner, name))
    def call(*args: Any, **kwargs: Any) -> Any:
        return getattr(owner, name)(*args, **kwargs)

    return call


def _stock_view(redirects: list[Redirect]) -> StockView:
    """Collect the redirects of torch's modules and types; carry out those of Megatron's own."""
    views: dict[str, View] = {}
    names: list[tuple[Any, Any]] = []
    methods = []
    for redirect in redirects:
        owner, name = redirect.owner, redirect.name
        if isinstance(owner, type):
            methods.append(MethodCall(*_METHODS[name], name, redirect.make(getattr(owner, name))))
        elif owner.__name__.partition(".")[0] == "torch":
            value = redirect.make(_current(owner, name))
            views.setdefault(owner.__name__, View(owner)).show(name, value)
            names.append((getattr(owner, name), value))
        else:
            setattr(owner, name, redirect.make(getattr(owner, name)))
    for name, view in views.items():
        parent, _, last = name.rpartition(".")
        if parent:
            views[parent].show(last, view)
    names += [(sys.modules[name], view) for name, view in views.items()]
    return StockView(names, methods, leave=frozenset({__name__}))


def enable() -> bool:
    """Redirect the calls of ``REDIRECTS`` in Megatron's modules; idempotent.

    Returns:
        True where the redirections are active, False where CUDA is available and nothing was
        changed.
    """
    global _enabled
    if torch.cuda.is_available():
        return False
    if _enabled:
        return True
    REDIRECTS.extend(_redirects())
    _stock_view(REDIRECTS).install()
    logging.getLogger("megatron.core.tensor_parallel.random").addFilter(
        _drop_shared_generator_warning
    )
    _enabled = True
    return True


def is_enabled() -> bool:
    """Return true when this process runs Megatron-Core on the CPU through this module."""
    return _enabled
