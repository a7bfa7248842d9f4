# SPDX-License-Identifier: Apache-2.0
"""What is prepared is what was encoded; skipped samples are counted by reason."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron.core.models.mimo.data.conversation import (
    Conversation,
    FileItem,
    Part,
    SampleError,
    Turn,
    text,
)
from megatron.core.models.mimo.data.encoding import ChatEncoder
from megatron.core.models.mimo.data.order import Order
from megatron.core.models.mimo.data.prepared import (
    Prepared,
    encode_piece,
    is_current,
    known_key,
)
from megatron.core.models.mimo.data.sources import SourceError
from megatron.core.models.mimo.data.stream import BatchSize, SampleStream
from tests.unit_tests.mimo.data.small import ROWS, Listed, image, png, said, save, save_text

pytestmark = pytest.mark.once


def broken(folder: Path) -> Conversation:
    (folder / "broken.png").write_bytes(b"no image")
    return Conversation(said([Part("image", "", FileItem(folder / "broken.png"))], "yes"))


def samples(folder: Path) -> list[Conversation | SampleError]:
    return [
        Conversation(said(["what is this", image(1), image(2)], "a circle")),
        Conversation(said(["red " * 300], "no")),
        SampleError("malformed", "no list"),
        Conversation(said(["is it red"], "no")),
        Conversation((Turn("user", (text("what"),)),)),
        broken(folder),
        Conversation(said([image(3), "what is it"], "a red square")),
    ]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("prepared")


@pytest.fixture(scope="module")
def encoder(place: Path) -> ChatEncoder:
    save_text(place / "text")
    return ChatEncoder(place / "text", 100)


@pytest.fixture(scope="module")
def prepared(place: Path, encoder: ChatEncoder) -> Prepared:
    source = Listed(samples(place))
    pieces = [
        encode_piece(source, encoder.encode, numbers, look=True)
        for numbers in (range(3), range(3, 4), range(4, 4), range(4, 7))
    ]
    save(place / "made", pieces, "a key")
    return Prepared(place / "made")


def test_what_is_kept_is_what_was_encoded(
    place: Path, encoder: ChatEncoder, prepared: Prepared
) -> None:
    assert prepared.numbers.tolist() == [0, 3, 6]
    source = Listed(samples(place))
    for number, at in enumerate(prepared.numbers.tolist()):
        wanted = encoder.encode(source[at])
        ids, learned = prepared.tokens(number)
        assert ids.tolist() == wanted.input_ids.tolist()
        assert learned.tolist() == wanted.learned.tolist()
        found = prepared.items(np.array([number]))
        assert (found.rows.tolist(), found.counts.tolist()) == (
            wanted.rows.tolist(), [len(wanted.rows)])  # fmt: skip
        assert prepared.lengths(np.array([number])).tolist() == [len(ids)]
    assert prepared.items(np.array([2, 1, 0])).rows.tolist() == [ROWS] * 3
    assert prepared.items(np.array([2, 1, 0])).counts.tolist() == [1, 0, 2]


def test_every_reason_is_counted(prepared: Prepared) -> None:
    reasons = ("malformed", "unreadable", "too_long", "no_supervision")
    assert prepared.skipped == dict.fromkeys(reasons, 1)
    assert "sample 1 is too_long: " in prepared.first_skipped


def test_images_are_looked_at_only_where_that_is_wanted(place: Path, encoder: ChatEncoder) -> None:
    piece = encode_piece(Listed([broken(place)]), encoder.encode, [0], look=False)
    assert piece.first == ""
    piece = encode_piece(Listed([broken(place)]), encoder.encode, [0], look=True)
    assert "sample 0 is unreadable: " in piece.first


def test_a_folder_is_known_by_its_key_and_replaced_whole(
    place: Path, encoder: ChatEncoder, prepared: Prepared
) -> None:
    assert known_key(place / "made") == "a key"
    assert known_key(place / "nothing") is None
    piece = encode_piece(Listed(samples(place)[:1]), encoder.encode, [0], look=True)
    for key in ("first", "second"):
        save(place / "again", [piece], key)
        assert known_key(place / "again") == key
    assert len(Prepared(place / "again")) == 1
    assert [path.name for path in place.glob(".*")] == []


def test_what_was_unreadable_is_tried_again(tmp_path: Path, encoder: ChatEncoder) -> None:
    """Images that are fetched later are trained on, though no file of text has changed."""
    late = Conversation(said([Part("image", "", FileItem(tmp_path / "late.png"))], "yes"))
    source = Listed([samples(tmp_path)[0], late, samples(tmp_path)[2], broken(tmp_path)])
    save(tmp_path / "made", [encode_piece(source, encoder.encode, range(4), look=True)], "key")
    how = {"key": "key", "source": source, "encode": encoder.encode, "look": True}
    assert is_current(tmp_path / "made", **how)
    assert not is_current(tmp_path / "made", **{**how, "key": "another"})
    assert not is_current(tmp_path / "nothing", **how)
    (tmp_path / "late.png").write_bytes(png(1))
    assert not is_current(tmp_path / "made", **how)
    save(tmp_path / "made", [encode_piece(source, encoder.encode, range(4), look=True)], "key")
    assert is_current(tmp_path / "made", **how)
    assert Prepared(tmp_path / "made").numbers.tolist() == [0, 1]


def test_data_of_which_nothing_is_kept_is_refused(place: Path, encoder: ChatEncoder) -> None:
    piece = encode_piece(Listed(samples(place)[1:2]), encoder.encode, [0], look=True)
    save(place / "none", [piece], "key")
    with pytest.raises(SourceError, match=r"no sample of 1 is kept: \{'too_long': 1\}; sample 0"):
        Prepared(place / "none")


def test_batches_hold_a_number_of_samples_or_fill_sequences(prepared: Prepared) -> None:
    order = Order((3,), (1.0,), 5)
    lengths = prepared.lengths(np.arange(3))
    stream = SampleStream(order, [prepared], BatchSize(4, 0, 0, 1))
    first, second = stream.batch(0), stream.batch(4)
    assert (first.start, first.stop, second.stop) == (0, 4, 8)
    assert first.lengths.tolist() == lengths[first.samples].tolist()
    # Sequences of 64 tokens, filled until one sample has no room.
    filled = SampleStream(order, [prepared], BatchSize(0, 2, 64, 4))
    at, taken = 0, []
    for _ in range(5):
        batch = filled.batch(at)
        whole = -(-batch.lengths // 4) * 4
        assert whole.sum() <= 2 * 64
        taken += batch.samples.tolist()
        at = batch.stop
    assert taken == order.at(0, at)[1].tolist(), "none twice, none left out"
    # A sequence that holds more samples than are looked at together.
    longest = -(-int(lengths.max()) // 4) * 4
    batch = SampleStream(order, [prepared], BatchSize(0, 1, 100 * longest, 4)).batch(0)
    assert len(batch.samples) >= 100
    beyond = prepared.lengths(order.at(batch.stop, 1)[1])
    assert (-(-batch.lengths // 4) * 4).sum() <= 100 * longest
    assert (-(-np.append(batch.lengths, beyond) // 4) * 4).sum() > 100 * longest
