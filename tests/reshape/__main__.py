# SPDX-License-Identifier: Apache-2.0
"""``python -m tests.reshape``: save at one layout, continue at another, compare the losses."""

import sys

from campaigns.command import main
from tests.reshape.campaign import Reshape

if __name__ == "__main__":
    sys.exit(main(Reshape()))
