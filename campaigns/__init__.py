# SPDX-License-Identifier: Apache-2.0
"""Long checks as commands: cases, one after the other, that can be stopped and gone on with.

    command.py   the command: options, a line per case and a bar, table, docs, exit code
    record.py    results by case on the disk, whole at any moment; kept for the same code only
    ranks.py     processes with a process group, forked from one that has imported everything
    launches.py  tasks on ranks: one launch per world size, a new one when a task brings it down
    pages.py     files and parts of files, replaced whole

A campaign says what its cases are, how they are run and judged, and how they are shown:
``tests/parity``, ``tests/reshape``, ``tests/mutants``, ``tests/faults``, ``benchmarks``.
"""
