# SPDX-License-Identifier: Apache-2.0
"""``python -m tests.gpus``: what only GPUs can show, on those that are there."""

import sys

from campaigns.command import main
from tests.gpus.campaign import Gpus

if __name__ == "__main__":
    sys.exit(main(Gpus()))
