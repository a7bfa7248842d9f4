# SPDX-License-Identifier: Apache-2.0
"""What measures planning, set-up and data for thousands of ranks, at sizes that are quick; seconds
are not a matter of right and wrong here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import data_index, data_steps, scale
from megatron.core.models.mimo.data import kept_arrays


def test_measures_every_size_and_writes_it(tmp_path: Path) -> None:
    scale.main(["--quick", "--out", str(tmp_path)])
    cells = json.loads((tmp_path / "scale.json").read_text())["cells"]
    assert [cell["world"] for cell in cells] == list(scale.QUICK)
    assert all(set(cell) == set(scale.COLUMNS) for cell in cells)
    assert len({cell["groups"] for cell in cells}) == 1
    # 500 MB for 16,384 ranks are 30 kB each; small worlds also load what is loaded once.
    assert all(cell["plan_MB"] < 40 for cell in cells)


def test_every_kind_of_data_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_index, "QUICK", (1000, 2000))
    monkeypatch.setattr(kept_arrays, "SETTLED_NS", 0)
    cells = list(data_index.run(quick=True))
    kinds = ["llava", "chat", "datasets", "webdataset", "tokens", "prepared"]
    assert [cell["kind"] for cell in cells[::2]] == kinds
    assert all(set(cell) == set(data_index.COLUMNS) for cell in cells)
    # 300 MB for a million samples; small ones also load what is loaded once.
    assert all(cell["open_MB"] < 100 for cell in cells)


def test_every_number_of_replicas_is_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_steps, "_EPOCH", 2000)
    cells = list(data_steps.run(quick=True))
    assert [cell["samples"] for cell in cells] == [8 * count for count in data_steps.QUICK]
    assert all(set(cell) == set(data_steps.COLUMNS) for cell in cells)
