# SPDX-License-Identifier: Apache-2.0
"""The layer spec with Transformer Engine, packed sequences and CP2, on a stand-in for TE.

It shows that what reaches TE is what TE takes: names, formats, dtypes, groups. TE's own kernels do
not run here; see ``te_stand_in``.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).with_name("te_stand_in.py")


def test_packed_sequences_over_cp_through_transformer_engine_s_layers() -> None:
    """Loss and gradients are those of each sequence alone."""
    root = SCRIPT.parents[3]
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*command, "--nproc-per-node", "2", str(SCRIPT)],
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    # Two layers, and one index for embeddings, labels and mask together.
    assert "TE CALLS ['index', 'thd'] 3" in done.stdout
    # Where TE has no attention for the dtype, its layers still run.
    assert "TE CALLS ['index'] 1" in done.stdout
