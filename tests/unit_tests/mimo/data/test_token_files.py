# SPDX-License-Identifier: Apache-2.0
"""Token files: each token but the first is learned once, whatever the length of a sample."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron.core.models.mimo.data.sources import SourceError
from megatron.core.models.mimo.data.token_files import TokenFiles

pytestmark = pytest.mark.once


@pytest.fixture
def files(tmp_path: Path) -> Path:
    for name, count in (("a", 21), ("b", 11)):
        tokens = np.arange(count, dtype=np.uint16) + (100 if name == "b" else 0)
        tokens.tofile(tmp_path / f"{name}.bin")
    return tmp_path


@pytest.mark.parametrize("length", [1, 4, 5])
def test_every_token_is_learned_once(files: Path, length: int) -> None:
    source = TokenFiles(files / "*.bin", length, 200)
    assert len(source) == 20 // length + 10 // length
    learned: list[int] = []
    for sample in range(len(source)):
        ids, mask = source.tokens(sample)
        assert len(ids) == length + 1
        assert mask.all()
        assert np.array_equal(np.diff(ids), np.ones(length)), "one file, in order"
        learned += ids[1:].tolist()
        assert source.items(np.array([sample])).counts.tolist() == [0]
        assert source.grids(sample).shape == (0, 3)
    last = 10 // length * length
    assert learned == [*range(1, 20 // length * length + 1), *range(101, 101 + last)]
    assert source.lengths(np.arange(3)).tolist() == [length + 1] * 3
    assert source.numbers.tolist() == list(range(len(source)))
    assert source.skipped == {}
    with pytest.raises(IndexError, match=f"sample {len(source)} is not in 0"):
        source.tokens(len(source))
    other = TokenFiles(files / "*.bin", length + 1, 200)
    assert other.fingerprint() != source.fingerprint()


def test_files_that_do_not_fit_are_refused(files: Path) -> None:
    with pytest.raises(SourceError, match=r"no file of tokens is called .*none\.bin"):
        TokenFiles(files / "none.bin", 4, 200)
    with pytest.raises(SourceError, match=r"b\.bin has 22 bytes, which is not two .* of 12 tokens"):
        TokenFiles(files / "b.bin", 11, 200)
    (files / "odd.bin").write_bytes(b"123")
    with pytest.raises(SourceError, match=r"odd\.bin has 3 bytes"):
        TokenFiles(files / "odd.bin", 1, 200)
    with pytest.raises(SourceError, match="length=0 and a vocabulary of 200"):
        TokenFiles(files / "a.bin", 0, 200)
    with pytest.raises(SourceError, match="uint16 counts up to 65536"):
        TokenFiles(files / "a.bin", 4, 70_000)
    with pytest.raises(SourceError, match=r"b\.bin has token 105 near 0, .* vocabulary has 105"):
        TokenFiles(files / "b.bin", 5, 105).tokens(0)
