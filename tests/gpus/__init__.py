# SPDX-License-Identifier: Apache-2.0
"""What only GPUs can show, on those that are there; see ``docs/gpu.md``."""
