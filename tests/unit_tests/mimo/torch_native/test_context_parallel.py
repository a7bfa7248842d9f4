# SPDX-License-Identifier: Apache-2.0
"""Context parallelism of models of transformers on one rank, and what is refused."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from megatron.core.models.mimo.partition.sequence_order import SequenceShardError
from megatron.core.models.mimo.torch_native import own_chunks, ring_attention
from megatron.core.models.mimo.torch_native.context_parallel import (
    attend_over_cp,
    context_parallel_problem,
)
from megatron.core.models.mimo.torch_native.loss import causal_loss
from megatron.core.models.mimo.torch_native.ring_attention import KERNELS, Kernel, ring_problem
from tests.unit_tests.mimo.torch_native.native_cases import build, tokens

pytestmark = pytest.mark.once

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def group() -> Iterator[dist.ProcessGroup]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    assert dist.group.WORLD is not None
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("items", [None, 0, torch.tensor(0)])
def test_a_batch_without_labels_has_no_loss_and_no_gradient(
    items: Any, group: dist.ProcessGroup
) -> None:
    logits = torch.randn(2, 3, 5).requires_grad_()
    labels = torch.full((2, 3), -100)
    loss = causal_loss(group)(logits, labels, num_items_in_batch=items)
    loss.backward()
    assert loss == 0
    assert torch.equal(torch.zeros_like(logits), logits.grad)  # type: ignore[arg-type]


@pytest.mark.parametrize("family", ["qwen2", "llama", "qwen3"])
def test_a_family_s_sequences_can_be_cut(family: str) -> None:
    assert context_parallel_problem(build(family), None) == ""


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("clip", {}, "CLIPVisionModel does not attend causally, .* give those ranks to tp or dp"),
        (
            "qwen2",
            {"attn_implementation": "eager"},
            "attn_implementation='eager', .*PyTorch's ring attention; build .*='sdpa'",
        ),
        (
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
            r"layers of \['sliding_attention'\], .*cp 1 or Megatron's layers",
        ),
        ("llama", {"attention_dropout": 0.1}, "attention_dropout 0.1, which .*set it to 0"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "rope_type='dynamic', whose frequencies depend on the length",
        ),
    ],
)
def test_models_whose_sequences_cannot_be_cut_are_named(
    family: str, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        raise ValueError(context_parallel_problem(build(family, **changes), None))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((CUDA, torch.float32, 64), "cuda computes in bfloat16, float16, got float32; give prec"),
        ((CUDA, torch.bfloat16, 20), "on cuda needs heads whose width is a multiple of 8, got 20"),
        ((torch.device("meta"), torch.float32, 64), r"kernels for \['cpu', 'cuda'\], got .*'meta'"),
    ],
)
def test_where_no_kernel_attends_is_refused(arguments: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        raise ValueError(ring_problem(*arguments))


def test_another_torch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ring_problem(CPU, torch.float32, 6) == ring_problem(CUDA, torch.bfloat16, 64) == ""
    found = ring_attention._loops()
    for name in ring_attention._LOOPS:
        with monkeypatch.context() as patch:
            patch.delattr(found, name)
            assert "needs PyTorch's ring attention" in ring_problem(CPU, torch.float32, 6), name
    monkeypatch.setattr(ring_attention, "_LOOPS", ("_no_such_loop",))
    with pytest.raises(ValueError, match=r"needs PyTorch's ring attention, torch.*which torch \d"):
        raise ValueError(context_parallel_problem(build("qwen2"), None))
    monkeypatch.setattr(ring_attention, "_ROOM", "torch.no_such_module")
    assert "take torch 2.13" in ring_problem(CPU, torch.float32, 6)


def test_what_a_forward_kernel_returns_is_what_its_backward_takes() -> None:
    """Also of CUDA's kernels, which cannot run here."""
    for kernel in KERNELS.values():
        forward, backward = (
            getattr(torch.ops.aten, name).default._schema
            for name in (kernel.forward, kernel.backward)
        )
        returned = [str(each.type) for each in forward.returns][2:]
        taken = {each.name: str(each.type) for each in backward.arguments}
        types = [taken[name] for name in kernel.saved]
        assert returned[: len(types)] == types
        ours = {"grad_out", "query", "key", "value", "out", "logsumexp", "dropout_p", "is_causal"}
        known = ours | {"scale", "attn_mask", *kernel.saved}
        assert set(taken) <= known
        assert [str(each.type) for each in backward.returns] == ["Tensor"] * 3


def inputs_of(heads: int, groups: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = [(2, heads, 8, 6), (2, groups, 8, 6), (2, groups, 8, 6)]
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


def gradients(output: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(output.sin().sum(), inputs))


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (8, 2)])
def test_grouped_queries_attend_as_pytorch_s(group: Any, heads: int, groups: int) -> None:
    inputs = inputs_of(heads, groups)
    found = ring_attention.ring_attention(*inputs, group, 0.3)
    query, key, value = inputs
    expected = functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=0.3, enable_gqa=True
    )
    torch.testing.assert_close(found, expected)
    for one, other in zip(gradients(found, inputs), gradients(expected, inputs), strict=True):
        torch.testing.assert_close(one, other)


def test_pytorch_s_global_switch_is_left_as_found(
    group: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    loops: Any = ring_attention._loops()
    monkeypatch.setattr(loops._cp_options, "enable_load_balance", False)
    inputs = inputs_of(4, 4)
    gradients(ring_attention.ring_attention(*inputs, group, None), inputs)
    assert loops._cp_options.enable_load_balance is False


class Fuller(Kernel):
    """The CPU's kernel, returning a tensor and a number more, which its backward must get."""

    def call(self, name: str) -> Any:
        plain = super().call(name)

        def forward(*args: Any, **kwargs: Any) -> Any:
            return (*plain(*args, **kwargs), torch.tensor([5]), 7)

        def backward(*, seed: Tensor, longest: int, **kwargs: Any) -> Any:
            assert seed.tolist() == [5]
            assert longest == 7
            return plain(**kwargs)

        return forward if name == self.forward else backward


def test_further_results_of_a_kernel_reach_its_backward(
    group: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, plain = inputs_of(4, 4), KERNELS["cpu"]
    expected = gradients(ring_attention.ring_attention(*inputs, group, None), inputs)
    names = ("seed", "longest")
    fuller = Fuller(plain.forward, plain.backward, names, plain.dtypes, plain.multiple)
    monkeypatch.setitem(KERNELS, "cpu", fuller)
    found = gradients(ring_attention.ring_attention(*inputs, group, None), inputs)
    assert all(map(torch.equal, found, expected))


def cut(group: Any, *, cut_sequence: bool = True) -> Any:
    model = build("qwen3")
    attend_over_cp(model, group, cut_sequence=cut_sequence, together=group)
    return model


def test_a_model_of_one_rank_is_what_it_was(group: Any) -> None:
    """Its configuration, which another model may share, is left as it is."""
    whole = build("qwen3")
    model = copy.deepcopy(whole)
    theirs = model.config
    attend_over_cp(model, group, cut_sequence=True, together=group)
    assert theirs._attn_implementation == "sdpa"
    ids, labels = tokens(2, 12)
    expected, found = whole(ids, labels=labels), model(ids, labels=labels)
    torch.testing.assert_close(found.logits, expected.logits)
    torch.testing.assert_close(found.loss, expected.loss)
    embedded = model.get_input_embeddings()(ids)
    shifted = functional.pad(labels[:, 1:], (0, 1), value=-100)
    again = model(inputs_embeds=embedded, shift_labels=shifted)
    torch.testing.assert_close(again.loss, expected.loss)


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"attention_mask": torch.ones(2, 12)}, "attention_mask is given, .*labels of -100, or"),
        ({"logits_to_keep": 1}, "logits_to_keep=1 would count within each cp rank's chunks; leave"),
        ({"logits_to_keep": torch.tensor([0])}, r"logits_to_keep=tensor\(\[0\]\) would count"),
        ({"past_key_values": object()}, "past_key_values is given, and over cp attention is"),
        (
            {"position_ids": torch.arange(6).repeat(2, 2)},
            "do not count the tokens of one sequence, as of packed samples .*a sample a row",
        ),
    ],
)
def test_inputs_that_attention_would_not_follow_are_refused(
    group: Any, inputs: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        cut(group)(tokens(2, 12)[0], **inputs)


def test_attention_that_the_ring_does_not_do_is_refused(group: Any) -> None:
    model = cut(group)
    with pytest.raises(ValueError, match=r"Qwen3Attention attends with softcap=30.0, which ring a"):
        model(tokens(2, 12)[0], softcap=30.0)
    with pytest.raises(ValueError, match="needs input_ids or inputs_embeds, got neither"):
        model(labels=tokens(2, 12)[1])


def test_what_a_caller_who_cuts_has_to_give(group: Any) -> None:
    model, (ids, labels) = cut(group, cut_sequence=False), tokens(2, 12)
    positions = torch.arange(12).expand(2, 12)
    with pytest.raises(ValueError, match=r"position_ids must be given with cut_sequence=False"):
        model(ids)
    with pytest.raises(ValueError, match=r"labels of a chunk lack .*; give shift_labels"):
        model(ids, labels=labels, position_ids=positions)
    assert model(ids, position_ids=positions + 3).logits.shape == (2, 12, 99)


class Two:
    """Stands for a group of two ranks."""

    def size(self) -> int:
        return 2

    def rank(self) -> int:
        return 1


@pytest.mark.usefixtures("group")
def test_chunks_are_those_of_megatron_s_language_models() -> None:
    two: Any = Two()
    assert own_chunks(torch.arange(8)[None], two).tolist() == [[2, 3, 4, 5]]
    with pytest.raises(SequenceShardError, match=r"divisible by 4 .*, got 6; pad it to 8"):
        own_chunks(torch.arange(6)[None], two)
