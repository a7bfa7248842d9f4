# SPDX-License-Identifier: Apache-2.0
"""What becomes of an encoder's activations between its forward and its backward pass."""
