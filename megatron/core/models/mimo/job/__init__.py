# SPDX-License-Identifier: Apache-2.0
"""What a training job has around its model; nothing that a model itself needs.

    built_model.py   a model ready to train: weights drawn, parts frozen, DDP, finalizer
    trainer.py       steps: Megatron-Core's schedule, optimizer; why one is skipped
    packing.py       samples of several lengths as one sequence
    route_plans.py   routes of a batch, planned on the host with the batch
    logits.py        whole logits, gathered from what every rank has
    next_tokens.py   the next token out of logits that stay cut
    loop.py          from the last checkpoint to the last step; saves, stops when told
    results.py       metrics, progress, summary; reporter.py uses them
    settings.py      what of grids and configurations follows from options
    samples.py       samples cut into equal runs, and epochs in orders of their own
    memory_plan.py   what each way to hold an encoder's activations would save
    plots.py         figures that are whole or not there; the loss
    calibration.py   what this machine reaches, to plan with
    probed_layers.py the layers that a calibration times
    plan_picture.py  bars of what layouts are predicted to take
    layout_plot.py   which rank holds what on either side of a bridge

Figures need matplotlib, progress needs tqdm, and the summary's table needs rich.
"""
