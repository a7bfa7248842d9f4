# SPDX-License-Identifier: Apache-2.0
"""``python -m tests.parity``: exit code 0 if all rows pass, 1 if one fails or is missing, or 2."""

import sys

from campaigns.command import main
from tests.parity.campaign import Parity

if __name__ == "__main__":
    sys.exit(main(Parity()))
