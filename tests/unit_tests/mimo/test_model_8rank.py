# SPDX-License-Identifier: Apache-2.0
"""``MimoModel`` with a stock ``GPTModel`` and real process groups, on 8 ranks.

Layout unless a test says otherwise: encoder TP2 DP4, language model TP2 CP2 DP2 with SP (fan-in
by 2), where the groups of the two sides differ. Whole-job comparisons live elsewhere; here are
the parts that need groups: cutting, text-only replicas, checkpoints, disjoint ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron.core import dist_checkpointing
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.models.mimo import MimoModel
from megatron.core.models.mimo.comm.plan.balance import EncoderBalance
from megatron.core.models.mimo.partition.sequence_order import dense_positions
from megatron.core.models.mimo.partition.utils import PartitionAdapter, PartitionConfig
from megatron.core.models.mimo.training.groups import create_process_groups, make_grid
from megatron.core.models.mimo.transformer.layer_specs import language_layer_spec
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer.spec_utils import ModuleSpec
from tests.unit_tests.mimo.model_stubs import (
    HIDDEN,
    IMAGE,
    StubLanguageModel,
    language_config,
    mimo_config,
    modality_spec,
)

pytestmark = pytest.mark.ranks(8)

LENGTH, VOCABULARY = 16, 64
WIDTH, SAMPLES = 16, 2
FAN_IN = ({"tp": 2, "dp": 4}, {"tp": 2, "cp": 2, "dp": 2})
FAN_OUT = ({"tp": 4, "dp": 2}, {"tp": 1, "cp": 2, "dp": 4})


@dataclass
class Built:
    """A model and what has to be released with it."""

    model: MimoModel
    grids: dict[str, Any]
    groups: dict[str, Any]
    config: Any

    def release(self) -> None:
        """Destroy the bridge's and the grids' groups."""
        self.model.destroy()
        for grid in self.grids.values():
            grid.destroy()

    def coords(self, module: str) -> dict[str, int]:
        """This rank's coordinates in a module's grid."""
        return self.grids[module].coords(dist.get_rank())


@pytest.fixture
def build(rank_device):
    """Builds models, and releases their groups at the end.

    The barrier: a group that one rank destroys while another still connects fails there.
    """
    made: list[Built] = []

    def make(
        layouts: tuple[dict, dict] = FAN_IN, seed: int = 1, bridge: str = "routed", **options: Any
    ) -> Built:
        grids = {
            name: make_grid(**sizes)
            for name, sizes in zip(("images", "language"), layouts, strict=True)
        }
        groups = {name: create_process_groups(grid) for name, grid in grids.items()}
        sizes = layouts[1]
        config = gpt_config(sizes)
        torch.manual_seed(seed)
        model_parallel_cuda_manual_seed(
            seed, tp_rank=groups["language"].tp.rank(), ep_rank=0, etp_rank=0
        )
        spec = modality_spec(pg_collection=groups["images"])
        spec.submodules["input_projections"][0].params["out_features"] = WIDTH
        model = MimoModel(
            mimo_config(
                modalities={"images": spec},
                language_model_spec=gpt_spec(config, groups["language"]),
                module_to_grid_map=grids,
                bridge=bridge,
                **options,
            )
        ).to(rank_device)
        made.append(Built(model, grids, groups, config))
        dist.barrier()
        return made[-1]

    yield make
    for built in made:
        built.release()


def gpt_config(sizes: dict[str, int]):
    return language_config(
        hidden_size=WIDTH,
        num_attention_heads=4,
        tensor_model_parallel_size=sizes["tp"],
        context_parallel_size=sizes.get("cp", 1),
        sequence_parallel=sizes["tp"] > 1,
        calculate_per_token_loss=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        # The plain loss of megatron-core 0.16 reads a global TP group.
        cross_entropy_loss_fusion=True,
        cross_entropy_fusion_impl="native",
        gradient_accumulation_fusion=False,
        bias_dropout_fusion=False,
    )


def gpt_spec(config, groups) -> ModuleSpec:
    return ModuleSpec(
        module=GPTModel,
        params={
            "config": config,
            "transformer_layer_spec": language_layer_spec(config),
            "vocab_size": VOCABULARY,
            "max_sequence_length": LENGTH,
            "position_embedding_type": "rope",
            "scatter_embedding_sequence_parallel": False,
            "pg_collection": groups,
        },
    )


def wrap(built: Built, **options: Any) -> None:
    """Put a stock DDP wrapper on each module."""
    ddp_config = DistributedDataParallelConfig(grad_reduce_in_fp32=True, **options)

    def wrapped(name: str, module: torch.nn.Module) -> DistributedDataParallel:
        return DistributedDataParallel(
            config=built.config,
            ddp_config=ddp_config,
            module=module,
            pg_collection=built.groups[name],
        )

    submodules = built.model.modality_submodules
    submodules["images"] = wrapped("images", submodules["images"])
    built.model.language_model = wrapped("language", built.model.language_model)


def token_batch(samples: int, images_per_sample: int, device: torch.device) -> torch.Tensor:
    ids = torch.arange(samples * LENGTH, device=device).view(samples, LENGTH) % 40
    ids[:, 1 : 1 + images_per_sample] = IMAGE
    return ids


def pictures(samples: int, per_sample: int, device: torch.device) -> dict:
    x = torch.linspace(-1, 1, samples * per_sample * 4, device=device)
    return {"images": {"linear": {"x": x.view(samples, per_sample, 4)}}}


def state_of(model: MimoModel) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items() if torch.is_tensor(v)}


@pytest.mark.parametrize("tp", [1, 2])
def test_cutting_and_its_gradient_over_real_groups(tp, rank_device):
    """Embeddings are cut over CP 2 and TP; the gradient is gathered over TP only."""
    grid = make_grid(tp=tp, cp=2, dp=4 // tp)
    groups = create_process_groups(grid)
    at = grid.coords(dist.get_rank())
    config = language_config(
        tensor_model_parallel_size=tp, sequence_parallel=tp > 1, context_parallel_size=2
    )
    adapter = PartitionAdapter(
        PartitionConfig.from_mp_config(
            config, max_seq_len=LENGTH, cp_group=groups.cp, tp_group=groups.tp
        )
    )
    generator = torch.Generator().manual_seed(3)
    whole, gradient = torch.randn(2, LENGTH, 3, HIDDEN, generator=generator).to(rank_device)
    whole.requires_grad_()
    labels = torch.arange(3 * LENGTH, device=rank_device).view(3, LENGTH)
    cut, cut_labels, _, _ = adapter.shard(whole, labels, None)
    own = dense_positions(LENGTH, at["cp"], 2, at["tp"], tp)
    cp_own = dense_positions(LENGTH, at["cp"], 2)
    assert torch.equal(cut, whole[own])
    assert torch.equal(cut_labels, labels[:, cp_own])
    cut.backward(gradient[own])
    expected = torch.zeros_like(whole)
    expected[cp_own] = gradient[cp_own]
    assert torch.equal(whole.grad, expected)
    dist.barrier()
    grid.destroy()


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("layouts", [FAN_IN, FAN_OUT], ids=["fan_in", "fan_out"])
@pytest.mark.parametrize("bridge", ["gather", "routed"])
def test_a_replica_without_images_keeps_nobody_waiting(
    bridge, layouts, overlap, build, rank_device
):
    """Some language replicas have text only in the first and the last of three batches.

    The last one matters: Megatron's wrapper reduces from its hooks from the second batch on, and
    then waits for every parameter. On fan-out two language replicas share an encoder replica, so
    both have images or neither has.
    """
    built = build(layouts, bridge=bridge)
    wrap(built, overlap_grad_reduce=overlap)
    with_images = built.coords("language")["dp"] < (2 if layouts is FAN_OUT else 1)
    gradients = [
        encoder_gradients(built, 3 if everybody or with_images else 0, rank_device)
        for everybody in (False, True, False)
    ]
    for part, whole, again in zip(*gradients, strict=True):
        # Bit-equal: the same sums over the same ranks, zeros included.
        assert torch.equal(part, again)
        assert part.abs().sum() > 0
        assert not torch.equal(part, whole)
        # Every encoder replica has the gradient of the replicas with images.
        reference = part.clone()
        dist.broadcast(reference, 0)
        assert torch.equal(part, reference)


def test_balanced_encoders_have_the_gradients_of_unbalanced_ones(build, rank_device):
    """Of two encoder replicas beside a language replica, the first reads all images but one."""
    one_row_each = EncoderBalance(
        threshold=1, tokens_per_item=lambda inputs: [1] * len(inputs["linear"]["x"])
    )
    gradients = []
    for balance in ({}, {"images": one_row_each}):
        built = build(encoder_balance=balance)
        wrap(built)
        dp = built.coords("images")["dp"]
        x = torch.linspace(-1, 1, 12 * 4, device=rank_device).view(2, 6, 1, 4)[dp // 2]
        x = [x[:5], x[5:]][dp % 2]
        gradients.append(gradients_of(built, 3, {"images": {"linear": {"x": x}}}, rank_device))
        expected = {"images": (pytest.approx(5 / 3), pytest.approx(1))} if balance else {}
        assert built.model.encoder_spread == expected
    for plain, balanced in zip(*gradients, strict=True):
        assert plain.abs().sum() > 0
        # fp32; the images' contributions are summed over other ranks.
        torch.testing.assert_close(balanced, plain, rtol=1e-6, atol=1e-7)


def encoder_gradients(built: Built, per_sample: int, device: torch.device) -> list[torch.Tensor]:
    """Reduced encoder gradients of one batch with so many images in this replica's samples."""
    fan_out = built.model.colocated_comms[("images", "language")].is_fan_out()
    # Fan-out: an encoder replica encodes the samples of two language replicas; fan-in: half of one.
    encoded = 2 * SAMPLES if fan_out else 1
    inputs = pictures(encoded, per_sample, device) if per_sample else None
    return gradients_of(built, per_sample, inputs, device)


def gradients_of(
    built: Built, per_sample: int, inputs: dict | None, device: torch.device
) -> list[torch.Tensor]:
    model = built.model
    model.zero_grad_buffer()
    ids = token_batch(SAMPLES, per_sample, device)
    losses, _ = model(
        ids,
        torch.arange(LENGTH, device=device).expand_as(ids),
        labels=ids % VOCABULARY,
        modality_inputs=inputs,
    )
    losses.sum().backward()
    for module in model._active_ddp_modules():
        module.finish_grad_sync()
    encoder = model.modality_submodules["images"]
    return [parameter.main_grad.clone() for parameter in encoder.parameters()]


@pytest.mark.parametrize(
    ("bridge", "how"),
    [
        ("gather", r": 3 on this rank, times the 2 encoder replicas"),
        ("routed", r" in the exchange group of 4 ranks .* per images replica \[3, 3\]"),
    ],
)
def test_rows_that_do_not_match_stop_every_rank_before_the_bridge(bridge, how, build, rank_device):
    built = build(bridge=bridge)
    ids = token_batch(2, 4, rank_device)
    message = r"images tokens \(8\) .* \(6\)" + how
    with pytest.raises(ValueError, match=message):
        built.model(ids, modality_inputs=pictures(1, 3, rank_device))
    # Nobody is left in a collective: the next batch goes through.
    built.model(ids, modality_inputs=pictures(1, 4, rank_device))


def test_the_sequence_parallel_scatter_of_the_embedding_is_refused(build):
    built = build()
    spec = gpt_spec(built.config, built.groups["language"])
    spec.params["scatter_embedding_sequence_parallel"] = True
    with pytest.raises(RuntimeError, match="scatter_embedding_sequence_parallel=False"):
        MimoModel(
            mimo_config(language_model_spec=spec),
            cp_group=built.groups["language"].cp,
            tp_group=built.groups["language"].tp,
        )


def test_groups_of_another_size_are_refused(build):
    built = build()
    config = mimo_config(
        language_model_spec=gpt_spec(built.config, built.groups["language"]),
        module_to_grid_map=built.grids,
    )
    with pytest.raises(ValueError, match="cp_group has 8 ranks, .* context_parallel_size 2"):
        MimoModel(config, cp_group=dist.group.WORLD)


@pytest.mark.parametrize("wrapped", [False, True])
def test_sharded_keys_are_the_keys_that_load(wrapped, build):
    built = build()
    if wrapped:
        wrap(built)
    sharded = built.model.sharded_state_dict()
    level = "module." if wrapped else ""
    assert f"language_model.{level}embedding.word_embeddings.weight" in sharded
    assert f"modality_submodules.images.{level}encoders.linear.layer.weight" in sharded
    tensors = {
        key: entry.data + 1
        for key, entry in sharded.items()
        if torch.is_tensor(getattr(entry, "data", None))
    }
    missing = built.model.load_state_dict(tensors, strict=False)
    assert missing.unexpected_keys == []
    assert [key for key in missing.missing_keys if not key.endswith("_extra_state")] == []
    for key, value in state_of(built.model).items():
        path = key.replace("language_model.", f"language_model.{level}").replace(
            "submodules.images.", f"submodules.images.{level}"
        )
        assert torch.equal(value, tensors[path]), key


def test_a_checkpoint_of_one_layout_loads_in_another_and_back(build, shared_tmp_path):
    first, second = build(FAN_IN, seed=1), build(FAN_OUT, seed=2)
    for built in (first, second):
        wrap(built)
    before = state_of(first.model)
    for step, (source, target) in enumerate([(first, second), (second, first)]):
        folder = shared_tmp_path / f"step{step}"
        if dist.get_rank() == 0:
            folder.mkdir()
        dist.barrier()
        dist_checkpointing.save(source.model.sharded_state_dict(), str(folder))
        if step == 0:
            with torch.no_grad():
                for parameter in first.model.parameters():
                    parameter.zero_()
        loaded = dist_checkpointing.load(target.model.sharded_state_dict(), str(folder))
        target.model.load_state_dict(loaded)
    after = state_of(first.model)
    assert after.keys() == before.keys()
    for key, value in before.items():
        assert torch.equal(value, after[key]), key


def test_disjoint_ranks(rank_device):
    """Encoder on ranks 0-3, language model on 4-7; the rows travel by a plain broadcast."""
    grids = {"images": make_grid(dp=4), "language": make_grid(dp=4, rank_offset=4)}
    for grid in grids.values():
        grid.create_pg("pp")
    torch.manual_seed(5)
    model = MimoModel(mimo_config(module_to_grid_map=grids)).to(rank_device)
    rank = dist.get_rank()
    payload = torch.zeros(6, HIDDEN, device=rank_device)
    ids = token_batch(2, 3, rank_device)
    if rank < 4:
        output, _ = model(ids, modality_inputs=pictures(2, 3, rank_device))
        assert list(output) == ["images"]
        payload = output["images"].detach().clone()
    dist.broadcast(payload, 0)
    if rank >= 4:
        model.set_input_tensor([{"images": [payload]}])
        output, _ = model(ids)
        assert isinstance(model.language_model, StubLanguageModel)
        fused = model.language_model.called_with["decoder_input"]
        assert torch.equal(fused[1:4].transpose(0, 1).reshape(6, HIDDEN), payload)
        assert output.shape == (LENGTH, 2, HIDDEN)
    dist.barrier()
    for grid in grids.values():
        grid.destroy()
