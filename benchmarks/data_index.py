# SPDX-License-Identifier: Apache-2.0
"""What it takes a rank to open data sets of a million samples.

Each cell is one kind and one size, opened in a process of its own, forked when all is imported:

* ``found_s``: opened for the first time, which one rank does and keeps beside the data.
* ``open_s``: opened as every rank does then, its fingerprint and a hundred samples read; of
  ``prepared``, what a run maps, with the order of its samples and the first global batch.
* ``open_MB``: what that adds to the largest memory of the process, pages of mapped files included.

Bounds: 2 s and 300 MB at every size. ``growth`` is ``open_s`` over that of a tenth of the samples.
"""

from __future__ import annotations

import importlib
import json
import os
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.scale import Watch, apart, peak_megabytes
from megatron.core.models.mimo.data import kept_arrays, sources
from megatron.core.models.mimo.data.order import Order
from megatron.core.models.mimo.data.prepared import Piece, Prepared, keep, write
from megatron.core.models.mimo.data.stream import BatchSize, SampleStream
from megatron.core.models.mimo.data.token_files import TokenFiles

SIZES, QUICK = (100_000, 1_000_000), (2_000, 20_000)
SECONDS, MEGABYTES = 2.0, 300
_READ, _BATCH, _PER_SHARD, _TOKENS = 100, 8192, 1000, 24
COLUMNS = {
    "kind": "kind",
    "samples": "samples",
    "found_s": "first opening s",
    "open_s": "opening s",
    "open_MB": "its peak MB",
    "growth": "growth",
    "passed": "",
}


def run(quick: bool = False) -> Iterator[dict[str, Any]]:
    """A cell per kind and size, ascending."""
    _import()
    for kind in _KINDS:
        before: dict[str, Any] | None = None
        for samples in QUICK if quick else SIZES:
            with tempfile.TemporaryDirectory() as folder:
                settings = apart(_written, (kind, Path(folder), samples))
                # A file that has just been written may still be, so nothing of it is kept.
                time.sleep(kept_arrays.SETTLED_NS / 1e9)
                first = apart(_opened, (kind, settings, samples))
                again = apart(_opened, (kind, settings, samples))
            cell = {"kind": kind, "samples": samples, "found_s": first["open_s"], **again}
            cell["growth"] = before and round(cell["open_s"] / max(before["open_s"], 1e-4), 2)
            cell["passed"] = cell["open_s"] < SECONDS and cell["open_MB"] < MEGABYTES
            before = cell
            yield cell


def _import() -> None:
    """Import what opens and reads data sets, which takes its time once in any process."""
    import datasets
    import wids.wids_mmtar  # noqa: F401

    datasets.disable_progress_bars()
    for file, _ in sources.KINDS.values():
        importlib.import_module(f"{sources.__package__}.{file}")


def _written(given: tuple[str, Path, int]) -> dict[str, Any]:
    kind, folder, samples = given
    return _KINDS[kind](folder, samples)


def _opened(given: tuple[str, dict[str, Any], int]) -> dict[str, Any]:
    kind, settings, samples = given
    memory, watch = peak_megabytes(), Watch()
    if kind == "prepared":
        found = _first_batch(Path(settings["path"]))
    elif kind == "tokens":
        found = len(TokenFiles(**settings, vocabulary=100))
    else:
        source = sources.open_source(kind, settings)
        found = len(source)
        source.fingerprint()
        for number in np.random.default_rng(1).integers(found, size=_READ).tolist():
            assert source[number].turns
    assert found == samples, f"{found} of {samples} samples of kind {kind}"
    return {"open_s": watch.lap(), "open_MB": round(peak_megabytes() - memory, 1)}


def _first_batch(folder: Path) -> int:
    prepared = Prepared(folder)
    order = Order((len(prepared),), (1.0,), 1)
    stream = SampleStream(order, [prepared], BatchSize(min(_BATCH, len(prepared)), 0, 0, 1))
    stream.items(stream.batch(0))
    return len(prepared)


# ---- data sets of the sizes of people's --------------------------------------------------------


def _messages(number: int) -> list[dict[str, str]]:
    asked = f"Which of the coloured shapes in picture {number} is the largest one, and where is it?"
    return [
        {"role": "user", "content": asked},
        {"role": "assistant", "content": f"The blue circle in row {number % 7} is the largest."},
    ]


def _write_llava(folder: Path, samples: int) -> dict[str, Any]:
    sides = {"user": "human", "assistant": "gpt"}
    with (folder / "a.json").open("w") as file:
        for number in range(samples):
            said = [{"from": sides[m["role"]], "value": m["content"]} for m in _messages(number)]
            sample = {"id": number, "conversations": said}
            file.write(("," if number else "[") + json.dumps(sample))
        file.write("]")
    return {"path": folder / "a.json"}


def _write_chat(folder: Path, samples: int) -> dict[str, Any]:
    with (folder / "a.jsonl").open("w") as file:
        for number in range(samples):
            file.write(json.dumps({"messages": _messages(number)}) + "\n")
    return {"path": folder / "a.jsonl"}


def _write_table(folder: Path, samples: int) -> dict[str, Any]:
    import datasets
    import pyarrow

    said = [message for number in range(samples) for message in _messages(number)]
    parts = [pyarrow.array([each[name] for each in said]) for name in ("role", "content")]
    talk = pyarrow.StructArray.from_arrays(parts, names=["role", "content"])
    starts = pyarrow.array(np.arange(0, 2 * samples + 1, 2, dtype=np.int32))
    column = pyarrow.ListArray.from_arrays(starts, talk)
    table = datasets.Dataset(pyarrow.table({"messages": column}))
    table.save_to_disk(str(folder / "saved"))
    return {"path": folder / "saved"}


def _write_shards(folder: Path, samples: int) -> dict[str, Any]:
    """One tar, and links to it: its headers are read for each."""
    first = folder / "0000.tar"
    with tarfile.open(first, "w") as tar:
        for number in range(_PER_SHARD):
            content = json.dumps({"messages": _messages(number)}).encode()
            for extension, held in (("json", content), ("png", b"no image")):
                member = tarfile.TarInfo(f"{number:08d}.{extension}")
                member.size = len(held)
                tar.addfile(member, BytesIO(held))
    for shard in range(1, samples // _PER_SHARD):
        os.link(first, folder / f"{shard:04d}.tar")
    return {"path": str(folder / "*.tar")}


def _write_tokens(folder: Path, samples: int) -> dict[str, Any]:
    np.zeros(samples * _TOKENS + 1, dtype=np.uint16).tofile(folder / "a.bin")
    return {"path": folder / "a.bin", "length": _TOKENS}


def _write_prepared(folder: Path, samples: int) -> dict[str, Any]:
    tokens = samples * _TOKENS
    piece = Piece(
        ids=np.ones(tokens, dtype=np.int32),
        learned=np.ones(tokens, dtype=bool),
        lengths=np.full(samples, _TOKENS),
        rows=np.full(samples, 4, dtype=np.int32),
        grids=np.zeros((samples, 3), dtype=np.int32),
        items=np.ones(samples, dtype=np.int64),
        reasons=np.zeros(samples, dtype=np.uint8),
        first="",
    )
    keep(piece, folder / "piece")
    write(folder / "made", [folder / "piece"], "key")
    return {"path": folder / "made"}


_KINDS: dict[str, Callable[[Path, int], dict[str, Any]]] = {
    "llava": _write_llava,
    "chat": _write_chat,
    "datasets": _write_table,
    "webdataset": _write_shards,
    "tokens": _write_tokens,
    "prepared": _write_prepared,
}
