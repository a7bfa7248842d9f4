# SPDX-License-Identifier: Apache-2.0
"""One row as ``make parity`` runs it: one process for the reference, then four ranks."""

from __future__ import annotations

import json

from campaigns.command import main
from tests.parity.campaign import Parity

KINDS = {
    "change of weights",
    "curve",
    "grad norm",
    "gradients",
    "initial weights",
    "logits",
    "loss",
    "loss falls",
    "tokens",
}


def test_a_pipelined_row_passes(tmp_path, capsys) -> None:
    row = "text-dp2pp2-tied"  # both ends of the pipeline share the embedding; sharded optimizer
    argv = ["--layouts", row, "--train-steps", "3", "--micro-batches", "2", "--backend", "gloo"]
    code = main(Parity(), [*argv, "--out", str(tmp_path)])
    text = capsys.readouterr().out
    assert code == 0, text
    summary = json.loads((tmp_path / "summary.json").read_text())
    (result,) = summary["results"].values()
    assert {check["kind"] for check in result["checks"]} == KINDS
    assert result["backend"] == "gloo"
    assert len(result["curve"]) == 3
    assert f"PASS  {row}  " in text
    assert "PASS: 1 of 1 rows" in text
