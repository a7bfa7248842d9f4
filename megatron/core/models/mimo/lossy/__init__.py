# SPDX-License-Identifier: Apache-2.0
"""Links that lose packets, to learn what a model tolerates; see ``docs/lossy.md``.

Off by default: nothing of the package imports this room. What a lost packet is, when it is lost
and what stands in its place are pure parts (``packets``, ``draws``, ``loss_models``,
``replacements``, ``statistics``, ``link``), which know nothing of process groups.
"""
