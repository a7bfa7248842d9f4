# SPDX-License-Identifier: Apache-2.0
"""The digits job's sounds, and batches with some. One process; the oracle is the recordings."""

from __future__ import annotations

import itertools
import wave
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from examples.mimo.digits import sounds
from examples.mimo.digits.data import (
    SEQUENCE_LENGTH,
    VOCABULARY_SIZE,
    Batch,
    DigitsBatches,
    Kind,
    Token,
)
from examples.mimo.digits.model import SpeechEncoder
from examples.mimo.digits.predictions import HeldOut
from examples.mimo.digits.sounds import (
    BANDS,
    FRAMES,
    RATE,
    SAMPLES,
    Clips,
    Variation,
    log_mel,
    recordings,
)
from mimo_colocated.launch.errors import JobError

pytestmark = pytest.mark.once

# Nothing is changed but the time at which the recording begins.
PLAIN = Variation(speed=1.0, gain_db=0.0, noise_db=-300.0, place=0.5)


# --------------------------------------------------------------------------------- recordings


def test_every_digit_has_a_recording_of_its_own() -> None:
    found = recordings()
    assert len(found) == 10
    assert len({each.tobytes() for each in found}) == 10
    for each in found:
        assert each.dtype == np.float32
        assert 0.2 < len(each) / RATE < 0.36
        assert 0.3 < np.abs(each).max() <= 1.0
        assert abs(each.mean()) < 0.02  # silence is 128 in the file and 0 here


def _write(path: Path, rate: int = RATE, channels: int = 1, width: int = 1, size: int = 8) -> None:
    with wave.open(str(path), "wb") as file:
        file.setparams((channels, width, rate, 0, "NONE", ""))
        file.writeframes(bytes(range(100, 100 + size)) * channels * width)


def test_a_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    _write(tmp_path / "a.wav")
    expected = (np.arange(100, 108) - 128) / 128
    np.testing.assert_array_equal(sounds.read_wav(tmp_path / "a.wav"), expected.astype(np.float32))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rate": 16000}, r"has 16000 Hz, 1 channels, 8 bits and 8 samples, but 8000 Hz, 1 ch"),
        ({"channels": 2}, r"has 8000 Hz, 2 channels"),
        ({"width": 2}, r"1 channels, 16 bits"),
        ({"size": 0}, r"and 0 samples, but .* and 1 to 3481 samples are needed; install"),
    ],
)
def test_other_recordings_are_refused(tmp_path: Path, change: dict, message: str) -> None:
    _write(tmp_path / "a.wav", **change)
    with pytest.raises(JobError, match=message):
        sounds.read_wav(tmp_path / "a.wav")


@pytest.mark.parametrize("content", [None, b"", b"RIFF1234WAVEnothing"])
def test_a_file_that_is_no_recording_is_refused(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "a.wav").write_bytes(content)
    with pytest.raises(JobError, match=r"a\.wav cannot be read \(.*\); install what the examples"):
        sounds.read_wav(tmp_path / "a.wav")


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sounds.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(JobError, match=r"come with captcha, which is missing; install what"):
        sounds.recordings.__wrapped__()


# --------------------------------------------------------------------------------- variations


def test_a_variation_plays_faster_softer_and_at_its_place() -> None:
    rng, recording = np.random.default_rng(0), recordings()[3]
    silence = SAMPLES - len(recording)
    plain = PLAIN.apply(recording, rng)
    np.testing.assert_allclose(plain[silence // 2 :][: len(recording)], recording, atol=1e-6)
    assert np.abs(plain[: silence // 2]).max() < 1e-6

    soft = Variation(1.0, -6.0, -300.0, 0.0).apply(recording, rng)
    np.testing.assert_allclose(soft[: len(recording)], 10 ** (-6 / 20) * recording, atol=1e-6)

    fast = Variation(1.25, 0.0, -300.0, 1.0).apply(recording, rng)
    heard = np.flatnonzero(np.abs(fast) > 1e-3)
    assert heard[-1] > SAMPLES - 40
    assert np.ptp(heard) == pytest.approx(len(recording) / 1.25, rel=0.05)


def test_noise_has_the_power_that_was_drawn() -> None:
    rng, recording = np.random.default_rng(0), recordings()[0]
    power = np.mean(recording**2)
    noisy = Variation(1.0, 0.0, -10.0, 0.5).apply(recording, rng)
    noise = noisy - PLAIN.apply(recording, rng)
    assert np.mean(noise**2) == pytest.approx(power / 10, rel=0.1)


def test_draws_fill_their_ranges() -> None:
    drawn = [Variation.draw(np.random.default_rng(seed)) for seed in range(400)]
    for name, (low, high) in {
        "speed": sounds.SPEED,
        "gain_db": sounds.GAIN_DB,
        "noise_db": sounds.NOISE_DB,
        "place": (0.0, 1.0),
    }.items():
        values = np.array([getattr(each, name) for each in drawn])
        edge = 0.05 * (high - low)
        assert low <= values.min() < low + edge, name
        assert high - edge < values.max() <= high, name
    # No recording is longer than a sound, at the lowest speed either.
    assert max(map(len, recordings())) / sounds.SPEED[0] < SAMPLES


def test_a_clip_depends_on_its_stream_and_slot_only() -> None:
    every = Clips((5, 2), np.array([1, 4, 4, 9]), np.array([0, 3, 4, 7]))
    part = every.between(3, 7)
    assert part.slots.tolist() == [3, 4]
    np.testing.assert_array_equal(part.waveforms, every.waveforms[1:3])
    assert not np.array_equal(every.waveforms[1], every.waveforms[2])
    other = Clips((5, 3), every.digits, every.slots)
    assert not np.isclose(other.waveforms, every.waveforms).all(axis=1).any()


# ------------------------------------------------------------------------------------ spectra


def test_a_tone_is_in_its_band_and_frame() -> None:
    time = np.arange(SAMPLES) / RATE
    waveforms = np.stack([np.sin(2 * np.pi * hz * time) for hz in (200, 1000, 3000)])
    waveforms[:, : SAMPLES // 2] = 0
    spectra = log_mel(waveforms.astype(np.float32))
    assert spectra.shape == (3, FRAMES, BANDS)
    assert spectra.dtype == np.float32
    loudest = spectra[:, -1].argmax(axis=1)
    assert list(loudest) == sorted(set(loudest))
    assert (spectra[:, :7] < spectra[:, -1:].max(axis=2, keepdims=True) - 1).all()


def test_a_wrong_length_is_refused() -> None:
    with pytest.raises(ValueError, match=r"sounds have the shape \(2, 99\), but \(n, 4352\) is"):
        log_mel(np.zeros((2, 99), dtype=np.float32))


def test_spectra_are_of_moderate_size_and_silence_is_finite() -> None:
    clips = Clips((1,), np.arange(10), np.arange(10))
    assert np.abs(clips.spectra).max() < 3
    assert np.isfinite(log_mel(np.zeros((1, SAMPLES), dtype=np.float32))).all()
    assert Clips((1,), np.arange(0), np.arange(0)).spectra.shape == (0, FRAMES, BANDS)


def test_a_token_is_the_mean_of_four_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SpeechEncoder, "encode", lambda self, x: x.transpose(0, 1))
    encoder = SpeechEncoder.__new__(SpeechEncoder)
    spectra = torch.arange(2.0 * FRAMES * BANDS).view(2, FRAMES, BANDS)
    rows = SpeechEncoder.forward(encoder, spectra)
    assert torch.equal(rows[1, 0], spectra[0, 4:8].mean(dim=0))
    assert torch.equal(rows[3, 1], spectra[1, 12:].mean(dim=0))
    with pytest.raises(ValueError, match=r"spectra have the shape \(2, 16, 3\), but \(n, 16, 20\)"):
        SpeechEncoder.forward(encoder, spectra[..., :3])


# ------------------------------------------------------------------------------------ batches


def _shown(batch: Batch) -> list[Counter]:
    return [Counter(sample) for sample in batch.kinds.tolist()]


def test_only_how_digits_are_shown_differs_from_a_batch_of_images() -> None:
    plain, mixed = (DigitsBatches(3, "train", 32, audio=audio).batch(1) for audio in (False, True))
    for name in ("digits", "loss_mask", "position_ids", "counted"):
        assert torch.equal(vars(mixed)[name], vars(plain)[name]), name
    answers = slice(21, None)
    assert torch.equal(mixed.input_ids[:, answers], plain.input_ids[:, answers])
    assert torch.equal(mixed.images, plain.images[mixed.image_slots])
    assert len(plain.clips) == 0
    assert (plain.kinds == Kind.IMAGE).all()


def test_tokens_say_what_is_shown() -> None:
    batch = DigitsBatches(2, "train", 64, audio=True).batch(0)
    body = {
        Kind.IMAGE: lambda digit: [Token.IMAGE_START] + [Token.IMAGE] * 4,
        Kind.SOUND: lambda digit: [Token.SOUND_START] + [Token.SOUND] * 4,
        Kind.TEXT: lambda digit: [Token.TEXT_START] + [Token.NAME + digit] * 4,
    }
    for ids, kinds, digits in zip(batch.input_ids, batch.kinds, batch.digits, strict=True):
        shown = [body[Kind(k)](d) for k, d in zip(kinds.tolist(), digits.tolist(), strict=True)]
        tokens = list(itertools.chain([Token.BOS], *shown))
        assert ids[: len(tokens)].tolist() == tokens
    assert batch.input_ids.shape == (64, SEQUENCE_LENGTH)
    assert int(batch.input_ids.max()) < VOCABULARY_SIZE
    assert torch.equal(torch.from_numpy(batch.clips.slots), _slots(batch, Kind.SOUND))
    assert torch.equal(batch.image_slots, _slots(batch, Kind.IMAGE))
    said = batch.digits.flatten()[_slots(batch, Kind.SOUND)]
    assert batch.clips.digits.tolist() == said.tolist()


def _slots(batch: Batch, kind: Kind) -> torch.Tensor:
    return (batch.kinds.flatten() == kind).nonzero().flatten()


def test_samples_of_every_sort_come_in_runs() -> None:
    batches, sorts, without = DigitsBatches(4, "train", 32, audio=True), Counter(), Counter()
    for step in range(60):
        samples = _shown(batches.batch(step))
        for run in range(8):
            alike = samples[4 * run : 4 * run + 4]
            pure = {next(iter(each)) for each in alike if len(each) == 1}
            # Samples that may show either can happen to show one thing only.
            mixed = any(len(each) > 1 for each in alike)
            assert mixed or len(pure) == 1
            sorts["mixed" if mixed else Kind(pure.pop()).name] += 1
        for microbatch in range(4):
            shown = sum(samples[8 * microbatch : 8 * microbatch + 8], Counter())
            without.update(kind.name for kind in Kind if not shown[kind])
    assert min(sorts[name] for name in ("IMAGE", "SOUND", "mixed")) / 480 > 0.2
    assert 0.02 < sorts["TEXT"] / 480 < 0.12
    assert min(without["IMAGE"], without["SOUND"]) > 5


def test_varied_samples_say_only_what_they_show() -> None:
    batch = DigitsBatches(2, "train", 64, audio=True, varied=True).batch(0)
    whole = DigitsBatches(2, "train", 64, audio=True).batch(0)
    shown = (batch.kinds >= 0).sum(dim=1)
    assert set(shown.tolist()) == {1, 2, 3, 4}
    assert torch.equal(torch.from_numpy(batch.clips.slots), _slots(batch, Kind.SOUND))
    assert 0 < len(batch.clips) < len(whole.clips)
    for sample, count in enumerate(shown.tolist()):
        assert torch.equal(batch.kinds[sample, :count], whole.kinds[sample, :count])
        start = 1 + 5 * count
        assert torch.equal(batch.input_ids[sample, :start], whole.input_ids[sample, :start])
        assert batch.input_ids[sample, start] == Token.READ


def test_a_batch_with_sounds_depends_on_seed_and_step_only() -> None:
    batches = DigitsBatches(7, "train", 8, audio=True)
    later, again = batches.batch(5), DigitsBatches(7, "train", 8, audio=True).batch(5)
    assert torch.equal(later.input_ids, again.input_ids)
    np.testing.assert_array_equal(later.clips.spectra, again.clips.spectra)
    streams = {batches.batch(6).clips.stream, DigitsBatches(8, "train", 8).batch(5).clips.stream}
    assert later.clips.stream not in streams


@pytest.mark.parametrize("microbatches", [1, 4])
def test_each_side_gets_its_own_samples(microbatches: int) -> None:
    batches = DigitsBatches(1, "train", 32, audio=True)
    whole, size = batches.batch(3), 32 // microbatches
    for microbatch, rank in itertools.product(range(microbatches), range(8)):
        parts = {"images": (rank // 2, 4), "audio": (rank, 8), "language": (rank // 4, 2)}
        local = batches.local_batch(3, microbatch, microbatches, parts)
        samples = {
            side: range(microbatch * size + part * size // parts,
                        microbatch * size + (part + 1) * size // parts)
            for side, part, parts in (("image", rank // 2, 4), ("sound", rank, 8))
        }  # fmt: skip
        first = microbatch * size + rank // 4 * size // 2
        assert torch.equal(local.input_ids, whole.input_ids[first : first + size // 2])
        assert torch.equal(local.kinds, whole.kinds[first : first + size // 2])
        seen = [i for i, slot in enumerate(whole.image_slots) if slot // 4 in samples["image"]]
        assert torch.equal(local.images, whole.images[seen])
        heard = [slot for slot in whole.clips.slots if slot // 4 in samples["sound"]]
        assert local.clips.slots.tolist() == heard
        assert local.clips.stream == whole.clips.stream


def test_held_out_digits_are_each_shown_once_in_each_way() -> None:
    batches = DigitsBatches(0, "held_out", 16, audio=True)
    shown: dict[Kind, list[int]] = {kind: [] for kind in Kind}
    pixels = []
    for step, batch in enumerate(batches):
        places = step % (len(batches) // 3) * 64 + torch.arange(64).view(16, 4)
        for kind in Kind:
            shown[kind] += places[batch.counted & (batch.kinds == kind)].tolist()
        counted = batch.counted.flatten()[batch.image_slots]
        pixels.append(batch.images[counted].numpy())
    for kind in Kind:
        assert sorted(shown[kind]) == list(range(359)), kind
    order = np.argsort(shown[Kind.IMAGE])
    expected = np.concatenate([b.images.numpy() for b in DigitsBatches(0, "held_out", 16)])[:359]
    np.testing.assert_array_equal(np.concatenate(pixels)[order], expected)


def test_held_out_sounds_do_not_follow_the_seed() -> None:
    left, right = (DigitsBatches(seed, "held_out", 16, audio=True) for seed in (1, 2))
    for step in (0, len(left) - 1):
        assert torch.equal(left.batch(step).input_ids, right.batch(step).input_ids)
        np.testing.assert_array_equal(
            left.batch(step).clips.waveforms, right.batch(step).clips.waveforms
        )
    training = DigitsBatches(1797, "train", 16, audio=True)  # the seed of the split, even
    assert training.batch(0).clips.stream != left.batch(0).clips.stream


def test_accuracy_is_told_apart_by_kind() -> None:
    batches = DigitsBatches(0, "held_out", 64, audio=True)
    answers = [batch.digits.clone() for batch in batches]
    wrong = batches.batch(0).kinds == Kind.SOUND
    answers[0][wrong] = -1
    held_out = HeldOut.collect(batches, answers)
    found = held_out.accuracies()
    assert found["images"] == 1.0
    assert found["sounds"] == pytest.approx(1 - wrong.sum().item() / 359)
    assert held_out.counted.sum() == 2 * 359
    for kind, shown in ((Kind.IMAGE, held_out.images), (Kind.SOUND, held_out.waveforms)):
        finite = np.isfinite(shown).reshape(*held_out.kinds.shape, -1).all(axis=2)
        np.testing.assert_array_equal(finite, held_out.kinds == kind)
