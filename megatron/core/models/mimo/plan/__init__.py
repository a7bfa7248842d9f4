# SPDX-License-Identifier: Apache-2.0
"""Which layouts to train in, before anything runs: predicted time and memory of every pair.

    shapes.py     sizes of a language model, of encoders, and what a step trains on
    machine.py    what accelerators and links do; presets, and files that a calibration writes
    flops.py      FLOPs by family of layer; whatever counts FLOPs reads it
    candidates.py all pairs of layouts that a model, a batch and a machine allow
    bridge.py     bytes that the bridge moves, by formula and from the route plan
    pipeline.py   how long a pipelined step takes, its first stage's encoder among it
    step_time.py  seconds of a step, part by part
    footprint.py  bytes of a rank, part by part
    encoder_parts.py  what of a step is an encoder replica's
    estimates.py  ``plan(...)``: estimates, the fastest that fits first
    why.py        why a pair is not the first choice, in words

Numbers go in and numbers come out: no process group and no accelerator is asked.
"""
