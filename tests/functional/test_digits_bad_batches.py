# SPDX-License-Identifier: Apache-2.0
"""Images of the wrong shape and token counts that do not match, up to the model on two ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from examples.mimo.digits.data import SEQUENCE_LENGTH, Batch, DigitsBatches, Token
from examples.mimo.digits.images import DigitImages, image_patches
from mimo_colocated.launch.layouts import Layout
from tests.models.model import VISION, ModelOptions, build_model

pytestmark = pytest.mark.once


@pytest.mark.parametrize("shape", [(5, 8, 9), (5, 64), (0, 8, 8), (5, 1, 8, 8)])
def test_a_data_set_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"^images have the shape .*, but \(n, 8, 8\) with n > 0 "):
        DigitImages(np.zeros(shape, np.float32), np.zeros(shape[0], np.int64))


@pytest.mark.parametrize("shape", [(5, 8, 8), (5, 3, 8, 8), (5, 1, 16, 16)])
def test_images_of_another_shape_are_not_cut_into_patches(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"^images have the shape .*, but \(n, 1, 8, 8\) is "):
        image_patches(torch.zeros(shape))


@pytest.fixture
def forward() -> Iterator[Callable[[Callable[[Batch], Batch]], Any]]:
    """Run the model on a batch that a function has changed, DP2 to TP2."""
    built = build_model(Layout(dp=2), Layout(tp=2), ModelOptions())
    rank = torch.distributed.get_rank()
    batch = DigitsBatches(1, "train", 4).local_batch(0, 0, 1, {VISION: (rank, 2)})
    device = next(built.model.parameters()).device

    def run(change: Callable[[Batch], Batch]) -> Any:
        changed = change(batch).to(device)
        return built.model(
            input_ids=changed.input_ids,
            position_ids=changed.position_ids,
            labels=changed.labels,
            loss_mask=changed.loss_mask,
            modality_inputs={VISION: {"digits": {"images": changed.images}}},
        )

    yield run
    built.destroy()


@pytest.mark.ranks(2)
def test_the_model_refuses_images_of_another_shape_on_every_rank(forward) -> None:
    with pytest.raises(ValueError, match=r"images have the shape \(8, 1, 8, 7\), but \(n, 1, 8, 8"):
        forward(lambda batch: replace(batch, images=batch.images[..., :7]))


@pytest.mark.ranks(2)
def test_the_model_refuses_a_token_count_that_does_not_match(forward) -> None:
    losses, _ = forward(lambda batch: batch)
    assert losses.shape == (4, SEQUENCE_LENGTH)

    def one_more(batch: Batch) -> Batch:
        input_ids = batch.input_ids.clone()
        input_ids[0, -1] = int(Token.IMAGE)
        return replace(batch, input_ids=input_ids)

    with pytest.raises(
        ValueError,
        match=r"Number of images tokens \(65\) does not match number of images embeddings \(64\)",
    ) as caught:
        forward(one_more)
    assert "\n" not in str(caught.value)
