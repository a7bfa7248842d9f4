# SPDX-License-Identifier: Apache-2.0
"""What is refused before anything is changed, and what a plan says; no ranks."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from megatron.core.hyper_comm_grid import GridShape, HyperCommGrid
from megatron.core.models.mimo.torch_native import mesh_of, parallelize
from megatron.core.models.mimo.torch_native.agreed import batch_digest, model_digest
from megatron.core.models.mimo.torch_native.checks import model_problem, styled
from megatron.core.models.mimo.torch_native.meshes import mesh_in, rank_table
from megatron.core.models.mimo.torch_native.parallelize import _Options
from megatron.core.models.mimo.torch_native.plans import PLANS, Plan, Style, plan_of
from megatron.core.models.mimo.torch_native.styles import _argument_hook
from tests.unit_tests.mimo.torch_native.native_cases import build

pytestmark = pytest.mark.once

LLAMA = PLANS["llama"]


def problem(family: str, tp: int, **changes: Any) -> str:
    model = build(family, **changes)
    return model_problem(model, plan_of(model.config), tp)


@pytest.mark.parametrize("family", ["qwen2", "llama", "qwen3", "clip", "siglip"])
def test_a_family_fits_its_plan(family) -> None:
    """With what stands beside its base model, and without."""
    assert problem(family, 4) == problem(family, 1) == ""
    model = build(family)
    base = getattr(model, model.base_model_prefix, model)
    for tp in (1, 4):
        assert model_problem(base, plan_of(model.config), tp) == ""


@pytest.mark.parametrize(
    "tp, changes, words",
    [
        (8, {}, r"tp 8 does not divide num_key_value_heads 4 of this Qwen2For.*one of \[1, 2, 4\]"),
        (3, {}, r"tp 3 does not divide num_attention_heads 8 .*one of \[1, 2, 4, 8\]"),
        (4, {"intermediate_size": 50}, r"tp 4 does not divide intermediate_size 50 .*1, 2, 5, 10"),
        (4, {"vocab_size": 3, "pad_token_id": 0}, r"embed_tokens has 3 rows, fewer than tp 4"),
    ],
)
def test_sizes_that_tp_does_not_divide_are_named_with_what_does(tp, changes, words) -> None:
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(problem("qwen2", tp, **changes))
    assert problem("qwen2", 1, **changes) == ""


def changed(**styles: Any) -> Any:
    return replace(LLAMA, styles={**LLAMA.styles, **styles})


def odd(model: Any) -> Any:
    """With a layer of its own of three features."""
    for layer in model.model.layers:
        layer.mlp.odd = nn.Linear(2, 3, bias=False)
    return model


def test_a_model_that_is_not_sharded_has_no_mesh() -> None:
    with pytest.raises(ValueError, match="this Linear is not sharded; give the model that parall"):
        mesh_in(nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"precision": torch.bfloat16, "fsdp": False}, r"precision=torch\.bfloat16 is FSDP's, got"),
        ({"activation_checkpointing": True}, "Model has no activation checkpointing in transform"),
        ({"precision": torch.bfloat16}, ""),
        ({}, ""),
    ],
)
def test_options_that_do_not_go_together_are_named(changes: dict[str, Any], words: str) -> None:
    class Model:
        supports_gradient_checkpointing = False

    given = {**dict.fromkeys(_Options.__annotations__, False), "fsdp": True, "precision": None}
    found = _Options(**{**given, **changes}).problem(Model(), 1)
    assert re.match(words, found) if words else found == ""


def test_plans_that_do_not_fit_a_model_are_named() -> None:
    model = build("qwen2")
    assert "plan names 'model.layers.*.q_norm'" in model_problem(
        model, changed(**{"layers.*.q_norm": Style.HEADS}), 2
    )
    assert "layers.0.mlp is a Qwen2MLP, and style 'column' is for a Linear" in model_problem(
        model, changed(**{"layers.*.mlp": Style.COLUMN}), 2
    )
    assert "blocks 'h.*' are no module" in model_problem(model, replace(LLAMA, blocks="h.*"), 2)
    assert "tp 2 does not divide the 3 features of model.layers.0.mlp.odd (column)" in (
        model_problem(odd(build("qwen2")), changed(**{"layers.*.mlp.odd": Style.COLUMN}), 2)
    )
    model.model.layers[1].extra = nn.Linear(2, 2)
    words = r"no style for model.layers.1.extra (Linear) with parameters ['bias', 'weight']"
    assert words in model_problem(model, LLAMA, 2)
    model.model.layers[1].extra.to("meta")
    assert "devices ['cpu', 'meta']" in model_problem(model, LLAMA, 1)


def test_a_plan_of_ones_own() -> None:
    plan = Plan(
        styles=LLAMA.styles,
        blocks=LLAMA.blocks,
        divisible=("hidden_size",),
        outer={"lm_head": Style.LOGITS, "scorer": Style.REPLICATED},
        optional=frozenset({"scorer"}),
    )
    model = build("qwen2")
    assert model_problem(model, plan, 4) == ""
    assert "tp 3 does not divide hidden_size 40" in model_problem(model, plan, 3)
    assert "the plan names 'scorer'" in model_problem(model, replace(plan, optional=frozenset()), 4)
    model.scorer = nn.Sequential(nn.Linear(40, 2))
    assert model_problem(model, plan, 4) == ""
    assert "no style for scorer.0" in model_problem(model, LLAMA, 4)


def test_names_of_the_base_model_and_of_the_whole_are_the_same_plan() -> None:
    whole, base = styled(build("qwen2"), LLAMA), styled(build("qwen2").model, LLAMA)
    assert {f"model.{name}".rstrip("."): style for name, style in base.items()} == {
        name: style for name, style in whole.items() if name != "lm_head"
    }
    assert whole["lm_head"] is Style.LOGITS


def test_transformers_own_plan_says_the_same_of_the_linears() -> None:
    styles = {"colwise": Style.COLUMN, "rowwise": Style.ROW}
    styles["replicated_with_grad_allreduce"] = Style.HEADS
    for family in ("qwen2", "llama", "qwen3"):
        config = build(family).config
        theirs = {name: styles[style] for name, style in config.base_model_tp_plan.items()}
        assert theirs.items() <= plan_of(config).styles.items()


def test_a_family_without_a_plan_gets_a_template_that_is_a_plan() -> None:
    config = build("qwen2").config
    config.model_type = "unheard_of"
    with pytest.raises(ValueError, match=r"no plan for model_type 'unheard_of'; .*\['clip") as info:
        plan_of(config)
    template = str(info.value).partition("\n\n")[2]
    names: dict[str, Any] = {}
    exec(
        template.replace("parallelize(model", "(lambda *_, plan: plan)(None").replace(
            "None, grid", "None, None"
        ),
        names,
    )
    assert names["plan"].blocks == "layers.*"
    assert names["parallelize"] is parallelize
    words = model_problem(build("qwen2"), names["plan"], 2)
    assert words.startswith("the plan has no style for model.layers.0.self_attn.k_proj")


@pytest.mark.parametrize(
    "shape, names, words",
    [
        (
            [2, 2, 2],
            ["tp", "pp", "dp"],
            r"has no pipeline stages, got pp=2; give those ranks to dp",
        ),
        ([2, 2, 2], ["tp", "ep", "dp"], r"split by tp, cp and dp only, got {'ep': 2}; give those"),
        ([2, 4], ["tp", "data"], r"needs a grid with dims 'tp' and 'dp', got .*without \['dp'\]"),
    ],
)
def test_grids_that_cannot_be_a_mesh_are_refused_before_a_group_is_made(
    monkeypatch, shape, names, words
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    grid = HyperCommGrid(shape, names)
    for refused in (lambda: mesh_of(grid), lambda: parallelize(build("qwen2"), grid)):
        with pytest.raises(ValueError, match=words):
            refused()


def test_ranks_stand_in_the_mesh_as_in_the_grid() -> None:
    assert rank_table(GridShape((2, 3), ("tp", "dp"), 4)).tolist() == [[4, 5], [6, 7], [8, 9]]
    assert rank_table(GridShape((3, 1, 2), ("dp", "pp", "tp"))).tolist() == [[0, 3], [1, 4], [2, 5]]
    # Ranks of a CP group have parts of the weights, too.
    cut = [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert rank_table(GridShape((2, 2, 2), ("tp", "cp", "dp"))).tolist() == cut
    assert rank_table(GridShape((2, 1, 4), ("tp", "cp", "dp"))).tolist() == cut
    turned = rank_table(GridShape((2, 2, 2), ("dp", "tp", "cp")))
    assert turned.T.tolist() == [[0, 1, 4, 5], [2, 3, 6, 7]]


class Attention(nn.Module):
    """Takes what transformers' attention takes, in its order."""

    def forward(self, hidden_states, position_embeddings=None, attention_mask=None, **more):
        return hidden_states, position_embeddings, attention_mask, more


def called(*args: Any, **kwargs: Any) -> Any:
    module = Attention()
    hook = _argument_hook("layers.3.self_attn", module, "hidden_states", lambda x: ("brought", x))
    module.register_forward_pre_hook(hook, with_kwargs=True)
    return module(*args, **kwargs)


def test_arguments_by_position_by_keyword_and_both_are_brought_and_others_left() -> None:
    pair = (torch.ones(1), torch.zeros(1))
    expected = (("brought", 5), pair, None, {})
    assert called(5, pair, None) == expected
    assert called(hidden_states=5, position_embeddings=pair) == expected
    assert called(5, position_embeddings=pair, attention_mask=None) == expected
    assert called(5, pair, cache=None)[3] == {"cache": None}


@pytest.mark.parametrize(
    "args, kwargs, words",
    [
        ((), {}, "missing a required argument: 'hidden_states'"),
        ((1, 2, 3, 4), {}, "too many positional arguments"),
        ((1,), {"hidden_states": 2}, "multiple values for argument 'hidden_states'"),
    ],
)
def test_wrong_arity_names_the_module_and_the_argument(args, kwargs, words) -> None:
    with pytest.raises(TypeError, match=rf"^layers.3.self_attn \(Attention\): {words}"):
        called(*args, **kwargs)


def test_digests_see_order_values_shapes_and_names() -> None:
    ids = torch.arange(6).view(2, 3)
    batches = [
        {"input_ids": ids},
        {"input_ids": ids.flip(0)},
        {"input_ids": ids.view(3, 2)},
        {"input_ids": ids.int()},
        {"input_ids": ids, "labels": None},
        {"input_ids": ids, "use_cache": False},
        {"pixel_values": torch.tensor([1.5], dtype=torch.bfloat16), "mask": ids > 2},
    ]
    assert len({batch_digest(batch) for batch in batches}) == len(batches)
    assert batch_digest({"input_ids": ids}) == batch_digest({"input_ids": ids.clone()})
    one, other = build("qwen2"), build("qwen2")
    assert model_digest(one) == model_digest(other)
    with torch.no_grad():
        other.lm_head.weight[0, 0] += 1e-3
    assert model_digest(one) != model_digest(other)


def test_a_digest_sees_all_that_makes_another_model() -> None:
    def made(change: Callable[[Any], object] = lambda _model: None) -> str:
        model: Any = torch.nn.Linear(2, 3)
        with torch.no_grad():
            model.weight.fill_(0.5)
            model.bias.zero_()
        model.register_buffer("table", torch.ones(4))
        change(model)
        return model_digest(model)

    changes: list[Callable[[Any], object]] = [
        lambda model: model.table.add_(1),
        lambda model: model.register_buffer("other", torch.ones(4)),
        lambda model: model.bias.requires_grad_(False),
        lambda model: model.bias.data.add_(1),
        lambda model: model.double(),
        lambda model: setattr(model, "weight", torch.nn.Parameter(model.weight.detach().t())),
    ]
    digests = {made(), *map(made, changes)}
    assert len(digests) == 1 + len(changes)
    assert made() in digests
