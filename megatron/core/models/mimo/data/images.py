# SPDX-License-Identifier: Apache-2.0
"""Images opened and turned upright; whatever is wrong with a file is one kind of error."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from typing import Any

from megatron.core.models.mimo.data.conversation import AnyItem, SampleError

_ORIENTATION = 0x0112  # Exif: how a camera was held
_LYING = (5, 6, 7, 8)  # its values that make rows of pixels columns of the image
Size = tuple[int, int]
"""Height and width, in pixels."""


@contextlib.contextmanager
def opened(item: AnyItem) -> Iterator[Any]:
    """Open an image for a block; what fails there is wrong with its file.

    Args:
        item: the image.

    Raises:
        SampleError: ``unreadable``.
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(item.read())) as image:
            yield image
    except (SampleError, MemoryError):
        raise
    except Exception as error:  # PIL raises many kinds for broken files
        raise SampleError("unreadable", f"{item.name} is no image: {error}") from error


def read_image(item: AnyItem) -> Any:
    """Return an image as transformers loads it: upright, in RGB.

    Args:
        item: the image.

    Raises:
        SampleError: ``unreadable``.
    """
    with opened(item) as image:
        return _upright(image)


def size_of(item: AnyItem) -> Size:
    """Return the size of an image when it is upright, by its header.

    Args:
        item: the image.

    Raises:
        SampleError: ``unreadable``.
    """
    with opened(item) as image:
        lying = image.getexif().get(_ORIENTATION) in _LYING
        return (image.width, image.height) if lying else (image.height, image.width)


def look_at(item: AnyItem) -> None:
    """Read an image to its end, a JPEG at an eighth of its size, which is enough to miss none.

    Args:
        item: the image.

    Raises:
        SampleError: ``unreadable``.
    """
    with opened(item) as image:
        image.draft("RGB", (1, 1))
        _upright(image)


def _upright(image: Any) -> Any:
    from PIL import ImageOps

    return ImageOps.exif_transpose(image).convert("RGB")
