# SPDX-License-Identifier: Apache-2.0
"""The partition adapter against the documented rule. One process, stand-in groups.

The oracle indexes the whole tensor with the positions of ``sequence_order``, which has tests of
its own. Cutting copies, so everything is compared bit for bit.
"""

from __future__ import annotations

import types

import pytest
import torch

from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.models.mimo.partition import utils
from megatron.core.models.mimo.partition.packed_lengths import check_packing
from megatron.core.models.mimo.partition.sequence_order import (
    SequenceShardError,
    dense_positions,
    packed_positions,
)
from megatron.core.models.mimo.partition.utils import PartitionAdapter, PartitionConfig
from megatron.core.packed_seq_params import PackedSeqParams
from tests.unit_tests.mimo.model_stubs import StubGroup, language_config

BATCH, HIDDEN = 3, 4
CP_SIZES = [2, 3, 4, 8]


@pytest.fixture(autouse=True)
def stub_groups(monkeypatch):
    """Sizes and ranks of stand-in groups; Megatron's helpers want torch.distributed."""
    monkeypatch.setattr(utils, "get_pg_size", lambda group: group.size() if group else 1)
    monkeypatch.setattr(utils, "get_pg_rank", lambda group: group.rank() if group else 0)


@pytest.fixture
def sequence_parallel_split(monkeypatch):
    """Stands for the scatter over TP: this rank's contiguous piece of dim 0."""

    def scatter(tensor, group):
        return tensor.chunk(group.size(), dim=0)[group.rank()]

    replacement = types.SimpleNamespace(scatter_to_sequence_parallel_region=scatter)
    monkeypatch.setattr(utils, "tensor_parallel", replacement)


def adapter(cp: int = 1, cp_rank: int = 0, tp: int = 1, tp_rank: int = 0, **fields):
    return PartitionAdapter(
        PartitionConfig(
            **{
                "seq_parallel": tp > 1,
                "use_cp": cp > 1,
                "tp_comm_overlap": False,
                "max_seq_len": 64,
                "cp_group": StubGroup(cp, cp_rank),
                "tp_group": StubGroup(tp, tp_rank),
                **fields,
            }
        )
    )


def batch_of(seq_len: int, batch: int = BATCH):
    """Embeddings (S,B,H), labels (B,S), loss mask (B,S), every element different."""
    embeddings = torch.randn(seq_len, batch, HIDDEN, requires_grad=True)
    labels = torch.arange(batch * seq_len).view(batch, seq_len)
    return embeddings, labels, labels * 0.5


def packed(cu_seqlens: list[int], **fields) -> PackedSeqParams:
    lengths = torch.tensor(cu_seqlens, dtype=torch.int32)
    return PackedSeqParams(**{"qkv_format": "thd", "cu_seqlens_q_padded": lengths, **fields})


def test_labels_alone_need_not_divide_over_tp():
    """Sequence parallelism scatters embeddings only."""
    cut = adapter(cp=2, tp=2)
    with pytest.raises(SequenceShardError, match="divisible by"):
        cut.check(2, 12)
    assert cut.check(2, 12, with_embeddings=False) is None
    with pytest.raises(SequenceShardError, match="divisible by"):
        cut.check(2, 6, with_embeddings=False)


def test_packing_is_checked_for_the_ranks_that_it_is_cut_over():
    params = packed([0, 4, 12], cu_seqlens_q=torch.tensor([0, 4, 12], dtype=torch.int32))
    assert check_packing(params, 1, 12) == check_packing(params, 1, 12, 2) == [0, 4, 12]
    with pytest.raises(SequenceShardError, match="divisible by 8|multiple of 8"):
        check_packing(params, 1, 12, 4)


def test_max_seqlen_counts_padding():
    """Rotary embeddings are made for so many positions, and padding has positions, too."""
    real = torch.tensor([0, 3, 6], dtype=torch.int32)
    for name in ("max_seqlen_q", "max_seqlen_kv"):
        assert check_packing(packed([0, 4, 8], cu_seqlens_q=real, **{name: 4}), 1, 8)
        with pytest.raises(SequenceShardError, match=f"{name} is 3, but the longest .* has 4 tok"):
            check_packing(packed([0, 4, 8], cu_seqlens_q=real, **{name: 3}), 1, 8)


@pytest.mark.parametrize("cp", CP_SIZES)
def test_dense_cut_and_its_gradient(cp):
    seq_len = 2 * cp * 3
    embeddings, labels, mask = batch_of(seq_len)
    total = torch.zeros_like(embeddings)
    for rank in range(cp):
        own = dense_positions(seq_len, rank, cp)
        cut, cut_labels, cut_mask, params = adapter(cp, rank).shard(embeddings, labels, mask)
        assert params is None
        assert torch.equal(cut, embeddings[own])
        assert torch.equal(cut_labels, labels[:, own])
        assert torch.equal(cut_mask, mask[:, own])
        gradient = torch.randn_like(cut)
        (adjoint,) = torch.autograd.grad(cut, embeddings, gradient)
        expected = torch.zeros_like(embeddings)
        expected[own] = gradient
        assert torch.equal(adjoint, expected)
        total += torch.autograd.grad(
            adapter(cp, rank).shard(embeddings, None, None)[0].sum(), embeddings
        )[0]
    # Every position has one owner: the sum over the CP group is the whole gradient.
    assert torch.equal(total, torch.ones_like(embeddings))


@pytest.mark.parametrize("cp", CP_SIZES)
def test_packed_cut_and_its_gradient(cp):
    cu_seqlens = [0, 2 * cp, 2 * cp, 8 * cp, 12 * cp]
    embeddings, labels, mask = batch_of(cu_seqlens[-1], batch=1)
    for rank in range(cp):
        own = packed_positions(cu_seqlens, rank, cp)
        params = packed(cu_seqlens)
        cut, cut_labels, cut_mask, same = adapter(cp, rank).shard(embeddings, labels, mask, params)
        assert same is params
        assert torch.equal(cut, embeddings[own])
        assert torch.equal(cut_labels, labels[:, own])
        assert torch.equal(cut_mask, mask[:, own])
        gradient = torch.randn_like(cut)
        expected = torch.zeros_like(embeddings)
        expected[own] = gradient
        assert torch.equal(torch.autograd.grad(cut, embeddings, gradient)[0], expected)


def test_packed_and_dense_differ():
    """The test above would not notice if packed batches were cut as one sequence."""
    embeddings, *_ = batch_of(24, batch=1)
    dense = adapter(2, 0).shard(embeddings, None, None)[0]
    in_parts = adapter(2, 0).shard(embeddings, None, None, packed([0, 8, 24]))[0]
    assert not torch.equal(dense, in_parts)


def test_padded_lengths_win_and_plain_ones_do():
    embeddings, *_ = batch_of(16, batch=1)
    plain = torch.tensor([0, 3, 11], dtype=torch.int32)
    both = packed([0, 4, 16], cu_seqlens_q=plain)
    padded_cut = adapter(2, 1).shard(embeddings, None, None, both)[0]
    assert torch.equal(padded_cut, embeddings[packed_positions([0, 4, 16], 1, 2)])
    only_plain = packed([0], cu_seqlens_q_padded=None, cu_seqlens_q=torch.tensor([0, 4, 16]))
    assert torch.equal(adapter(2, 1).shard(embeddings, None, None, only_plain)[0], padded_cut)


def test_the_packed_index_is_made_once_per_batch(monkeypatch):
    calls = []
    monkeypatch.setattr(utils, "packed_spans", lambda *a: calls.append(a) or [(0, 4)], raising=True)
    cut, params = adapter(2, 0), packed([0, 8])
    embeddings, labels, mask = batch_of(8, batch=1)
    cut.shard(embeddings, labels, mask, params)
    cut.shard(None, labels, mask, params)
    assert len(calls) == 1
    params.cu_seqlens_q_padded += torch.tensor([0, 0], dtype=torch.int32)  # another version
    cut.shard(embeddings, labels, mask, params)
    assert len(calls) == 2


def test_packed_in_inference_mode():
    with torch.inference_mode():
        embeddings, *_ = batch_of(8, batch=1)
        cut = adapter(2, 1).shard(embeddings, None, None, packed([0, 4, 8]))[0]
    assert torch.equal(cut, embeddings[[1, 2, 5, 6]])


def test_lengths_that_change_in_place_are_read_again():
    """Also in inference mode, whose tensors count no versions."""
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            embeddings, *_ = batch_of(16, batch=1)
            cut, params = adapter(2, 1), packed([0, 4, 16])
            cut.shard(embeddings, None, None, params)
            params.cu_seqlens_q_padded[1] = 12
            again = cut.shard(embeddings, None, None, params)[0]
        assert torch.equal(again, embeddings[packed_positions([0, 12, 16], 1, 2)])


def test_lengths_that_fitted_one_batch_are_compared_with_the_next_one_s():
    cut, params = adapter(2), packed([0, 4, 16])
    assert cut.check(1, 16, params) == [0, 4, 16]
    for batch, length in ((1, 24), (2, 16)):
        with pytest.raises(SequenceShardError, match=f"got {batch} rows of {length} tokens and"):
            cut.check(batch, length, params)
    params.max_seqlen_q = 11  # of the same tensors
    with pytest.raises(SequenceShardError, match="max_seqlen_q is 11, but the longest .* has 12"):
        cut.check(1, 16, params)


def test_transformer_engine_s_kernel_is_used_where_it_applies(monkeypatch):
    calls = []

    def kernel(cu_seqlens, size, cp_size, cp_rank):
        calls.append((cu_seqlens.tolist(), size, cp_size, cp_rank))
        return torch.tensor([3, 1])

    fake = types.SimpleNamespace(thd_get_partitioned_indices=kernel)
    monkeypatch.setattr(utils, "tex", fake)
    monkeypatch.setattr(utils, "_kernel_applies", lambda device: True)
    embeddings, labels, mask = batch_of(8, batch=1)
    cut, cut_labels, _, _ = adapter(2, 1).shard(embeddings, labels, mask, packed([0, 4, 8]))
    assert torch.equal(cut, embeddings[[3, 1]])
    assert torch.equal(cut_labels, labels[:, [3, 1]])
    assert calls == [([0, 4, 8], 8, 2, 1)]


@pytest.mark.parametrize(
    ("installed", "device", "new_enough", "applies"),
    [
        (True, "meta", True, True),
        (True, "cpu", True, False),
        (False, "meta", True, False),
        (True, "meta", False, False),
    ],
)
def test_when_the_kernel_applies(installed, device, new_enough, applies, monkeypatch):
    monkeypatch.setattr(utils, "_HAVE_TEX", installed)
    monkeypatch.setattr(utils, "is_te_min_version", lambda version: new_enough)
    assert utils._kernel_applies(torch.device(device)) is applies


@pytest.mark.parametrize("cp", [1, 2, 4])
@pytest.mark.parametrize("tp", [2, 4])
def test_sequence_parallel_pieces(cp, tp, sequence_parallel_split):
    seq_len = 2 * cp * tp
    embeddings, labels, mask = batch_of(seq_len)
    for cp_rank in range(cp):
        for tp_rank in range(tp):
            cut, cut_labels, cut_mask, _ = adapter(cp, cp_rank, tp, tp_rank).shard(
                embeddings, labels, mask
            )
            own = dense_positions(seq_len, cp_rank, cp, tp_rank, tp)
            assert torch.equal(cut, embeddings[own])
            # The loss is taken after the TP gather: labels are cut over CP only.
            cp_own = dense_positions(seq_len, cp_rank, cp)
            assert torch.equal(cut_labels, labels[:, cp_own])
            assert torch.equal(cut_mask, mask[:, cp_own])


def test_packed_with_sequence_parallelism(sequence_parallel_split):
    embeddings, *_ = batch_of(24, batch=1)
    own = packed_positions([0, 8, 24], 1, 2)
    for tp_rank in range(2):
        cut = adapter(2, 1, 2, tp_rank).shard(embeddings, None, None, packed([0, 8, 24]))[0]
        assert torch.equal(cut, embeddings[own[tp_rank * 6 : (tp_rank + 1) * 6]])


def test_nothing_to_cut():
    embeddings, labels, mask = batch_of(5)
    out = adapter().shard(embeddings, labels, mask)
    assert out[0] is embeddings
    assert out[1] is labels
    assert out[2] is mask
    assert adapter(2).shard(None, None, None) == (None, None, None, None)


def test_a_later_pipeline_stage_has_no_embeddings():
    _, labels, mask = batch_of(8)
    cut, cut_labels, cut_mask, _ = adapter(2, 1).shard(None, labels, mask)
    assert cut is None
    assert torch.equal(cut_labels, labels[:, 2:6])
    assert torch.equal(cut_mask, mask[:, 2:6])


def test_a_later_stage_is_not_held_to_the_factor_of_the_scatter(sequence_parallel_split):
    _, labels, _ = batch_of(4)
    assert adapter(2, 0, tp=4).shard(None, labels, None)[1].shape == (BATCH, 2)


def test_the_dense_cut_goes_through_the_module_s_name(monkeypatch):
    seen = []

    def stand_in(batch, is_hybrid_cp, cp_group):
        seen.append((sorted(batch), is_hybrid_cp, cp_group))
        return {key: value[:, :2] for key, value in batch.items()}

    monkeypatch.setattr(utils, "get_batch_on_this_cp_rank", stand_in)
    cutter = adapter(2, 1)
    embeddings, labels, mask = batch_of(8)
    cut, cut_labels, _, _ = cutter.shard(embeddings, labels, mask)
    assert seen == [(["embeddings", "labels", "loss_mask"], False, cutter.cfg.cp_group)]
    assert torch.equal(cut, embeddings[:2])
    assert torch.equal(cut_labels, labels[:, :2])


class TestBatchOnThisCpRank:
    def test_values_that_are_none_stay(self):
        out = utils.get_batch_on_this_cp_rank(
            {"a": torch.arange(8).view(1, 8), "b": None}, cp_group=StubGroup(2, 0)
        )
        assert out["a"].tolist() == [[0, 1, 6, 7]]
        assert out["b"] is None

    def test_one_rank_keeps_everything(self):
        batch = {"a": torch.arange(3).view(1, 3)}
        assert utils.get_batch_on_this_cp_rank(batch, cp_group=StubGroup())["a"] is batch["a"]

    def test_without_a_group_the_global_one_is_used(self, monkeypatch):
        monkeypatch.setattr(utils, "get_context_parallel_group", lambda: StubGroup(2, 1))
        out = utils.get_batch_on_this_cp_rank({"a": torch.arange(4).view(1, 4)})
        assert out["a"].tolist() == [[1, 2]]

    def test_hybrid_cp_is_refused(self):
        with pytest.raises(ValueError, match="is_hybrid_cp=True .* is not supported"):
            utils.get_batch_on_this_cp_rank({}, is_hybrid_cp=True)

    def test_a_length_that_does_not_divide(self):
        with pytest.raises(SequenceShardError, match="divisible by 4 .* got 6; pad it to 8"):
            utils.get_batch_on_this_cp_rank({"a": torch.zeros(1, 6)}, cp_group=StubGroup(2, 0))


class TestErrors:
    """Everything is refused before anything is cut."""

    @pytest.fixture(autouse=True)
    def nothing_may_be_cut(self, monkeypatch):
        def cut(*args, **kwargs):
            raise RuntimeError("something was cut")

        monkeypatch.setattr(utils, "get_batch_on_this_cp_rank", cut)
        monkeypatch.setattr(utils, "packed_index", cut)
        fake = types.SimpleNamespace(scatter_to_sequence_parallel_region=cut)
        monkeypatch.setattr(utils, "tensor_parallel", fake)

    @pytest.mark.parametrize("error", [ValueError, AssertionError])
    @pytest.mark.parametrize(
        ("sizes", "factor"), [({"cp": 2}, 4), ({"tp": 4}, 4), ({"cp": 2, "tp": 4}, 16)]
    )
    def test_length(self, sizes, factor, error):
        embeddings, labels, mask = batch_of(18)
        message = (
            rf"Sequence length should be divisible by {factor} for Sequence/Context parallelism, "
            rf"got 18 .*pad it to {-(-18 // factor) * factor}"
        )
        with pytest.raises(error, match=message):
            adapter(**sizes).shard(embeddings, labels, mask)

    def test_length_without_embeddings(self):
        with pytest.raises(SequenceShardError, match="divisible by 4 .* got 6"):
            adapter(cp=2).shard(None, torch.zeros(1, 6), None)

    @pytest.mark.parametrize(
        ("labels", "mask"), [((BATCH, 4), (BATCH, 8)), ((BATCH, 8), (8, BATCH)), (None, (8,))]
    )
    def test_shapes(self, labels, mask):
        embeddings, *_ = batch_of(8)
        tensors = [None if shape is None else torch.zeros(shape) for shape in (labels, mask)]
        with pytest.raises(SequenceShardError, match=r"same \(B,S\), got embeddings \(3, 8\)"):
            adapter(cp=2).shard(embeddings, *tensors)

    def test_labels_of_one_dim(self):
        with pytest.raises(SequenceShardError, match=r"same \(B,S\), got labels \(8,\)"):
            adapter(cp=2).shard(None, torch.zeros(8), None)

    def test_packed_sequence(self):
        embeddings, *_ = batch_of(16, batch=1)
        with pytest.raises(SequenceShardError, match=r"Packed sequence 0 has 6 tokens"):
            adapter(cp=2).shard(embeddings, None, None, packed([0, 6, 16]))

    def test_packed_length(self):
        embeddings, *_ = batch_of(16, batch=1)
        with pytest.raises(SequenceShardError, match="16 tokens and cu_seqlens that end at 12"):
            adapter(cp=2).shard(embeddings, None, None, packed([0, 4, 12]))

    def test_packed_batch_of_several_rows(self):
        embeddings, *_ = batch_of(8)
        with pytest.raises(SequenceShardError, match="3 rows of 8 tokens"):
            adapter(cp=2).shard(embeddings, None, None, packed([0, 8]))

    def test_packed_without_lengths(self):
        embeddings, *_ = batch_of(8, batch=1)
        with pytest.raises(SequenceShardError, match="needs cu_seqlens_q_padded or cu_seqlens_q"):
            adapter(cp=2).shard(embeddings, None, None, PackedSeqParams(qkv_format="thd"))

    def test_packed_scatter(self):
        embeddings, *_ = batch_of(12, batch=1)
        with pytest.raises(SequenceShardError, match="divisible by 8 .* got 12"):
            adapter(cp=2, tp=4).shard(embeddings, None, None, packed([0, 4, 12]))

    def test_tp_comm_overlap(self):
        embeddings, *_ = batch_of(32)
        with pytest.raises(AssertionError, match="TP Comm overlap requires .* got 32 and 64"):
            adapter(tp=2, tp_comm_overlap=True).shard(embeddings, None, None)
        assert adapter(tp=2, tp_comm_overlap=True).check(BATCH, 64) is None

    def test_overlapped_communication_takes_packed_batches_of_any_length(self):
        """Stock turns it off for them; and a stage without embeddings scatters nothing."""
        cut = adapter(cp=2, tp=2, tp_comm_overlap=True)
        assert cut.check(1, 16, packed([0, 4, 16])) == [0, 4, 16]
        assert cut.check(2, 16, with_embeddings=False) is None
        with pytest.raises(SequenceShardError, match="TP Comm overlap requires"):
            cut.check(2, 16)


class TestFromMpConfig:
    @pytest.fixture(autouse=True)
    def no_globals(self, monkeypatch):
        def unasked():
            raise RuntimeError("the global group was asked for")

        monkeypatch.setattr(utils, "get_context_parallel_group", unasked)
        monkeypatch.setattr(utils, "get_tensor_model_parallel_group", unasked)

    def parallel(self, **sizes):
        return language_config(tensor_model_parallel_size=2, **sizes)

    def test_given_groups_are_used_as_they_are(self):
        cp_group, tp_group = StubGroup(2, 1), StubGroup(2, 0)
        cfg = PartitionConfig.from_mp_config(
            self.parallel(context_parallel_size=2, sequence_parallel=True),
            max_seq_len=16,
            kv_format="thd",
            cp_group=cp_group,
            tp_group=tp_group,
        )
        assert cfg == PartitionConfig(True, True, False, 16, "thd", cp_group, tp_group)
        assert cfg.cp_group is cp_group
        assert cfg.tp_group is tp_group

    def test_a_given_group_is_cut_over_whatever_the_config_says(self):
        cfg = PartitionConfig.from_mp_config(
            self.parallel(), max_seq_len=16, cp_group=StubGroup(2, 1)
        )
        assert cfg.use_cp

    def test_no_group_is_asked_for_that_is_not_needed(self):
        cfg = PartitionConfig.from_mp_config(self.parallel(), max_seq_len=16)
        assert cfg == PartitionConfig(False, False, False, 16)

    def test_a_needed_group_that_is_missing_is_the_global_one(self, monkeypatch):
        cp_group, tp_group = StubGroup(4, 1), StubGroup(2, 0)
        monkeypatch.setattr(utils, "get_context_parallel_group", lambda: cp_group)
        monkeypatch.setattr(utils, "get_tensor_model_parallel_group", lambda: tp_group)
        cfg = PartitionConfig.from_mp_config(
            self.parallel(context_parallel_size=4, sequence_parallel=True), max_seq_len=16
        )
        assert (cfg.cp_group, cfg.tp_group) == (cp_group, tp_group)
        assert cfg.use_cp

    def test_a_plain_model_parallel_config_will_do(self):
        assert not PartitionConfig.from_mp_config(ModelParallelConfig(), max_seq_len=1).use_cp

    def test_other_configs_are_refused(self):
        message = "mp must be a ModelParallelConfig instance, got dict"
        with pytest.raises(TypeError, match=message):
            PartitionConfig.from_mp_config({}, max_seq_len=1)

    def test_the_config_is_frozen(self):
        cfg = PartitionConfig.from_mp_config(self.parallel(), max_seq_len=16)
        with pytest.raises(AttributeError, match="cannot assign"):
            cfg.use_cp = True
