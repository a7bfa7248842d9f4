# SPDX-License-Identifier: Apache-2.0
"""Attention of items that are cut over CP ranks, all ranks as threads of one process.

The oracle is the same attention on one rank, whole: outputs and the gradients of queries, keys and
values. float64; the bound of 1e-12 is a thousand times the rounding of sums this long, and a
billionth of the effect of one misplaced position.
"""

from __future__ import annotations

import doctest
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from megatron.core.models.mimo.transformer import ulysses_attention
from megatron.core.models.mimo.transformer.context_parallel_attention import (
    ContextParallelAttention,
)
from megatron.core.models.mimo.transformer.ulysses_attention import ItemParts, UlyssesAttention
from megatron.core.transformer.enums import AttnMaskType
from tests.unit_tests.mimo.attention_oracle import FakeGroup, fake_groups, tiny_config
from tests.unit_tests.mimo.bridge_cases import DEVICE
from tests.unit_tests.mimo.in_process_ranks import InProcessWorld

EXACT = {"rtol": 0.0, "atol": 1e-12}
HEADS, GROUPS, WIDTHS = 8, 4, (6, 6, 4)  # of query, key and value heads


def attention(kind: type, cp: Any, causal: bool = False, **config: Any) -> Any:
    config = {"num_attention_heads": HEADS, "num_query_groups": GROUPS, "hidden_size": 48} | config
    return kind(
        config=tiny_config(context_parallel_size=1 if cp is None else cp.size(), **config),
        layer_number=1,
        attn_mask_type=AttnMaskType.causal if causal else AttnMaskType.no_mask,
        attention_type="self",
        pg_collection=fake_groups(cp=cp),
    )


def drawn(parts: ItemParts, groups: int) -> list[torch.Tensor]:
    """Queries, keys, values and the output's gradient of all items, ``(t, heads, d)``."""
    generator = torch.Generator().manual_seed(5)
    total = sum(parts.lengths)
    shapes = [(HEADS, WIDTHS[0]), (groups, WIDTHS[1]), (groups, WIDTHS[2])]
    shapes.append((HEADS * WIDTHS[2],))
    return [
        torch.randn((total, *shape), generator=generator, dtype=torch.float64).to(DEVICE)
        for shape in shapes
    ]


def forward_and_back(module: Any, qkv: list[torch.Tensor], gradient: torch.Tensor, params: Any):
    leaves = [x.clone().requires_grad_() for x in qkv]
    out = module(*leaves, None, packed_seq_params=params)
    out.backward(gradient)
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def whole(parts: ItemParts, groups: int, causal: bool) -> list[torch.Tensor]:
    *qkv, gradient = drawn(parts, groups)
    one = attention(ContextParallelAttention, None, causal, num_query_groups=groups)
    return forward_and_back(one, qkv, gradient, replace(parts, size=1).packed())


def on_ranks(
    parts: ItemParts, groups: int, causal: bool, pad_to: int = 1, told: ItemParts | None = None
) -> list[list[torch.Tensor]]:
    """What every rank finds of its own positions; ``told`` are the parts that its layers see."""

    def body(rank: int) -> list[torch.Tensor]:
        group = dist.new_subgroups_by_enumeration([list(range(parts.size))])[0]
        own = attention(UlyssesAttention, group, causal, num_query_groups=groups)
        local = [parts.cut(x, rank, pad_to) for x in drawn(parts, groups)]
        found = forward_and_back(own, local[:3], local[3], (told or parts).packed())
        count = parts.totals[rank]
        assert all(not each[count:].any() for each in found), "padding"
        return [each[:count] for each in found]

    return InProcessWorld(parts.size).run(body)


def assert_whole(parts: ItemParts, groups: int = GROUPS, causal: bool = False, **more: Any) -> None:
    expected = whole(parts, groups, causal)
    for rank, found in enumerate(on_ranks(parts, groups, causal, **more)):
        for mine, all_of_it in zip(found, expected, strict=True):
            wanted = parts.cut(all_of_it, rank)[: parts.totals[rank]]
            torch.testing.assert_close(mine, wanted, **EXACT)


PARTS = {
    "alike": ItemParts((6, 6, 6), 2),
    "alike-uneven": ItemParts((7, 7), 4),
    "other-lengths": ItemParts((5, 1, 9, 2), 2),
    "fewer-than-ranks": ItemParts((1, 3, 2), 4),
    "ranks-without-any": ItemParts((1, 1), 4),
    "one-item": ItemParts((10,), 4),
    "class-token": ItemParts((5, 8, 2), 4, lead=1),
    "class-token-alike": ItemParts((5, 5), 2, lead=1),
    "merged": ItemParts((8, 4, 12), 2, unit=4),
}


@pytest.mark.parametrize("causal", [False, True], ids=["both-ways", "causal"])
@pytest.mark.parametrize("groups", [HEADS, GROUPS], ids=["heads", "grouped"])
@pytest.mark.parametrize("name", list(PARTS))
def test_equal_to_whole_items_on_one_rank(name: str, groups: int, causal: bool) -> None:
    assert_whole(PARTS[name], groups, causal)


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=5),
    st.sampled_from([2, 4]),
    st.integers(0, 1),
    st.integers(1, 3),
    st.integers(1, 4),
)
def test_any_items(rows: list[int], size: int, lead: int, unit: int, pad_to: int) -> None:
    lengths = tuple(lead + unit * count for count in rows)
    assert_whole(ItemParts(lengths, size, lead, unit), pad_to=pad_to)


def test_rows_of_padding_are_zeros_and_reach_nothing() -> None:
    assert_whole(PARTS["fewer-than-ranks"], pad_to=8)


def test_layers_that_are_told_of_other_items_do_not_agree_with_the_whole() -> None:
    """The control: as many positions on each rank, of items that end elsewhere."""
    parts = ItemParts((4, 8), 2)
    found = on_ranks(parts, GROUPS, False, told=ItemParts((8, 4), 2))
    expected = whole(parts, GROUPS, False)[0]
    assert not torch.allclose(found[0][0], parts.cut(expected, 0), atol=1e-3)


def test_two_exchanges_each_way() -> None:
    world, parts = InProcessWorld(2), PARTS["alike"]

    def body(rank: int) -> None:
        group = dist.new_subgroups_by_enumeration([[0, 1]])[0]
        *local, gradient = (parts.cut(x, rank) for x in drawn(parts, GROUPS))
        forward_and_back(attention(UlyssesAttention, group), local, gradient, parts.packed())

    world.run(body)
    assert world.counts(0) == {("all_to_all", (0, 1)): 4}


def test_a_batch_of_one_keeps_its_dim() -> None:
    parts = PARTS["alike"]

    def body(rank: int) -> tuple[int, ...]:
        group = dist.new_subgroups_by_enumeration([[0, 1]])[0]
        local = [parts.cut(x, rank).unsqueeze(1) for x in drawn(parts, GROUPS)[:3]]
        out = attention(UlyssesAttention, group)(*local, None, packed_seq_params=parts.packed())
        return tuple(out.shape)

    assert InProcessWorld(2).run(body) == [(9, 1, HEADS * WIDTHS[2])] * 2


class TestParts:
    def test_docstring_examples(self) -> None:
        outcome = doctest.testmod(ulysses_attention)
        assert outcome.attempted >= 2
        assert outcome.failed == 0

    def test_every_position_is_in_one_part_and_comes_back(self) -> None:
        for parts in PARTS.values():
            positions = torch.arange(sum(parts.lengths))
            cut = [parts.cut(positions, rank)[: parts.totals[rank]] for rank in range(parts.size)]
            there, back = parts.order(torch.device("cpu"))
            assert torch.equal(torch.cat(cut)[there], positions)
            assert torch.equal(positions[back], torch.cat(cut))

    def test_leading_positions_make_no_rows(self) -> None:
        parts = ItemParts((5, 4), 2, lead=1)
        whole = torch.tensor([0, 1, 2, 3, 4, 10, 11, 12, 13])
        rows = [parts.rows(parts.cut(whole, rank, 4), rank).tolist() for rank in range(2)]
        assert rows == [[1, 2, 11], [3, 4, 12, 13]]

    @pytest.mark.parametrize("more", [{"unit": 4}, {"lead": 7}, {"lead": 1, "unit": 2}])
    def test_items_that_are_no_whole_number_of_rows(self, more: dict[str, int]) -> None:
        with pytest.raises(ValueError, match="An item of 6 positions, of which"):
            ItemParts((8 + more.get("lead", 0), 6), 2, **more)


class TestRefusals:
    @pytest.mark.parametrize(
        ("config", "words"),
        [
            ({"num_attention_heads": 6, "num_query_groups": 6, "hidden_size": 36},
             r"num_attention_heads \(6\) must divide by tp \* cp = 1 \* 4"),
            ({"num_query_groups": 2}, r"num_query_groups \(2\) must divide by tp \* cp = 1 \* 4"),
            ({"tensor_model_parallel_size": 4},
             r"num_attention_heads \(8\) must divide by tp \* cp = 4 \* 4"),
        ],
    )  # fmt: skip
    def test_heads_that_do_not_divide(self, config: dict[str, int], words: str) -> None:
        with pytest.raises(ValueError, match=words):
            attention(UlyssesAttention, FakeGroup(0, 4), **config)

    @pytest.mark.parametrize(
        ("params", "words"),
        [
            (None, r"needs packed_seq_params of ItemParts\(lengths, 2\).packed\(\), got none"),
            (ItemParts((6, 6), 4).packed(), "got parts for 4 ranks"),
            (ItemParts((6, 9), 2).packed(), r"brings 6 positions; its parts of .*\[6, 9\].* are 7"),
        ],
    )
    def test_parts(self, params: Any, words: str) -> None:
        own = attention(UlyssesAttention, FakeGroup(0, 2))
        qkv = [parts[:6] for parts in drawn(ItemParts((6, 6), 2), GROUPS)[:3]]
        with pytest.raises(ValueError, match=words):
            own(*qkv, None, packed_seq_params=params)

    @pytest.mark.parametrize("name", ["attention_mask", "attention_bias"])
    def test_masks(self, name: str) -> None:
        own = attention(UlyssesAttention, FakeGroup(0, 2))
        given = {"attention_mask": None, name: torch.ones(1)}
        qkv = drawn(ItemParts((6, 6), 2), GROUPS)[:3]
        with pytest.raises(ValueError, match="must be None where items are cut"):
            own(*qkv, **given)
