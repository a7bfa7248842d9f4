# SPDX-License-Identifier: Apache-2.0
"""Studies that this project runs: ``mimo study``, from a checkout."""
