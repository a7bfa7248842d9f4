# SPDX-License-Identifier: Apache-2.0
"""Dense attention masks: attention by the formula and as stock's, then whole models in one process.

A mask is bool, True where attention is forbidden, and says all: it takes the causal mask's place.
The bound of 1e-12 in float64 is a thousand times the rounding of sums this short, and a billionth
of what one key more or less changes.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.mimo import MimoModel
from megatron.core.models.mimo.model import attention_masks
from megatron.core.models.mimo.model.attention_masks import MaskError, check_mask
from megatron.core.models.mimo.model.language_batch import LanguageBatch
from megatron.core.models.mimo.training.initial_weights import initialize_weights
from megatron.core.models.mimo.transformer.context_parallel_attention import (
    ContextParallelAttention,
)
from megatron.core.models.mimo.transformer.layer_specs import language_layer_spec
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec
from tests.unit_tests.mimo.attention_oracle import Case, fake_groups, reference, tiny_config
from tests.unit_tests.mimo.in_process_ranks import InProcessWorld
from tests.unit_tests.mimo.model_stubs import IMAGE, VOCABULARY, mimo_config, modality_spec
from tests.unit_tests.mimo.test_routed_model import Case as RoutedCase
from tests.unit_tests.mimo.test_stage_side import Case as StageCase

EXACT = {"rtol": 0.0, "atol": 1e-12}
LENGTH, BATCH = 12, 3


def causal(length: int = LENGTH) -> torch.Tensor:
    return torch.ones(length, length, dtype=torch.bool).triu(1)


def left_padded() -> torch.Tensor:
    """Samples with 0, 5 and 11 tokens of padding in front, whose queries see nothing."""
    padding = torch.arange(LENGTH) < torch.tensor([[0], [5], [11]])
    return causal() | padding[:, None, None, :]


def right_padded() -> torch.Tensor:
    padding = torch.arange(LENGTH) >= torch.tensor([[12], [7], [1]])
    return causal() | padding[:, None, None, :]


def images_whole() -> torch.Tensor:
    """Causal, but the tokens of an image (places 2 to 5 and 7 to 9) see each other."""
    number = torch.tensor([0, 0, 1, 1, 1, 1, 0, 2, 2, 2, 0, 0])
    inside = (number[:, None] == number[None, :]) & (number[:, None] > 0)
    return (causal() & ~inside).expand(BATCH, 1, -1, -1)


def window() -> torch.Tensor:
    """Every query sees itself and the two tokens before."""
    older = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril(-3)
    return (causal() | older).expand(BATCH, 1, -1, -1)


def blocks() -> torch.Tensor:
    """Three sequences in a row, each causal."""
    number = torch.repeat_interleave(torch.arange(3), torch.tensor([3, 5, 4]))
    return (causal() | (number[:, None] != number[None, :]))[None, None]


MASKS = {
    "causal": lambda: causal()[None, None],
    "left_padded": left_padded,
    "right_padded": right_padded,
    "images_whole": images_whole,
    "window": window,
    "blocks": blocks,
    "per_head": lambda: torch.rand(BATCH, 4, LENGTH, LENGTH, generator=seeded(5)) < 0.5,
    "everything": lambda: torch.zeros(1, 1, LENGTH, LENGTH, dtype=torch.bool),
    "keys_only": lambda: (torch.arange(LENGTH) >= torch.tensor([[12], [7], [1]]))[:, None, None],
}
TYPES = [AttnMaskType.causal, AttnMaskType.padding, AttnMaskType.no_mask, AttnMaskType.arbitrary]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def attention(kind: type, mask_type: AttnMaskType, scale: float | None = None) -> Any:
    return kind(
        config=tiny_config(num_query_groups=2),
        layer_number=1,
        attn_mask_type=mask_type,
        attention_type="self",
        softmax_scale=scale,
        pg_collection=fake_groups(),
    )


def problem(factor: float = 1.0, queries: int = LENGTH) -> list[torch.Tensor]:
    """Fresh q, k, v (requiring gradients) and output gradient; queries are the last ones."""
    q, k, v, grad = Case((LENGTH,), (LENGTH,), batch=BATCH, groups=2).tensors()
    q = (q.detach()[-queries:] * factor).requires_grad_()
    return [q, k, v, grad[-queries:].flatten(-2)]


def results(out: torch.Tensor, q: Any, k: Any, v: Any, grad: torch.Tensor) -> list[torch.Tensor]:
    out.backward(grad)
    return [out.detach(), q.grad, k.grad, v.grad]


@pytest.fixture
def stock(monkeypatch: pytest.MonkeyPatch) -> None:
    """What stock's attention asks Megatron's global state for."""
    monkeypatch.setattr(parallel_state, "_GLOBAL_MEMORY_BUFFER", None)
    parallel_state._set_global_memory_buffer()
    model_parallel_cuda_manual_seed(7, tp_rank=0, ep_rank=0, etp_rank=0)


# --- attention by itself ------------------------------------------------------------------


@pytest.mark.parametrize("mask_type", TYPES, ids=lambda kind: kind.name)
@pytest.mark.parametrize("name", list(MASKS))
def test_a_mask_says_all_whatever_the_layer_s_type(name: str, mask_type: AttnMaskType) -> None:
    mask = MASKS[name]()
    q, k, v, grad = problem()
    expected = results(reference(q, k, v, ~mask, None), q, k, v, grad)
    q, k, v, grad = problem()
    layer = attention(ContextParallelAttention, mask_type)
    found = results(layer(q, k, v, mask), q, k, v, grad)
    for each, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(each, wanted, **EXACT)
        assert each.isfinite().all()


@pytest.mark.parametrize("mask_type", TYPES, ids=lambda kind: kind.name)
@pytest.mark.parametrize("name", list(MASKS))
def test_as_stock_s_local_attention(name: str, mask_type: AttnMaskType, stock: None) -> None:
    """Queries that see nothing are left out: they are zeros here, a mean over all keys there."""
    mask = MASKS[name]()
    sees = (~mask).any(-1).expand(BATCH, 4, LENGTH).permute(2, 0, 1)
    sees = sees.repeat_interleave(6, dim=-1).reshape(LENGTH, BATCH, -1)
    kinds = (DotProductAttention, ContextParallelAttention)
    found = []
    for kind in kinds:
        q, k, v, grad = problem()
        out = attention(kind, mask_type)(q, k, v, mask) * sees
        found.append(results(out, q, k, v, grad))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, **EXACT)


def test_stock_s_queries_that_see_nothing_are_no_model(stock: None) -> None:
    """Why they are left out above: the control of that test."""
    q, k, v, _ = problem()
    out = attention(DotProductAttention, AttnMaskType.causal)(q, k, v, left_padded())
    mean = v.mean(0).repeat_interleave(2, dim=1).flatten(-2)
    torch.testing.assert_close(out[0, 2], mean[2])


@pytest.mark.parametrize("masked", [False, True], ids=["by_type", "by_mask"])
@pytest.mark.parametrize("causal_type", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("queries", [1, 3, 11])
def test_fewer_queries_than_keys(queries: int, causal_type: bool, masked: bool) -> None:
    """Of stock's static inference: the queries are the last ones, with earlier keys kept."""
    allowed = (~causal() if causal_type else torch.ones(LENGTH, LENGTH, dtype=torch.bool))[
        -queries:
    ]
    q, k, v, grad = problem(queries=queries)
    expected = results(reference(q, k, v, allowed, None), q, k, v, grad)
    kind = AttnMaskType.causal if causal_type else AttnMaskType.no_mask
    mask = ~allowed[None, None] if masked else None
    q, k, v, grad = problem(queries=queries)
    found = results(attention(ContextParallelAttention, kind)(q, k, v, mask), q, k, v, grad)
    for each, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(each, wanted, **EXACT)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [None, *MASKS])
def test_logits_of_large_magnitude(name: str | None, dtype: torch.dtype) -> None:
    """Of up to 6e4, where an exponential is infinite and the -10000 of stock is no mask.

    Whole numbers, so that logits are exact in every dtype and equal ones share their weight.
    """
    mask = causal()[None, None] if name is None else MASKS[name]()
    shapes = [x.shape for x in problem()[:2]]
    q, k = (torch.randint(-3, 4, shape, generator=seeded(6)).to(dtype) for shape in shapes)
    q, v, grad = q * 2**11, *(x.detach().to(dtype) for x in problem()[2:])
    wide = [x.double().requires_grad_() for x in (q, k, v)]
    expected = results(reference(*wide, ~mask, 0.5), *wide, grad.double())
    own = [x.requires_grad_() for x in (q, k, v)]
    layer = attention(ContextParallelAttention, AttnMaskType.causal, 0.5)
    found = results(layer(*own, None if name is None else mask), *own, grad)
    # Sums of up to twelve numbers of about 1. Backward starts from the logarithm of a sum of
    # exponentials, a number as large as the logits, which kernels keep in float32 at least.
    kept = torch.float64 if dtype is torch.float64 else torch.float32
    forward = 16 * torch.finfo(dtype).eps
    backward = forward + 2**17 * torch.finfo(kept).eps
    bounds = (forward, backward, backward * 2**11, backward)
    for each, wanted, bound in zip(found, expected, bounds, strict=True):
        torch.testing.assert_close(each.double(), wanted, rtol=0, atol=bound)


@pytest.mark.parametrize("scale", [None, 0.02, 3.0])
def test_softmax_scale_beside_a_mask(scale: float | None, stock: None) -> None:
    found = []
    for kind in (DotProductAttention, ContextParallelAttention):
        q, k, v, grad = problem()
        out = attention(kind, AttnMaskType.causal, scale)(q, k, v, window())
        found.append(results(out, q, k, v, grad))
    q, k, v, grad = problem()
    found.append(results(reference(q, k, v, ~window(), scale), q, k, v, grad))
    for one, other, formula in zip(*found, strict=True):
        torch.testing.assert_close(one, formula, **EXACT)
        torch.testing.assert_close(other, formula, **EXACT)


@pytest.mark.parametrize("mask", [torch.ones(12, 12), torch.ones(12, 12, dtype=torch.int64)])
def test_masks_of_other_conventions_are_refused(mask: torch.Tensor) -> None:
    q, k, v, _ = problem()
    with pytest.raises(ValueError, match="must be bool, True where attention is forbidden, got"):
        attention(ContextParallelAttention, AttnMaskType.causal)(q, k, v, mask)


# --- whole models -------------------------------------------------------------------------


def one_rank() -> ProcessGroupCollection:
    groups = fake_groups()
    groups.embd = None
    return groups


def gpt_model(own_layers: bool = True, **settings: Any) -> MimoModel:
    """Two layers of a stock GPT among rows of one modality; float64, so that 1e-12 means exact."""
    config = tiny_config(num_layers=2, hidden_size=8, num_attention_heads=2, **settings)
    layers = language_layer_spec(config) if own_layers else get_gpt_layer_local_spec()
    params = {
        "transformer_layer_spec": layers,
        "vocab_size": VOCABULARY,
        "max_sequence_length": 64,
        "position_embedding_type": "rope",
        "pg_collection": one_rank(),
    }
    made = mimo_config(config, {"images": modality_spec()}, language_params=params)
    made.language_model_spec = ModuleSpec(GPTModel, params={"config": config, **params})
    model = MimoModel(made).double()
    initialize_weights(model.language_model, 3)
    return model


def batch(lengths: tuple[int, ...] = (LENGTH,) * BATCH) -> dict[str, Any]:
    """Samples of these numbers of real tokens, padded in front, with an image of four rows."""
    ids = torch.randint(1, 40, (len(lengths), LENGTH), generator=seeded(2))
    ids[:, -6:-2] = IMAGE
    pixels = torch.randn(len(lengths), 4, 4, generator=seeded(3), dtype=torch.float64)
    padding = LENGTH - torch.tensor(lengths)
    positions = (torch.arange(LENGTH) - padding[:, None]).clamp(min=0)
    return {
        "input_ids": ids,
        "position_ids": positions,
        "modality_inputs": {"images": {"linear": {"x": pixels}}},
    }


def run(model: MimoModel, weight: torch.Tensor, **inputs: Any) -> dict[str, torch.Tensor]:
    """Logits and every gradient of their weighted sum."""
    model.zero_grad()
    logits, _ = model(**inputs)
    (logits * weight).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    return {"logits": logits.detach(), **gradients}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=0, atol=1e-10, msg=name)


@pytest.fixture
def weight() -> torch.Tensor:
    shape = (BATCH, LENGTH, VOCABULARY)
    return torch.randn(shape, generator=seeded(4), dtype=torch.float64)


def in_a_world_of_one(body: Callable[..., None]) -> Callable[..., None]:
    """Runs a test as a rank: stock's embedding wants groups only where there is a world."""

    @functools.wraps(body)
    def test(**fixtures: Any) -> None:
        InProcessWorld(1).run(lambda rank: body(**fixtures))

    return test


@pytest.mark.parametrize("name", ["causal", "right_padded", "images_whole", "window", "blocks"])
@in_a_world_of_one
def test_a_model_equals_one_of_stock_s_layers(name: str, weight: torch.Tensor, stock: None) -> None:
    mask = MASKS[name]()
    own, theirs = gpt_model(), gpt_model(own_layers=False)
    theirs.load_state_dict(own.state_dict(), strict=False)
    found = run(own, weight, attention_mask=mask, **batch())
    assert_same(found, run(theirs, weight, attention_mask=mask, **batch()))
    unmasked = run(own, weight, **batch())
    same = torch.allclose(found["logits"], unmasked["logits"])
    assert same == (name == "causal"), "a mask that changes nothing was not read"


@in_a_world_of_one
def test_left_padding_changes_no_real_token(weight: torch.Tensor, stock: None) -> None:
    """The oracle is each sample by itself, without padding; sums of gradients of all of them."""
    lengths = (12, 8, 7)
    whole, model = batch(lengths), gpt_model()
    padding = torch.arange(LENGTH) < LENGTH - torch.tensor(lengths)[:, None]
    mask = causal() | padding[:, None, None, :]
    weight = weight.masked_fill(padding[:, :, None], 0.0)
    found = run(model, weight, attention_mask=mask, **whole)
    totals: dict[str, torch.Tensor] = {}
    for sample, length in enumerate(lengths):
        pixels = whole["modality_inputs"]["images"]["linear"]["x"][sample : sample + 1]
        alone = run(
            model,
            weight[sample : sample + 1, -length:],
            input_ids=whole["input_ids"][sample : sample + 1, -length:],
            modality_inputs={"images": {"linear": {"x": pixels}}},
        )
        torch.testing.assert_close(found["logits"][sample, -length:], alone.pop("logits")[0])
        totals = {name: totals.get(name, 0) + value for name, value in alone.items()}
    del found["logits"]
    for name, value in found.items():
        torch.testing.assert_close(value, totals[name], rtol=0, atol=1e-9, msg=name)


# --- who gets the mask --------------------------------------------------------------------


@pytest.mark.parametrize("bridge", ["routed", "gather"])
def test_the_language_model_gets_the_mask_over_both_bridges(bridge: str) -> None:
    def change(rank: int, inputs: dict[str, Any]) -> None:
        inputs["attention_mask"] = mask = torch.zeros(2, 1, 16, 16, dtype=torch.bool)
        mask[..., rank] = True

    def body(rank: int) -> torch.Tensor:
        case = RoutedCase((1, 2), (1, 1, 2), [1] * 4, [2, 2], bridge=bridge)
        model, grids = case.build()
        inputs = case._inputs(rank, model, grids)
        change(rank, inputs)
        model(**inputs)
        return model.language_model.called_with["attention_mask"]

    for rank, mask in enumerate(InProcessWorld(2).run(body)):
        assert mask.shape == (2, 1, 16, 16)
        assert mask[..., rank].all()
        assert mask.sum() == 2 * 16


@pytest.mark.parametrize("bridge", ["routed", "gather"])
def test_every_stage_of_a_pipeline_gets_the_mask(bridge: str) -> None:
    dims = ("tp", "cp", "pp", "dp")
    case = StageCase((1, 4), (1, 1, 2, 2), dims=dims, options={"bridge": bridge})

    def body(case: StageCase, rank: int, model: MimoModel) -> torch.Tensor:
        batch = case.inputs(rank, 0)  # without images
        mask = torch.full((2, 1, 16, 16), bool(rank % 2))
        batch["attention_mask"] = mask
        (encoded,) = model.encode_microbatches([batch]).microbatches
        del batch["modality_inputs"]
        model.language_model.set_input_tensor(torch.zeros(1, 8))
        model.forward_stage(model.language_model, encoded, **batch)
        return model.language_model.called_with["attention_mask"] is mask

    assert all(case.run(body))


# --- refusals -----------------------------------------------------------------------------

SHAPE = r"shape \(3, 1, 12, 12\) or \(1, 1, 12, 12\)"
KEEP = torch.ones(BATCH, LENGTH, dtype=torch.int64)
REFUSED = {
    "hugging_face": (KEEP, rf"of {SHAPE}, got torch.int64 of shape \(3, 12\); from a Hugging Face"),
    "hugging_face_bool": (KEEP.bool(), rf"must have the {SHAPE}, got \(3, 12\)"),
    "additive": (
        torch.zeros(BATCH, 1, LENGTH, LENGTH),
        r"must be bool, .* got torch.float32 .*, from an additive one `mask < 0`",
    ),
    "keys_only": (KEEP.bool()[:, None, None], r"got \(3, 1, 1, 12\): .* it replaces the causal"),
    "other_length": (causal(8)[None, None], r"got \(1, 1, 8, 8\)"),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_other_conventions_are_refused_by_name(name: str, stock: None) -> None:
    mask, message = REFUSED[name]
    with pytest.raises(MaskError, match=message):
        gpt_model()(attention_mask=mask, **batch())


def test_what_a_refusal_says_converts_the_mask(stock: None) -> None:
    keep = torch.arange(LENGTH) >= torch.tensor([[0], [5], [11]])
    with pytest.raises(MaskError) as caught:
        gpt_model()(attention_mask=keep, **batch())
    _, name, _, words, *_ = str(caught.value).split("`")
    assert name == "keep"
    converted = eval(words, {"torch": torch, "S": LENGTH, "keep": keep})
    assert torch.equal(converted, left_padded())


def test_a_mask_beside_packing_is_refused(stock: None) -> None:
    lengths = torch.tensor([0, 5, LENGTH], dtype=torch.int32)
    packing = {"cu_seqlens_q": lengths, "cu_seqlens_kv": lengths}
    inputs = batch((LENGTH,))
    with pytest.raises(MaskError, match="attention_mask and packing_kwargs were both given"):
        gpt_model()(attention_mask=causal()[None, None], packing_kwargs=packing, **inputs)


class OtherAttention(torch.nn.Module):
    """Stands for Transformer Engine's, whose causal kernels take no mask."""


@pytest.mark.parametrize("kind", ["other", "window", "fused"])
def test_layers_that_would_ignore_a_mask_are_refused(kind: str, stock: None) -> None:
    model = gpt_model(own_layers=kind == "other")
    attention = model.language_model.decoder.layers[1].self_attention
    if kind == "other":
        attention.core_attention = OtherAttention()
    if kind == "window":
        attention.core_attention.scale_mask_softmax.window_size = (2, 0)
    if kind == "fused":
        softmax = attention.core_attention.scale_mask_softmax
        softmax.scaled_masked_softmax_fusion = softmax.input_in_float16 = True
    name = "OtherAttention" if kind == "other" else "DotProductAttention"
    message = rf"{name} of 'decoder.layers.1.self_attention' does not read it; build the layers"
    with pytest.raises(MaskError, match=message):
        model(attention_mask=causal()[None, None], **batch())


@pytest.mark.parametrize("fusion", [False, True], ids=["no_fusion", "fusion"])
@pytest.mark.parametrize("half", [False, True], ids=["fp32", "half"])
def test_fused_kernels_of_half_precision_only_have_a_mask_of_their_own(
    half: bool, fusion: bool, stock: None
) -> None:
    """In fp32 stock's softmax reads the mask, whatever the configuration says of fusion."""
    model = gpt_model(own_layers=False).language_model
    core = model.decoder.layers[0].self_attention.core_attention
    softmax = core.scale_mask_softmax
    softmax.scaled_masked_softmax_fusion, softmax.input_in_float16 = fusion, half
    refused = pytest.raises(MaskError, match="'x' does not read it")
    with refused if fusion and half else contextlib.nullcontext():
        attention_masks._check_reader("x", core)


def test_layers_of_later_virtual_stages_are_looked_at_too(stock: None) -> None:
    model = gpt_model(own_layers=True)
    later = gpt_model(own_layers=True).language_model
    later.decoder.layers[0].self_attention.core_attention = OtherAttention()
    model.virtual_stages, mask = torch.nn.ModuleList([later]), causal()[None, None]
    with pytest.raises(MaskError, match="OtherAttention of 'decoder.layers.0.self_attention' does"):
        check_mask(
            model.language_stages(), False, LanguageBatch.of(batch() | {"attention_mask": mask})
        )


def test_language_models_of_other_makes_get_their_own_convention() -> None:
    model = MimoModel(mimo_config())
    keep = torch.ones(2, 8, dtype=torch.int64)
    model(torch.ones(2, 8, dtype=torch.int64), attention_mask=keep)
    assert model.language_model.called_with["attention_mask"] is keep


def test_a_mask_of_one_replica_under_cp_is_one_error_before_anything_moves() -> None:
    """Also where the other ranks of the exchange group have none."""

    def body(rank: int) -> str:
        case = RoutedCase((1, 4), (1, 4, 1), [1] * 4, [1] * 4)
        model, grids = case.build()
        inputs = case._inputs(rank, model, grids)
        if rank == 0:
            inputs["attention_mask"] = torch.zeros(4, 1, 16, 16, dtype=torch.bool)
        with pytest.raises(ValueError) as caught:
            model(**inputs)
        return str(caught.value)

    found = InProcessWorld(4).run(body)
    assert "rank 0: MIMO context parallelism requires attention_mask=None, got" in found[0]
    assert set(found) == {found[0]}
