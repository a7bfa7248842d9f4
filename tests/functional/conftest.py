# SPDX-License-Identifier: Apache-2.0
"""The example's modules are imported as its script imports them: as siblings."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "mimo" / "digits"))
