# SPDX-License-Identifier: Apache-2.0
"""Are models from Hugging Face folders what transformers makes of them? ``make models`` asks it.

plan.py      which models, in which layouts
work.py      what a rank does: build, compare logits and gradients
campaign.py  the table, and its place in docs/models.md
"""
