# SPDX-License-Identifier: Apache-2.0
"""Does a run saved in one layout continue in another? ``make reshape`` asks it of many pairs.

plan.py      pure: layouts, pairs, and the order of launches
work.py      what a rank does: train, save, continue
runs.py      the model of a place, ready to train
campaign.py  tasks are run, cases judged from their losses
"""
