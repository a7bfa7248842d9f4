# SPDX-License-Identifier: Apache-2.0
"""``python -m tests.imported``: models from Hugging Face folders against transformers."""

import sys

from campaigns.command import main
from tests.imported.campaign import Imported

if __name__ == "__main__":
    sys.exit(main(Imported()))
