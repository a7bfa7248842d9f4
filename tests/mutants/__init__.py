# SPDX-License-Identifier: Apache-2.0
"""Breaks the code on purpose and asks the tests whether they notice: ``python -m tests.mutants``.

A mutant is one small, plausible mistake. It is made in a copy of the tree, the tests that must
notice run there, and a mutant that none of them notices is a hole in the tests.

    mutant.py     what a mutant is; applying one; which ones are stale
    catalogue/    the mutants, one file per area
    trial.py      pytest on a copy of the tree, and what its outcome says about a mutant
    campaign.py   baseline, then every mutant, one-process tests several at a time; the docs' table
    __main__.py   the command
"""
