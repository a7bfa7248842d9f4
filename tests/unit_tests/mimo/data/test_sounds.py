# SPDX-License-Identifier: Apache-2.0
"""Sounds in a model's text and as its encoder takes them; transformers' processor is the oracle."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import transformers

from megatron.core.models.mimo.data import sounds
from megatron.core.models.mimo.data.conversation import (
    BytesItem,
    Conversation,
    FileItem,
    Part,
    SampleError,
)
from megatron.core.models.mimo.data.encoding import ChatEncoder
from megatron.core.models.mimo.data.messages import files_below, from_messages
from megatron.core.models.mimo.data.prepared import encode_piece
from megatron.core.models.mimo.data.readers import ReadError, SoundReader
from tests.unit_tests.mimo.data.small import Listed, png, said, save_text
from tests.unit_tests.mimo.train.strangers import RATE, write_qwen_audio, write_wav

pytestmark = pytest.mark.once


@pytest.fixture(autouse=True)
def _python_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """WAV files are read by Python itself."""
    found = importlib.util.find_spec
    monkeypatch.setattr(
        sounds.importlib.util,
        "find_spec",
        lambda name: None if name == "soundfile" else found(name),
    )


def tone(path: Path, length: int, **how: Any) -> FileItem:
    write_wav(path, 0.5 * np.sin(np.arange(length) / 3), **how)
    return FileItem(path)


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_whole_numbers_of_any_width_are_read(width: int, tmp_path: Path) -> None:
    wave = np.stack([np.linspace(-1, 1, 50), np.zeros(50)], axis=1)
    write_wav(tmp_path / "a.wav", wave, width=width)
    item = FileItem(tmp_path / "a.wav")
    found = sounds.read_sound(item, RATE)
    assert found.dtype == np.float32
    assert sounds.length_of(item, RATE) == len(found) == 50
    # Half a step of what so many bits can tell apart.
    assert np.abs(found - wave.mean(axis=1)).max() <= 2.0 ** (1 - 8 * width) + 1e-7


@pytest.mark.parametrize(("count", "length"), [(2205, 1600), (2204, 1600), (2206, 1601)])
def test_another_rate_is_converted(count: int, length: int, tmp_path: Path) -> None:
    """A slow tone stays what it is; its length is known without converting."""
    wave = np.sin(np.arange(count) * 2 * np.pi * 100 / 22_050)
    write_wav(tmp_path / "a.wav", wave, rate=22_050)
    item = FileItem(tmp_path / "a.wav")
    found = sounds.read_sound(item, RATE)
    assert len(found) == sounds.length_of(item, RATE) == length
    expected = np.sin(np.arange(length) * 2 * np.pi * 100 / RATE)
    assert np.abs(found - expected)[100:-100].max() < 0.01


def test_another_rate_without_scipy_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "scipy.signal", None)
    item = tone(tmp_path / "a.wav", 100, rate=22_050)
    said = rf"a\.wav has 22050 numbers per second, its processor takes {RATE}; .* install scipy: "
    with pytest.raises(SampleError, match=said) as caught:
        sounds.read_sound(item, RATE)
    assert caught.value.reason == "unreadable"


def test_want_of_memory_is_no_broken_sound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such a sample is not left out: what is short now was enough before."""
    item = tone(tmp_path / "a.wav", 100)

    def none_left(*_given: Any, **_how: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(sounds, "_wav", none_left)
    with pytest.raises(MemoryError):
        sounds.look_at(item)


def test_what_is_no_whole_sound_is_unreadable(tmp_path: Path) -> None:
    whole = tone(tmp_path / "a.wav", 100).read()
    for content, message in (
        (whole[:-8], r"is no sound: it ends after 192 of 200 bytes; other kinds than WAV need sou"),
        (b"no sound", "is no sound: "),
        (b"", "is no sound: "),
    ):
        with pytest.raises(SampleError, match=message) as caught:
            sounds.look_at(BytesItem(content, "a"))
        assert caught.value.reason == "unreadable"


def test_other_kinds_are_read_by_soundfile(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(_file: Any, dtype: str, always_2d: bool) -> tuple[np.ndarray, int]:
        assert (dtype, always_2d) == ("float32", True)
        return np.ones((6, 2), dtype=np.float32), RATE

    known = SimpleNamespace(frames=6, samplerate=RATE)
    fake = SimpleNamespace(info=lambda _file: known, read=read)
    monkeypatch.setitem(sys.modules, "soundfile", fake)
    monkeypatch.setattr(sounds.importlib.util, "find_spec", lambda _name: fake)
    item = BytesItem(b"fLaC", "a.flac")
    assert sounds.length_of(item, RATE) == 6
    assert sounds.read_sound(item, RATE).tolist() == [1.0] * 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qwen-audio")
    write_qwen_audio(folder)
    return folder


def about(*items: FileItem) -> Conversation:
    return Conversation(said([*(Part("audio", "", item) for item in items), "which"], "low"))


def test_tokens_and_spectra_are_those_of_the_processor(folder: Path, tmp_path: Path) -> None:
    """Of lengths around a step of the spectrum, one more row or not, and of two in one text."""
    processor = transformers.AutoProcessor.from_pretrained(folder)
    encoder = ChatEncoder(folder, 200)
    lengths = [801, 1199, 1200, 1201, 1599, 1600, 1601, 2401, 9999, 15_999, 16_000]
    items = [tone(tmp_path / f"{length}.wav", length) for length in lengths]
    reader = SoundReader(processor.feature_extractor, ["input_features", "feature_attention_mask"])
    for shown in (*([item] for item in items), items[4:6]):
        made = encoder.encode(about(*shown))
        messages = [
            {"role": "user", "content": [*[{"type": "audio"}] * len(shown), _text("which")]},
            {"role": "assistant", "content": [_text("low")]},
        ]
        waves = [sounds.read_sound(item, RATE) for item in shown]
        theirs = processor(
            text=processor.apply_chat_template(messages, tokenize=False),
            audio=waves,
            sampling_rate=RATE,
            return_tensors="np",
        )
        assert made.input_ids.tolist() == theirs["input_ids"][0].tolist()
        token = processor.tokenizer.convert_tokens_to_ids("<|AUDIO|>")
        assert made.rows.sum() == made.input_ids.tolist().count(token) > 0
        found = reader.read(shown)
        for name, value in found.items():
            np.testing.assert_array_equal(value, theirs[name])
    assert encoder.tokenizer.decode(made.input_ids[made.learned]) == "low<|im_end|>"


def _text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def test_sounds_that_cannot_be_used_are_skipped_by_reason(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "none.wav").write_text("none")
    (tmp_path / "cut.wav").write_bytes(tone(tmp_path / "a.wav", 9000).read()[:-1])
    image = Part("image", "", BytesItem(png(3), "image"))
    samples = [
        about(tone(tmp_path / "fine.wav", 5000)),
        about(tone(tmp_path / "long.wav", 20_000)),
        about(tone(tmp_path / "short.wav", 100)),
        about(FileItem(tmp_path / "none.wav")),
        about(FileItem(tmp_path / "cut.wav")),
        Conversation(said([image], "yes")),
        Conversation(said(["text that has <|AUDIO|>"], "yes")),
        Conversation(said(["text alone"], "yes")),
    ]
    encode = ChatEncoder(folder, 200).encode
    found = encode_piece(Listed(samples), encode, range(len(samples)), look=True)
    assert [*found.reasons] == [0, 3, 2, 2, 2, 1, 1, 0]
    assert found.first == (
        f"sample 1 is too_long: {tmp_path / 'long.wav'} has 1.25 s, and its processor takes 1 s"
    )
    with pytest.raises(SampleError, match=r"the model hears sounds, the sample has \['image'\]"):
        encode(samples[5])
    # Whether a file is whole is seen when it is looked at.
    assert [*encode_piece(Listed(samples[4:5]), encode, [0], look=False).reasons] == [0]


def test_a_sound_that_is_none_in_mid_run_is_one_sentence(folder: Path) -> None:
    extractor = transformers.AutoFeatureExtractor.from_pretrained(folder)
    with pytest.raises(ReadError, match="x cannot be read as a sound: x is no sound: .*prepare it"):
        SoundReader(extractor, ["input_features"]).read([BytesItem(b"", "x")])


def test_a_video_that_is_a_list_of_frames_is_so_many_images(tmp_path: Path) -> None:
    save_text(tmp_path)
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(png(number))

    def asked(video: Any) -> Conversation:
        content = [{"type": "video", "video": video}, _text("what is this")]
        answer = {"role": "assistant", "content": "a circle"}
        return from_messages([{"role": "user", "content": content}, answer], files_below(tmp_path))

    encoder = ChatEncoder(tmp_path, 200)
    frames = asked([f"{number}.png" for number in range(3)])
    assert [item.name for item in frames.items()] == [str(tmp_path / f"{n}.png") for n in range(3)]
    assert encoder.encode(frames).rows.tolist() == [4, 4, 4]
    with pytest.raises(SampleError, match=r"\['video'\]; give a video as the list of its frames"):
        encoder.encode(asked("film.mp4"))
