# SPDX-License-Identifier: Apache-2.0
"""PyTorch's ring attention over context-parallel ranks, on GPUs and on the CPU.

PyTorch's loop over the ranks' keys and values calls any kernel that returns the logarithm of the
softmax's sum beside its output. PyTorch itself gives it CUDA kernels; its CPU kernel does as well.
Rank ``r`` of ``cp`` has chunks ``r`` and ``2 * cp - 1 - r`` of a sequence, as this project cuts it.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

_ROOM = "torch.distributed.tensor.experimental._context_parallel._attention"
_LOOPS = ("_templated_ring_attention", "_templated_ring_attention_backward", "_cp_options")
_SEQUENCE = 2


@dataclass(frozen=True)
class Kernel:
    """A kernel of PyTorch's, by its name in ``torch.ops.aten``.

    Attributes:
        forward: returns output and logarithms, and what ``saved`` names.
        backward: takes them.
        saved: arguments of the backward, in the order of the forward's further results.
        dtypes: in which it computes.
        multiple: the width of heads must be a multiple of it.
    """

    forward: str
    backward: str
    saved: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    multiple: int

    def call(self, name: str) -> Callable[..., Any]:
        """Return one of the two operations."""
        return getattr(torch.ops.aten, name).default


_FLASH = "_scaled_dot_product_flash_attention"
KERNELS = {
    "cpu": Kernel(
        _FLASH + "_for_cpu",
        _FLASH + "_for_cpu_backward",
        (),
        (torch.float32, torch.float64, torch.bfloat16, torch.float16),
        1,
    ),
    "cuda": Kernel(
        _FLASH,
        _FLASH + "_backward",
        ("cum_seq_q", "cum_seq_k", "max_q", "max_k", "philox_seed", "philox_offset"),
        (torch.bfloat16, torch.float16),
        8,
    ),
}


def ring_problem(device: torch.device, dtype: torch.dtype, width: int) -> str:
    """Return why attention cannot run over CP ranks; empty if it can.

    Args:
        device, dtype: of queries.
        width: of a head.
    """
    if _loops() is None:
        return (
            f"context parallelism needs PyTorch's ring attention, {_ROOM}, which torch "
            f"{torch.__version__} does not have; take torch 2.13, cp 1 or Megatron's layers"
        )
    kernel = KERNELS.get(device.type)
    if kernel is None:
        return (
            f"context parallelism has kernels for {sorted(KERNELS)}, got a model on "
            f"{device.type!r}; take cp 1 or Megatron's layers"
        )
    if dtype not in kernel.dtypes:
        return (
            f"context parallelism on {device.type} computes in {_names(kernel.dtypes)}, got "
            f"{_names([dtype])}; give precision=torch.bfloat16"
        )
    if width % kernel.multiple:
        return (
            f"context parallelism on {device.type} needs heads whose width is a multiple of "
            f"{kernel.multiple}, got {width}; take cp 1 or Megatron's layers"
        )
    return ""


def ring_attention(
    query: Tensor, key: Tensor, value: Tensor, group: dist.ProcessGroup, scale: float | None
) -> Tensor:
    """Attend causally over a sequence whose chunks lie on the ranks of a group.

    Args:
        query: ``(B, heads, S/cp, D)``: this rank's two chunks, one after the other.
        key, value: ``(B, groups, S/cp, D)``, where ``groups`` divides ``heads``.
        group: the CP ranks; all of them call it.
        scale: of the scores; None for ``1 / sqrt(D)``.

    Returns:
        ``(B, heads, S/cp, D)``.
    """
    return _RingAttention.apply(query, key, value, group, scale)


class _RingAttention(torch.autograd.Function):
    """Shapes as of :func:`ring_attention`.

    forward: keys and values go once around; results are merged by their logarithms.
    backward: the same again. A key's gradient, of which every rank's queries have a part, is
    added to on its way around and ends where the key is.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, group: Any, scale: float | None
    ) -> Tensor:
        kernel = KERNELS[query.device.type]
        call, times = kernel.call(kernel.forward), query.shape[1] // key.shape[1]

        def attend(q: Tensor, k: Tensor, v: Tensor, **more: Any) -> Any:
            return call(q, _repeated(k, times), _repeated(v, times), **more)

        tensors = [each.contiguous() for each in (query, key, value)]
        with _zigzag() as torch_s:
            output, logarithms, *others = torch_s._templated_ring_attention(
                group, _SEQUENCE, attend, *tensors, is_causal=True, dropout_p=0.0, scale=scale
            )
        further = dict(zip(kernel.saved, others, strict=False))
        ctx.numbers = {name: each for name, each in further.items() if not torch.is_tensor(each)}
        ctx.names = [name for name in further if name not in ctx.numbers]
        ctx.save_for_backward(*tensors, output, logarithms, *(further[n] for n in ctx.names))
        ctx.group, ctx.scale = group, scale
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        query, key, value, output, logarithms, *others = ctx.saved_tensors
        kernel = KERNELS[query.device.type]
        call, times = kernel.call(kernel.backward), query.shape[1] // key.shape[1]

        def attend(*, key: Tensor, value: Tensor, **more: Any) -> Any:
            of_query, of_key, of_value = call(
                key=_repeated(key, times), value=_repeated(value, times), **more
            )
            return of_query, _summed(of_key, times), _summed(of_value, times)

        further = {**ctx.numbers, **dict(zip(ctx.names, others, strict=True))}
        with _zigzag() as torch_s:
            gradients = torch_s._templated_ring_attention_backward(
                ctx.group,
                _SEQUENCE,
                attend,
                grad_out=gradient.contiguous(),
                grad_out_name="grad_out",
                query=query,
                key=key,
                value=value,
                out=output,
                logsumexp=logarithms,
                is_causal=True,
                dropout_p=0.0,
                scale=ctx.scale,
                **further,
            )
        return (*gradients[:3], None, None)


def _loops() -> Any:
    """PyTorch's module, which is no public interface; None where this torch has another one."""
    try:
        found = importlib.import_module(_ROOM)
    except ImportError:
        return None
    return found if all(hasattr(found, name) for name in _LOOPS) else None


@contextlib.contextmanager
def _zigzag() -> Iterator[Any]:
    """PyTorch's module, told that sequences are cut as this project does; it is a global switch."""
    torch_s = _loops()
    before = torch_s._cp_options.enable_load_balance
    torch_s._cp_options.enable_load_balance = True
    try:
        yield torch_s
    finally:
        torch_s._cp_options.enable_load_balance = before


def _repeated(heads: Tensor, times: int) -> Tensor:
    """Each head so many times: what goes around the ring is one of each."""
    return heads if times == 1 else heads.repeat_interleave(times, dim=1)


def _summed(heads: Tensor, times: int) -> Tensor:
    return heads if times == 1 else heads.unflatten(1, (-1, times)).sum(dim=2)


def _names(dtypes: Any) -> str:
    return ", ".join(str(each).removeprefix("torch.") for each in dtypes)
