# SPDX-License-Identifier: Apache-2.0
"""Importing the package changes nothing for torch, transformers or anybody else but Megatron.

The tables of ``torch_table.py`` are made in two interpreters, side by side: one imports the
package first of all, one after it has used torch, so that what torch caches at first use is cached
before. What an interpreter answers that never imported the package is the oracle of both.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import megatron.core

pytestmark = pytest.mark.once

HERE = Path(__file__).resolve().parent
MUST_DIFFER = {  # in the control; a case that cannot see a replaced function proves nothing
    "with_device_meta",
    "default_device_meta",
    "fake_tensors",
    "function_modes",
    "tables_of_subclasses",
    "cuda_requests",
    "generators",
    "from_pretrained",
}


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the interpreters printed, by the time of the import."""
    started = {}
    for order in ("first", "last"):
        command = [sys.executable, HERE / "torch_table.py", order, tmp_path_factory.mktemp(order)]
        started[order] = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=HERE.parents[2],
            env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"},
        )
    printed = {}
    for order, process in started.items():
        out, errors = process.communicate(timeout=600)
        assert process.returncode == 0, errors
        printed[order] = json.loads(out.splitlines()[-1])
    return printed


# ``megatron.core`` 0.19 puts its own in place, by itself: one that loads no code.
STOCK_REPLACES = (
    {"torch.storage._load_from_bytes"} if hasattr(megatron.core, "safe_load_from_bytes") else set()
)


def test_the_import_replaces_no_function_and_no_setting_of_torch(tables: dict) -> None:
    # In the other one torch's compiler is new, and wraps some of torch's functions itself.
    assert set(tables["last"]["replaced"]) <= STOCK_REPLACES


@pytest.mark.parametrize("order", ["first", "last"])
def test_every_case_answers_as_without_the_import(tables: dict, order: str) -> None:
    never = tables["last"]["before"]
    after = tables[order]["after"]
    assert len(never) >= 20
    assert {name: after[name] for name in never} == never


def test_what_is_loaded_from_a_folder_is_what_was_saved(tables: dict) -> None:
    for order in ("first", "last"):
        for whole, loaded, _half in tables[order]["after"]["from_pretrained"]:
            assert whole
            assert any("inv_freq" in name or "position_ids" in name for name in loaded)


def test_a_function_replaced_for_everybody_is_noticed(tables: dict) -> None:
    never, control = tables["last"]["before"], tables["last"]["control"]
    assert {name for name in never if control[name] != never[name]} >= MUST_DIFFER
