# SPDX-License-Identifier: Apache-2.0
"""Towers whose inputs say how they lie: with those integers on the host, no wait for the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron.core.utils import unwrap_model
from mimo_colocated.launch.layouts import Layout
from tests.harness.host_waits import watched_device
from tests.unit_tests.mimo.huggingface import harness, llava_models, sounds
from tests.unit_tests.mimo.huggingface import qwen_vl_models as qwen

TASKS: dict[str, Callable[[], harness.Task]] = {
    "qwen2.5-vl": lambda: qwen.task(qwen.MODELS["qwen2_5_vl"]()),
    "qwen3-vl": lambda: qwen.task(qwen.MODELS["qwen3_vl"]()),
    "siglip2": lambda: llava_models.llava_task(llava_models.llava("siglip2-llama")),
    "qwen2-audio": sounds.task,
}


@pytest.fixture(autouse=True)
def _one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("name", list(TASKS))
def test_forward_and_backward_wait_for_nothing_but_integers_on_the_device(
    name: str, tmp_path: Path
) -> None:
    task = TASKS[name]()
    task.model.save_pretrained(tmp_path)
    ((modality, inputs_of),) = task.items.items()
    built = harness.built_case(tmp_path, harness.Case(Layout(), {modality: Layout()}))
    submodule = unwrap_model(built.model.modality_submodules[modality])
    given = inputs_of(range(len(task.input_ids)))
    assert given is not None
    ((encoder, inputs),) = given.items()
    kept = submodule.encoders[encoder].reads_on_host
    for on_host in (kept, ()):
        device = watched_device()
        device.hold(submodule)
        shown = {n: v.cpu() if n in on_host else device.upload(v) for n, v in inputs.items()}
        assert set(on_host) <= set(shown)
        with device.watch():
            rows = submodule(encoder_inputs={encoder: shown})
            rows.square().sum().backward()
        waits = [str(each) for each in device.host_waits]
        assert bool(waits) == (not on_host), waits
    assert torch.isfinite(rows).all()
    built.destroy()
