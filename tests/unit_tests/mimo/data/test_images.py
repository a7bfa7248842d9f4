# SPDX-License-Identifier: Apache-2.0
"""Images are those that transformers loads, upright; broken files are found beforehand."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import transformers
from PIL import Image

from megatron.core.models.mimo.data.conversation import BytesItem, FileItem, SampleError
from megatron.core.models.mimo.data.images import look_at, read_image, size_of
from megatron.core.models.mimo.data.places import GridPlaces
from megatron.core.models.mimo.data.readers import ImageReader, ReadError
from tests.unit_tests.mimo.data.small import photo, png

pytestmark = pytest.mark.once

SIDE = 32


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photos_are_upright_as_transformers_loads_them(tmp_path: Path, orientation: int) -> None:
    path = photo(tmp_path, orientation)
    wanted = transformers.image_utils.load_image(str(path))
    found = FileItem(path)
    assert np.array_equal(np.asarray(read_image(found)), np.asarray(wanted))
    assert size_of(found) == (wanted.height, wanted.width)
    assert (wanted.height > wanted.width) is (orientation > 4), "the cases differ"
    # A control: what the file holds, not turned, is another image.
    lying = np.asarray(Image.open(path).convert("RGB"))
    assert (orientation > 1) is (not np.array_equal(lying, np.asarray(wanted)))
    siglip = transformers.SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE})
    made = ImageReader(siglip, ["pixel_values"]).read([found])["pixel_values"]
    assert np.array_equal(made, siglip(images=[wanted], return_tensors="np")["pixel_values"])


def test_rows_are_those_of_the_upright_photo(tmp_path: Path) -> None:
    path = photo(tmp_path, 6)
    size = {"shortest_edge": 64, "longest_edge": 64 * 64}
    grids = transformers.Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, size=size)
    wanted = grids(images=[transformers.image_utils.load_image(str(path))], return_tensors="np")
    found = GridPlaces(grids, "<image>", 2).shown(FileItem(path))
    assert found.grid == tuple(wanted["image_grid_thw"][0].tolist()) == (1, 10, 4)


def noise(kind: str) -> bytes:
    file, draw = io.BytesIO(), np.random.default_rng(0)
    Image.fromarray(draw.integers(0, 255, (200, 200, 3), dtype=np.uint8)).save(file, kind)
    return file.getvalue()


def huge() -> bytes:
    """A PNG of a few bytes that says it has 400 million pixels."""

    def chunk(name: bytes, content: bytes) -> bytes:
        end = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + end

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 20000, 20000, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


BROKEN = {
    "half a jpeg": noise("JPEG")[: len(noise("JPEG")) // 2],
    "most of a jpeg": noise("JPEG")[:-2000],
    "half a png": noise("PNG")[: len(noise("PNG")) // 2],
    "half a webp": noise("WEBP")[: len(noise("WEBP")) // 2],
    "half a gif": noise("GIF")[: len(noise("GIF")) // 2],
    "a huge png": huge(),
    "nothing": b"",
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_cannot_be_read_is_found_when_it_is_looked_at(name: str) -> None:
    item = BytesItem(BROKEN[name], name)
    with pytest.raises(SampleError, match=f"{name} is no image: ") as caught:
        look_at(item)
    assert caught.value.reason == "unreadable"
    reader = ImageReader(transformers.SiglipImageProcessorPil(), ["pixel_values"])
    with pytest.raises(ReadError, match=f"{name} cannot be read as an image: "):
        reader.read([item])


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF"])
def test_what_is_whole_passes(kind: str) -> None:
    look_at(BytesItem(noise(kind), "whole"))


def test_an_image_too_thin_for_its_processor_is_unreadable() -> None:
    places = GridPlaces(transformers.Qwen2VLImageProcessorPil(), "<image>", 2)
    with pytest.raises(SampleError, match="thin has 8 x 2000 pixels, which its processor") as told:
        places.shown(BytesItem(png(1, (2000, 8)), "thin"))
    assert told.value.reason == "unreadable"
    with pytest.raises(SampleError, match="huge is no image: .*exceeds limit"):
        places.shown(BytesItem(huge(), "huge"))
