# SPDX-License-Identifier: Apache-2.0
"""``python -m benchmarks``: exit code 0, 1 if a bound is missed or a kind has no result, or 2."""

import sys

from benchmarks.campaign import Benchmarks
from campaigns.command import main

if __name__ == "__main__":
    sys.exit(main(Benchmarks()))
