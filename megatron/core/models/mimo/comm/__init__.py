# SPDX-License-Identifier: Apache-2.0
"""The bridge between two modules on the same ranks.

- ``bridge_layout``: pure integers; who holds which samples on either side, and who gathers.
- ``collectives``: the differentiable collectives, each a forward with its backward.
- ``colocated_communicator``: executes a layout with the collectives.
"""
