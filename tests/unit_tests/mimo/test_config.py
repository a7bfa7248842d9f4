# SPDX-License-Identifier: Apache-2.0
"""The package's public names and ``MimoModelConfig``. One process, no process group."""

from __future__ import annotations

import subprocess
import sys

import pytest

from megatron.core.models import mimo
from megatron.core.models.mimo import MimoModelConfig
from megatron.core.transformer.spec_utils import ModuleSpec
from tests.unit_tests.mimo.model_stubs import StubGrid, language_config, mimo_config, modality_spec

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
        "import megatron.core.models.mimo.comm.bridge_layout\n"
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


@pytest.mark.parametrize("name", ["language", "text"])
def test_reserved_modality_names(name):
    with pytest.raises(ValueError, match=rf"\['{name}'\] cannot be a modality name"):
        mimo_config(modalities={name: modality_spec()}, special_token_ids={name: 1})


def test_unknown_kv_format():
    with pytest.raises(ValueError, match=r"kv_format must be one of .*'sbhd', 'thd'.*got 'bshd'"):
        mimo_config(kv_format="bshd")
