# SPDX-License-Identifier: Apache-2.0
"""Images read here or in processes beside; a process that is gone is an error, not a wait."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import transformers

from megatron.core.models.mimo.data.conversation import BytesItem, FileItem
from megatron.core.models.mimo.data.readers import ImageReader, ReaderProcesses, ReadError
from mimo_colocated.stop_requests import SIGNALS
from tests.unit_tests.mimo.data.small import SIDE, png

pytestmark = pytest.mark.once

ITEMS = [BytesItem(png(shade, (SIDE + shade, SIDE)), f"image {shade}") for shade in range(5)]


def reader() -> ImageReader:
    size = {"height": SIDE, "width": SIDE}
    return ImageReader(transformers.SiglipImageProcessorPil(size=size), ["pixel_values", "absent"])


@pytest.fixture
def processes() -> Iterator[ReaderProcesses]:
    made = ReaderProcesses(reader(), 2)
    yield made
    made.close()


def test_images_are_those_of_the_processor_in_order(processes: ReaderProcesses) -> None:
    alone = reader()
    alone.opened = []
    wanted = alone.read(ITEMS)
    assert alone.opened == [item.name for item in ITEMS]
    assert list(wanted) == ["pixel_values"]
    assert wanted["pixel_values"].shape == (5, 3, SIDE, SIDE)
    assert len({image.tobytes() for image in wanted["pixel_values"]}) == 5
    for items in (ITEMS, ITEMS[:1], ITEMS[3:]):
        found = processes.read(items)
        assert np.array_equal(found["pixel_values"], alone.read(items)["pixel_values"])


def test_an_image_that_cannot_be_read_is_named(processes: ReaderProcesses, tmp_path: Path) -> None:
    missing = FileItem(tmp_path / "a.png")
    for each in (reader(), processes):
        with pytest.raises(ReadError, match=r"a\.png cannot be read as an image: .*No such file"):
            each.read([*ITEMS, missing])
        with pytest.raises(ReadError, match=r"noise cannot be read as an image.*look_at_images"):
            each.read([BytesItem(b"noise", "noise")])
    # It goes on.
    assert len(processes.read(ITEMS)["pixel_values"]) == 5


def test_a_killed_process_is_an_error(processes: ReaderProcesses) -> None:
    os.kill(processes.pids[1], signal.SIGKILL)
    with pytest.raises(ReadError, match=rf"process {processes.pids[1]}, .* killed by SIGKILL"):
        processes.read(ITEMS)


def test_what_tells_the_job_to_stop_leaves_its_readers(processes: ReaderProcesses) -> None:
    """A job saves before it stops, and a terminal or a queue tells all processes at once."""
    processes.read(ITEMS)  # a process that has just begun is not told
    for sent in (signal.SIGINT, *SIGNALS):
        for pid in processes.pids:
            os.kill(pid, sent)
    assert len(processes.read(ITEMS)["pixel_values"]) == 5


def test_no_process_reads_nothing() -> None:
    with pytest.raises(ValueError, match="0 processes read nothing; give at least 1"):
        ReaderProcesses(reader(), 0)
