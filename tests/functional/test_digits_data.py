# SPDX-License-Identifier: Apache-2.0
"""The digits job's batches. One process; the oracle is the images as scikit-learn gives them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from examples.mimo.digits.data import (
    ANSWER_SLOTS,
    READING_POSITIONS,
    SEQUENCE_LENGTH,
    VOCABULARY_SIZE,
    Batch,
    DigitsBatches,
    Token,
    even_slice,
    with_answer,
)
from examples.mimo.digits.images import DigitImages, image_patches, split_images
from megatron.core.hyper_comm_grid import GridShape
from megatron.core.models.mimo.comm.plan.gather_layout import BridgeLayout

pytestmark = pytest.mark.once


def _scanned() -> DigitImages:
    scanned = load_digits()
    return DigitImages(scanned.images.astype(np.float32), scanned.target.astype(np.int64))


def _same(left: Batch, right: Batch) -> bool:
    tensors = {k: v for k, v in vars(left).items() if isinstance(v, torch.Tensor)}
    assert tensors
    return all(torch.equal(value, vars(right)[name]) for name, value in tensors.items())


def _pixels(images: torch.Tensor) -> np.ndarray:
    """Model inputs back to 0..16."""
    return ((images[:, 0] + 1.0) * 8.0).numpy()


def test_the_split_uses_every_image_once_and_keeps_the_shares_of_the_digits() -> None:
    images = _scanned()
    train, held_out = split_images(images, "train"), split_images(images, "held_out")
    both = np.concatenate([train.pixels, held_out.pixels]).reshape(-1, 64)
    expected = images.pixels.reshape(-1, 64)
    np.testing.assert_array_equal(np.unique(both, axis=0), np.unique(expected, axis=0))
    assert len(both) == len(images) == 1797
    for digit in range(10):
        total = (images.digits == digit).sum()
        assert (held_out.digits == digit).sum() == pytest.approx(0.2 * total, abs=0.5)


def test_the_split_and_the_held_out_batches_do_not_follow_the_seed() -> None:
    left, right = DigitsBatches(1, "held_out", 16), DigitsBatches(2, "held_out", 16)
    assert all(_same(left.batch(step), right.batch(step)) for step in range(len(left)))


def test_image_tokens_are_those_of_the_whole_microbatch() -> None:
    batches = DigitsBatches(3, "train", 6)
    mask = batches.tokens(Token.IMAGE, 2, 1, 3)
    assert np.array_equal(mask, (batches.batch(2).input_ids[2:4] == Token.IMAGE).numpy())
    assert mask.shape == (2, SEQUENCE_LENGTH)
    assert mask.sum() == 2 * 16  # four images of four patches


def test_tokens_of_a_sample() -> None:
    batch = DigitsBatches(3, "train", 6).batch(0)
    image = [Token.IMAGE_START, *[Token.IMAGE] * 4]
    question = [Token.READ, Token.NUMBER, Token.COLON]
    for sample in range(6):
        answer = [Token.ZERO + d for d in batch.digits[sample].tolist()]
        tokens = [Token.BOS, *image * 4, *question, *answer, Token.EOS]
        tokens += [Token.PAD] * (SEQUENCE_LENGTH - len(tokens))
        assert batch.input_ids[sample].tolist() == tokens
        assert batch.labels[sample].tolist() == [*tokens[1:], Token.PAD]
    assert batch.position_ids.tolist() == [list(range(SEQUENCE_LENGTH))] * 6
    assert int(batch.input_ids.max()) < VOCABULARY_SIZE


def test_loss_is_on_the_answer_digits_only() -> None:
    batch = DigitsBatches(3, "train", 6).batch(0)
    counted = batch.labels[batch.loss_mask.bool()].reshape(6, 4)
    assert torch.equal(counted - int(Token.ZERO), batch.digits)
    assert batch.loss_mask.sum() == 24
    assert torch.equal(
        batch.labels[:, list(READING_POSITIONS)], batch.input_ids[:, list(ANSWER_SLOTS)]
    )


def test_uneven_masks_count_a_leading_part_that_varies_and_change_nothing_else() -> None:
    even = DigitsBatches(5, "train", 64).batch(2)
    uneven = DigitsBatches(5, "train", 64, uneven_loss_mask=True).batch(2)
    kept = uneven.loss_mask[:, list(READING_POSITIONS)]
    assert set(kept.sum(dim=1).tolist()) == {0.0, 1.0, 2.0, 3.0, 4.0}
    assert torch.equal(kept, kept.cummin(dim=1).values)
    assert torch.equal(uneven.loss_mask, uneven.loss_mask * even.loss_mask)
    assert torch.equal(uneven.images, even.images)
    assert torch.equal(uneven.labels, even.labels)


def test_varied_samples_show_one_to_four_images_and_end_after_them() -> None:
    plain = DigitsBatches(5, "train", 64).batch(2)
    varied = DigitsBatches(5, "train", 64, varied=True).batch(2)
    counts = (varied.kinds >= 0).sum(dim=1).tolist()
    assert set(counts) == {1, 2, 3, 4}
    assert torch.equal(varied.digits, plain.digits)
    image = [Token.IMAGE_START, *[Token.IMAGE] * 4]
    for sample, count in enumerate(counts):
        answer = [Token.ZERO + d for d in varied.digits[sample, :count].tolist()]
        prompt = [Token.BOS, *image * count, Token.READ, Token.NUMBER, Token.COLON]
        tokens = [*prompt, *answer, Token.EOS]
        assert varied.lengths[sample] == len(tokens)
        assert varied.input_ids[sample, : len(tokens)].tolist() == tokens
        assert not varied.input_ids[sample, len(tokens) :].any()
        counted = varied.labels[sample][varied.loss_mask[sample].bool()]
        assert counted.tolist() == answer
        assert varied.counted[sample].sum() == count
    shown = torch.arange(4).expand(64, 4) < torch.tensor(counts)[:, None]
    assert torch.equal(varied.images, plain.images[shown.reshape(-1)])
    assert set(plain.lengths) == {29}
    assert (DigitsBatches(5, "held_out", 64, varied=True).batch(0).kinds >= 0).all()


def test_local_batches_of_varied_samples_have_their_own_images() -> None:
    batches = DigitsBatches(1, "train", 16, varied=True)
    whole = batches.batch(3)
    parts = [
        batches.local_batch(3, 1, 2, {"images": (rank, 4), "language": (rank // 2, 2)})
        for rank in range(4)
    ]
    seen = torch.cat([part.images for part in parts])
    assert torch.equal(seen, whole.images[int((whole.kinds[:8] >= 0).sum()) :])
    assert len(parts[3].images) == int((whole.kinds[14:] >= 0).sum())
    assert parts[3].lengths == whole.lengths[12:]
    assert batches.lengths(3, 1, 2).tolist() == list(whole.lengths[8:])
    assert int((parts[3].input_ids == Token.IMAGE).sum()) == 4 * int((whole.kinds[12:] >= 0).sum())


def test_a_batch_depends_on_seed_and_step_only() -> None:
    batches = DigitsBatches(7, "train", 8)
    later = batches.batch(5)
    assert _same(later, DigitsBatches(7, "train", 8).batch(5))  # without the steps before
    assert not _same(later, batches.batch(6))
    assert not _same(later, DigitsBatches(8, "train", 8).batch(5))


def test_an_epoch_shows_every_training_image_once() -> None:
    train = split_images(_scanned(), "train")
    batches = DigitsBatches(0, "train", 7, augment=False)  # 28 images: 1438 is not a multiple
    steps = len(train) // 28 + 2
    shown = np.concatenate([_pixels(batches.batch(s).images) for s in range(steps)])
    for epoch in (shown[: len(train)], shown[len(train) : 2 * len(train)]):
        assert len(np.unique(epoch.reshape(len(epoch), 64), axis=0)) == len(epoch)


def test_epochs_come_in_orders_of_their_own() -> None:
    """By the digits: as many places as chance has agree between epochs, and between seeds."""
    count = len(split_images(_scanned(), "train"))

    def order(seed: int, epoch: int) -> np.ndarray:
        batches = DigitsBatches(seed, "train", count, augment=False)  # four epochs a step
        return batches.batch(epoch // 4).digits.reshape(4, count)[epoch % 4].numpy()

    orders = [order(*each) for each in ((0, 0), (0, 1), (0, 3), (0, 4), (1, 0))]
    for one, other in itertools.combinations(orders, 2):
        assert np.array_equal(np.sort(one), np.sort(other))
        assert 0.05 < np.mean(one == other) < 0.15


def test_every_step_draws_anew() -> None:
    """Shifts, how much of a loss mask counts, how many digits are shown and how, and sounds."""
    scanned = _scanned()
    alike = DigitImages(np.repeat(scanned.pixels[:1], len(scanned), axis=0), scanned.digits)
    one, other = (DigitsBatches(0, "train", 64, images=alike).batch(step) for step in (0, 1))
    assert not torch.equal(one.images, other.images)
    uneven = DigitsBatches(0, "train", 64, uneven_loss_mask=True)
    assert not torch.equal(*(uneven.batch(step).loss_mask for step in (0, 1)))
    varied = DigitsBatches(0, "train", 64, varied=True, audio=True)
    one, other = (varied.batch(step) for step in (0, 1))
    assert not torch.equal(one.kinds >= 0, other.kinds >= 0)
    assert not torch.equal(one.kinds, other.kinds)
    assert len({one.clips.stream, other.clips.stream, varied.batch(2).clips.stream}) == 3


def test_augmentation_shifts_by_up_to_one_pixel() -> None:
    plain = _pixels(DigitsBatches(0, "train", 32, augment=False).batch(0).images)
    shifted = _pixels(DigitsBatches(0, "train", 32).batch(0).images)
    offsets = set()
    for before, after in zip(plain, shifted, strict=True):
        padded = np.pad(before, 1)
        found = [
            (dy, dx)
            for dy in (-1, 0, 1)
            for dx in (-1, 0, 1)
            if np.array_equal(padded[1 - dy : 9 - dy, 1 - dx : 9 - dx], after)
        ]
        assert found
        offsets.add(found[0])
    assert len(offsets) == 9


def test_held_out_images_are_each_counted_once() -> None:
    held_out = split_images(_scanned(), "held_out")
    batches = DigitsBatches(0, "held_out", 16)
    pixels, digits = [], []
    for batch in batches:
        assert batch.input_ids.shape == (16, SEQUENCE_LENGTH)
        assert torch.equal(batch.loss_mask.sum(dim=1), batch.counted.sum(dim=1).float())
        pixels.append(_pixels(batch.images)[batch.counted.numpy().reshape(-1)])
        digits.append(batch.digits[batch.counted].numpy())
    np.testing.assert_array_equal(np.concatenate(pixels), held_out.pixels)
    np.testing.assert_array_equal(np.concatenate(digits), held_out.digits)
    with pytest.raises(ValueError, match=r"step 6 is not in 0\.\.5 of the held_out images"):
        batches.batch(6)


@pytest.mark.parametrize(
    ("vision", "language"), [((2, 4), (2, 2, 2)), ((4, 2), (1, 2, 4)), ((2, 4), (1, 2, 4))]
)
@pytest.mark.parametrize("microbatches", [1, 4])
def test_local_batches_are_what_the_bridge_lines_up(
    vision: tuple[int, int], language: tuple[int, int, int], microbatches: int
) -> None:
    layout = BridgeLayout.from_grids(
        GridShape(vision, ("tp", "dp")), GridShape(language, ("tp", "cp", "dp"))
    )
    batches, size = DigitsBatches(1, "train", 16), 16 // microbatches
    whole = batches.batch(3)
    for microbatch in range(microbatches):
        for rank in layout.ranks:
            parts = {
                "images": (layout.rank_to_src_pos[rank][0], layout.src_dp_size),
                "language": (layout.rank_to_dest_coords[rank][0], layout.dest_dp_size),
            }
            local = batches.local_batch(3, microbatch, microbatches, parts)
            text, seen = layout.dest_slice(rank, size), layout.src_slice(rank, size)
            first = microbatch * size + text.start
            assert torch.equal(local.input_ids, whole.input_ids[first : first + text.size])
            assert torch.equal(local.loss_mask, whole.loss_mask[first : first + text.size])
            begin = 4 * (microbatch * size + seen.start)
            assert torch.equal(local.images, whole.images[begin : begin + 4 * seen.size])


def test_patches_are_sample_major_quarters() -> None:
    images = torch.arange(2 * 64.0).reshape(2, 1, 8, 8)
    patches = image_patches(images)
    assert torch.equal(patches[1, 1], images[1, 0, :4, 4:].reshape(-1))
    assert torch.equal(patches[0, 2], images[0, 0, 4:, :4].reshape(-1))


def test_a_model_that_reads_sees_no_digit_of_the_answer() -> None:
    ids = DigitsBatches(0, "train", 4).batch(0).input_ids
    hidden = with_answer(ids, ids.new_zeros((4, 0)))
    assert int((hidden >= Token.ZERO).sum()) == 0
    assert torch.equal(hidden[:, : ANSWER_SLOTS.start], ids[:, : ANSWER_SLOTS.start])
    known = with_answer(ids, torch.tensor([[3, 9]] * 4))
    assert known[0, ANSWER_SLOTS.start :].tolist()[:3] == [Token.ZERO + 3, Token.ZERO + 9, 0]


@pytest.mark.parametrize(
    ("pixels", "digits", "message"),
    [
        (np.zeros((3, 8, 9)), np.zeros(3), r"shape \(3, 8, 9\), but \(n, 8, 8\) with n > 0"),
        (np.zeros((0, 8, 8)), np.zeros(0), r"shape \(0, 8, 8\)"),
        (np.zeros((3, 8, 8)), np.zeros(2), r"3 images came with labels of the shape \(2,\)"),
        (np.full((1, 8, 8), 255.0), np.zeros(1), r"pixels range over 255\.\.255, but 0\.\.16"),
        (np.full((1, 8, 8), np.nan), np.zeros(1), r"pixels range over nan"),
        (np.zeros((2, 8, 8)), np.array([1, 10]), r"digits 0\.\.9, got \[1, 10\]"),
    ],
)
def test_wrong_images_are_refused(pixels: np.ndarray, digits: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DigitImages(pixels, digits)


def test_wrong_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(2, 8, 8\), but \(n, 1, 8, 8\)"):
        image_patches(torch.zeros(2, 8, 8))
    with pytest.raises(ValueError, match=r"6 samples .* over 4 language DP ranks"):
        DigitsBatches(0, "train", 6).local_batch(0, 0, 1, {"images": (0, 2), "language": (0, 4)})
    with pytest.raises(ValueError, match=r"index 4 is not in 0\.\.3"):
        even_slice(8, 4, 4, "microbatch", "ranks")
    with pytest.raises(ValueError, match="split must be 'train' or 'held_out', got 'test'"):
        DigitsBatches(0, "test", 8)
    with pytest.raises(ValueError, match="seed must be 0 or more, got -1"):
        DigitsBatches(-1, "train", 8)
    with pytest.raises(ValueError, match="global_batch_size must be 1 or more, got 0"):
        DigitsBatches(0, "train", 0)
    with pytest.raises(ValueError, match="step -1 is not in 0 of the train images"):
        DigitsBatches(0, "train", 8).batch(-1)
