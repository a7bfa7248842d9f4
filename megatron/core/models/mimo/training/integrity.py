# SPDX-License-Identifier: Apache-2.0
"""The module is ``mimo.checkpoint.integrity``; this older path leads to it."""

import sys

from megatron.core.models.mimo.checkpoint import integrity

if __name__ == "__main__":
    print(f"SHA-256: {integrity.measure() / 1e9:.2f} GB/s on one core")
sys.modules[__name__] = integrity
