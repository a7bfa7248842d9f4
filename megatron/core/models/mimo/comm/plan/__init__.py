# SPDX-License-Identifier: Apache-2.0
"""Who holds what and what goes where: pure integers, no process group, no tensor.

Both bridges have a layout here, and execute it one folder up:

- ``gather_layout``: who holds which samples on either side, and who gathers with whom.
- ``routed_layout``, ``token_runs``, ``routes``: who may exchange rows with whom, where tokens
  stand, and which row goes from where to where; ``merged_routes`` of several microbatches,
  ``batch_routes`` from a microbatch's token mask.
- ``balance``, ``item_moves``: who encodes which item, and what goes there.
"""
