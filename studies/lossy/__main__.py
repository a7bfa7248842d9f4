# SPDX-License-Identifier: Apache-2.0
"""``python -m studies.lossy``: what ``mimo study lossy`` runs."""

import sys

from campaigns.command import main
from studies.lossy.campaign import LossyStudy

if __name__ == "__main__":
    sys.exit(main(LossyStudy()))
