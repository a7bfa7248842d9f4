# SPDX-License-Identifier: Apache-2.0
"""Ranks of the real digits job are killed and stopped: ``make faults``.

``cases`` draws what happens to whom, ``inject`` makes it happen and keeps a journal that knows
nothing of the code under test, ``starts`` starts the job, ``verdict`` compares what it said and
left with the journal, ``report`` shows and writes it.
"""
