# SPDX-License-Identifier: Apache-2.0
"""What is exported stops where an answer ends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from mimo_colocated.train.answers import stop_at

pytestmark = pytest.mark.once


@pytest.mark.parametrize(
    ("files", "stops"),
    [
        ({"generation_config": {"eos_token_id": 3, "top_k": 9}, "config": {}}, [3, 7]),
        ({"generation_config": {"eos_token_id": [7, 3], "top_k": 9}, "config": {}}, [7, 3]),
        ({"generation_config": {"top_k": 9}, "config": {}}, [7]),
        ({"config": {"eos_token_id": 3}}, [3, 7]),
        ({"config": {"text_config": {"eos_token_id": 3}}}, [3, 7]),
    ],
)
def test_generate_stops_where_an_answer_ends(
    tmp_path: Path, files: dict[str, Any], stops: list[int]
) -> None:
    for name, content in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    stop_at(tmp_path, 7)
    found = transformers.GenerationConfig.from_pretrained(tmp_path)
    assert found.eos_token_id == stops
    assert found.top_k == files.get("generation_config", {}).get("top_k", found.top_k)
    assert sorted(path.stem for path in tmp_path.iterdir()) == ["config", "generation_config"]


def test_one_that_stops_there_is_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 7}))
    stop_at(tmp_path, 7)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
