# SPDX-License-Identifier: Apache-2.0
"""The command that measures planning and set-up for thousands of ranks, at sizes that are quick;
its seconds are not a matter of right and wrong here."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks import scale


def test_measures_every_size_and_writes_it(tmp_path: Path) -> None:
    scale.main(["--quick", "--out", str(tmp_path)])
    cells = json.loads((tmp_path / "scale.json").read_text())["cells"]
    assert [cell["world"] for cell in cells] == list(scale.QUICK)
    assert all(set(cell) == set(scale.COLUMNS) for cell in cells)
    assert len({cell["groups"] for cell in cells}) == 1
    # 500 MB for 16,384 ranks are 30 kB each; small worlds also load what is loaded once.
    assert all(cell["plan_MB"] < 40 for cell in cells)
