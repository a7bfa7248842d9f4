# SPDX-License-Identifier: Apache-2.0
"""Models of transformers whose sequences are cut over CP, against the unsharded ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron.core.models.mimo.torch_native import (
    clip_grad_norm,
    context_parallel,
    full_state,
    own_chunks,
    parallelize,
)
from megatron.core.models.mimo.torch_native.language_model import TorchNativeLanguageModel
from megatron.core.models.mimo.torch_native.ring_attention import ring_attention
from megatron.core.transformer.transformer_config import TransformerConfig
from tests.harness.backend import own_device
from tests.unit_tests.mimo.torch_native.native_cases import (
    BOUND,
    Pair,
    build,
    grid_of,
    pair,
    plain,
    tokens,
)

# Of Megatron-Core's nothing but sizes of groups is in them.
pytestmark = [pytest.mark.ranks(8), pytest.mark.once]
# Two samples per data rank; of the first ones half of the labels do not count, so that the ranks
# of a CP group have unequal shares of the loss.
LENGTH = 16


def step(both: Pair, **more: Any) -> None:
    """Loss and gradients of one batch agree."""
    ids, labels = tokens(2 * both.grid.dim_size("dp"), LENGTH)
    both.zero_grad()
    expected = both.whole(ids, labels=labels).loss
    expected.backward()
    loss = both.sharded(both.own(ids), labels=both.own(labels), **more).loss
    loss.backward()
    assert type(loss) is torch.Tensor
    assert abs(float(loss) - float(expected)) <= BOUND * abs(float(expected))
    both.check_gradients()


def test_over_tp_cp_and_dp_everything_is_the_unsharded_model_s(monkeypatch) -> None:
    """Loss, gradients, norm, logits and state; then mistakes, which must be seen."""
    with grid_of(2, 2, cp=2) as grid:
        both, group = pair("qwen2", grid, tie_word_embeddings=True), grid.get_pg("cp")
        step(both)
        expected = torch.nn.utils.clip_grad_norm_(both.whole.parameters(), float("inf"))
        norm = float(clip_grad_norm(both.sharded, float("inf")))
        assert abs(norm - float(expected)) <= BOUND * float(expected)
        ids, _ = tokens(4, LENGTH)
        logits = plain(both.sharded(both.own(ids)).logits)
        truth = own_chunks(both.own(both.whole(ids).logits), group)
        assert (logits - truth).abs().max() <= BOUND * truth.abs().max()
        state = full_state(both.sharded)
        for name, value in both.whole.state_dict().items():
            assert torch.equal(state[name], value), name
        with monkeypatch.context() as patch:
            patch.setattr(context_parallel, "ring_attention", dropping)
            with pytest.raises(AssertionError):
                step(both)
        # Each rank gives its chunks the other rank's positions, after whole ones were checked.
        with monkeypatch.context() as patch:
            patch.setattr(context_parallel, "own_chunks", with_wrong_positions)
            with pytest.raises(AssertionError):
                step(both)


def dropping(query: Any, key: Any, value: Any, group: Any, scale: Any) -> Any:
    """What other ranks' queries ask of the keys of CP rank 1 is lost."""
    lost = key.detach() + 0 * key if group.rank() else key
    return ring_attention(query, lost, value, group, scale)


def with_wrong_positions(whole: torch.Tensor, group: Any) -> torch.Tensor:
    counts = whole.ndim == 2 and torch.equal(whole[0], torch.arange(LENGTH, device=whole.device))
    return own_chunks(whole.flip(1) if counts else whole, group)


@pytest.mark.parametrize(
    ("family", "sizes", "options"),
    [
        ("qwen3", (1, 1, 8), {"activation_checkpointing": True}),
        ("llama", (1, 2, 4), {"sequence_parallel": False, "loss_parallel": False}),
    ],
)
def test_families_and_options(family: str, sizes: tuple[int, int, int], options: Any) -> None:
    dp, tp, cp = sizes
    with grid_of(dp, tp, cp=cp) as grid:
        step(pair(family, grid, options))


def test_a_caller_may_cut_and_may_add_up_gradients() -> None:
    """Without FSDP adding up over CP and DP is the caller's."""
    with grid_of(2, 2, cp=2) as grid:
        both = pair("llama", grid, {"cut_sequence": False, "fsdp": False})
        ids, labels = tokens(4, LENGTH)
        expected = both.whole(ids, labels=labels).loss
        expected.backward()
        next_ones = labels.roll(-1, 1)
        next_ones[:, -1] = -100
        positions = torch.arange(LENGTH, device=own_device()).expand(4, LENGTH)
        given = {"input_ids": ids, "shift_labels": next_ones, "position_ids": positions}
        own = {name: own_chunks(both.own(t), grid.get_pg("cp")) for name, t in given.items()}
        loss = both.sharded(**own, labels=own["shift_labels"]).loss
        loss.backward()
        assert abs(float(loss) - float(expected)) <= BOUND * abs(float(expected))
        for parameter in both.sharded.parameters():
            dist.all_reduce(parameter.grad.to_local(), group=grid.get_pg(["cp", "dp"]))
        both.check_gradients()


def test_what_does_not_fit_is_refused_alike() -> None:
    rank = dist.get_rank()
    with grid_of(2, 2, cp=2) as grid:
        with pytest.raises(ValueError, match=r"^Qwen2ForCausalLM has attn_implementation='eager'"):
            parallelize(build("qwen2", attn_implementation="eager"), grid)
        model = parallelize(build("qwen2"), grid)
        ids, _ = tokens(2, 14)
        if rank % 4 == 2:
            ids = ids.flip(0)
        first = rank // 4 * 4
        wanted = rf"inputs of ranks \[{first + 2}\] are not those of rank {first}; ranks of a TP gr"
        with pytest.raises(ValueError, match=wanted + r"oup and of a CP group take the same"):
            model(ids)
        with pytest.raises(ValueError, match="^Sequence .* divisible by 4 .*got 14; pad it to 16"):
            model(ids)
        with pytest.raises(ValueError, match="under tp and cp a rank has .*heads and tokens only"):
            model(ids, output_attentions=True)


def boundary_at(*starts: int) -> torch.Tensor:
    """Positions of two packed rows that begin anew at these tokens."""
    ends = [*starts[1:], LENGTH]
    lengths = [end - start for start, end in zip(starts, ends, strict=True)]
    counts = [torch.arange(length, device=own_device()) for length in lengths]
    return torch.cat(counts).expand(2, LENGTH)


@pytest.mark.parametrize("cut_sequence", [True, False])
def test_what_one_rank_refuses_no_rank_enters(cut_sequence: bool) -> None:
    """The boundary is in the last chunk, which CP rank 0 of one data rank has."""
    with grid_of(2, 2, cp=2) as grid:
        here, group = grid.coords(dist.get_rank()), grid.get_pg("cp")
        model = parallelize(build("qwen2"), grid, cut_sequence=cut_sequence)
        counted = torch.arange(LENGTH, device=own_device()).expand(2, LENGTH)
        given = {"input_ids": tokens(2, LENGTH)[0], "position_ids": counted}
        packed = given | {"position_ids": boundary_at(0, 14)}
        for inputs in (given, packed, given):  # not in the first forward only
            own = packed if inputs is packed and here["dp"] == 1 else given
            if not cut_sequence:
                own = {name: own_chunks(each, group) for name, each in own.items()}
            if inputs is given:
                assert model(**own).logits.shape == (2, LENGTH // 2, 99)
                continue
            # All have the error, which names those that FSDP connects with this TP rank.
            first = 4 + here["tp"]
            ranks = f"{first}, {first + 2}" if cut_sequence else first
            wanted = rf"^on ranks \[{ranks}\]: position_ids do not count the tokens of one"
            with pytest.raises(ValueError, match=wanted):
                model(**own)


def test_a_language_model_judges_whole_positions() -> None:
    """Also a boundary between chunks, after which each chunk counts on."""
    with grid_of(2, 2, cp=2) as grid:
        config = TransformerConfig(
            num_layers=2,
            hidden_size=40,
            num_attention_heads=8,
            tensor_model_parallel_size=2,
            context_parallel_size=2,
        )
        model = TorchNativeLanguageModel(config, build("qwen2"), grid)
        model.shard()
        here = grid.coords(dist.get_rank())
        counted = torch.arange(LENGTH, device=own_device()).expand(2, LENGTH)
        jump = counted + 5 * ((counted >= 4) & (counted < 12))
        ids = own_chunks(tokens(2, LENGTH)[0], grid.get_pg("cp"))
        assert model(ids, counted, None).shape == (2, LENGTH // 2, 50)
        for wrong in (boundary_at(0, 4, 12, 14), jump):
            own = wrong if here["dp"] == 0 else counted
            ranks = f"{here['tp']}, {here['tp'] + 2}"
            with pytest.raises(ValueError, match=rf"^on ranks \[{ranks}\]: position_ids do not"):
                model(ids, own, None)
