# SPDX-License-Identifier: Apache-2.0
"""The recorder's watch: :mod:`mimo_colocated.forensics.flight_recorder` under its earlier name."""

import sys

from mimo_colocated.forensics import flight_recorder

sys.modules[__name__] = flight_recorder
