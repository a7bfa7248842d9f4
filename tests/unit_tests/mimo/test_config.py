# SPDX-License-Identifier: Apache-2.0
"""The package's public names and ``MimoModelConfig``. One process, no process group."""

from __future__ import annotations

import subprocess
import sys
from unittest.mock import MagicMock

import pytest
import torch

from megatron.core.models import mimo
from megatron.core.models.mimo import MimoModel, MimoModelConfig
from megatron.core.models.mimo.comm.plan.balance import EncoderBalance
from megatron.core.models.mimo.config.role import ModuleLayout
from megatron.core.models.mimo.memory.policy import EncoderMemory
from megatron.core.transformer.spec_utils import ModuleSpec
from tests.unit_tests.mimo.model_stubs import (
    IMAGE,
    SOUND,
    StubGrid,
    language_config,
    mimo_config,
    modality_spec,
)

STOCK_NAMES = [
    "MimoModelConfig",
    "MimoModel",
    "MimoOptimizer",
    "get_mimo_optimizer",
    "ModalitySubmodules",
    "VisionModalitySubmodules",
    "AudioModalitySubmodules",
]


def run_python(code: str) -> str:
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_public_names_are_those_of_stock():
    assert mimo.__all__ == STOCK_NAMES
    assert set(STOCK_NAMES) <= set(dir(mimo))
    for name in STOCK_NAMES:
        assert getattr(mimo, name).__name__ == name


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'NoSuchModel'"):
        _ = mimo.NoSuchModel


def test_pure_modules_import_without_the_model():
    loaded = run_python(
        "import sys\n"
        "import megatron.core.models.mimo.comm.plan.gather_layout\n"
        "import megatron.core.models.mimo.partition.sequence_order\n"
        "heavy = ['model.base', 'config.base_configs', 'submodules.base', 'optimizer']\n"
        "print([n for n in heavy if f'megatron.core.models.mimo.{n}' in sys.modules])"
    )
    assert loaded == "[]"


@pytest.mark.parametrize("first", ["megatron.core.optimizer", "megatron.core.models.mimo"])
def test_either_import_order_works(first):
    code = f"import {first}\nfrom megatron.core.models.mimo import MimoModel, MimoOptimizer\n"
    assert run_python(code + "print(MimoModel.__name__)") == "MimoModel"


def test_defaults():
    spec = ModuleSpec(module=object, params={"config": language_config()})
    config = MimoModelConfig(spec)
    assert config.language_model_spec is spec
    assert config.modality_submodules_spec == {}
    assert config.special_token_ids == {}
    assert config.module_to_grid_map is None
    assert config.kv_format == "sbhd"
    assert (config.bridge, config.bridge_guard) == ("routed", "always")


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"bridge": "ring"}, r"bridge must be one of \('gather', 'routed'\), got 'ring'"),
        (
            {"bridge_guard": "off", "bridge": "gather"},
            "bridge_guard='off' is for bridge='routed', got 'gather'; leave it out",
        ),
        ({"bridge_guard": "never"}, r"\('always', 'first', 'off'\), got 'never'"),
    ],
)
def test_unknown_bridges_and_guards_are_refused(field, message):
    with pytest.raises(ValueError, match=message):
        mimo_config(**field)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["images"], r"keys must match .*'language'. Missing: \['language'\], extra: \[\]"),
        (["language"], r"Missing: \['images'\], extra: \[\]"),
        (["images", "language", "audio"], r"Missing: \[\], extra: \['audio'\]"),
    ],
)
def test_grid_keys_are_the_modules(keys, message):
    with pytest.raises(ValueError, match="module_to_grid_map keys must match"):
        mimo_config(module_to_grid_map={key: StubGrid() for key in keys})
    with pytest.raises(ValueError, match=message):
        mimo_config(module_to_grid_map={key: StubGrid() for key in keys})


def test_grid_keys_that_match_are_accepted():
    grids = {"images": StubGrid(), "language": StubGrid()}
    assert mimo_config(module_to_grid_map=grids).module_to_grid_map is grids


def test_no_grids_may_be_an_empty_map():
    """As an unset one: what is built of them asks for neither keys nor ranks."""
    config = mimo_config(module_to_grid_map={})
    assert MimoModel(config).role.mode is ModuleLayout.COLOCATED


@pytest.mark.parametrize("name", ["language", "text"])
def test_reserved_modality_names(name):
    with pytest.raises(ValueError, match=rf"\['{name}'\] cannot be a modality name"):
        mimo_config(modalities={name: modality_spec()}, special_token_ids={name: 1})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"encoder_balance": {"images": EncoderBalance()}, "bridge": "gather"},
            r"encoder_balance is for \['images'\]; it needs bridge='routed' \(got 'gather'\)",
        ),
        (
            {"encoder_balance": {"sounds": EncoderBalance()}},
            r"\['sounds'\]; .* modalities of the model, which are \['images'\]",
        ),
        ({"encoder_memory": {"sounds": EncoderMemory()}}, r"encoder_memory is for \['sounds'\]"),
    ],
)
def test_what_nobody_would_balance_or_keep_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        mimo_config(**options)


def test_unknown_kv_format():
    with pytest.raises(ValueError, match=r"kv_format must be one of .*'sbhd', 'thd'.*got 'bshd'"):
        mimo_config(kv_format="bshd")


# ---- what is checked when the model is built ----------------------------------------------------


def built(ids=None, **options):
    given = {} if ids is None else {"special_token_ids": ids}
    return MimoModel(mimo_config(**given, **options))


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ({"images": True}, r"\['images'\] must be a whole number, got True; give the id"),
        ({"images": 49.0}, "must be a whole number, got 49.0"),
        ({"images": "49"}, "must be a whole number, got '49'"),
        ({"images": None}, "must be a whole number, got None"),
        ({"images": 49, "sounds": 49}, r"gives \['images', 'sounds'\] the same id 49, so their"),
        ({"image": 49}, r"names \['image'\], which .* not have, and misses \['images'\]"),
    ],
)
def test_special_tokens_that_cannot_be_meant_are_refused(ids, message):
    with pytest.raises(ValueError, match="^special_token_ids.*" + message):
        built(ids)


@pytest.mark.parametrize("spec", [None, object, "vit"])
def test_a_modality_without_a_spec_is_refused(spec):
    with pytest.raises(TypeError, match=r"\['images'\] must be a ModuleSpec, got"):
        built(modalities={"images": spec})


@pytest.mark.parametrize(
    "options",
    [
        {"config": language_config(mtp_num_layers=1)},
        {"language_params": {"mtp_block_spec": "layers"}},
        {"virtual_stage_specs": [ModuleSpec(object, params={"mtp_block_spec": "layers"})]},
    ],
    ids=["config", "spec", "virtual_stage"],
)
def test_multi_token_prediction_is_refused(options):
    with pytest.raises(ValueError, match=r"^Multi-token prediction \(mtp_num_layers=(1|None)\) em"):
        built(**options)


@pytest.mark.parametrize("part", ["language", "virtual_stage", "encoder", "projection"])
@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"fp8": "hybrid"}, "fp8='hybrid' with fp8_recipe='delayed', .* 'tensorwise', 'block"),
        ({"cp_comm_type": "a2a+p2p"}, r"cp_comm_type='a2a\+p2p', .* 'p2p', 'all_gather' or 'a2a'"),
        ({"cp_comm_type": ["a2a+p2p"]}, r"cp_comm_type='a2a\+p2p', whose two levels"),
        ({"use_transformer_engine_op_fuser": True}, "sets use_transformer_engine_op_fuser, .* Fal"),
        ({"cuda_graph_impl": "local"}, r"CUDA graphs \(cuda_graph_impl='local'\), .*='none'"),
        ({"enable_cuda_graph": True}, r"CUDA graphs \(.*enable_cuda_graph=True\), which cannot"),
        ({"external_cuda_graph": True}, "CUDA graphs .*external_cuda_graph=True"),
    ],
)
def test_what_needs_ranks_outside_the_module_and_graphs_are_refused(part, asked, message):
    """Set on a config that is made: making one with CUDA graphs asks for Transformer Engine."""
    config = language_config()
    vars(config).update(asked)
    options, where = {
        "language": ({"config": config}, "the language model"),
        "virtual_stage": (
            {"virtual_stage_specs": [ModuleSpec(object, params={"config": config})]},
            "the language model",
        ),
        "encoder": ({"modalities": {"images": modality_spec()}}, "images"),
        "projection": ({"modalities": {"images": modality_spec()}}, "images"),
    }[part]
    if part == "encoder":
        spec = options["modalities"]["images"].submodules["encoders"]["linear"]
        spec.params = {"transformer_config": config}
    elif part == "projection":
        options["modalities"]["images"].submodules["input_projections"][0].params["config"] = config
    with pytest.raises(ValueError, match=f"^The config of {where} .*{message}"):
        built(**options)


@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise", "mxfp8"])
def test_fp8_whose_scales_stay_in_the_module_is_taken(recipe):
    config = language_config(fp8_recipe=recipe)
    config.fp8 = "hybrid"
    built(config=config)
    built(config=language_config(fp8_recipe="delayed"))  # the default says nothing without fp8


def test_tokens_of_a_modality_that_was_not_built():
    """One vocabulary for several models is fine, rows of zeros are not."""
    with pytest.warns(UserWarning, match=r"names \['sounds'\], but the model's modalities are"):
        model = built({"images": IMAGE, "sounds": SOUND})
    model(torch.tensor([[1, 2, 3, 4]]))
    message = r"input_ids has 2 tokens of 'sounds', .* \(those that do: \['images'\]\); give the"
    with pytest.raises(ValueError, match=message):
        model(torch.tensor([[1, SOUND, SOUND, 4]]))


@pytest.mark.parametrize("outside", [-200, 50, 50257])
def test_ids_outside_the_vocabulary_are_said_and_work(outside):
    """Models of this field have placeholders that no tokenizer knows; they are never embedded."""
    pixels = {"images": {"linear": {"x": torch.randn(1, 2, 4)}}}
    results = []
    for token in (IMAGE, outside):
        torch.manual_seed(5)
        if token == outside:
            with pytest.warns(UserWarning, match=rf"'images': {outside}.* vocabulary of 50 ids"):
                model = built({"images": token}, language_params={"vocab_size": 50})
        else:
            model = built({"images": token}, language_params={"vocab_size": 50})
        results.append(model(torch.tensor([[1, token, token, 4]]), modality_inputs=pixels)[0])
    assert torch.equal(*results)


def test_stand_ins_for_values_are_not_compared():
    """Code written for stock tests with configs whose unset attributes are mocks."""
    config = language_config()
    config.mtp_num_layers = MagicMock()
    built({"images": MagicMock()}, config=config, language_params={"vocab_size": MagicMock()})
