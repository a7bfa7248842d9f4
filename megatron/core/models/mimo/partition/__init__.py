# SPDX-License-Identifier: Apache-2.0
"""Who owns which sequence positions (pure), and the adapter that cuts tensors accordingly."""
