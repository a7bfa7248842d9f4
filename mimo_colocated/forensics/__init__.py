# SPDX-License-Identifier: Apache-2.0
"""What a rank that died or stalled leaves behind, and what its peers know of it.

    evidence.py         phases, dumps, processes that are stopped or gone: all that is known
    flight_recorder.py  PyTorch's flight recorder: switched on, and saved when a peer is lost
    who_waits.py        who waits for whom, and in which collective

Ranks mark where they are with ``mimo_colocated.phases``.
"""
