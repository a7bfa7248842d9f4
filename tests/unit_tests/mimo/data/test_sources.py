# SPDX-License-Identifier: Apache-2.0
"""Every kind of data set gives the same conversations, by number, or says what is wrong."""

from __future__ import annotations

import importlib.util
import inspect
import io
import json
import os
import sys
import tarfile
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from megatron.core.models.mimo.data import chat_jsonl, kept_arrays, llava_json, tar_shards
from megatron.core.models.mimo.data.conversation import (
    Conversation,
    FileItem,
    Part,
    SampleError,
    StretchItem,
)
from megatron.core.models.mimo.data.easy_vqa import EasyVqa
from megatron.core.models.mimo.data.llava_json import LlavaJson
from megatron.core.models.mimo.data.sources import Source, SourceError, open_source
from megatron.core.models.mimo.data.tables import Tables
from tests.unit_tests.mimo.data.small import png

pytestmark = pytest.mark.once

QUESTIONS = ["what is this", "is it red"]


def messages(number: int, *shown: Any) -> list[dict[str, Any]]:
    """Two turns each way; the first question shows what is given."""
    parts = [*shown, {"type": "text", "text": f"{QUESTIONS[0]} {number}"}]
    return [
        {"role": "user", "content": parts},
        {"role": "assistant", "content": f"answer {number}"},
        {"role": "user", "content": QUESTIONS[1]},
        {"role": "assistant", "content": "no"},
    ]


def llava(folder: Path) -> Source:
    samples = []
    for number in range(3):
        (folder / f"{number}.png").write_bytes(png(number))
        said = [m["content"] for m in messages(number)]
        said[0] = f"<image>\n{said[0][0]['text']}"
        sides = ["human", "gpt"] * 2
        turns = [{"from": side, "value": s} for side, s in zip(sides, said, strict=True)]
        samples.append({"image": f"{number}.png", "conversations": turns})
    (folder / "train.json").write_text(json.dumps(samples))
    (folder / "json").mkdir()
    (folder / "train.json").rename(folder / "json" / "train.json")
    return LlavaJson(folder / "json" / "train.json", images=folder)


def chat(folder: Path) -> Source:
    (folder / "shown").mkdir()
    lines = []
    for number in range(3):
        (folder / "shown" / f"{number}.png").write_bytes(png(number))
        part = {"type": "image", "image": f"{number}.png"}
        lines.append(json.dumps({"messages": messages(number, part)}))
    # Blank lines are no samples, and the last line need not end.
    (folder / "train.jsonl").write_text(f"{lines[0]}\n\n{lines[1]}\n  \n{lines[2]}")
    return open_source("chat", {"path": folder / "train.jsonl", "media": folder / "shown"})


def rows(*, alone: bool = False) -> datasets.Dataset:
    """An image in a list of one, or a column of images."""
    images = [{"bytes": png(number), "path": None} for number in range(3)]
    shown = images if alone else [[image] for image in images]
    talk = [messages(number, {"type": "image", "text": None}) for number in range(3)]
    for said in talk:  # a column of a table has one type
        for message in said:
            if isinstance(message["content"], str):
                message["content"] = [{"type": "text", "text": message["content"]}]
    features = {"talk": datasets.features.features.generate_from_dict(
        [{"role": {"dtype": "string", "_type": "Value"},
          "content": [{"type": {"dtype": "string", "_type": "Value"},
                       "text": {"dtype": "string", "_type": "Value"}}]}]
    ), "shown": datasets.Image() if alone else datasets.List(datasets.Image())}
    return datasets.Dataset.from_dict(
        {"talk": talk, "shown": shown}, features=datasets.Features(features)
    )


def arrow(folder: Path) -> Source:
    rows().save_to_disk(str(folder / "saved"))
    return Tables(folder / "saved", messages="talk", images="shown")


def alone(folder: Path) -> Source:
    rows(alone=True).save_to_disk(str(folder / "saved"))
    return Tables(folder / "saved", messages="talk", images="shown")


def parquet(folder: Path) -> Source:
    rows().to_parquet(str(folder / "a.parquet"))
    how = {"path": folder / "*.parquet", "messages": "talk", "images": "shown"}
    return open_source("datasets", how)


def shards(folder: Path) -> Source:
    for name, numbers in (("0.tar", (0, 1)), ("1.tar", (2,))):
        with tarfile.open(folder / name, "w") as tar:
            for number in numbers:
                said = messages(number, {"type": "image", "image": "seen.png"})
                add(tar, f"{number}.json", json.dumps({"messages": said}).encode())
                add(tar, f"{number}.seen.png", png(number))
    return open_source("webdataset", {"path": str(folder / "*.tar")})


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


KINDS = [llava, chat, arrow, alone, parquet, shards]


def words(conversation: Conversation) -> list[tuple[str, list[str]]]:
    turns = conversation.turns
    return [(turn.role, [part.kind + part.text for part in turn.parts]) for turn in turns]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize("make", KINDS, ids=lambda make: make.__name__)
def test_every_kind_gives_the_same_conversations(make: Any, tmp_path: Path) -> None:
    source = make(tmp_path)
    assert len(source) == 3
    for number in (2, 0, 1):
        found = source[number]
        assert words(found) == [
            ("user", ["image", f"textwhat is this {number}"]),
            ("assistant", [f"textanswer {number}"]),
            ("user", ["textis it red"]),
            ("assistant", ["textno"]),
        ]
        assert [item.read() for item in found.items()] == [png(number)]
    assert len(source.fingerprint()) == 16
    assert source.fingerprint() == source.fingerprint()


def test_easy_vqa_by_image_and_by_question() -> None:
    together = open_source("easy-vqa", {"split": "train"})
    assert len(together) == 4000
    assert len(together[0].items()) == 1
    assert len(together[0].turns) == 2 * len(together.questions[0])  # type: ignore[attr-defined]
    alone = open_source("easy-vqa", {"split": "test", "together": False, "images": 3})
    assert {len(alone[number].turns) for number in range(len(alone))} == {2}
    assert {len(alone[number].items()) for number in range(len(alone))} == {1}
    assert alone.fingerprint() != together.fingerprint()
    with pytest.raises(SourceError, match="no split 'dev'; it has train, test"):
        open_source("easy-vqa", {"split": "dev"})


def test_few_turns_of_easy_vqa_are_drawn_anew_for_each_sample() -> None:
    whole, few = EasyVqa("train", images=50), EasyVqa("train", images=50, turns=4, draws=6)
    assert len(few) == 300
    orders = set()
    for number, pairs in enumerate(few.questions):
        known = whole.questions[number % 50]
        assert few.image(number) == whole.image(number % 50)
        assert set(pairs) <= set(known)
        assert len(set(pairs)) == len(pairs) == min(4, len(pairs))
        opened = {answer for _, answer in known} - {"yes", "no"}
        assert sorted(a for _, a in pairs if a not in ("yes", "no")) == sorted(opened)
        orders |= {tuple(pairs)} if number % 50 == 0 else set()
    assert len(orders) > 3  # those of the first image differ
    assert few.questions == EasyVqa("train", images=50, turns=4, draws=6).questions
    assert few.fingerprint() != whole.fingerprint()
    single = EasyVqa("train", images=1, turns=1, draws=40).questions
    assert {answer for ((_, answer),) in single} == {"rectangle", "blue", "yes", "no"}
    for wrong, said in (
        ({"turns": 0}, "turns=0 has to be at least 1, with together"),
        ({"turns": 2, "together": False}, "turns=2 has to be at least 1, with together"),
        ({"draws": 2}, "draws=2 has to be at least 1, and more than one need turns"),
        ({"turns": 2, "draws": 0}, "draws=0 has to be at least 1"),
    ):
        with pytest.raises(SourceError, match=said):
            open_source("easy-vqa", {"split": "train", **wrong})


@pytest.mark.parametrize(
    ("kind", "settings", "said"),
    [
        ("csv", {}, "'csv' is no kind of data; the kinds are llava, chat, datasets"),
        ("chat", {"paths": "x"}, "unexpected keyword argument 'paths'"),
        ("chat", {"path": "/nowhere.jsonl"}, "/nowhere.jsonl cannot be read: No such file"),
        ("llava", {"path": "/nowhere.json"}, "/nowhere.json cannot be read: No such file"),
        ("webdataset", {"path": "/nowhere-*.tar"}, "no tar is called /nowhere"),
        ("datasets", {"path": "/nowhere"}, "neither a folder of save_to_disk, with state.json"),
    ],
)
def test_what_is_not_there_is_named(kind: str, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(SourceError, match=said):
        open_source(kind, settings)


@pytest.mark.parametrize(
    ("kind", "package", "said"),
    [
        ("easy-vqa", "easy_vqa", r"the package is missing: easy_vqa; pip install 'easy-vqa>="),
        ("datasets", "datasets", r"a\.tar needs the package datasets: pip install 'megatron-"),
        ("webdataset", "wids.wids_mmtar", r"a\.tar needs the package webdataset: pip install 'm"),
    ],
)
def test_a_package_that_is_not_installed_is_named(
    kind: str, package: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.tar").write_bytes(b"")
    how = {"split": "train"} if kind == "easy-vqa" else {"path": str(tmp_path / "a.tar")}
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *of: None if name == package else find(name, *of)
    )
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SourceError, match=said):
        open_source(kind, how)


def test_files_of_another_kind_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"x" * 600)
    with pytest.raises(SourceError, match=r"a\.tar is no tar"):
        open_source("webdataset", {"path": str(tmp_path / "a.tar")})
    datasets.Dataset.from_dict({"x": [1]}).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(SourceError, match="has no column 'messages'; it has x"):
        open_source("datasets", {"path": tmp_path / "saved"})


LINES = {
    "{": "Expecting property name",
    "[]": "has no messages",
    # Text and lists may have the word in them.
    **dict.fromkeys(("3", "null", '"messages"', '["messages"]'), "has no messages"),
    '{"messages": 3}': "messages is no list but int",
    '{"messages": []}': "a conversation has no turn",
    '{"messages": [{"role": "user"}]}': "a message needs role and content",
    '{"messages": [{"role": "tool", "content": "x"}]}': "role 'tool' is not known",
    '{"messages": [{"role": "user", "content": 3}]}': "content is text or a list of parts",
    '{"messages": [{"role": "user", "content": [{"type": "smell"}]}]}': "a part is text, or image",
    '{"messages": [{"role": "user", "content": [{"type": "image"}]}]}': "image names no file",
    '{"messages": [{"role": "user", "content": [{"type": "image", "url": "http://x"}]}]}':
        "image names no file",
}  # fmt: skip


def test_samples_that_are_malformed_say_why(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(LINES))
    source = open_source("chat", {"path": file})
    assert len(source) == len(LINES)
    for number, said in enumerate(LINES.values()):
        with pytest.raises(SampleError, match=said) as caught:
            source[number]
        assert caught.value.reason == "malformed"


def test_images_that_do_not_fit_their_places_are_malformed(tmp_path: Path) -> None:
    file, talk = tmp_path / "a.json", [{"from": "human", "value": "<image> <image>"}]
    shown = (["a"], ["a"] * 3)
    file.write_text(json.dumps([{"image": images, "conversations": talk} for images in shown]))
    source = open_source("llava", {"path": file})
    wrong = ["more <image> than there are images", "more images than <image>"]
    for number, said in enumerate(wrong):
        with pytest.raises(SampleError, match=said):
            source[number]


def test_every_setting_of_a_source_is_in_its_fingerprint(tmp_path: Path) -> None:
    """Or what was prepared with other images would be taken."""
    (tmp_path / "a.json").write_text("[]")
    (tmp_path / "a.jsonl").write_text("")
    columns = {name: ["x"] for name in ("messages", "images", "talk", "shown")}
    datasets.Dataset.from_dict(columns).to_parquet(str(tmp_path / "a.parquet"))
    asked: dict[str, Any] = {"split": "train", "images": 5}
    # Class, settings that stay, settings that change one at a time.
    sources: list[tuple[Any, dict[str, Any], dict[str, Any]]] = [
        (LlavaJson, {"path": tmp_path / "a.json"}, {"images": tmp_path / "other"}),
        (chat_jsonl.ChatJsonl, {"path": tmp_path / "a.jsonl"}, {"media": tmp_path / "other"}),
        (Tables, {"path": tmp_path / "a.parquet"}, {"messages": "talk", "images": "shown"}),
        (EasyVqa, asked, {"split": "test", "images": 6, "together": False, "turns": 2}),
        (EasyVqa, {**asked, "turns": 2}, {"turns": 3, "draws": 2}),
    ]
    known: dict[Any, set[str]] = {}
    for kind, given, settings in sources:
        known.setdefault(kind, set()).update(given, settings)
        usual = kind(**given).fingerprint()
        for name, value in settings.items():
            assert kind(**{**given, name: value}).fingerprint() != usual, (kind, name)
        assert kind(**given).fingerprint() == usual
    for kind, names in known.items():
        assert names == inspect.signature(kind).parameters.keys()


def test_images_of_a_table_that_its_messages_do_not_show_are_malformed(tmp_path: Path) -> None:
    shown = [{"role": "user", "content": [{"type": "image"}]}]
    image = {"bytes": b"x", "path": None}
    table = datasets.Dataset.from_dict({"messages": [shown] * 2, "images": [[image] * 2, []]})
    table.to_parquet(str(tmp_path / "a.parquet"))
    source = open_source("datasets", {"path": tmp_path / "a.parquet"})
    wrong = ["row 0 has more images than its messages show", "show more images than the row has"]
    for number, said in enumerate(wrong):
        with pytest.raises(SampleError, match=said):
            source[number]


@pytest.mark.parametrize(
    ("shown", "column", "said"),
    [
        ({"type": "image"}, [{"bytes": None, "path": None}], "image 0 of row 0 has no bytes, no p"),
        ({"type": "image"}, ["a.png"], "image 0 of row 0 has no bytes, no path"),
        ({"type": "image"}, "a.png", "image 0 of row 0 has no bytes, no path"),
        ({"type": "image"}, 5, "image 0 of row 0 has no bytes, no path"),
        ({"type": "audio"}, [], "a table shows its images column, got audio None"),
        ({"type": "image", "image": "a.png"}, [], "shows its images column, got image 'a.png'"),
    ],
)
def test_a_table_of_other_columns_says_what_it_takes(
    shown: dict[str, Any], column: Any, said: str, tmp_path: Path
) -> None:
    talk = [{"role": "user", "content": [shown]}]
    table = datasets.Dataset.from_dict({"messages": [talk], "images": [column]})
    table.to_parquet(str(tmp_path / "a.parquet"))
    with pytest.raises(SampleError, match=said) as caught:
        open_source("datasets", {"path": tmp_path / "a.parquet"})[0]
    assert caught.value.reason == "malformed"


def test_images_of_a_table_may_be_paths(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(1))
    talk = [{"role": "user", "content": [{"type": "image"}]}]
    for column in ([{"path": str(tmp_path / "a.png")}], {"path": str(tmp_path / "a.png")}):
        table = datasets.Dataset.from_dict({"messages": [talk], "images": [column]})
        table.to_parquet(str(tmp_path / "a.parquet"))
        found = open_source("datasets", {"path": tmp_path / "a.parquet"})[0]
        assert [item.read() for item in found.items()] == [png(1)]


@pytest.mark.parametrize(
    ("part", "said"),
    [
        (("smell", "", None), "a part of kind 'smell'; the kinds are text, image"),
        (("image", "", None), "a part of kind image has text or an item, alone"),
        (("image", "red", FileItem(Path("a"))), "a part of kind image has text or an item, alone"),
        (("text", "", FileItem(Path("a"))), "a part of kind text has text or an item, alone"),
    ],
)
def test_parts_of_a_source_of_ones_own_are_checked(part: Any, said: str) -> None:
    with pytest.raises(SampleError, match=said) as caught:
        Part(*part)
    assert caught.value.reason == "malformed"


LLAVA = (
    ({"image": 5}, {}, "image is a name or a list of names, got 5"),
    ({"image": [5]}, {}, r"image is a name or a list of names, got \[5\]"),
    ({"image": {"a": "b"}}, {}, "image is a name or a list of names, got {"),
    ({}, {"from": ["human"]}, r"needs from and value, got {'from': \['human'\]"),
    ({}, {"value": 3}, "needs from and value"),
    ({"conversations": "hello"}, {}, "sample 0 has no list of conversations"),
)


@pytest.mark.parametrize(("sample", "turn", "said"), LLAVA)
def test_llava_samples_that_are_malformed_say_why(
    tmp_path: Path, sample: dict[str, Any], turn: dict[str, Any], said: str
) -> None:
    file, whole = tmp_path / "a.json", {"from": "human", "value": "<image>x", **turn}
    file.write_text(json.dumps([{"image": "a.png", "conversations": [whole], **sample}]))
    with pytest.raises(SampleError, match=said) as caught:
        open_source("llava", {"path": file})[0]
    assert caught.value.reason == "malformed"


SAMPLES_OF_SHARDS = {
    json.dumps({"messages": messages(0, {"type": "image", "image": ["seen.png"]})}):
        r"image \['seen.png'\] is no member; there are json",
    "[]": r"0\.json.* has no messages",
    "{": r"0\.json.*: Expecting property name",
    "\udcff": r"0\.json.*: 'utf-8' codec can't decode",
}  # fmt: skip


@pytest.mark.parametrize("sample", SAMPLES_OF_SHARDS)
def test_samples_of_shards_that_are_malformed_say_why(sample: str, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "0.json", sample.encode(errors="surrogateescape"))
    with pytest.raises(SampleError, match=SAMPLES_OF_SHARDS[sample]) as caught:
        open_source("webdataset", {"path": str(tmp_path / "a.tar")})[0]
    assert caught.value.reason == "malformed"


def _kept_chat(folder: Path) -> tuple[Any, dict[str, Any], Path]:
    chat(folder)
    return chat_jsonl, {"path": folder / "train.jsonl", "media": folder / "shown"}, folder


def _kept_llava(folder: Path) -> tuple[Any, dict[str, Any], Path]:
    llava(folder)
    return llava_json, {"path": folder / "json" / "train.json", "images": folder}, folder / "json"


def _kept_shards(folder: Path) -> tuple[Any, dict[str, Any], Path]:
    shards(folder)
    return tar_shards, {"path": str(folder / "*.tar")}, folder


FINDERS = {
    "chat": ("find_lines", _kept_chat),
    "llava": ("find_elements", _kept_llava),
    "webdataset": ("_found", _kept_shards),
}


@pytest.mark.parametrize("kind", FINDERS)
def test_where_samples_lie_is_found_again_only_when_files_have_changed(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, make = FINDERS[kind]
    module, settings, folder = make(tmp_path)
    searched: list[Any] = []
    find = getattr(module, name)
    monkeypatch.setattr(module, name, lambda of: searched.append(of) or find(of))

    def opened() -> list[Any]:
        source = open_source(kind, settings)
        return [words(source[number]) for number in range(len(source))]

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    first = opened()
    assert list(folder.glob("*.index")) == [], "just written, it may still be"
    monkeypatch.setattr(kept_arrays, "SETTLED_NS", -(10**9))
    assert opened() == first
    (beside,) = folder.glob("*.index")
    assert len(searched) == 2
    assert opened() == first
    assert len(searched) == 2
    # As long as before, and as old, but another file.
    file = Path(str(settings["path"]).replace("*", "0"))
    content, size = file.read_bytes(), file.stat().st_size
    os.utime(file, (1e9, 1e9))
    opened()
    file.write_bytes(content.replace(b"this 0", b"that 0"))
    os.utime(file, (1e9, 1e9))
    assert file.stat().st_size == size
    assert opened() != first
    assert len(searched) == 4
    file.write_bytes(content)
    assert opened() == first
    # What is cut short, or was made of it in another way, is no help.
    for wrong in (beside.read_bytes()[:-8], b"cut short", b""):
        beside.write_bytes(wrong)
        assert opened() == first
    assert len(searched) == 8
    # Beside the data nothing can be written: the user's cache has it.
    beside.unlink()
    beside.mkdir()
    assert opened() == first
    assert opened() == first
    assert len(searched) == 9
    assert len(list((tmp_path / "cache" / "mimo-colocated").iterdir())) == 1
    assert list(tmp_path.rglob(".*")) == []


def test_a_file_that_is_read_in_two_ways_is_found_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept_arrays, "SETTLED_NS", -(10**9))
    file = tmp_path / "a.json"
    file.write_text('[{"conversations":\n[]}, {"conversations":\n[]}]')
    for _ in range(2):
        assert len(open_source("llava", {"path": file})) == 2
        assert len(open_source("chat", {"path": file})) == 3
    (tmp_path / "none.json").write_text("[]")
    for _ in range(2):  # kept as well
        assert len(open_source("llava", {"path": tmp_path / "none.json"})) == 0
    assert (tmp_path / "none.json.index").is_file()
    # Not a file of ours: nothing of it is run.
    with (tmp_path / "none.json.index").open("wb") as index:
        np.save(index, np.array([Bomb()], dtype=object))
    assert len(open_source("llava", {"path": tmp_path / "none.json"})) == 0


class Bomb:
    def __reduce__(self) -> Any:
        return pytest.fail, ("unpickled",)


ELEMENTS = [
    {"number": n, "said": 'ü"\\]}[{' * (n % 5) + "\U0001f600"} if n % 3 else n for n in range(30)
]


@pytest.mark.parametrize("how", [{}, {"indent": 1}, {"ensure_ascii": False}])
def test_elements_that_cross_blocks_are_found(
    how: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a.json"
    for wanted in (ELEMENTS, []):
        file.write_text(json.dumps(wanted, **how) + "\n \n", encoding="utf-8")
        content = file.read_bytes()
        for block in (1, 7, 1 << 20):
            monkeypatch.setattr(llava_json, "_BLOCK", block)
            found = llava_json.find_elements(file)
            assert found.dtype == np.int64
            assert [json.loads(content[start:stop]) for start, stop in found.tolist()] == wanted


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", r"Expecting '\[', byte 0"),
        ("{}", r"Expecting '\[', byte 0"),
        ("[1", r"Expecting ',' or '\]', byte 2"),
        ("[1, ]", "Expecting value, byte 4"),
        ("[1 2]", "Expecting ',', byte 3"),
        ('[1, "a]', "Unterminated string starting at, byte 4"),
        ("[nul]" + " " * 99, "Expecting value, byte 1"),
        ("[1]\n[2]", "more follows where its list ends"),
    ],
)
def test_what_is_no_list_is_refused(content: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text(content)
    with pytest.raises(SourceError, match=rf"a\.json is no JSON list of conversations: {said}"):
        open_source("llava", {"path": file})


def test_lines_that_cross_blocks_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.jsonl"
    lines = ["x" * length for length in (5, 1, 12, 7, 8)]
    file.write_text("\n".join(lines))
    for block in (1, 3, 8, 1 << 20):
        monkeypatch.setattr(chat_jsonl, "_BLOCK", block)
        found = chat_jsonl.find_lines(file)
        content = file.read_text()
        assert [content[start:stop] for start, stop in found.tolist()] == lines
    file.write_text("")
    assert chat_jsonl.find_lines(file).shape == (0, 2)
    assert chat_jsonl.find_lines(file).dtype == np.int64


def test_items_that_cannot_be_read_say_so(tmp_path: Path) -> None:
    with pytest.raises(SampleError, match=r"nothing\.png cannot be read: No such file"):
        FileItem(tmp_path / "nothing.png").read()
    for name, said in (("a\0.png", "embedded null"), ("\ud800.png", "surrogates not allowed")):
        with pytest.raises(SampleError, match=f"cannot be read: .*{said}") as caught:
            FileItem(tmp_path / name).read()
        assert caught.value.reason == "unreadable"
    (tmp_path / "short").write_bytes(b"12345")
    assert StretchItem(tmp_path / "short", 1, 3, "a").read() == b"234"
    with pytest.raises(SampleError, match="a of .*short has 4 of its 9 bytes"):
        StretchItem(tmp_path / "short", 1, 9, "a").read()
