# SPDX-License-Identifier: Apache-2.0
"""Encoders, projections and the order of their rows. One process, no process group.

Orders are tested with b > 1: with one sample every order is the same.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from megatron.core.models.mimo import (
    AudioModalitySubmodules,
    ModalitySubmodules,
    VisionModalitySubmodules,
)
from megatron.core.models.mimo.compat import ContractError
from megatron.core.models.mimo.model.encoder_runner import trains
from megatron.core.transformer.spec_utils import ModuleSpec
from tests.unit_tests.mimo.model_stubs import HIDDEN, LinearEncoder, modality_spec

BATCH, TOKENS, WIDTH = 3, 2, 4


class Echo(nn.Module):
    """Returns its input, so that a test sees what became of it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class SequenceFirstEcho(Echo):
    """Returns (s, b, h) and says so."""

    output_layout = "sbh"


class Wrapper(nn.Module):
    """A wrapper that hides the class of what it wraps."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
        return self.module(**inputs)


def numbered() -> torch.Tensor:
    """``(b, s, h)``; element (b, s, h) is 100 b + 10 s + h."""
    b, s, h = torch.meshgrid(
        torch.arange(BATCH), torch.arange(TOKENS), torch.arange(WIDTH), indexing="ij"
    )
    return (100 * b + 10 * s + h).float()


def sample_major() -> torch.Tensor:
    """The rows in reading order: all of sample 0, then all of sample 1, ..."""
    return torch.stack([numbered()[b, s] for b in range(BATCH) for s in range(TOKENS)])


@pytest.fixture(params=[VisionModalitySubmodules, AudioModalitySubmodules])
def modality(request) -> type[ModalitySubmodules]:
    return request.param


def test_the_base_class_is_abstract():
    with pytest.raises(TypeError, match="abstract"):
        ModalitySubmodules()


def test_from_spec_builds_all_parts(modality):
    built = modality.from_spec(modality_spec(modality))
    assert isinstance(built, modality)
    assert list(built.encoders) == ["linear"]
    assert len(built.input_projections) == 1
    assert (built.is_first_stage, built.is_last_stage) == (True, True)
    rows = built(encoder_inputs={"linear": {"x": torch.randn(BATCH, TOKENS, 4)}})
    assert rows.shape == (BATCH * TOKENS, HIDDEN)


@pytest.mark.parametrize(
    ("first", "last", "inputs", "outputs"),
    [(True, True, 1, 1), (True, False, 0, 1), (False, True, 1, 0), (False, False, 0, 0)],
)
def test_projections_are_built_where_they_are_used(first, last, inputs, outputs):
    spec = modality_spec()
    spec.submodules["output_projections"] = spec.submodules["input_projections"]
    built = VisionModalitySubmodules.from_spec(spec, is_first_stage=first, is_last_stage=last)
    assert len(built.input_projections) == inputs
    assert len(built.output_projections) == outputs


def test_spec_params_reach_the_class():
    groups = object()
    built = VisionModalitySubmodules.from_spec(modality_spec(pg_collection=groups))
    assert built.pg_collection is groups


def test_batch_first_rows_are_sample_major(modality):
    built = modality(encoders={"echo": Echo()})
    assert torch.equal(built(encoder_inputs={"echo": {"x": numbered()}}), sample_major())


def test_flat_rows_stay_as_they_are(modality):
    built = modality(encoders={"echo": Echo()})
    assert torch.equal(built(encoder_inputs={"echo": {"x": sample_major()}}), sample_major())


@pytest.mark.parametrize(
    "submodules",
    [
        VisionModalitySubmodules(encoders={"e": Echo()}, sequence_first_encoders=["e"]),
        VisionModalitySubmodules(encoders={"e": Echo()}, sequence_first_encoders="e"),
        VisionModalitySubmodules(encoders={"e": SequenceFirstEcho()}),
        VisionModalitySubmodules.from_spec(
            ModuleSpec(
                module=VisionModalitySubmodules,
                params={"sequence_first_encoders": ["e"]},
                submodules={"encoders": {"e": ModuleSpec(module=Echo)}},
            )
        ),
    ],
    ids=["argument", "one name", "class attribute", "spec"],
)
def test_sequence_first_rows_become_sample_major(submodules):
    sequence_first = numbered().transpose(0, 1)
    rows = submodules(encoder_inputs={"e": {"x": sequence_first}})
    assert torch.equal(rows, sample_major())


def test_the_order_is_remembered_when_the_encoder_is_wrapped_later():
    built = VisionModalitySubmodules(encoders={"e": SequenceFirstEcho()})
    built.encoders["e"] = Wrapper(built.encoders["e"])
    rows = built(encoder_inputs={"e": {"x": numbered().transpose(0, 1)}})
    assert torch.equal(rows, sample_major())


def test_sequence_first_names_are_checked():
    with pytest.raises(ValueError, match=r"names \['clp'\], but the encoders .* are \['clip'\]"):
        VisionModalitySubmodules(encoders={"clip": Echo()}, sequence_first_encoders=["clp"])


def test_unknown_output_layout():
    encoder = Echo()
    encoder.output_layout = "hbs"
    with pytest.raises(ValueError, match=r"encoder 'e' must be one of .*'bsh', 'sbh'.*got 'hbs'"):
        VisionModalitySubmodules(encoders={"e": encoder})


@pytest.mark.parametrize("dims", [1, 4])
def test_outputs_of_other_ranks(dims):
    built = VisionModalitySubmodules(encoders={"e": Echo()})
    with pytest.raises(ValueError, match=rf"Encoder 'e' output shape .* got {dims}D"):
        built(encoder_inputs={"e": {"x": torch.zeros([2] * dims)}})


def test_flat_rows_of_a_sequence_first_encoder_are_refused():
    built = VisionModalitySubmodules(encoders={"e": SequenceFirstEcho()})
    with pytest.raises(ValueError, match=r"Expected 3D \(s,b,h\) tensor, got 2D"):
        built(encoder_inputs={"e": {"x": torch.zeros(6, 4)}})


def test_of_a_tuple_the_first_entry_is_used():
    class WithState(nn.Module):
        def forward(self, x):
            return x, {"state": 1}

    built = VisionModalitySubmodules(encoders={"e": WithState()})
    assert torch.equal(built(encoder_inputs={"e": {"x": numbered()}}), sample_major())


def test_missing_encoder_inputs_are_named_before_an_encoder_runs():
    class MustNotRun(nn.Module):
        def forward(self, x):
            raise AssertionError("ran")

    built = VisionModalitySubmodules(encoders={"a": MustNotRun(), "b": Echo()})
    with pytest.raises(ValueError, match=r"No inputs found for encoder 'b'; got .*\['a'\]"):
        built(encoder_inputs={"a": {"x": numbered()}})


def test_inputs_and_params_that_nobody_reads_are_refused():
    built = VisionModalitySubmodules(encoders={"a": Echo()})
    with pytest.raises(ValueError, match=r"inputs for \['b'\], but the encoders of .* \['a'\]"):
        built(encoder_inputs={"a": {"x": numbered()}, "b": {"x": numbered()}})
    with pytest.raises(TypeError, match=r"got params \['sequence_first_encoder'\] that it"):
        VisionModalitySubmodules(encoders={"a": Echo()}, sequence_first_encoder=["a"])


@pytest.mark.parametrize("inputs", [None, {}])
def test_nothing_to_encode_gives_nothing(inputs):
    assert VisionModalitySubmodules(encoders={"e": Echo()})(encoder_inputs=inputs) is None


def test_decoders_are_parts_that_rows_do_not_pass():
    """They have weights to save, and say nothing of whether rows need a gradient."""
    encoder, decoder = nn.Linear(WIDTH, HIDDEN).requires_grad_(False), nn.Linear(HIDDEN, WIDTH)
    built = VisionModalitySubmodules(encoders={"e": encoder}, decoders={"d": decoder})
    assert "decoders.d.weight" in dict(built.named_parameters())
    assert not trains(built)
    assert trains(VisionModalitySubmodules(encoders={"e": decoder}, decoders={"d": encoder}))
    spec = modality_spec()
    spec.submodules["decoders"] = {"d": ModuleSpec(module=Echo)}
    assert isinstance(VisionModalitySubmodules.from_spec(spec).decoders["d"], Echo)


def test_stages_encode_first_and_project_last():
    rows = torch.randn(5, 6)
    projection = nn.Linear(6, HIDDEN)
    middle = VisionModalitySubmodules(
        encoders={"e": Echo()}, is_first_stage=False, is_last_stage=False
    )
    assert middle(encoder_inputs={"e": {"x": rows}}) is None
    assert middle(hidden_states=rows) is rows
    last = VisionModalitySubmodules(input_projections=[projection], is_first_stage=False)
    assert torch.equal(last(hidden_states=rows), projection(rows))


def test_inputs_and_hidden_states_exclude_each_other():
    built = VisionModalitySubmodules(encoders={"e": Echo()})
    with pytest.raises(ValueError, match="mutually exclusive"):
        built(encoder_inputs={"e": {"x": numbered()}}, hidden_states=torch.zeros(1, 1))


def test_projection_that_returns_megatron_s_output_and_bias():
    class Biased(nn.Module):
        def forward(self, x):
            return 2 * x, torch.ones(WIDTH)

    built = VisionModalitySubmodules(encoders={"e": Echo()}, input_projections=[Biased()])
    rows = built(encoder_inputs={"e": {"x": numbered()}})
    assert torch.equal(rows, 2 * sample_major() + 1)


def test_output_projection():
    projection = nn.Linear(WIDTH, 2)
    built = AudioModalitySubmodules(output_projections=[projection])
    rows = torch.randn(3, WIDTH)
    assert torch.equal(built.project_embeddings([rows], is_input=False), projection(rows))


def test_combining_nothing():
    with pytest.raises(ValueError, match="Cannot combine empty list"):
        VisionModalitySubmodules().combine_embeddings([])


@pytest.mark.parametrize("kind", ["input", "output"])
@pytest.mark.parametrize("error", [ValueError, AssertionError, ContractError])
def test_one_projection_each_way(modality, kind, error):
    projections = {f"{kind}_projections": [nn.Identity(), nn.Identity()]}
    with pytest.raises(error, match=rf"{modality.__name__} supports only one {kind}.*got 2"):
        modality(**projections)


def test_decoding_is_not_there(modality):
    with pytest.raises(NotImplementedError, match="not implemented"):
        modality().decode(torch.zeros(1), {})


def test_a_pg_collection_without_dp_cp_cannot_be_saved():
    class Groups:
        dp_cp = None

    built = VisionModalitySubmodules(encoders={"e": LinearEncoder()}, pg_collection=Groups())
    with pytest.raises(ContractError, match="'VisionModalitySubmodules' is missing dp_cp group"):
        built.sharded_state_dict()
