# SPDX-License-Identifier: Apache-2.0
"""Parity: parallel runs compared with the same model on one process, unsharded.

``make parity`` or ``python -m tests.parity``; docs/parity.md has the table and how to read it.

    rows.py       the table: one frozen ``Row`` per comparison, and how rows are chosen
    tasks.py      the data of a row, with its loss masks
    language.py   the language model alone, over pipeline stages
    measure.py    what one run shows: weights, logits, gradients, losses
    tensors.py    shards gathered to whole tensors under layout-independent names
    compare.py    two measurements -> checks with their tolerances
    work.py       what the ranks of one launch do, row after row
    campaign.py   options, references before rows, the line and the cells of a row
    docs.py       docs/parity.md
"""
