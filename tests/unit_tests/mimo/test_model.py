# SPDX-License-Identifier: Apache-2.0
"""``MimoModel`` on one process with stand-in modules, groups and bridges; b > 1 throughout.

The oracle places rows with a Python loop over the batch. Placing copies, so it is compared bit
for bit; the language model's one matrix product runs on equal inputs and is, too.
"""

from __future__ import annotations

import functools
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.models.common.embeddings.rotary_pos_embedding import MultimodalRotaryEmbedding
from megatron.core.models.mimo import AudioModalitySubmodules, MimoModel, compat
from megatron.core.models.mimo.config import role as role_module
from megatron.core.models.mimo.config.role import ModuleLayout, ModuleStageInfo, RankRole
from megatron.core.models.mimo.model import base
from megatron.core.models.mimo.model.language_groups import check_pp_size
from megatron.core.models.mimo.model.multimodal_rotary import rotary_positions_of
from megatron.core.models.mimo.model.replaceable import ReplaceableSteps
from megatron.core.models.mimo.model.token_positions import TokenPositions
from megatron.core.models.mimo.partition import utils as partition_utils
from megatron.core.transformer.module import Float16Module
from tests.unit_tests.mimo.model_stubs import (
    HIDDEN,
    IMAGE,
    SOUND,
    StubGrid,
    StubGroup,
    StubLanguageModel,
    language_config,
    mimo_config,
    modality_spec,
)

BATCH, LENGTH = 3, 8


def tokens(*images_per_sample: int, length: int = LENGTH) -> torch.Tensor:
    """``input_ids`` whose samples have these numbers of image tokens, at different places."""
    ids = torch.arange(1, 1 + len(images_per_sample) * length).view(-1, length) % 40
    for sample, count in enumerate(images_per_sample):
        ids[sample, sample % 2 : sample % 2 + count] = IMAGE
    return ids


def images(samples: int, per_sample: int) -> dict:
    return {"images": {"linear": {"x": torch.randn(samples, per_sample, 4)}}}


def places(ids: torch.Tensor, token: int) -> list[tuple[int, int]]:
    """(sample, position) of a token, in reading order."""
    batch, length = ids.shape
    return [(b, s) for b in range(batch) for s in range(length) if ids[b, s] == token]


def fuse(ids: torch.Tensor, words: torch.Tensor, rows: torch.Tensor, token: int = IMAGE):
    """The oracle: word rows everywhere, modality rows over them, one by one. (S, B, H)."""
    fused = words[ids].clone()
    for row, (b, s) in zip(rows, places(ids, token), strict=True):
        fused[b, s] = row
    return fused.transpose(0, 1)


def batch_first(forward):
    """What a language model with a head returns."""
    return lambda **inputs: forward(**inputs).transpose(0, 1)


@pytest.fixture
def model() -> MimoModel:
    torch.manual_seed(1)
    return MimoModel(mimo_config())


class TestForward:
    def test_rows_stand_where_their_tokens_stand(self, model):
        ids = tokens(2, 2, 2)
        inputs = images(BATCH, 2)
        output, mask = model(ids, modality_inputs=inputs, loss_mask=torch.ones(BATCH, LENGTH))
        rows = model.modality_submodules["images"](encoder_inputs=inputs["images"])
        fused = fuse(ids, model.language_model.embedding.words.weight, rows)
        assert torch.equal(model.language_model.called_with["decoder_input"], fused)
        assert torch.equal(output, model.language_model.head(fused))
        assert torch.equal(mask, torch.ones(BATCH, LENGTH))

    def test_samples_with_different_numbers_of_tokens(self, model):
        ids = tokens(1, 3, 2)
        rows = torch.randn(6, HIDDEN)
        model.modality_submodules["images"] = Constant(rows)
        model(ids, modality_inputs={"images": {}})
        fused = fuse(ids, model.language_model.embedding.words.weight, rows)
        assert torch.equal(model.language_model.called_with["decoder_input"], fused)

    def test_gradients_reach_rows_and_words(self, model):
        ids = tokens(2, 1, 3)
        rows = torch.randn(6, HIDDEN, requires_grad=True)
        model.modality_submodules["images"] = Constant(rows)
        model.language_model.head = nn.Identity()
        output, _ = model(ids, modality_inputs={"images": {}})
        gradient = torch.randn_like(output)
        output.backward(gradient)
        expected = torch.stack([gradient[s, b] for b, s in places(ids, IMAGE)])
        assert torch.equal(rows.grad, expected)
        words = torch.zeros_like(model.language_model.embedding.words.weight)
        for b in range(BATCH):
            for s in range(LENGTH):
                if ids[b, s] != IMAGE:
                    words[ids[b, s]] += gradient[s, b]
        assert torch.equal(model.language_model.embedding.words.weight.grad, words)

    def test_what_the_language_model_is_called_with(self, model):
        ids, positions = tokens(1, 1, 1), torch.arange(LENGTH).expand(BATCH, -1)
        labels = torch.randint(0, 40, (BATCH, LENGTH))
        mask = torch.zeros(BATCH, 1, LENGTH, LENGTH, dtype=torch.bool)
        model(ids, positions, mask, labels=labels, modality_inputs=images(BATCH, 1))
        seen = model.language_model.called_with
        assert seen["input_ids"] is None
        assert seen["position_ids"] is positions
        assert seen["labels"] is labels
        assert seen["packed_seq_params"] is None
        assert seen["attention_mask"] is mask

    def test_text_only(self, model):
        ids = tokens(0, 0, 0)
        for inputs in (None, {}, {"images": None}):
            model(ids, modality_inputs=inputs)
            words = model.language_model.embedding.words.weight
            assert torch.equal(
                model.language_model.called_with["decoder_input"], words[ids].transpose(0, 1)
            )

    def test_two_modalities(self):
        specs = {"images": modality_spec(), "sounds": modality_spec(AudioModalitySubmodules)}
        model = MimoModel(mimo_config(modalities=specs))
        ids = tokens(2, 2, 2)
        ids[:, 5] = SOUND
        sound = {"linear": {"x": torch.randn(BATCH, 1, 4)}}
        model(ids, modality_inputs={"sounds": sound, **images(BATCH, 2)})
        fused = model.language_model.called_with["decoder_input"]
        rows = model.modality_submodules["sounds"](encoder_inputs=sound)
        assert torch.equal(fused[5], rows)

    def test_packing(self, model):
        lengths = torch.tensor([0, 3, 8])
        given = {"cu_seqlens_q": lengths, "cu_seqlens_kv": lengths, "max_seqlen_q": 5}
        before = dict(given)
        model(tokens(0), packing_kwargs=given)
        params = model.language_model.called_with["packed_seq_params"]
        assert params.qkv_format == "thd"
        assert params.cu_seqlens_q.dtype == params.cu_seqlens_kv.dtype == torch.int32
        assert params.max_seqlen_q == 5
        assert (params.max_seqlen_q, params.max_seqlen_kv) == (5, 5)  # the longest
        assert given == before

    def test_packing_that_layers_would_misread(self, model):
        with pytest.raises(ValueError, match="rows of 8 tokens and cu_seqlens that end at 4"):
            model(tokens(0)[:1], packing_kwargs={"cu_seqlens_q": torch.tensor([0, 4])})
        with pytest.raises(ValueError, match="needs cu_seqlens_q_padded or cu_seqlens_q"):
            model(tokens(0)[:1], packing_kwargs={})

    def test_packing_with_an_unknown_field(self, model):
        with pytest.raises(ValueError, match=r"packing_kwargs has \['cu_seqlen'\].*'cu_seqlens_q'"):
            model(tokens(0), packing_kwargs={"cu_seqlen": None})

    def test_the_positions_are_looked_for_once(self, model, monkeypatch):
        calls = []
        find = TokenPositions.find
        monkeypatch.setattr(
            TokenPositions, "find", classmethod(lambda cls, *a: calls.append(a) or find(*a))
        )
        model(tokens(1, 1, 1), modality_inputs=images(BATCH, 1))
        assert len(calls) == 1
        assert model._language.token_positions.latest is None

    def test_inference_mode(self, model):
        with torch.inference_mode():
            output, _ = model(tokens(1, 1), modality_inputs=images(2, 1))
        assert output.shape == (LENGTH, 2, HIDDEN)

    def test_an_edited_batch_is_looked_at_again(self, model):
        ids = tokens(1, 1)
        assert model.get_text_embeddings(ids, None, {"images": IMAGE}).shape[0] == 14
        ids[0, 0] = 1
        assert model.get_text_embeddings(ids, None, {"images": IMAGE}).shape[0] == 15
        assert model.get_text_embeddings(ids, None, {}).shape[0] == 16


class Constant(nn.Module):
    """A modality whose rows a test chooses."""

    def __init__(self, rows: torch.Tensor | None) -> None:
        super().__init__()
        self.rows = rows

    def forward(self, encoder_inputs=None, hidden_states=None):
        return self.rows if hidden_states is None else hidden_states


class TestMismatch:
    def test_counts(self, model):
        message = r"Number of images tokens \(6\) does not match number of images embeddings \(3\)"
        with pytest.raises(ValueError, match=message):
            model(tokens(2, 2, 2), modality_inputs=images(BATCH, 1))

    def test_tokens_without_inputs(self, model):
        message = r"images inputs are missing, but matching special tokens exist \(4 of them\)"
        for inputs in (None, {"images": None}, {"image": {}}):
            with pytest.raises(RuntimeError, match=message):
                model(tokens(2, 2), modality_inputs=inputs)

    def test_inputs_that_nobody_reads(self, model):
        message = r"modality_inputs has \['image'\], but this model's modalities are \['images'\]"
        with pytest.raises(ValueError, match=message):
            model(tokens(0, 0), modality_inputs={"image": {"linear": {"x": torch.ones(1, 1, 4)}}})
        model(tokens(0, 0), modality_inputs={"image": None})

    def test_inputs_without_items_are_no_inputs(self, model):
        """Encoders need not be able to shape nothing."""
        def cannot_shape_nothing(**inputs: object) -> None:
            raise AssertionError("encoders got no items")

        model.modality_submodules["images"] = Constant(None)
        model.modality_submodules["images"].forward = cannot_shape_nothing
        for shape in ((0, 2, 4), (0,)):
            model(tokens(0, 0), modality_inputs={"images": {"linear": {"x": torch.ones(shape)}}})
        with pytest.raises(RuntimeError, match="images inputs are missing"):
            model(tokens(2, 2), modality_inputs={"images": {"linear": {"x": torch.ones(0, 4)}}})

    @pytest.mark.parametrize("shape", [(0, LENGTH), (0, 0), (3, 0)], ids=str)
    def test_a_batch_without_tokens(self, model, shape):
        """Nothing comes out, and every parameter of the language model has a zero gradient."""
        empty = torch.zeros(shape, dtype=torch.int64)
        model.language_model.forward = batch_first(model.language_model.forward)
        batch = {"labels": empty, "loss_mask": empty.float(), "position_ids": empty}
        output, mask = model(empty, **batch)
        assert tuple(output.shape) == (*shape, HIDDEN)
        assert tuple(mask.shape) == shape
        output.sum().backward()
        for parameter in model.language_model.parameters():
            assert torch.equal(parameter.grad, torch.zeros_like(parameter))

    def test_a_packed_batch_without_tokens(self, model):
        empty, ends = torch.zeros(1, 0, dtype=torch.int64), torch.zeros(1, dtype=torch.int32)
        model.language_model.forward = batch_first(model.language_model.forward)
        packing = {"cu_seqlens_q": ends, "cu_seqlens_kv": ends}
        output, _ = model(empty, packing_kwargs=packing)
        assert tuple(output.shape) == (1, 0, HIDDEN)

    def test_padding_that_experts_would_count(self):
        experts = {"num_moe_experts": 2, "moe_aux_loss_coeff": [0.0, 0.1], "add_bias_linear": False}
        experts["moe_router_load_balancing_type"] = ["aux_loss", "seq_aux_loss"]
        model = MimoModel(mimo_config(language_config(**experts)))
        with pytest.raises(ValueError, match="has no samples, and {'moe_aux_loss_coeff': "):
            model(torch.zeros(0, LENGTH, dtype=torch.int64))
        model(tokens(0, 0))

    def test_tokens_without_rows(self, model):
        model.modality_submodules["images"] = Constant(None)
        with pytest.raises(RuntimeError, match="images inputs are missing"):
            model(tokens(2, 2), modality_inputs={"images": {}})

    def test_inputs_without_tokens(self, model):
        with pytest.raises(ValueError, match=r"images tokens \(0\) .* embeddings \(2\)"):
            model(tokens(0, 0), modality_inputs=images(2, 1))

    def test_no_token_id_is_found_before_the_encoder_runs(self):
        model = MimoModel(mimo_config(special_token_ids={}))
        model.modality_submodules["images"] = MustNotRun()
        message = r"No special token ID defined for modality images; special_token_ids has \[\]"
        with pytest.raises(ValueError, match=message):
            model(tokens(1, 1), modality_inputs=images(2, 1))

    def test_missing_inputs_of_one_modality_stop_the_others_encoders(self):
        specs = {"images": modality_spec(), "sounds": modality_spec(AudioModalitySubmodules)}
        model = MimoModel(mimo_config(modalities=specs))
        model.modality_submodules["images"] = MustNotRun()
        ids = tokens(1, 1)
        ids[0, 7] = SOUND
        with pytest.raises(RuntimeError, match="sounds inputs are missing"):
            model(ids, modality_inputs=images(2, 1))


class MustNotRun(nn.Module):
    def forward(self, **_):
        raise AssertionError("the encoder ran")


class TestAlign:
    def align(self, model, rows, ids, special=None):
        return model.align_embeddings_by_token_positions(
            modality_embeddings=rows,
            input_ids=ids,
            special_token_ids={"images": IMAGE} if special is None else special,
        )

    def test_one_sample_without_a_batch_dim(self, model):
        ids = tokens(2)[0]
        text, image = torch.randn(LENGTH - 2, HIDDEN), torch.randn(2, HIDDEN)
        fused = self.align(model, {"text": text, "images": image}, ids)
        assert fused.shape == (LENGTH, 1, HIDDEN)
        assert torch.equal(fused[:2, 0], image)
        assert torch.equal(fused[2:, 0], text)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_exact_in_both_dtypes(self, model, dtype):
        ids = tokens(2, 1, 3)
        text = torch.randn(LENGTH * BATCH - 6, HIDDEN, dtype=dtype)
        image = torch.randn(6, HIDDEN, dtype=dtype)
        fused = self.align(model, {"images": image, "text": text}, ids)
        assert fused.dtype is dtype
        assert fused.is_contiguous()
        assert torch.equal(torch.stack([fused[s, b] for b, s in places(ids, IMAGE)]), image)

    def test_rows_take_the_dtype_of_the_text_and_gradients_their_own(self, model):
        ids = tokens(1, 1)
        text = torch.zeros(LENGTH * 2 - 2, HIDDEN, dtype=torch.bfloat16)
        image = torch.randn(2, HIDDEN, requires_grad=True)
        fused = self.align(model, {"images": image, "text": text}, ids)
        assert fused.dtype is torch.bfloat16
        assert torch.equal(fused[0, 0], image[0].bfloat16())
        fused.float().sum().backward()
        assert torch.equal(image.grad, torch.ones_like(image))

    def test_tokens_without_rows_are_zeros(self, model):
        ids = tokens(2, 2)
        fused = self.align(model, {"text": torch.ones(LENGTH * 2 - 4, HIDDEN)}, ids)
        for b, s in places(ids, IMAGE):
            assert not fused[s, b].any()
        assert fused.sum() == (LENGTH * 2 - 4) * HIDDEN

    def test_no_rows_at_all(self, model):
        with pytest.raises(ValueError, match="No modality embeddings provided"):
            self.align(model, {}, tokens(0))

    @pytest.mark.parametrize("rows", [5, 7])
    def test_text_count(self, model, rows):
        message = rf"text tokens \(6\) .* text embeddings \({rows}\)"
        with pytest.raises(ValueError, match=message):
            self.align(model, {"text": torch.zeros(rows, HIDDEN)}, tokens(2))

    def test_modality_without_a_token(self, model):
        message = "No special token ID defined for modality sounds"
        with pytest.raises(ValueError, match=message):
            self.align(model, {"sounds": torch.zeros(1, HIDDEN)}, tokens(2))

    def test_widths(self, model):
        rows = {"text": torch.zeros(LENGTH - 2, HIDDEN), "images": torch.zeros(2, 6)}
        with pytest.raises(ValueError, match=r"same hidden size, got {'text': 8, 'images': 6}"):
            self.align(model, rows, tokens(2))


class TestTextEmbeddings:
    def test_text_rows_in_reading_order(self, model):
        ids = tokens(2, 1)
        rows = model.get_text_embeddings(ids, None, {"images": IMAGE})
        words = model.language_model.embedding.words.weight
        expected = [words[i] for i in ids.flatten().tolist() if i != IMAGE]
        assert torch.equal(rows, torch.stack(expected))

    def test_positions_follow_their_tokens(self, model):
        ids = tokens(2, 1)
        positions = torch.arange(2 * LENGTH).view(2, LENGTH)
        without = model.get_text_embeddings(ids, None, {"images": IMAGE})
        rows = model.get_text_embeddings(ids, positions, {"images": IMAGE})
        expected = positions[ids != IMAGE].unsqueeze(-1)
        assert torch.equal(rows, without + expected)
        three = torch.stack([positions, -positions, -positions])
        assert torch.equal(model.get_text_embeddings(ids, three, {"images": IMAGE}), rows)

    def test_one_row_of_positions_for_all_samples(self, model):
        ids = tokens(2, 1)
        shared = torch.arange(LENGTH).unsqueeze(0)
        rows = model.get_text_embeddings(ids, shared, {"images": IMAGE})
        each = model.get_text_embeddings(ids, shared.expand(2, -1), {"images": IMAGE})
        assert torch.equal(rows, each)

    def test_no_text_at_all(self, model):
        ids = torch.full((2, 2), IMAGE)
        assert model.get_text_embeddings(ids, None, {"images": IMAGE}).shape == (0, HIDDEN)


@pytest.fixture
def stub_sizes(monkeypatch):
    """Sizes of stand-in groups; Megatron's helpers want torch.distributed."""
    monkeypatch.setattr(partition_utils, "get_pg_size", lambda g: g.size() if g else 1)
    monkeypatch.setattr(partition_utils, "get_pg_rank", lambda g: g.rank() if g else 0)


@pytest.mark.usefixtures("stub_sizes")
class TestContextParallel:
    def build(self, cp_group=None, tp_group=None, grid=None, config=None, **overrides) -> MimoModel:
        config = config or language_config(context_parallel_size=2)
        grids = None if grid is None else {"images": StubGrid(), "language": grid}
        return MimoModel(
            mimo_config(config, module_to_grid_map=grids, **overrides), cp_group, tp_group
        )

    @pytest.mark.parametrize(("rank", "own"), [(0, [0, 1, 6, 7]), (1, [2, 3, 4, 5])])
    def test_the_sequence_is_cut(self, rank, own):
        torch.manual_seed(1)
        model = self.build(StubGroup(2, rank))
        ids, mask = tokens(2, 2, 2), torch.arange(BATCH * LENGTH).view(BATCH, LENGTH)
        inputs = images(BATCH, 2)
        positions = torch.zeros(BATCH, LENGTH, dtype=torch.int64)
        output, cut_mask = model(
            ids, positions, loss_mask=mask, labels=-mask, modality_inputs=inputs
        )
        rows = model.modality_submodules["images"](encoder_inputs=inputs["images"])
        fused = fuse(ids, model.language_model.embedding.words.weight, rows)
        seen = model.language_model.called_with
        assert torch.equal(seen["decoder_input"], fused[own])
        assert torch.equal(seen["labels"], -mask[:, own])
        assert torch.equal(cut_mask, mask[:, own])
        assert seen["position_ids"] is positions
        assert output.shape == (4, BATCH, HIDDEN)

    def test_a_packed_batch_is_cut_by_sequence(self):
        model = self.build(StubGroup(2, 0), kv_format="thd")
        ids = tokens(0)
        model(ids, packing_kwargs={"cu_seqlens_q_padded": torch.tensor([0, 4, 8])})
        words = model.language_model.embedding.words.weight
        seen = model.language_model.called_with["decoder_input"]
        assert torch.equal(seen[:, 0], words[ids[0, [0, 3, 4, 7]]])
        assert model.partition_adapter.cfg.kv_format == "thd"

    def test_an_attention_mask_is_refused(self):
        model = self.build(StubGroup(2, 0))
        mask = torch.ones(1, 1, LENGTH, LENGTH)
        message = r"context parallelism requires attention_mask=None, got .*\(1, 1, 8, 8\)"
        with pytest.raises(RuntimeError, match=message):
            model(tokens(0, 0), attention_mask=mask)

    def test_a_length_that_cannot_be_cut(self):
        with pytest.raises(ValueError, match="divisible by 4 .* got 6"):
            self.build(StubGroup(2, 0))(tokens(0, length=6))

    def test_the_grid_s_group_is_used(self):
        group = StubGroup(2, 1)
        grid = StubGrid(0, 1, [2], ["cp"], {"cp": group})
        assert self.build(grid=grid).partition_adapter.cfg.cp_group is group

    def test_a_given_group_wins(self):
        group = StubGroup(2, 1)
        grid = StubGrid(0, 1, [2], ["cp"], {"cp": StubGroup(2, 0)})
        assert self.build(group, grid=grid).partition_adapter.cfg.cp_group is group

    def test_the_grid_s_group_is_missing(self):
        with pytest.raises(KeyError, match=r"'cp' group and it was not created; call grid.create"):
            self.build(grid=StubGrid(0, 1, [2], ["cp"]))

    def test_grid_and_config_disagree(self):
        message = "grid has cp size 4, the language config has context_parallel_size 2"
        with pytest.raises(ValueError, match=message):
            self.build(grid=StubGrid(0, 1, [4], ["cp"]))
        with pytest.raises(ValueError, match="grid has cp size 2, .* context_parallel_size 1"):
            self.build(grid=StubGrid(0, 1, [2], ["cp"]), config=language_config())

    def test_group_and_config_disagree(self):
        for size in (4, 1):
            message = f"cp_group has {size} ranks, the language config has context_parallel_size 2"
            with pytest.raises(ValueError, match=message):
                self.build(StubGroup(size, 0))

    def test_without_cp_and_sp_there_is_no_adapter(self, model):
        assert model.partition_adapter is None


@pytest.mark.usefixtures("stub_sizes")
class TestSequenceParallel:
    config = {"tensor_model_parallel_size": 2, "sequence_parallel": True}

    def build(self, tp_group=None, scatter=False, grids=None) -> MimoModel:
        return MimoModel(
            mimo_config(
                language_config(**self.config),
                language_params={
                    "scatter_embedding_sequence_parallel": scatter,
                    "max_sequence_length": 99,
                },
                module_to_grid_map=grids,
            ),
            tp_group=tp_group,
        )

    def test_the_fused_sequence_is_scattered(self, monkeypatch):
        group = StubGroup(2, 1)
        seen = []

        def scatter(tensor, group):
            seen.append(group)
            return tensor[4:]

        fake = SimpleNamespace(scatter_to_sequence_parallel_region=scatter)
        monkeypatch.setattr(partition_utils, "tensor_parallel", fake)
        model = self.build(group)
        ids = tokens(1, 1)
        model(ids, modality_inputs=images(2, 1))
        assert model.language_model.called_with["decoder_input"].shape == (4, 2, HIDDEN)
        assert seen == [group]
        assert model.partition_adapter.cfg.max_seq_len == 99

    def test_an_embedding_that_scatters_is_refused_when_it_is_built(self):
        with pytest.raises(RuntimeError, match="scatter_embedding_sequence_parallel=False"):
            self.build(StubGroup(2, 0), scatter=True)

    def test_and_when_it_is_swapped_in_later(self):
        model = self.build(StubGroup(2, 0))
        model.language_model.embedding.scatter_to_sequence_parallel = True
        with pytest.raises(RuntimeError, match="scatter_embedding_sequence_parallel=False"):
            model.get_text_embeddings(tokens(0), None, {})

    def test_the_grid_s_group_is_used_or_checked(self):
        group = StubGroup(2, 1)
        grids = {
            "images": StubGrid(0, 1, [1], ["tp"]),
            "language": StubGrid(0, 1, [2], ["tp"], {"tp": group}),
        }
        assert self.build(grids=grids).partition_adapter.cfg.tp_group is group
        with pytest.raises(ValueError, match="tp_group has 4 ranks, .* grid has tp size 2"):
            self.build(StubGroup(4, 0), grids=grids)


class StubBridge:
    """Moves rows as the real one would on one process: repeats (fan-in) or takes a part."""

    def __init__(self, scale: int, fan_in: bool) -> None:
        self.scale, self.fan_in = scale, fan_in
        self.moved: list[int] = []
        self.destroyed = 0

    def is_fan_in(self) -> bool:
        return self.fan_in

    def communicate(self, rows: torch.Tensor) -> torch.Tensor:
        self.moved.append(rows.size(0))
        if self.fan_in:
            return rows.repeat(self.scale, 1)
        if rows.size(0) % self.scale:
            raise ValueError("not divisible by fan_out")
        return rows[: rows.size(0) // self.scale]

    def destroy(self) -> None:
        self.destroyed += 1


class TestColocated:
    @pytest.fixture
    def bridged(self, model):
        def with_bridge(scale: int, fan_in: bool) -> MimoModel:
            model.colocated_comms[("images", "language")] = StubBridge(scale, fan_in)
            return model

        return with_bridge

    def bridge(self, model) -> StubBridge:
        return model.colocated_comms[("images", "language")]

    @pytest.mark.parametrize(
        ("scale", "fan_in", "samples"), [(2, True, 2), (2, False, 8), (1, False, 4)]
    )
    def test_rows_pass_the_bridge(self, bridged, scale, fan_in, samples):
        model = bridged(scale, fan_in)
        model(tokens(2, 2, 2, 2), modality_inputs=images(samples, 2))
        assert self.bridge(model).moved == [samples * 2]

    @pytest.mark.parametrize(
        ("scale", "fan_in", "samples", "message"),
        [
            (2, True, 3, r"\(12\): 6 on this rank, times the 2 encoder replicas"),
            (2, False, 4, r"\(4\): 8 on this rank, shared by 2 language replicas"),
            (1, False, 3, r"\(6\)$"),
        ],
    )
    def test_a_mismatch_is_found_before_the_bridge(self, bridged, scale, fan_in, samples, message):
        model = bridged(scale, fan_in)
        sentence = r"images tokens \(8\) does not match number of images embeddings "
        with pytest.raises(ValueError, match=sentence + message):
            model(tokens(2, 2, 2, 2), modality_inputs=images(samples, 2))
        assert self.bridge(model).moved == []

    def test_rows_that_cannot_be_shared_are_the_bridge_s_to_refuse(self, bridged):
        model = bridged(2, False)
        with pytest.raises(ValueError, match="not divisible by fan_out"):
            model(tokens(1, 1), modality_inputs=images(3, 1))

    @pytest.mark.parametrize("inputs", [None, images(0, 2)], ids=["none", "empty"])
    def test_without_tokens_no_rank_enters_the_bridge(self, bridged, inputs):
        model = bridged(2, True)
        output, _ = model(tokens(0, 0), modality_inputs=inputs)
        assert output.shape == (LENGTH, 2, HIDDEN)
        assert self.bridge(model).moved == []

    def test_an_encoder_that_finds_nothing_does_not_enter_it_either(self, bridged, monkeypatch):
        model = bridged(2, True)
        nothing = torch.zeros(0, HIDDEN)
        monkeypatch.setattr(model.modality_submodules["images"], "forward", lambda **_: nothing)
        output, _ = model(tokens(0, 0), modality_inputs=images(1, 2))
        assert output.shape == (LENGTH, 2, HIDDEN)
        assert self.bridge(model).moved == []

    def test_missing_inputs_are_found_before_the_bridge(self, bridged):
        model = bridged(2, True)
        with pytest.raises(RuntimeError, match="images inputs are missing"):
            model(tokens(1, 1))
        assert self.bridge(model).moved == []

    def test_destroy_releases_every_bridge_once(self, bridged):
        model = bridged(2, True)
        bridge = self.bridge(model)
        model.destroy()
        model.destroy()
        assert bridge.destroyed == 1
        assert model.colocated_comms == {}

    def test_one_bridge_per_modality_between_the_grids(self, monkeypatch):
        made = []
        monkeypatch.setattr(
            base, "ColocatedBridgeCommunicator", lambda **kwargs: made.append(kwargs) or "bridge"
        )
        specs = {"images": modality_spec(), "sounds": modality_spec(AudioModalitySubmodules)}
        grids = {
            name: StubGrid(0, 1, [1, 1], ["tp", "dp"]) for name in ("language", "sounds", "images")
        }
        model = MimoModel(
            mimo_config(modalities=specs, module_to_grid_map=grids, bridge="gather")
        )
        # Of all orders the spec's: process groups are made in it on every rank.
        assert list(model.colocated_comms) == [("images", "language"), ("sounds", "language")]
        assert made[0] == {
            "src_grid": grids["images"],
            "dest_grid": grids["language"],
            "src_module_name": "images",
            "dest_module_name": "language",
            "dim_mapping": {"b": 0, "h": 1},
        }

    @pytest.mark.parametrize("lacks", ["images", "language", "images language"])
    @pytest.mark.parametrize("dims", [["dp"], ["tp"], ["pp"]], ids=str)
    def test_grids_without_tp_or_dp_need_no_bridge(self, lacks, dims):
        """One such grid suffices: a bridge has two ends."""
        grids = {name: StubGrid(0, 1, [1, 1], ["tp", "dp"]) for name in ("images", "language")}
        grids |= {name: StubGrid(0, 1, [1], dims) for name in lacks.split()}
        assert MimoModel(mimo_config(module_to_grid_map=grids)).colocated_comms == {}


class FakeDDP(nn.Module):
    """Records the data-parallel calls that a wrapper gets."""

    def __init__(self, module: nn.Module, **overlap: bool) -> None:
        super().__init__()
        self.module = module
        options = {"overlap_grad_reduce": False, "overlap_param_gather": False, **overlap}
        self.ddp_config = SimpleNamespace(**options)
        self.calls: list = []

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)

    @contextmanager
    def no_sync(self):
        self.calls.append("enter")
        yield
        self.calls.append("exit")

    def __getattr__(self, name):
        recorded = {
            "start_grad_sync",
            "start_param_sync",
            "zero_grad_buffer",
            "enable_forward_pre_hook",
            "disable_forward_pre_hook",
            "free_overlap_buffers",
        }
        if name in recorded:
            return lambda **kwargs: self.calls.append((name, kwargs))
        return super().__getattr__(name)


@pytest.fixture
def fake_ddp(monkeypatch):
    monkeypatch.setattr(base, "DistributedDataParallel", FakeDDP)


@pytest.mark.usefixtures("fake_ddp")
class TestDataParallelCalls:
    def wrapped(self, model, language: dict, image: dict) -> tuple[FakeDDP, FakeDDP]:
        model.language_model = FakeDDP(model.language_model, **language)
        return model.language_model, self.wrapped_encoder(model, **image)

    def wrapped_encoder(self, model, **overlap: bool) -> FakeDDP:
        model.modality_submodules["images"] = FakeDDP(
            model.modality_submodules["images"], **overlap
        )
        return model.modality_submodules["images"]

    def test_no_sync_of_overlapping_modules(self, model):
        language, image = self.wrapped(model, {"overlap_grad_reduce": True}, {})
        with model.no_sync():
            assert language.calls == ["enter"]
        assert language.calls == ["enter", "exit"]
        assert image.calls == []

    @pytest.mark.parametrize(
        ("name", "given", "passed"),
        [
            (
                "start_param_sync",
                {"force_sync": True},
                {"force_sync": True, "force_dispatch": False},
            ),
            (
                "start_param_sync",
                {"force_dispatch": True},
                {"force_sync": False, "force_dispatch": True},
            ),
            ("enable_forward_pre_hook", {}, {}),
            ("disable_forward_pre_hook", {"param_sync": False}, {"param_sync": False}),
            ("free_overlap_buffers", {}, {}),
        ],
    )
    def test_gather_calls(self, model, name, given, passed):
        language, image = self.wrapped(model, {}, {"overlap_param_gather": True})
        getattr(model, name)(**given)
        assert image.calls == [(name, passed)]
        assert language.calls == []

    def test_calls_reach_every_module_that_overlaps(self, model):
        overlap = {"overlap_grad_reduce": True, "overlap_param_gather": True}
        both = self.wrapped(model, overlap, overlap)
        names = ["start_grad_sync", "start_param_sync", "enable_forward_pre_hook"]
        names += ["disable_forward_pre_hook", "free_overlap_buffers", "zero_grad_buffer"]
        for name in names:
            getattr(model, name)()
        with model.no_sync():
            pass
        for each in both:
            called = [call if isinstance(call, str) else call[0] for call in each.calls]
            assert called == [*names, "enter", "exit"]

    def test_start_grad_sync(self, model):
        language, image = self.wrapped(model, {}, {"overlap_grad_reduce": True})
        model.start_grad_sync()
        assert image.calls == [("start_grad_sync", {})]
        assert language.calls == []

    def test_zero_grad_buffer_of_all_modules(self, model):
        model(tokens(0, 0))[0].sum().backward()
        image = FakeDDP(model.modality_submodules["images"])
        model.modality_submodules["images"] = image
        model.zero_grad_buffer()
        assert image.calls == [("zero_grad_buffer", {})]
        assert all(p.grad is None for p in model.language_model.parameters())

    @pytest.mark.parametrize("poison", [0.0, float("nan")])
    def test_a_text_only_batch_readies_every_parameter_of_an_overlapping_encoder(
        self, model, poison
    ):
        image = self.wrapped_encoder(model, overlap_grad_reduce=True)
        with torch.no_grad():
            next(image.parameters()).fill_(poison)
        output, _ = model(tokens(0, 0))
        assert not output.isnan().any()
        output.sum().backward()
        for parameter in image.parameters():
            assert torch.equal(parameter.grad, torch.zeros_like(parameter))

    def test_and_leaves_others_alone(self, model):
        image = self.wrapped_encoder(model)
        model(tokens(0, 0))[0].sum().backward()
        assert all(parameter.grad is None for parameter in image.parameters())

    def test_frozen_parameters_stay_without_gradients(self, model):
        image = self.wrapped_encoder(model, overlap_grad_reduce=True)
        image.requires_grad_(False)
        image.module.input_projections.requires_grad_(True)
        model(tokens(0, 0))[0].sum().backward()
        ready = {n for n, p in image.named_parameters() if p.grad is not None}
        assert ready == {n for n, p in image.named_parameters() if p.requires_grad}


def disjoint(monkeypatch, rank: int, encoder_dp: int = 1, language_dp: int = 1, **language):
    """Grids with the encoder on ranks 0.. and the language model behind it; this is ``rank``."""
    monkeypatch.setattr(role_module.dist, "get_rank", lambda: rank)
    return {
        "images": StubGrid(0, encoder_dp, [encoder_dp], ["dp"]),
        "language": StubGrid(
            encoder_dp, language_dp, **{"shape": [language_dp], "dim_names": ["dp"], **language}
        ),
    }


class TestEncoderRank:
    @pytest.fixture
    def encoder(self, monkeypatch):
        return MimoModel(mimo_config(module_to_grid_map=disjoint(monkeypatch, 0)))

    def test_it_has_no_language_model(self, encoder):
        assert encoder.role.mode is ModuleLayout.NON_COLOCATED
        assert encoder.language_model is None
        assert encoder.partition_adapter is None
        assert encoder.colocated_comms == {}
        assert list(encoder.modality_submodules) == ["images"]

    def test_it_returns_rows_by_module_name(self, encoder):
        inputs, mask = images(2, 3), torch.ones(2, LENGTH)
        output, returned = encoder(tokens(3, 3), modality_inputs=inputs, loss_mask=mask)
        assert list(output) == ["images"]
        rows = encoder.modality_submodules["images"](encoder_inputs=inputs["images"])
        assert torch.equal(output["images"], rows)
        assert returned is mask

    def test_equal_samples_need_no_split_sizes(self, encoder):
        output, _ = encoder(tokens(3, 3), modality_inputs=images(2, 3))
        assert not hasattr(output["images"], "_mimo_bridge_split_sizes")

    def test_uneven_samples_carry_their_sizes(self, encoder):
        encoder.modality_submodules["images"] = Constant(torch.zeros(4, HIDDEN))
        output, _ = encoder(tokens(1, 3), modality_inputs={"images": {}})
        assert output["images"]._mimo_bridge_split_sizes == [1, 3]

    def test_token_0_stands_for_images_like_any_other(self, encoder):
        encoder.special_token_ids["images"] = 0
        ids = torch.tensor([[0, 7, 7], [0, 0, 0]])
        with pytest.raises(RuntimeError, match="images inputs are missing"):
            encoder(ids)
        encoder.modality_submodules["images"] = Constant(torch.zeros(4, HIDDEN))
        output, _ = encoder(ids, modality_inputs={"images": {}})
        assert output["images"]._mimo_bridge_split_sizes == [1, 3]

    def test_uneven_samples_cannot_fan_in(self, monkeypatch):
        model = MimoModel(mimo_config(module_to_grid_map=disjoint(monkeypatch, 0, encoder_dp=2)))
        model.modality_submodules["images"] = Constant(torch.zeros(4, HIDDEN))
        for error in (AssertionError, ValueError):
            with pytest.raises(error, match=r"encoder DP <= LM DP \(got .* DP=2, LM DP=1\)"):
                model(tokens(1, 3), modality_inputs={"images": {}})

    def test_a_text_only_batch_sends_an_empty_payload(self, encoder):
        output, _ = encoder(tokens(0, 0))
        assert output["images"].shape == (0, HIDDEN)
        assert output["images"].requires_grad
        parameter = next(encoder.modality_submodules["images"].parameters())
        assert output["images"].device == parameter.device
        assert output["images"].dtype is torch.float32

    def test_its_dtype_is_the_language_model_s(self, monkeypatch):
        config = language_config(params_dtype=torch.bfloat16, bf16=True)
        grids = disjoint(monkeypatch, 0)
        model = MimoModel(mimo_config(config, module_to_grid_map=grids))
        assert model(tokens(0))[0]["images"].dtype is torch.bfloat16

    def test_its_payload_readies_an_overlapping_encoder(self, encoder, fake_ddp):
        wrapped = FakeDDP(encoder.modality_submodules["images"], overlap_grad_reduce=True)
        encoder.modality_submodules["images"] = wrapped
        payload = encoder(tokens(0, 0))[0]["images"]
        payload.backward(torch.empty(0, HIDDEN))
        for parameter in wrapped.parameters():
            assert torch.equal(parameter.grad, torch.zeros_like(parameter))

    def test_tokens_without_inputs(self, encoder):
        with pytest.raises(RuntimeError, match="images inputs are missing, but matching special"):
            encoder(tokens(1, 1))

    def test_a_later_stage_gets_rows_from_the_one_before(self, monkeypatch):
        grids = disjoint(monkeypatch, 1, encoder_dp=2)
        grids["images"] = StubGrid(0, 2, [2], ["pp"], {"pp": StubGroup(2, 1)})
        model = MimoModel(mimo_config(module_to_grid_map=grids))
        rows = torch.randn(6, 6)
        model.set_input_tensor([{"images": [rows]}])
        output, _ = model(tokens(3, 3))
        projection = model.modality_submodules["images"].input_projections[0]
        assert torch.equal(output["images"], projection(rows))


class TestLanguageRank:
    def build(self, monkeypatch, **overrides) -> MimoModel:
        grids = disjoint(monkeypatch, 1)
        torch.manual_seed(1)
        return MimoModel(mimo_config(module_to_grid_map=grids, **overrides))

    def test_it_has_no_encoder(self, monkeypatch):
        model = self.build(monkeypatch)
        assert len(model.modality_submodules) == 0
        assert model.language_model is not None

    @pytest.mark.parametrize("wrap", [lambda t: t, lambda t: [t]], ids=["tensor", "list"])
    def test_it_takes_rows_through_set_input_tensor(self, monkeypatch, wrap):
        model = self.build(monkeypatch)
        ids, rows = tokens(2, 1), torch.randn(3, HIDDEN)
        model.set_input_tensor([{"images": wrap(rows)}])
        output, _ = model(ids)
        fused = fuse(ids, model.language_model.embedding.words.weight, rows)
        assert torch.equal(output, model.language_model.head(fused))

    def test_an_empty_payload(self, monkeypatch):
        model = self.build(monkeypatch)
        model.set_input_tensor({"images": torch.empty(0, HIDDEN)})
        assert model(tokens(0, 0))[0].shape == (LENGTH, 2, HIDDEN)

    def test_it_reads_an_attention_mask(self, monkeypatch):
        model = self.build(monkeypatch)
        mask = torch.ones(1, 1, LENGTH, LENGTH)
        model(tokens(0, 0), attention_mask=mask)
        assert model.language_model.called_with["attention_mask"] is mask

    def test_rows_that_do_not_match(self, monkeypatch):
        model = self.build(monkeypatch)
        model.set_input_tensor({"images": torch.zeros(2, HIDDEN)})
        with pytest.raises(ValueError, match=r"images tokens \(3\) .* embeddings \(2\)"):
            model(tokens(2, 1))

    def staged(self, monkeypatch, stage: int, stages: int = 3) -> MimoModel:
        grids = disjoint(
            monkeypatch,
            1,
            language_dp=stages,
            shape=[stages],
            dim_names=["pp"],
            groups={"pp": StubGroup(stages, stage)},
        )
        return MimoModel(mimo_config(module_to_grid_map=grids))

    def test_a_stage_before_the_last_names_its_output(self, monkeypatch):
        model = self.staged(monkeypatch, 0)
        output, _ = model(tokens(0, 0))
        assert list(output) == ["language"]
        assert output["language"].shape == (LENGTH, 2, HIDDEN)

    def test_a_later_stage_takes_hidden_states(self, monkeypatch):
        model = self.staged(monkeypatch, 2)
        hidden = torch.randn(LENGTH, 2, HIDDEN)
        model.set_input_tensor([{"language": [hidden]}])
        output, _ = model(tokens(0, 0))
        assert torch.equal(output, model.language_model.head(hidden))
        assert model.language_model.called_with["decoder_input"] is None

    def test_a_role_without_modules(self, monkeypatch):
        model = self.build(monkeypatch)
        model.role = RankRole(modules={}, mode=ModuleLayout.NON_COLOCATED)
        with pytest.raises(RuntimeError, match="Rank has no modules assigned"):
            model(tokens(0))


class TestSetInputTensor:
    def test_one_tensor_goes_to_the_language_model(self, model):
        hidden = torch.zeros(1)
        for given in (hidden, [hidden]):
            model.set_input_tensor(given)
            assert model.language_model.received is hidden
        model.set_input_tensor([None])
        assert model.language_model.received is None

    def test_through_wrappers(self, model):
        inner = model.language_model
        model.language_model = Float16Module(language_config(bf16=True), inner)
        hidden = torch.zeros(1)
        model.set_input_tensor(hidden)
        assert inner.received is hidden


def test_every_step_that_a_user_replaces_is_taken_from_the_model(model, monkeypatch):
    """By a colocated model, with a packed batch, or by an encoder's rank."""

    class Names:
        def __getattr__(self, name):
            return name

    steps = [name for name, kind in vars(ReplaceableSteps).items() if isinstance(kind, property)]
    names, taken = {getattr(ReplaceableSteps(Names()), step) for step in steps}, set()

    def noted(name, step, *args, **kwargs):
        taken.add(name)
        return step(*args, **kwargs)

    def replaced(owner):
        for name in names:
            step = getattr(owner, name)
            monkeypatch.setattr(owner, name, functools.partial(noted, name, step))
        return owner

    model.colocated_comms[("images", "language")] = StubBridge(1, True)
    packing = {"cu_seqlens_q": torch.tensor([0, 3, LENGTH])}
    replaced(model)(tokens(2), modality_inputs=images(1, 2), packing_kwargs=packing)
    encoder = MimoModel(mimo_config(module_to_grid_map=disjoint(monkeypatch, 0)))
    replaced(encoder)(tokens(0, 0))
    encoder.modality_submodules["images"] = Constant(torch.zeros(4, HIDDEN))
    encoder(tokens(1, 3), modality_inputs={"images": {}})
    assert taken == names


def test_rows_are_sent_in_the_dtype_of_the_residual_stream():
    """Stock embeds in float32 then, whatever the weights are."""
    for residual, dtype in ((False, torch.bfloat16), (True, torch.float32)):
        config = language_config(fp32_residual_connection=residual)
        model = MimoModel(mimo_config(config)).bfloat16()
        assert model._language.embedding_dtype() is dtype


class TestState:
    def test_a_wrapped_model_loads_its_own_state(self, model):
        config = language_config(bf16=True)
        model.language_model = Float16Module(config, model.language_model)
        model.modality_submodules["images"] = Float16Module(
            config, model.modality_submodules["images"]
        )
        saved = {key: value + 1 for key, value in model.state_dict().items()}
        assert "language_model.head.weight" in saved
        model.load_state_dict(saved)
        for key, value in model.state_dict().items():
            assert torch.equal(value, saved[key])

    def test_keys_that_name_the_wrapper_load_too(self, model):
        bare = {key: value + 1 for key, value in model.state_dict().items()}
        model.language_model = Float16Module(language_config(bf16=True), model.language_model)
        named = {
            key.replace("language_model.", "language_model.module."): value
            for key, value in bare.items()
        }
        model.load_state_dict(named)
        head = model.state_dict()["language_model.head.weight"]
        assert torch.equal(head, bare["language_model.head.weight"].bfloat16())

    def test_assigned_tensors_become_the_parameters(self, model):
        state = {key: value + 1 for key, value in model.state_dict().items()}
        model.load_state_dict(state, assign=True)
        for key, value in model.state_dict().items():
            assert value.data_ptr() == state[key].data_ptr()

    def test_prefix_and_offsets_of_a_larger_model(self, model, monkeypatch):
        """Every module is asked for its state below the prefix, at the offsets."""
        asked = []
        monkeypatch.setattr(
            compat,
            "sharded_state_dict_default",
            lambda module, prefix, offsets, *_, **__: asked.append((prefix, offsets)) or {},
        )
        model.modality_submodules["images"] = Float16Module(
            language_config(bf16=True), model.modality_submodules["images"]
        )
        model.sharded_state_dict("outer.", ((0, 1, 2),), {})
        prefixes = ["outer.modality_submodules.images.module.", "outer.language_model."]
        assert sorted(asked) == sorted((prefix, ((0, 1, 2),)) for prefix in prefixes)
        asked.clear()
        images = model.modality_submodules["images"].module
        images.sharded_state_dict("inner.", ((0, 0, 2),), {})
        parts = ["inner.encoders.linear.", "inner.input_projections.0."]
        assert asked == [(prefix, ((0, 0, 2),)) for prefix in parts]

    @pytest.mark.parametrize("prefix", ["", "outer."])
    def test_virtual_stages_are_one_language_model_on_the_disk(self, model, prefix, monkeypatch):
        monkeypatch.setattr(
            compat,
            "sharded_state_dict_default",
            lambda _, path, *__, **___: {f"{path}w": ShardedObject(f"{path}w", 0, (1,), (0,))},
        )
        model.virtual_stages = nn.ModuleList([nn.Linear(1, 1)])
        found = model.sharded_state_dict(prefix)
        for stage in ("language_model", "virtual_stages.0"):
            assert found[f"{prefix}{stage}.w"].key == f"{prefix}language_model.w"

    def test_a_missing_key_is_an_error(self, model):
        state = model.state_dict()
        del state["language_model.head.weight"]
        with pytest.raises(RuntimeError, match="language_model.head.weight"):
            model.load_state_dict(state)


def test_stage_info_reaches_the_modality(monkeypatch):
    grids = disjoint(monkeypatch, 0, encoder_dp=2)
    grids["images"] = StubGrid(0, 2, [2], ["pp"], {"pp": StubGroup(2, 0)})
    model = MimoModel(mimo_config(module_to_grid_map=grids))
    assert model.role.modules["images"] == ModuleStageInfo(True, False)
    assert len(model.modality_submodules["images"].input_projections) == 0


def test_the_language_class_is_built_from_its_spec(model):
    assert isinstance(model.language_model, StubLanguageModel)
    assert model.config is model.mimo_config.language_model_spec.params["config"]


def test_rotary_embeddings_cut_as_before_after_an_error():
    rotary = MultimodalRotaryEmbedding.__new__(MultimodalRotaryEmbedding)
    nn.Module.__init__(rotary)
    before, group = StubGroup(2, 0), StubGroup(2, 1)
    language_model = nn.Module()
    language_model.rotary_pos_emb, rotary.cp_group = rotary, before

    def fails() -> None:
        with rotary_positions_of(language_model, None, group):
            assert rotary.cp_group is group
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        fails()
    assert rotary.cp_group is before


@pytest.mark.parametrize(
    ("fp32_residual", "dtype"), [(True, torch.float32), (False, torch.bfloat16)]
)
def test_rows_are_brought_in_the_dtype_of_the_embedded_text(fp32_residual, dtype):
    config = language_config(
        fp32_residual_connection=fp32_residual, bf16=True, params_dtype=torch.bfloat16
    )
    model = MimoModel(mimo_config(config)).bfloat16()
    assert model._language.embedding_dtype() is dtype


def test_a_language_grid_without_stages_is_one_of_one_stage():
    grid = StubGrid(0, 2, [2], ["dp"])
    check_pp_size(grid, 1)
    check_pp_size(None, 2)
    with pytest.raises(ValueError, match="grid has pp size 1, .* pipeline_model_parallel_size 2"):
        check_pp_size(grid, 2)


@pytest.mark.usefixtures("stub_sizes")
def test_embedded_text_is_dropped_in_training_only():
    config = language_config(tensor_model_parallel_size=2, sequence_parallel=True)
    model = MimoModel(mimo_config(config), tp_group=StubGroup(2, 0))
    embedding = model.language_model.embedding
    embedding.embedding_dropout = nn.Dropout(0.5)
    model._language.drop_text_alike_over_tp()
    ids = torch.arange(40).view(1, -1)
    kept = embedding.words(ids).transpose(0, 1)
    dropped = embedding(ids)
    assert 0 < (dropped == 0).sum() < dropped.numel()
    assert torch.equal(embedding.eval()(ids), kept)


@pytest.mark.usefixtures("fake_ddp")
def test_gathers_of_experts_start_and_are_waited_for_with_all_others(model):
    class Group:
        next_param_gather_bucket_group = None

        def __init__(self, name: str) -> None:
            self.name, self.param_gather_handle, self.param_gather_dispatched = name, None, False

        def start_param_sync(self) -> None:
            self.param_gather_handle = object()
            seen.append(f"start {self.name}")

        def finish_param_sync(self, skip_next_bucket_dispatch: bool) -> None:
            seen.append(f"finish {self.name}")

    seen: list[str] = []
    image = FakeDDP(model.modality_submodules["images"], overlap_param_gather=True)
    image.remove_forward_pre_hook_handles = {"some": "handle"}
    image.bucket_groups = [Group("dense 0"), Group("dense 1")]
    image.expert_parallel_bucket_groups = [Group("expert 0"), Group("expert 1")]
    model.modality_submodules["images"] = image
    model.start_param_gathers()
    model.finish_param_gathers()
    order = ["dense 1", "dense 0", "expert 1", "expert 0"]
    assert seen == [f"start {name}" for name in order] + [f"finish {name}" for name in order]
