# SPDX-License-Identifier: Apache-2.0
"""Initial weights in one process: real Megatron modules built for made-up TP, PP and EP places.

No group communicates while a model is built, so a group that only knows its place and size is
enough. All comparisons of weights are bit for bit: they are copies of one draw.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from megatron.core.models.gpt import GPTModel
from megatron.core.models.mimo.training.initial_weights import (
    PER_SHARD_MODULE_IDS,
    global_modules,
    initialize_weights,
    per_shard_seed,
    tp_shard,
)
from megatron.core.models.mimo.transformer.layer_specs import language_layer_spec
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig
from tests.unit_tests.mimo.attention_oracle import FakeGroup

ONE = FakeGroup(0, 1)
SEED = 1337


@pytest.fixture(autouse=True)
def groups_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stock asks a group for its size only where torch.distributed is initialised."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda group=None: 0)


def model_config(**changes: Any) -> TransformerConfig:
    values: dict[str, Any] = {
        "num_layers": 4,
        "hidden_size": 16,
        "num_attention_heads": 4,
        "num_query_groups": 4,
        "ffn_hidden_size": 24,
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": True,
        "normalization": "RMSNorm",
        "qk_layernorm": True,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "use_cpu_initialization": True,  # else stock's constructors ask for a seeded RNG tracker
    }
    return TransformerConfig(**{**values, **changes})


def build_gpt(
    tp: FakeGroup = ONE, pp: FakeGroup = ONE, tied: bool = False, **changes: Any
) -> GPTModel:
    """The model as the rank at these places builds it; its weights are whatever stock drew."""
    config = model_config(
        tensor_model_parallel_size=tp.count,
        pipeline_model_parallel_size=pp.count,
        pipeline_dtype=torch.float32,
        **changes,
    )
    groups = ProcessGroupCollection(tp=tp, cp=ONE, pp=pp, embd=None)
    return GPTModel(
        config,
        language_layer_spec(config, pp_rank=pp.place),
        vocab_size=32,
        max_sequence_length=8,
        pre_process=pp.place == 0,
        post_process=pp.place == pp.count - 1,
        position_embedding_type="learned_absolute",
        share_embeddings_and_output_weights=tied,
        pg_collection=groups,
    )


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Weights by global name."""
    return {
        f"{name}.{key}": p.detach()
        for name, module in global_modules(model)
        for key, p in module.named_parameters(recurse=False)
    }


def initialized(model: torch.nn.Module, seed: int = SEED, **options: Any) -> torch.nn.Module:
    initialize_weights(model, seed, **options)
    return model


def gather(parts: list[torch.nn.Module]) -> dict[str, torch.Tensor]:
    """Whole weights from all TP ranks' models; replicated ones must agree."""
    whole: dict[str, torch.Tensor] = {}
    for name, parameter in parts[0].named_parameters():
        shards = [dict(part.named_parameters())[name].detach() for part in parts]
        if not getattr(parameter, "tensor_model_parallel", False):
            assert all(torch.equal(shard, shards[0]) for shard in shards), name
            whole[name] = shards[0]
        elif "linear_fc1" in name:
            gates, ups = zip(*(shard.chunk(2) for shard in shards), strict=True)
            whole[name] = torch.cat([*gates, *ups])
        else:
            whole[name] = torch.cat(shards, dim=parameter.partition_dim)
    return whole


# --- the layout makes no difference -------------------------------------------------------


@pytest.mark.parametrize(("tp_size", "query_groups"), [(2, 4), (2, 2), (4, 4)])
def test_shards_of_all_tp_ranks_are_the_unsharded_weights(tp_size: int, query_groups: int) -> None:
    whole = dict(initialized(build_gpt(num_query_groups=query_groups)).named_parameters())
    parts = [
        initialized(build_gpt(FakeGroup(rank, tp_size), num_query_groups=query_groups))
        for rank in range(tp_size)
    ]
    gathered = gather(parts)
    assert gathered.keys() == whole.keys()
    for name, weight in gathered.items():
        assert torch.equal(weight, whole[name]), name


@pytest.mark.parametrize("tied", [False, True])
def test_pipeline_stages_hold_the_weights_of_one_model(tied: bool) -> None:
    whole = weights(initialized(build_gpt(tied=tied)))
    stages = [initialized(build_gpt(pp=FakeGroup(rank, 2), tied=tied)) for rank in (0, 1)]
    seen: set[str] = set()
    for stage in stages:
        for name, weight in weights(stage).items():
            source = name
            if tied and name == "output_layer.weight":
                source = "embedding.word_embeddings.weight"
            assert torch.equal(weight, whole[source]), name
            seen.add(source)
    assert seen == whole.keys()


def test_sharded_gated_mlp_is_the_same_function() -> None:
    """[gate; up] on every rank: a contiguous cut would put gates on one rank and ups on another."""
    x = torch.randn(3, 2, 16, generator=torch.Generator().manual_seed(0))

    def run(mlp: MLP) -> torch.Tensor:
        gate, up = torch.nn.functional.linear(x, mlp.linear_fc1.weight).chunk(2, dim=-1)
        hidden = torch.nn.functional.silu(gate) * up
        return torch.nn.functional.linear(hidden, mlp.linear_fc2.weight)

    def build(tp: FakeGroup) -> MLP:
        config = model_config(tensor_model_parallel_size=tp.count, add_bias_linear=False)
        layers = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
        return initialized(MLP(config, layers, tp_group=tp))

    whole = run(build(ONE))
    parts = sum(run(build(FakeGroup(rank, 4))) for rank in range(4))
    # Sums of 24 fp32 products in another order.
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-7)
    assert whole.abs().max() > 1e-4


def test_gated_layer_is_known_by_its_mlp() -> None:
    """Transformer Engine's layers carry no stride that says so."""
    shards = []
    for stride in (1, 2):
        model = build_gpt(FakeGroup(1, 2))
        weight = model.decoder.layers[0].mlp.linear_fc1.weight
        weight.partition_stride = stride
        initialize_weights(model, SEED)
        shards.append(weight.detach())
    assert torch.equal(*shards)


def test_experts_are_counted_over_expert_parallel_ranks() -> None:
    class Experts(torch.nn.Module):
        def __init__(self, ep: FakeGroup) -> None:
            super().__init__()
            self.ep_group = ep
            count = 4 // ep.count
            self.local_experts = torch.nn.ModuleList(torch.nn.Linear(3, 3) for _ in range(count))

    whole = weights(initialized(Experts(ONE)))
    halves = [weights(initialized(Experts(FakeGroup(rank, 2)))) for rank in (0, 1)]
    merged = {**halves[0], **halves[1]}
    assert len(whole) == len(merged) == 8
    assert all(torch.equal(merged[name], weight) for name, weight in whole.items())


def test_wrappers_and_parts_make_no_difference() -> None:
    plain = initialized(build_gpt(), name_prefix="language_model")
    half = Float16Module(model_config(bf16=True), build_gpt())
    wrapped = initialized(half, name_prefix="language_model.")
    part = build_gpt()
    initialize_weights(part.decoder, SEED, name_prefix="language_model.decoder")
    for name, parameter in plain.named_parameters():
        other = dict(wrapped.module.named_parameters())[name]
        # The wrapper is bf16: drawn in fp32 as well, then cast.
        assert torch.equal(other, parameter.bfloat16()), name
        if name.startswith("decoder."):
            assert torch.equal(dict(part.named_parameters())[name], parameter), name


# --- what is drawn ------------------------------------------------------------------------


def test_distributions_are_stocks() -> None:
    config = model_config(hidden_size=64, init_method_std=0.5, embedding_init_method_std=2.0)
    groups = ProcessGroupCollection(tp=ONE, cp=ONE, pp=ONE, embd=None)
    model = GPTModel(config, language_layer_spec(config), 256, 64, pg_collection=groups)
    got = weights(initialized(model))
    row_parallel = 0.5 / math.sqrt(2 * 4)
    expected = {
        "embedding.word_embeddings.weight": 2.0,
        "embedding.position_embeddings.weight": 2.0,
        "decoder.layers.0.self_attention.linear_qkv.weight": 0.5,
        "decoder.layers.3.self_attention.linear_proj.weight": row_parallel,
        "decoder.layers.1.mlp.linear_fc1.weight": 0.5,
        "decoder.layers.2.mlp.linear_fc2.weight": row_parallel,
        "output_layer.weight": 0.5,
    }
    for name, std in expected.items():
        # At least 1,536 draws: the standard error of the estimate is below 2 %.
        assert got[name].std().item() == pytest.approx(std, rel=0.1), name
    for name, weight in got.items():
        if name.endswith(".bias"):
            assert torch.count_nonzero(weight) == 0, name
        if "layernorm" in name and name.endswith(".weight"):
            assert torch.equal(weight, torch.ones_like(weight)), name


def test_refill_restores_every_weight() -> None:
    model = initialized(build_gpt())
    first = {name: weight.clone() for name, weight in weights(model).items()}
    model.decoder.layers[0].requires_grad_(False)  # frozen ones too
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.rand_like(parameter))
    initialize_weights(model, SEED)
    for name, weight in weights(model).items():
        assert torch.equal(weight, first[name]), name


def test_seed_and_name_both_count() -> None:
    first, *others = (
        weights(initialized(build_gpt(), seed)) for seed in (SEED, SEED + 1, 0, 1)
    )
    drawn = [name for name, w in first.items() if w.dim() > 1]
    assert len(drawn) == 4 * 4 + 3
    for one, other in itertools.combinations([first, *others], 2):
        assert not any(torch.equal(one[name], other[name]) for name in drawn)
    fc1 = [first[f"decoder.layers.{i}.mlp.linear_fc1.weight"] for i in range(4)]
    assert not any(torch.equal(a, b) for i, a in enumerate(fc1) for b in fc1[:i])


def test_each_kind_of_weight_has_the_configs_method() -> None:
    def filled(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda weight: torch.nn.init.constant_(weight, value)

    model = build_gpt(
        init_method=filled(1.0),
        output_layer_init_method=filled(2.0),
        embedding_init_method=filled(3.0),
    )
    found = weights(initialized(model))
    ends = {"linear_proj.weight": 2.0, "linear_fc2.weight": 2.0, "embeddings.weight": 3.0}
    for name, weight in found.items():
        if weight.dim() > 1:
            expected = next((value for end, value in ends.items() if name.endswith(end)), 1.0)
            assert (weight == expected).all(), name


@pytest.mark.parametrize("policy", ["global", "per_shard"])
def test_global_random_state_is_left_alone(policy: Any) -> None:
    model = torch.nn.Sequential(build_gpt(), torch.nn.Linear(4, 4))
    before = torch.get_rng_state()
    initialize_weights(model, SEED, policy=policy)
    assert torch.equal(before, torch.get_rng_state())


class PatchEncoder(torch.nn.Module):
    """Modules that are not Megatron's, under a Megatron config."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config = model_config(init_method_std=0.25)
        self.patches = torch.nn.Conv2d(3, 32, 4, dtype=dtype)
        self.lookup = torch.nn.Embedding(64, 32, dtype=dtype)
        self.norm = torch.nn.LayerNorm(32, dtype=dtype)
        self.class_token = torch.nn.Parameter(torch.zeros(1, 1, 4096, dtype=dtype))
        self.scale = torch.nn.Parameter(torch.full((32,), 3.0, dtype=dtype))


def test_other_modules_reset_themselves_and_bare_matrices_are_normal() -> None:
    torch.manual_seed(1)
    encoder = initialized(PatchEncoder())
    bound = 1 / math.sqrt(3 * 4 * 4)  # PyTorch's own uniform bound for this convolution
    assert encoder.patches.weight.abs().max().item() == pytest.approx(bound, rel=0.01)
    assert 0 < encoder.patches.bias.abs().max().item() <= bound
    assert encoder.lookup.weight.std().item() == pytest.approx(1.0, rel=0.1)
    assert encoder.class_token.std().item() == pytest.approx(0.25, rel=0.1)
    assert torch.equal(encoder.scale, torch.full((32,), 3.0))
    torch.manual_seed(2)
    again = initialized(PatchEncoder())
    for a, b in zip(encoder.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


def test_draws_are_fp32_whatever_the_weights_are() -> None:
    full, half = initialized(PatchEncoder()), initialized(PatchEncoder(torch.bfloat16))
    for a, b in zip(full.parameters(), half.parameters(), strict=True):
        assert b.dtype == torch.bfloat16
        assert torch.equal(a.bfloat16(), b)


def test_draws_of_any_size_are_fp32() -> None:
    """PyTorch's own in lower precision give other numbers for some sizes only."""

    class Odd(torch.nn.Module):
        def __init__(self, dtype: torch.dtype) -> None:
            super().__init__()
            self.bare = torch.nn.Parameter(torch.empty(7, 5, dtype=dtype))
            self.linear = torch.nn.Linear(300, 300, dtype=dtype)

    full = initialized(Odd(torch.float32))
    for dtype in (torch.bfloat16, torch.float16):
        half = initialized(Odd(dtype))
        for a, b in zip(full.parameters(), half.parameters(), strict=True):
            assert torch.equal(a.to(dtype), b)


def test_a_reset_that_fails_leaves_the_module_whole() -> None:
    class Broken(torch.nn.Linear):
        armed = False

        def reset_parameters(self) -> None:
            if self.armed:
                raise RuntimeError("no")
            super().reset_parameters()

    module = Broken(2, 2)
    before = dict(module.named_parameters())
    state = torch.get_rng_state()
    module.armed = True
    with pytest.raises(RuntimeError, match="no"):
        initialize_weights(module, SEED)
    assert all(p is before[name] for name, p in module.named_parameters())
    assert torch.equal(state, torch.get_rng_state())


def test_tied_weights_are_filled_once() -> None:
    def tied(order: Callable[[Any], Any]) -> torch.nn.Module:
        first, second = torch.nn.Linear(4, 4, bias=False), torch.nn.Linear(4, 4, bias=False)
        second.weight = first.weight
        return torch.nn.ModuleDict(order([("a", first), ("b", second)]))

    alone = initialized(torch.nn.ModuleDict({"a": torch.nn.Linear(4, 4, bias=False)}))
    assert torch.equal(initialized(tied(dict))["b"].weight, alone["a"].weight)


# --- per shard ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "seed"),
    [
        ((0, 0, 0), 1337),
        ((0, 0, 1), 1338),
        ((0, 0, 2), 1339),
        ((0, 0, 3), 1340),
        ((0, 1, 0), 1437),
        ((1, 0, 0), 1001337),
        ((1, 0, 1), 1001338),
    ],
)
def test_per_shard_seed_worked_values(place: tuple[int, int, int], seed: int) -> None:
    assert per_shard_seed(1337, *place) == seed


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ((-1, 0, 0), "tp_rank must be from 0 to the TP size - 1, got -1"),
        ((0, 10_000, 0), "layer must be from 0 to 10000 - 1, got 10000"),
        ((0, 0, 100), "module_id must be from 0 to 100 - 1, got 100"),
    ],
)
def test_per_shard_seed_refuses_places_whose_seeds_collide(
    place: tuple[int, int, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        per_shard_seed(1337, *place)


@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize("tp_rank", [0, 1])
def test_per_shard_draws_each_shard_from_its_documented_seed(tp_rank: int, stage: int) -> None:
    model = build_gpt(FakeGroup(tp_rank, 2), FakeGroup(stage, 2))
    got = weights(initialized(model, policy="per_shard"))
    for layer in (2 * stage, 2 * stage + 1):
        for module, module_id in PER_SHARD_MODULE_IDS.items():
            weight = got[f"decoder.layers.{layer}.{module}.weight"]
            seed = 1337 + tp_rank * 1_000_000 + layer * 100 + module_id
            std = 0.02 / math.sqrt(2 * 4) if module_id in (1, 3) else 0.02
            generator = torch.Generator().manual_seed(seed)
            expected = torch.empty_like(weight).normal_(0.0, std, generator=generator)
            assert torch.equal(weight, expected), (layer, module)


def test_per_shard_replicated_weights_agree_and_sharded_ones_differ() -> None:
    parts = [initialized(build_gpt(FakeGroup(r, 2)), policy="per_shard") for r in (0, 1)]
    for (name, a), b in zip(parts[0].named_parameters(), parts[1].parameters(), strict=True):
        sharded = getattr(a, "tensor_model_parallel", False) and a.dim() > 1
        assert torch.equal(a, b) is not sharded, name


def test_per_shard_refuses_two_stacks_of_layers_in_one_call() -> None:
    both = torch.nn.ModuleDict({"vision": build_gpt(), "language": build_gpt()})
    with pytest.raises(ValueError, match=r"vision.*and language.*the same seed 1338"):
        initialize_weights(both, SEED, policy="per_shard")


# --- pieces and refusals ------------------------------------------------------------------


def test_tp_shard_cuts_every_block() -> None:
    full = torch.arange(12).reshape(2, 6)
    assert tp_shard(full, rank=1, size=3, dim=1).tolist() == [[2, 3], [8, 9]]
    assert tp_shard(full, rank=1, size=3, dim=1, blocks=2).tolist() == [[1, 4], [7, 10]]
    assert tp_shard(full, rank=0, size=1, dim=0, blocks=2).tolist() == full.tolist()


def test_unknown_policy_is_refused() -> None:
    with pytest.raises(ValueError, match="policy must be 'global' or 'per_shard', got 'local'"):
        initialize_weights(torch.nn.Linear(2, 2), SEED, policy="local")


def test_experts_in_one_tensor_are_refused() -> None:
    module = torch.nn.Module()
    module.weight1 = torch.nn.Parameter(torch.zeros(4, 4))
    module.weight1.allreduce = False
    with pytest.raises(ValueError, match="weight1 holds several experts at once"):
        initialize_weights(module, SEED)


def test_weight_without_partition_is_refused() -> None:
    layer = ColumnParallelLinear(
        4,
        4,
        config=model_config(),
        init_method=torch.nn.init.zeros_,
        bias=False,
        skip_bias_add=False,
        tp_group=ONE,
    )
    del layer.weight.tensor_model_parallel
    with pytest.raises(ValueError, match="layer.weight does not say how it is sharded over TP"):
        initialize_weights(layer, SEED, name_prefix="layer")
