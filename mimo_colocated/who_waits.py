# SPDX-License-Identifier: Apache-2.0
"""Who waits for whom: :mod:`mimo_colocated.forensics.who_waits` under its earlier name."""

import sys

from mimo_colocated.forensics import who_waits

sys.modules[__name__] = who_waits
