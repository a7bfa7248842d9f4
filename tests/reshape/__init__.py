# SPDX-License-Identifier: Apache-2.0
"""Does a run saved in one layout continue in another? ``make reshape`` asks it of many pairs.

plan.py      pure: layouts, pairs, and the order of launches
ranks.py     starts and ends the ranks of one launch
worker.py    what a rank does: train, save, continue
runs.py      the model of a place, ready to train
results.py   what is known so far: kept in a file, judged, put into summary.json and a table
__main__.py  the command
"""
