# SPDX-License-Identifier: Apache-2.0
"""A script: the digits job, its ranks forked from one process that has imported the libraries.

For tests of what the job computes; on few cores its start takes a third of the time. Tests of how
it starts and ends take ``train.py`` itself.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.faults.starts import prepare, run_forked

if __name__ == "__main__":
    prepare()
    sys.exit(run_forked(sys.argv[1:]))
