# SPDX-License-Identifier: Apache-2.0
"""The bridge between two modules on the same ranks.

- ``bridge_layout``: pure integers; who holds which samples on either side, and who gathers.
- ``collectives``: the differentiable collectives, each a forward with its backward.
- ``colocated_communicator``: executes a layout with the collectives.
- ``token_runs``, ``route_layout``, ``routes``: pure integers; where tokens stand, and which row
  goes from where to where.
- ``exchange``, ``plan_guard``, ``routed_bridge``: executes such routes, after a comparison.
"""
