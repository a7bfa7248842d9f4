# SPDX-License-Identifier: Apache-2.0
"""``python -m tests.mutants``: exits 0 if the tests notice every mutant.

Exits 1 if a mutant survives or is broken, 2 if nothing can be tried: a stale mutant, an unknown
name, tests that fail without a mutant.
"""

import sys

from campaigns.command import main
from tests.mutants.campaign import Mutants

if __name__ == "__main__":
    sys.exit(main(Mutants()))
