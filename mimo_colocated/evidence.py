# SPDX-License-Identifier: Apache-2.0
"""What a failure left behind: :mod:`mimo_colocated.forensics.evidence` under its earlier name."""

import sys

from mimo_colocated.forensics import evidence

sys.modules[__name__] = evidence
