# SPDX-License-Identifier: Apache-2.0
"""``python -m tests.faults``: exit code 0 if every case passes, 1 if one fails, or 2."""

import sys

from campaigns.command import main
from tests.faults.campaign import Faults

if __name__ == "__main__":
    sys.exit(main(Faults()))
