# SPDX-License-Identifier: Apache-2.0
"""Sharded models of transformers against the unsharded ones: losses and every whole gradient."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d as c10d

from megatron.core.models.mimo.torch_native import (
    clip_grad_norm,
    full_gradients,
    full_state,
    mesh_of,
    parallelize,
)
from tests.harness.backend import own_device
from tests.unit_tests.mimo.torch_native.kept_bytes import kept_by_norms
from tests.unit_tests.mimo.torch_native.native_cases import (
    BOUND,
    Pair,
    build,
    grid_of,
    kept_grids,
    pair,
    plain,
    side_by_side,
    tokens,
)

# Nothing of Megatron-Core's is in them.
pytestmark = [pytest.mark.ranks(8, timeout=300), pytest.mark.once]


@pytest.fixture(scope="module", autouse=True)
def _grids() -> Iterator[None]:
    with kept_grids((2, 2), (2, 4)):
        yield


def step(both: Pair, length: int, **more: Any) -> None:
    """Loss and gradients of one batch agree."""
    ids, labels = tokens(2 * both.grid.dim_size("dp"), length)
    both.zero_grad()
    expected = both.whole(ids, labels=labels, **more).loss
    expected.backward()
    own = {name: both.own(value) for name, value in more.items()}
    loss = both.sharded(both.own(ids), labels=both.own(labels), **own).loss
    loss.backward()
    assert type(loss) is torch.Tensor
    assert abs(float(loss) - float(expected)) <= BOUND * abs(float(expected))
    both.check_gradients()


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("dp, tp", [(1, 2), (1, 4), (2, 2), (4, 2), (8, 1)])
def test_loss_and_every_gradient_are_those_of_the_unsharded_model(dp, tp, tied) -> None:
    with side_by_side(dp, tp) as grid:
        both = pair("qwen2", grid, tie_word_embeddings=tied)
        step(both, 13)
        # A rank keeps of a gradient what it keeps of the weight, with FSDP and without.
        assert all(p.grad.placements == p.placements for p in both.sharded.parameters())


@pytest.mark.parametrize("dp, tp", [(2, 4)])
def test_one_changed_weight_is_noticed(dp, tp) -> None:
    """The control: what compares gradients sees one wrong weight of each kind of split."""
    with side_by_side(dp, tp) as grid:
        for name in ("model.norm.weight", "model.layers.1.mlp.down_proj.weight"):
            both = pair("qwen2", grid)
            with torch.no_grad():
                both.whole.get_parameter(name).view(-1)[-1] += 0.1
            with pytest.raises(AssertionError):
                step(both, 13)


def test_any_length() -> None:
    with side_by_side(2, 4) as grid:
        both = pair("qwen2", grid, num_hidden_layers=1)
        for length in (3, 4, 5, 423, 424):
            step(both, length)
        # Of one token nothing is predicted; its logits are there.
        ids, _ = tokens(4, 1)
        expected = both.own(both.whole(ids).logits)
        logits = plain(both.sharded(both.own(ids)).logits)
        assert (logits - expected).abs().max() <= BOUND * expected.abs().max()


@pytest.mark.parametrize(
    "family, options", [("llama", {"sequence_parallel": False}), ("qwen3", {}), ("llama", {})]
)
def test_families(family, options) -> None:
    with side_by_side(2, 2) as grid:
        step(pair(family, grid, options), 13)


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_towers(family) -> None:
    with side_by_side(2, 2) as grid:
        both = pair(family, grid)
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(4, 3, 24, 24, generator=generator).to(own_device())
        expected = both.whole(images)
        found = both.sharded(both.own(images))
        for name in ("last_hidden_state", "pooler_output"):
            assert type(found[name]) is torch.Tensor
            truth = both.own(expected[name])
            assert (found[name] - truth).abs().max() <= BOUND * truth.abs().max()
        for output in (expected, found):
            (output.last_hidden_state.sin().sum() + output.pooler_output.cos().sum()).backward()
        both.check_gradients()


def packed_positions(samples: int) -> Tensor:
    counts = [torch.arange(length, device=own_device()) for length in (5, 9, 3)]
    return torch.cat(counts).expand(samples, 17)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_positions_and_masks_are_those_of_the_whole_sequence(attention) -> None:
    with side_by_side(2, 2) as grid:
        both = pair("qwen2", grid, attn_implementation=attention)
        mask = torch.ones(4, 17, dtype=torch.long, device=own_device())
        mask[1, 11:] = mask[2, 14:] = 0
        step(both, 17)
        step(both, 17, position_ids=torch.arange(17, device=own_device()).expand(4, 17))
        step(both, 17, attention_mask=mask)
        step(both, 17, position_ids=packed_positions(4))
        # The control: packed samples are not one long one.
        ids, labels = tokens(4, 17)
        packed = both.whole(ids, labels=labels, position_ids=packed_positions(4)).loss
        assert abs(float(packed - both.whole(ids, labels=labels).loss)) > 100 * BOUND


def test_embeddings_of_the_caller_get_their_gradients() -> None:
    with side_by_side(2, 2) as grid:
        both = pair("qwen2", grid)
        rows = torch.randn(4, 13, 40, generator=torch.Generator().manual_seed(0)).to(own_device())
        whole = rows.clone().requires_grad_()
        own = both.own(rows).clone().requires_grad_()
        _, labels = tokens(4, 13)
        both.whole(inputs_embeds=whole, labels=labels).loss.backward()
        both.sharded(inputs_embeds=own, labels=both.own(labels)).loss.backward()
        expected = both.own(whole.grad)
        assert (own.grad - expected).norm() <= BOUND * expected.norm()


def test_norms_keep_a_part_of_the_sequence_and_sum_their_gradients() -> None:
    with side_by_side(2, 4) as grid:
        both = pair("qwen2", grid, {"fsdp": False})
        kept: dict[str, int] = {}
        for name, model in (("whole", both.whole), ("sharded", both.sharded)):
            kept[name] = bytes_kept_by_norms(model, both.own(tokens(4, 24)[0]))
        assert kept["sharded"] * 4 == kept["whole"]
        norm = both.sharded.model.norm.weight
        parts = [torch.empty(40, device=own_device()) for _ in range(4)]
        dist.all_gather(parts, norm.grad.to_local(), group=grid.get_pg("tp"))
        assert all(torch.equal(part, parts[0]) for part in parts)
        expected = both.whole.model.norm.weight.grad
        assert (parts[0] - expected).norm() <= BOUND * expected.norm()


def bytes_kept_by_norms(model: Any, ids: Tensor) -> int:
    """Bytes of activations that this rank's norms keep; every parameter has a gradient then."""
    return kept_by_norms(model, lambda: plain(model(ids).logits).sin().sum().backward())


def test_logits_stay_split_and_whole_where_asked() -> None:
    with side_by_side(2, 4) as grid:
        both = pair("qwen2", grid)
        ids = both.own(tokens(4, 13)[0])
        logits = both.sharded(ids).logits
        here = grid.coords(dist.get_rank())["tp"]
        # 99 columns: 25, 25, 25 and 24.
        assert logits.to_local().nbytes == 2 * 13 * (24 if here == 3 else 25) * 4
        assert logits.shape == (2, 13, 99)
        whole = parallelize(build("qwen2"), grid, loss_parallel=False)
        assert type(whole(ids).logits) is torch.Tensor
        assert (whole(ids).logits - plain(logits)).abs().max() <= BOUND * plain(logits).abs().max()
        assert whole(ids).logits.nbytes == 2 * 13 * 99 * 4
        with pytest.raises(ValueError, match="output_attentions=True: under tp and cp"):
            whole(ids, output_attentions=True)
        states = whole(ids, output_hidden_states=True).hidden_states
        assert [type(s) for s in states] == [torch.Tensor] * 3
        assert all(s.shape == (2, 13, 40) for s in states)
        step(Pair(both.whole, whole, grid), 13)


def test_norm_of_the_gradient_and_clipping() -> None:
    with side_by_side(2, 4) as grid:
        both = pair("qwen2", grid, tie_word_embeddings=True)
        step(both, 13)
        expected = torch.nn.utils.clip_grad_norm_(both.whole.parameters(), 0.01)
        norm = clip_grad_norm(both.sharded, 0.01)
        assert type(norm) is torch.Tensor
        assert abs(float(norm - expected)) <= BOUND * float(expected)
        both.check_gradients()
        for bound in (1.0, float("inf")):  # gradients that are smaller stay as they are
            assert abs(float(clip_grad_norm(both.sharded, bound)) - 0.01) <= 1e-6
            both.check_gradients()


def test_microbatches_and_a_step_of_the_optimizer() -> None:
    with side_by_side(2, 2) as grid:
        both = pair("qwen2", grid, tie_word_embeddings=True)
        batches = [tokens(4, length) for length in (9, 14)]
        count = sum(int((labels[:, 1:] != -100).sum()) for _, labels in batches)
        for model, own in ((both.whole, lambda batch: batch), (both.sharded, both.own)):
            # Larger than Adam's own: its first step is otherwise a sign, and noise has one, too.
            adam = torch.optim.AdamW(model.parameters(), lr=0.1, eps=1e-2, foreach=False)
            for ids, labels in batches:
                model(own(ids), labels=own(labels), num_items_in_batch=count).loss.backward()
            adam.step()
        both.check_gradients()
        state = full_state(both.sharded)
        for name, value in both.whole.state_dict().items():
            assert (state[name] - value).abs().max() <= 1e-4, name


def test_tied_weights_stay_one_and_the_state_loads_into_transformers() -> None:
    with side_by_side(2, 2) as grid:
        for tied in (True, False):
            both = pair("qwen2", grid, tie_word_embeddings=tied)
            sharded, whole = both.sharded, both.whole
            assert (sharded.lm_head.weight is sharded.model.embed_tokens.weight) is tied
            names = [name for name, _ in whole.named_parameters()]
            assert [name for name, _ in sharded.named_parameters()] == names
            step(both, 13)
            state = full_state(sharded)
            assert list(state) == list(whole.state_dict())
            for name, value in whole.state_dict().items():
                assert type(state[name]) is torch.Tensor
                assert torch.equal(state[name], value), name
            fresh = build("qwen2", tie_word_embeddings=tied).apply(redraw)
            assert not torch.equal(fresh.lm_head.weight, whole.lm_head.weight)
            fresh.load_state_dict(state)
            ids, _ = tokens(2, 13)
            assert torch.equal(fresh(ids).logits, whole(ids).logits)


def redraw(module: Any) -> None:
    for parameter in module.parameters(recurse=False):
        torch.nn.init.normal_(parameter)


def test_recomputation_replays_dropout() -> None:
    with side_by_side(2, 2) as grid:
        found = []
        for again in (False, True):
            options = {"activation_checkpointing": again}
            both = pair("qwen2", grid, options, attention_dropout=0.4)
            both.sharded.train()
            ids, labels = tokens(4, 13)
            torch.manual_seed(11)
            loss = both.sharded(both.own(ids), labels=both.own(labels)).loss
            loss.backward()
            found.append((loss.detach(), full_gradients(both.sharded)))
        (loss, gradients), (again, others) = found
        assert torch.equal(loss, again)
        for name, gradient in gradients.items():
            assert torch.equal(gradient, others[name]), name
        # The control: another draw is another loss.
        assert float(both.sharded(both.own(ids), labels=both.own(labels)).loss) != float(loss)


def test_bf16_policy() -> None:
    with side_by_side(2, 2) as grid:
        both = pair("qwen2", grid, {"precision": torch.bfloat16})
        ids, labels = tokens(4, 24)
        expected = float(both.whole(ids, labels=labels).loss)
        output = both.sharded(both.own(ids), labels=both.own(labels))
        output.loss.backward()
        assert output.logits.dtype is torch.bfloat16
        assert all(p.dtype is p.grad.dtype is torch.float32 for p in both.sharded.parameters())
        # bf16 has 8 bits; the loss is a mean over many roundings.
        assert 0 < abs(float(output.loss) - expected) <= 2.0**-6 * expected


def test_frozen_parts_get_no_gradient() -> None:
    with side_by_side(2, 2) as grid:
        whole = build("qwen2")
        whole.model.embed_tokens.requires_grad_(False)
        whole.model.layers[0].requires_grad_(False)
        step(Pair(whole, parallelize(copy.deepcopy(whole), grid), grid), 13)


def test_what_is_unfrozen_later_trains_as_if_it_had_always() -> None:
    with side_by_side(1, 4) as grid:
        whole = build("qwen2")
        whole.requires_grad_(False)
        whole.lm_head.requires_grad_(True)
        both = Pair(whole, parallelize(copy.deepcopy(whole), grid), grid)
        for model in (both.whole, both.sharded):
            model.requires_grad_(True)
        step(both, 13)


def test_one_rank_changes_nothing() -> None:
    with side_by_side(1, 1) as grid:
        whole = build("qwen2")
        sharded = copy.deepcopy(whole)
        before = dict(sharded.named_parameters())
        assert parallelize(sharded, grid) is sharded
        assert all(after is before[name] for name, after in sharded.named_parameters())
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in sharded.modules())
        ids, labels = tokens(2, 13)
        assert torch.equal(sharded(ids, labels=labels).loss, whole(ids, labels=labels).loss)


def test_no_group_is_made_twice() -> None:
    with grid_of(2, 4) as grid:
        before = set(c10d._world.pg_map)
        mesh = mesh_of(grid, own_device().type)
        model = parallelize(build("qwen2"), grid)
        ids, labels = tokens(2, 13)
        model(ids, labels=labels).loss.backward()
        full_gradients(model), clip_grad_norm(model, 1.0)
        assert set(c10d._world.pg_map) == before
        assert mesh.mesh_dim_names == ("fsdp", "tp")
        assert mesh.mesh.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
        assert mesh.get_group("tp") is grid.get_pg("tp")
        assert mesh.get_group("fsdp") is grid.get_pg("dp")


def test_a_grid_over_the_ranks_of_one_that_is_gone() -> None:
    """Operations on tensors go over its own groups, also where PyTorch has seen such a mesh."""
    for models in (1, 2):  # two models on one grid, too
        with grid_of(2, 4) as grid:
            for _ in range(models):
                step(pair("qwen2", grid, num_hidden_layers=1), 13)


def test_batches_that_differ_inside_a_tp_group_are_named() -> None:
    with side_by_side(2, 2) as grid:
        model = parallelize(build("qwen2"), grid)
        ids, labels = tokens(2, 13)
        if dist.get_rank() % 4 == 1:
            ids = ids.flip(0)  # the same samples in another order
        if dist.get_rank() < 2 or dist.get_rank() in (4, 5):
            first = dist.get_rank() // 2 * 2
            wanted = rf"inputs of ranks \[{first + 1}\] are not those of rank {first}; .*same samp"
            with pytest.raises(ValueError, match=wanted):
                model(ids, labels=labels)
            return
        dist.barrier(grid.get_pg("tp"))


def test_ranks_that_disagree_are_named_and_nothing_is_changed() -> None:
    rank = dist.get_rank()
    with grid_of(2, 4) as grid:
        model = build("qwen2")
        before = dict(model.named_parameters())
        with torch.no_grad():
            model.model.norm.weight[0] += float(rank == 5)
        with pytest.raises(ValueError, match=r"weights of ranks \[5\] are not those of rank 0; lo"):
            parallelize(model, grid)
        with pytest.raises(ValueError, match=r"arguments of parallelize of ranks \[3\] are not "):
            parallelize(build("qwen2"), grid, loss_parallel=rank != 3)
        wrong = build("qwen2", num_key_value_heads=2 if rank == 6 else 4)
        with pytest.raises(ValueError, match=r"on ranks \[6\]: tp 4 does not divide num_key_valu"):
            parallelize(wrong, grid)
        assert all(after is before[name] for name, after in model.named_parameters())
        with pytest.raises(ValueError, match="sharded already"):
            parallelize(parallelize(build("qwen2"), grid), grid)
