# SPDX-License-Identifier: Apache-2.0
"""What the bridges cost, measured side by side: ``make bench`` or ``python -m benchmarks``.

Ratios within one run, since seconds of one machine say little about another; docs/bridge.md has
the figures and what they mean.

    cases.py        pairs of layouts, batches of tokens: who holds and who needs which rows; pure
    formulas.py     bytes by formula and by counting sets, the lower bound; pure
    counting.py     bytes at the collective calls
    paths.py        encoder rows -> this rank's part of the fused sequence, by either bridge
    bytes_moved.py  1. bytes per rank, counted, against the formulas
    wall_time.py    2. forward + backward, routed over gather
    memory.py       3. peak memory of the fused-sequence path
    scale.py        4. planning for thousands of ranks, in one process
    whole_step.py   5. the digits job's step, and where its time goes
    torch_native.py torch-native modules beside Megatron's layers: step, memory
    overlap.py      6. what the asynchronous exchange hides, and its trace
    published.py, plan_check.py   predicted against published steps: make plan-check
    plan_pairs.py   predicted against measured steps of the digits model
    plan_scale.py   predicted steps from 8 to 16,384 GPUs
    kinds.py        the list of these
    work.py         what the ranks of the one launch do
    campaign.py     the command: cells as they come, a table and a file per kind
    report.py       tables, the stacked bars
    plots.py        the plots of docs/bridge.md: who holds, who needs, what moves
"""
