# SPDX-License-Identifier: Apache-2.0
"""Tokens are those of transformers' processor; answers are learned, and nothing else."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import transformers
from PIL import Image
from transformers import AutoTokenizer

from megatron.core.models.mimo.data.conversation import (
    BytesItem,
    Conversation,
    FileItem,
    Part,
    SampleError,
    Turn,
    text,
)
from megatron.core.models.mimo.data.encoding import ChatEncoder, TemplateError
from mimo_colocated.train.easy_vqa_model import train_tokenizer
from tests.unit_tests.mimo.data.small import (
    PATCH,
    ROWS,
    SIDE,
    TEMPLATE,
    image,
    png,
    said,
    save_text,
)

pytestmark = pytest.mark.once

SEVERAL = Conversation(
    (
        Turn("system", (text("it is a circle"),)),
        *said([image(1), "what is this"], "a red circle"),
        *said(["is it red", image(2), image(3)], "yes"),
    )
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("text")
    save_text(place)
    return place


@pytest.fixture(scope="module")
def encoder(folder: Path) -> ChatEncoder:
    return ChatEncoder(folder, 200)


@pytest.fixture(scope="module", params=["nothing", "added", "written"])
def begun(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ChatEncoder:
    """Of texts that begin with nothing, a token of the tokenizer's, or one of the template's."""
    place = tmp_path_factory.mktemp("begun")
    template = "{{ bos_token }}" * (request.param == "written") + TEMPLATE
    save_text(place, template, opening="" if request.param == "nothing" else "<s>")
    return ChatEncoder(place, 200)


def theirs(encoder: ChatEncoder, conversation: Conversation, **how: bool) -> list[int]:
    """What transformers makes of the same messages, images and all."""
    messages = [
        {
            "role": turn.role,
            "content": [
                {"type": "text", "text": part.text}
                if part.item is None
                else {"type": "image", "image": Image.open(io.BytesIO(part.item.read()))}
                for part in turn.parts
            ],
        }
        for turn in conversation.turns
    ]
    processor = encoder.places._processor
    made = processor.apply_chat_template(messages, tokenize=True, return_dict=True, **how)
    return np.array(made["input_ids"]).reshape(-1).tolist()


def test_tokens_are_those_of_transformers(begun: ChatEncoder) -> None:
    found = begun.encode(SEVERAL)
    whole = theirs(begun, SEVERAL)
    # The line break after the last answer is not learned, and is kept.
    assert found.input_ids.tolist() == whole
    assert found.rows.tolist() == [ROWS] * 3
    places = found.input_ids == begun.tokenizer.convert_tokens_to_ids("<image>")
    assert places.sum() == 3 * ROWS


def test_answers_are_learned_up_to_their_end_and_nothing_else(begun: ChatEncoder) -> None:
    found = begun.encode(SEVERAL)
    spoken = begun.tokenizer.decode(found.input_ids[found.learned])
    assert spoken == "a red circle<|im_end|>yes<|im_end|>"


# As LLaVA-1.5's: an answer is followed by a blank, and by nothing that ends it.
ENDLESS = (
    "{% for m in messages %}{{ m.role | upper }}: {% for p in m.content %}"
    "{% if p.type == 'image' %}<image>{% else %}{{ p.text }}{% endif %}{% endfor %} {% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def test_the_end_of_an_answer_is_that_of_the_template(tmp_path: Path) -> None:
    """A base model's tokenizer ends texts in another way than its chat template ends answers."""
    save_text(tmp_path, end="<|endoftext|>")
    encoder = ChatEncoder(tmp_path, 200)
    assert encoder.end == encoder.tokenizer.convert_tokens_to_ids("<|im_end|>")
    found = encoder.encode(SEVERAL)
    spoken = encoder.tokenizer.decode(found.input_ids[found.learned])
    assert spoken == "a red circle<|im_end|>yes<|im_end|>"
    assert found.input_ids.tolist() == theirs(encoder, SEVERAL)


def test_an_answer_that_a_template_does_not_end_is_ended(tmp_path: Path) -> None:
    """All is as transformers writes it; behind it the last answer ends, so a model learns to."""
    save_text(tmp_path, ENDLESS, opening="<s>")
    encoder = ChatEncoder(tmp_path, 200)
    found = encoder.encode(SEVERAL)
    spoken = encoder.tokenizer.decode(found.input_ids[found.learned])
    assert spoken == " a red circle yes<|im_end|>"
    assert encoder.end == encoder.tokenizer.eos_token_id == found.input_ids[-1]
    asked = Conversation(SEVERAL.turns[:-1])
    prompt = theirs(encoder, asked, add_generation_prompt=True)
    assert encoder.prompt(asked).input_ids.tolist() == prompt
    assert found.input_ids[: len(prompt)].tolist() == prompt
    assert encoder.tokenizer.decode(found.input_ids[len(prompt) :]) == " yes<|im_end|>"
    # What is said after the last answer stays unlearned, and the end stands behind the answer.
    on = encoder.encode(Conversation((*SEVERAL.turns, Turn("user", (text("what"),)))))
    assert encoder.tokenizer.decode(on.input_ids[on.learned]) == " a red circle yes"


def test_a_question_ends_where_an_answer_begins(begun: ChatEncoder) -> None:
    asked = Conversation(SEVERAL.turns[:-1])
    found = begun.prompt(asked)
    assert found.input_ids.tolist() == theirs(begun, asked, add_generation_prompt=True)
    whole = begun.encode(SEVERAL)
    count = len(found.input_ids)
    assert whole.input_ids[:count].tolist() == found.input_ids.tolist()
    assert whole.learned[count]
    assert not found.learned.any()


def test_text_alone(tmp_path: Path) -> None:
    save_text(tmp_path).tokenizer.save_pretrained(tmp_path / "text")
    (tmp_path / "text" / "chat_template.jinja").write_text(TEMPLATE)
    encoder = ChatEncoder(tmp_path / "text", 50)
    assert encoder.places is None
    found = encoder.encode(Conversation(said(["what is this"], "a circle")))
    assert encoder.tokenizer.decode(found.input_ids[found.learned]) == "a circle<|im_end|>"
    assert encoder.padding == encoder.tokenizer.pad_token_id
    with pytest.raises(SampleError, match=r"the model sees text alone, the sample has \['image'\]"):
        encoder.encode(SEVERAL)


@pytest.mark.parametrize(
    ("sample", "reason", "words"),
    [
        (Conversation(said(["red " * 300], "no")), "too_long", "tokens are more than 200"),
        (Conversation(SEVERAL.turns[:2]), "no_supervision", "no token of an answer"),
        (Conversation(said(["is <image> it"], "no")), "malformed", "more places than there are"),
        (
            Conversation(said([Part("audio", "", FileItem(Path("x.wav")))], "no")),
            "malformed",
            "the model sees images, the sample has",
        ),
        (Conversation(said(["is it \ud800"], "no")), "malformed", "takes no such text"),
    ],
)
def test_samples_that_cannot_be_used_say_why(
    encoder: ChatEncoder, sample: Conversation, reason: str, words: str
) -> None:
    with pytest.raises(SampleError, match=words) as caught:
        encoder.encode(sample)
    assert caught.value.reason == reason


def test_what_an_assistant_says_first_is_learned(encoder: ChatEncoder) -> None:
    greeting = Turn("assistant", (text("yes it is"),))
    first = Conversation((greeting, *said(["what is this"], "a circle")))
    found = encoder.encode(first)
    spoken = encoder.tokenizer.decode(found.input_ids[found.learned])
    assert spoken == "yes it is<|im_end|>a circle<|im_end|>"
    assert found.input_ids.tolist() == theirs(encoder, first)
    alone = encoder.encode(Conversation((greeting,)))
    spoken = encoder.tokenizer.decode(alone.input_ids[alone.learned])
    assert spoken == "yes it is<|im_end|>"


def test_turns_that_a_template_refuses_are_malformed(tmp_path: Path) -> None:
    """As Mistral's and Gemma's refuse two questions in a row."""
    refusing = (
        "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}"
    )
    save_text(tmp_path, template=refusing + TEMPLATE)
    encoder = ChatEncoder(tmp_path, 200)
    assert encoder.encode(Conversation(said(["what is this"], "a circle"))).learned.any()
    twice = Conversation((SEVERAL.turns[1], *said(["is it red"], "yes")))
    first = Conversation((SEVERAL.turns[2], *said(["is it red"], "yes")))
    for sample in (twice, first):
        with pytest.raises(SampleError, match="chat template refuses .*roles must") as caught:
            encoder.encode(sample)
        assert caught.value.reason == "malformed"
    with pytest.raises(SampleError, match="chat template refuses .*roles must alternate"):
        encoder.prompt(Conversation((SEVERAL.turns[1], SEVERAL.turns[1])))


def test_items_that_a_template_does_not_show_are_malformed(tmp_path: Path) -> None:
    """As a template that takes one image a turn, or none of an answer."""
    asked = "{% if m.role == 'user' %}<image>{% endif %}"
    save_text(tmp_path, template=TEMPLATE.replace("<image>", asked))
    encoder = ChatEncoder(tmp_path, 200)
    drawn = Turn("assistant", (image(2), text("a circle")))
    sample = Conversation((*said([image(1), "what is this"], "a circle")[:1], drawn))
    with pytest.raises(SampleError, match="2 items, and the text has places for 1") as caught:
        encoder.encode(sample)
    assert caught.value.reason == "malformed"


def test_want_of_memory_is_no_malformed_sample(
    encoder: ChatEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none_left(*_given: object, **_how: object) -> None:
        raise MemoryError

    monkeypatch.setattr(encoder.tokenizer, "apply_chat_template", none_left)
    with pytest.raises(MemoryError):
        encoder.encode(SEVERAL)


def test_a_run_of_places_is_never_cut(folder: Path) -> None:
    """One token less than it needs, and the sample is skipped whole."""
    length = len(ChatEncoder(folder, 200).encode(SEVERAL).input_ids)
    assert len(ChatEncoder(folder, length).encode(SEVERAL).input_ids) == length
    with pytest.raises(SampleError, match=f"{length} tokens are more than {length - 1}"):
        ChatEncoder(folder, length - 1).encode(SEVERAL)


def test_templates_that_cannot_be_trained_with_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_text(tmp_path / "none", template=None)
    with pytest.raises(TemplateError, match="has no chat template; put one into"):
        ChatEncoder(tmp_path / "none", 50)
    save_text(tmp_path / "endless", template=ENDLESS, end=None)
    with pytest.raises(TemplateError, match="writes no end after an answer, and .* no eos_token"):
        ChatEncoder(tmp_path / "endless", 50)
    save_text(tmp_path / "silent", template="{{ messages[0].role }}")
    with pytest.raises(TemplateError, match="does not write what an assistant says"):
        ChatEncoder(tmp_path / "silent", 50)
    save_text(tmp_path / "broken", template="{{ messages[0].role }}{{ raise_exception('no') }}")
    with pytest.raises(TemplateError, match="cannot write a question and its answer: .*no"):
        ChatEncoder(tmp_path / "broken", 50)
    # A tokenizer of Python alone.
    save_text(tmp_path / "slow")
    opened = AutoTokenizer.from_pretrained(tmp_path / "slow")
    monkeypatch.setattr(type(opened), "is_fast", False)
    with pytest.raises(TemplateError, match="slow does not tell where its tokens stand .*fast ver"):
        ChatEncoder(tmp_path / "slow", 50)
    monkeypatch.undo()
    # Drops what was said before, as some do with earlier thoughts.
    forgetful = "{% for m in messages[-2:] %}" + TEMPLATE.removeprefix("{% for m in messages %}")
    save_text(tmp_path / "forgetful", template=forgetful)
    with pytest.raises(TemplateError, match="writes turns before turn 3 in another way"):
        ChatEncoder(tmp_path / "forgetful", 99).encode(SEVERAL)


def test_rows_by_the_size_of_an_image(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor that makes more of larger images: their headers are read."""
    encoder = ChatEncoder(folder, 200)
    made: list[tuple[int, int]] = []

    def rows(size: tuple[int, int]) -> int:
        made.append(size)
        return size[0] * size[1] // PATCH**2

    monkeypatch.setattr(encoder.places, "rows", rows)
    monkeypatch.setattr(encoder.places, "any_size", False)
    assert encoder.places.shown(image(1).item).rows == ROWS
    assert made == [(SIDE, SIDE)]
    with pytest.raises(SampleError, match="nowhere.png cannot be read"):
        encoder.places.shown(FileItem(Path("nowhere.png")))


def test_images_that_keep_their_shape(tmp_path: Path) -> None:
    """Qwen2-VL's processor: rows and grid by the size of each image."""
    tokenizer = train_tokenizer(["what is this"] * 3)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path)
    size = {"shortest_edge": 64, "longest_edge": 64 * 64}
    images = transformers.Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, size=size)
    images.save_pretrained(tmp_path)
    token = tokenizer.convert_tokens_to_ids("<image>")
    film = tokenizer.convert_tokens_to_ids("<|pad|>")  # stands for what the model also sees
    known = {"image_token_id": token, "vision_config": {"spatial_merge_size": 2}}
    (tmp_path / "config.json").write_text(json.dumps({**known, "video_token_id": film}))
    encoder = ChatEncoder(tmp_path, 200)
    shown = [Part("image", "", BytesItem(png(1, size), "x")) for size in ((16, 8), (24, 32))]
    found = encoder.encode(Conversation(said([*shown, "what"], "red")))
    opened = [Image.open(io.BytesIO(part.item.read())) for part in shown]
    made = [images(images=[image])["image_grid_thw"][0] for image in opened]
    assert found.grids.tolist() == [np.array(grid).tolist() for grid in made]
    assert found.rows.tolist() == [int(np.prod(grid)) // 4 for grid in made]
    assert found.rows.tolist() == [2, 12]
    assert (found.input_ids == token).sum() == 14
    with pytest.raises(SampleError, match="x is no image"):
        encoder.places.shown(BytesItem(b"x", "x"))
    with pytest.raises(SampleError, match=r"the text has '<\|pad\|>', which stands for a v") as it:
        encoder.encode(Conversation(said([shown[0], "what is <|pad|>"], "red")))
    assert it.value.reason == "malformed"


def test_a_folder_is_known_by_its_text_and_its_length(folder: Path, tmp_path: Path) -> None:
    first = ChatEncoder(folder, 200).fingerprint()
    assert ChatEncoder(folder, 200).fingerprint() == first
    assert ChatEncoder(folder, 201).fingerprint() != first
    save_text(tmp_path, template=TEMPLATE.replace("<|im_end|>\n", "<|im_end|>"))
    assert ChatEncoder(tmp_path, 200).fingerprint() != first


@pytest.mark.parametrize(
    "name",
    [
        "chat_template.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "tokenizer.model",
        "merges.txt",
        "chat_template.jinja",
        "chat_templates/tool_use.jinja",
        "preprocessor_config.json",
    ],
)
def test_every_file_that_text_is_made_with_counts(
    encoder: ChatEncoder, folder: Path, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    monkeypatch.setattr(encoder, "_folder", tmp_path / "copy")
    before, file = encoder.fingerprint(), tmp_path / "copy" / name
    file.parent.mkdir(exist_ok=True)
    file.write_text("{}")
    changed = encoder.fingerprint()
    assert changed != before
    for weights in ("model.safetensors.index.json", "pytorch_model.bin.index.json", "model.bin"):
        (tmp_path / "copy" / weights).write_text("{}")
    assert encoder.fingerprint() == changed, "weights are no text"
    file.rename(file.with_name(f"other-{file.name}"))
    assert encoder.fingerprint() != changed, "names count"
