# SPDX-License-Identifier: Apache-2.0
"""``python -m mimo_colocated``: the ``mimo`` command where its script is not on the path."""

import sys

from mimo_colocated.cli.main import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
