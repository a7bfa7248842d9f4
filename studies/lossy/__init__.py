# SPDX-License-Identifier: Apache-2.0
"""What training tolerates when packets are lost; ``docs/lossy.md`` has the results.

    gpt2.py       a classifier in GPT-2's shape, of Megatron's layers
    digits.py     what it classifies
    classifier.py trains it over lossy links
    easy_vqa.py   the other subject: a recipe of ``mimo train``
    grid.py       cells, and the sets of them
    work.py       what the ranks of a launch do
    results.py    means over seeds, intervals, tables
    pictures.py   of them
    campaign.py   the command
"""
