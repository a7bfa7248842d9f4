# SPDX-License-Identifier: Apache-2.0
"""The bridge between two modules on the same ranks.

- ``plan``: pure integers; who holds what, and what goes where.
- ``collectives``: the differentiable collectives, each a forward with its backward.
- ``gather_bridge``: executes a gather layout with the collectives.
- ``exchange``, ``plan_guard``, ``routed_bridge``: execute routes, after a comparison.
- ``item_exchange``, ``input_balance``: encoder inputs go where they are encoded.

``colocated_communicator`` (stock's path), ``bridge_layout``, ``route_layout``, ``routes`` and
``token_runs`` are older paths that lead to where the module is now.
"""
