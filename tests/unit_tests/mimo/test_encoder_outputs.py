# SPDX-License-Identifier: Apache-2.0
"""What encoders return, and the order of rows of several encoders. One process, no process group.

Items are told apart by their values: a wrong order has the same shape.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from megatron.core.models.mimo import VisionModalitySubmodules
from megatron.core.models.mimo.memory.policy import EncoderMemory
from megatron.core.models.mimo.submodules.encoder_outputs import PER_ITEM, EncodedRows

ITEMS, WIDTH = 3, 4


class Returns(nn.Module):
    """Returns what it is given."""

    def forward(self, x: Any, **_: Any) -> Any:
        return x


def rows_of(item: int, count: int, sign: int = 1) -> torch.Tensor:
    """``(count, WIDTH)``; row r of an item is 100 item + 10 r + channel."""
    row = torch.arange(count)[:, None] * 10 + torch.arange(WIDTH)
    return sign * (100.0 * item + row)


def batch(count: int, sign: int = 1) -> torch.Tensor:
    """``(ITEMS, count, WIDTH)``."""
    return torch.stack([rows_of(item, count, sign) for item in range(ITEMS)])


def rows(outputs: dict[str, Any], projection: nn.Module | None = None, **settings: Any) -> Any:
    """Rows of a modality whose encoders return ``outputs``."""
    built = VisionModalitySubmodules(
        encoders={name: Returns() for name in outputs},
        input_projections=[] if projection is None else [projection],
        **settings,
    )
    inputs = {name: {"x": output, "sizes": [1, 3, 2]} for name, output in outputs.items()}
    return built(encoder_inputs=inputs)


FLAT = batch(2).flatten(0, 1)
RAGGED = [rows_of(item, count) for item, count in enumerate((1, 3, 2))]
BOTH = torch.cat([x for i in range(ITEMS) for x in (rows_of(i, 2), rows_of(i, 1, -1))])
RAGGED_BOTH = torch.cat([x for i in range(ITEMS) for x in (RAGGED[i], rows_of(i, 1, -1))])


class Output(dict):
    """A mapping as transformers' ``ModelOutput`` is one."""


@pytest.mark.parametrize(
    ("output", "where"),
    [
        (batch(2), None),
        (FLAT, None),
        (list(batch(2)), None),
        ([x[None] for x in batch(2)], None),
        ((FLAT,), None),
        ((FLAT, None), None),
        ((batch(2), {"state": 1}), None),
        ((batch(2), torch.zeros(ITEMS, WIDTH)), None),
        ((FLAT, torch.zeros(6, 1)), None),
        ((batch(2), (FLAT, FLAT)), None),
        (Output(rows=batch(2)), None),
        (Output(last_hidden_state=batch(2), hidden_states=(FLAT,), attentions=None), None),
        (Output(last_hidden_state=batch(2), pooler_output=torch.zeros(ITEMS, WIDTH)), None),
        (Output(last_hidden_state=torch.zeros(24, 2), pooler_output=FLAT), "pooler_output"),
        (
            Output(last_hidden_state=torch.zeros(24, 2), pooler_output=tuple(batch(2))),
            "pooler_output",
        ),
        (tuple(batch(2)), PER_ITEM),
        ((FLAT, FLAT + 1), 0),
        ((FLAT + 1, FLAT), 1),
        (SimpleNamespace(rows=FLAT, more=None), "rows"),
    ],
)
def test_rows_are_found(output, where):
    settings = {} if where is None else {"encoder_outputs": {"e": where}}
    assert torch.equal(rows({"e": output}, **settings), FLAT)


@pytest.mark.parametrize("how", ["list", "tuple", "field"])
def test_items_of_different_sizes(how):
    outputs = {"list": RAGGED, "tuple": tuple(RAGGED), "field": Output(images=RAGGED)}
    where = {"list": {}, "tuple": {"e": PER_ITEM}, "field": {"e": "images"}}[how]
    assert torch.equal(rows({"e": outputs[how]}, encoder_outputs=where), torch.cat(RAGGED))


@pytest.mark.parametrize("first", [False, True], ids=["batch_first", "sequence_first"])
def test_items_with_a_batch_of_one_each(first):
    """(1, s, h), or (s, 1, h) of an encoder that is sequence first; not the other one."""
    settings = {"sequence_first_encoders": ["e"] if first else []}
    ours, others = ([x.unsqueeze(dim) for x in RAGGED] for dim in ((1, 0) if first else (0, 1)))
    assert torch.equal(rows({"e": ours}, **settings), torch.cat(RAGGED))
    with pytest.raises(ValueError, match=r"expected one \(n, h\) tensor per item"):
        rows({"e": others}, **settings)


@pytest.mark.parametrize(
    ("output", "where", "message"),
    [
        (tuple(RAGGED), None, r"'e' returned a tuple \(tensor \(1, 4\), .*which may be one tensor "
         r"per item.*'encoder_outputs': \{'e': 'per_item'\}.*or 0 for the first"),
        ((batch(2), batch(2)), None, "which may be one tensor per item"),
        (Output(last_hidden_state=torch.zeros(24, 2), pooler_output=FLAT), None,
         r"returned a Output \(last_hidden_state: tensor \(24, 2\).*say in the spec which field"),
        (Output(image_embeds=FLAT, last_hidden_state=batch(2)), None, "which field holds the rows"),
        (Output(hidden_states=(FLAT,)), None, "which field holds the rows"),
        (Output(rows=FLAT), "pixels", "has no 'pixels', which encoder_outputs names"),
        ((FLAT, FLAT), 2, "has no 2, which encoder_outputs names"),
        (FLAT, PER_ITEM, r"a tensor \(6, 4\); expected .* at 'per_item'"),
        (None, None, r"'e' returned a NoneType; expected a tensor \(b, s, h\) or \(n, h\), a map"),
        ([], None, r"returned a list \(\); expected a tensor"),
        ((), None, r"returned a tuple \(\); expected a tensor"),
        ([FLAT, None], None, r"returned a list \(tensor \(6, 4\), NoneType\); expected a tensor"),
        ([batch(2), batch(2)], None, r"expected one \(n, h\) tensor per item"),
        (({"state": 1}, FLAT), None, r"returned a tuple \(dict, tensor \(6, 4\)\); expected"),
    ],
)  # fmt: skip
def test_what_holds_no_rows_or_may_be_two_things_is_refused(output, where, message):
    settings = {} if where is None else {"encoder_outputs": {"e": where}}
    with pytest.raises(ValueError, match=message):
        rows({"e": output}, **settings)


@pytest.mark.parametrize(
    ("outputs", "settings", "expected"),
    [
        ({"a": batch(2), "b": batch(1, -1)}, {}, BOTH),
        (
            {"a": batch(2).transpose(0, 1), "b": list(batch(1, -1))},
            {"sequence_first_encoders": ["a"]},
            BOTH,
        ),
        ({"a": FLAT, "b": batch(1, -1)}, {"rows_per_item": {"a": 2}}, BOTH),
        ({"a": RAGGED, "b": batch(1, -1)}, {}, RAGGED_BOTH),
        (
            {"a": torch.cat(RAGGED), "b": batch(1, -1)},
            {"rows_per_item": {"a": lambda inputs: inputs["sizes"]}},
            RAGGED_BOTH,
        ),
        # Two encoders that cut one image into tiles of their own: items are declared, not dim 0.
        (
            {"a": torch.cat(RAGGED)[:, None], "b": batch(1, -1)},
            {"rows_per_item": {"a": lambda inputs: inputs["sizes"]}},
            RAGGED_BOTH,
        ),
    ],
    ids=["both", "sequence first", "number", "ragged", "function", "declared over seen"],
)
def test_several_encoders_are_put_together_item_by_item(outputs, settings, expected):
    assert torch.equal(rows(outputs, **settings), expected)
    together = [outputs["a"], outputs["b"]]
    encoder_by_encoder = torch.cat([torch.cat(list(x)) if isinstance(x, list) else
                                    x.reshape(-1, WIDTH) for x in together])  # fmt: skip
    assert not torch.equal(expected, encoder_by_encoder)


@pytest.mark.parametrize("cut", [1, 2])
@pytest.mark.parametrize("policy", ["keep", "recompute", "offload"])
def test_the_order_is_the_same_however_the_batch_is_cut(cut, policy):
    built = VisionModalitySubmodules(encoders={"a": Returns(), "b": Returns()})
    built.use_memory(EncoderMemory(encoder=policy))
    a, b = batch(2).requires_grad_(), batch(1, -1)

    def encode(part: slice) -> torch.Tensor:
        return built(encoder_inputs={"a": {"x": a[part] * 1}, "b": {"x": b[part]}})

    parts = torch.cat([encode(slice(0, cut)), encode(slice(cut, None))])
    assert torch.equal(parts, BOTH)
    (gradient,) = torch.autograd.grad((parts * BOTH).sum(), a)
    assert torch.equal(gradient, batch(2))


@pytest.mark.parametrize(
    ("outputs", "settings", "message"),
    [
        ({"a": FLAT, "b": FLAT}, {}, r"Encoders \['a', 'b'\].*item by item.*but \['a', 'b'\] retur"
         r"ned flat rows.*params=\{'rows_per_item': \{'a'"),
        ({"a": FLAT[:2], "b": batch(1)[:1]}, {}, r"but \['a'\] returned flat rows"),
        ({"a": (FLAT,), "b": batch(1)}, {}, r"but \['a'\] returned flat rows"),
        ({"a": batch(2), "b": batch(1)[:2]}, {}, r"number of items, got \{'a': 3, 'b': 2\}"),
        ({"a": batch(2), "b": batch(2)[..., :3]}, {}, r"the width, got \{'a': 4, 'b': 3\}"),
        ({"a": FLAT, "b": batch(1)}, {"rows_per_item": {"a": 4}},
         "'a' returned 6 rows, but rows_per_item gives 4 of 1 items"),
        ({"a": FLAT, "b": batch(1)}, {"rows_per_item": {"a": lambda inputs: [1, 2]}},
         "'a' returned 6 rows, but rows_per_item gives 3 of 2 items"),
    ],
)  # fmt: skip
def test_rows_without_an_order_are_refused(outputs, settings, message):
    with pytest.raises(ValueError, match=message):
        rows(outputs, **settings)


def test_no_items_give_no_rows():
    none = {"a": batch(2)[:0].requires_grad_(), "b": batch(1)[:0]}
    found = rows(none)
    assert found.shape == (0, WIDTH)
    assert found.requires_grad


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"encoder_outputs": {"vti": 0}}, r"encoder_outputs names \['vti'\], but .*\['vit'\]"),
        ({"rows_per_item": {"vti": 1}}, r"rows_per_item names \['vti'\], but .*\['vit'\]"),
        ({"rows_per_item": {"vit": 0}}, "'vit' must be a positive number or a function.*got 0"),
        ({"rows_per_item": {"vit": 1.5}}, "'vit' must be a positive number or a function.*got 1.5"),
    ],
)
def test_settings_are_checked_when_it_is_built(settings, message):
    with pytest.raises(ValueError, match=message):
        VisionModalitySubmodules(encoders={"vit": Returns()}, **settings)


def test_a_plain_list_is_concatenated_as_in_stock():
    built = VisionModalitySubmodules()
    assert torch.equal(built.combine_embeddings([FLAT, -FLAT]), torch.cat([FLAT, -FLAT]))


class OwnEncode(VisionModalitySubmodules):
    """An ``encode`` as in stock: a list of rows and no word on items."""

    def encode(self, encoders_data_batch: Any) -> list[torch.Tensor]:
        return [entry["x"] for entry in encoders_data_batch.values()]


class OwnBoth(OwnEncode):
    """Adds encoders up, so that there is no order."""

    def combine_embeddings(self, embeddings: Any) -> torch.Tensor:
        return sum(embeddings)


def test_an_encode_that_does_not_tell_items_is_refused_where_order_matters():
    inputs = {"a": {"x": FLAT}, "b": {"x": FLAT}}
    encoders = {name: Returns() for name in inputs}
    with pytest.raises(ValueError, match=r"OwnEncode.encode returned a list of 2.*EncodedRows"):
        OwnEncode(encoders=encoders)(encoder_inputs=inputs)
    assert torch.equal(OwnEncode(encoders=encoders)(encoder_inputs={"a": {"x": FLAT}}), FLAT)
    assert torch.equal(OwnBoth(encoders=encoders)(encoder_inputs=inputs), 2 * FLAT)


def test_encode_is_a_list_of_flat_rows():
    built = VisionModalitySubmodules(encoders={"a": Returns(), "b": Returns()})
    found = built.encode({"a": {"x": batch(2)}, "b": {"x": FLAT}})
    assert isinstance(found, list)
    assert isinstance(found, EncodedRows)
    assert found.items == [[2, 2, 2], None]
    assert all(torch.equal(each, FLAT) for each in found)


class Projection(nn.Module):
    """Returns what a function makes of its rows."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(x)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x: (x,), FLAT),
        (lambda x: (x, None), FLAT),
        (lambda x: (x, torch.ones(WIDTH)), FLAT + 1),
    ],
)
def test_projections(function, expected):
    assert torch.equal(rows({"e": FLAT}, Projection(function)), expected)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: (x, x), r"returned a tuple \(tensor \(6, 4\), tensor \(6, 4\)\); expected one"),
        (lambda x: (x, torch.ones(1)), "with a bias of the rows' width"),
        (lambda x: (x, None, None), "expected one tensor of rows"),
        (lambda x: [x], r"A projection returned a list \(tensor"),
        (lambda x: Output(rows=x), r"A projection returned a Output \(rows: tensor"),
        (lambda x: None, "A projection returned a NoneType"),
    ],
)
def test_projections_that_return_something_else_are_refused(function, message):
    with pytest.raises(ValueError, match=message):
        rows({"e": FLAT}, Projection(function))
