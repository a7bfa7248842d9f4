# SPDX-License-Identifier: Apache-2.0
"""``mimo generate`` and ``mimo eval`` on 8 ranks, against transformers in one process."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers

from megatron.core.models.mimo.huggingface.all_ranks import on_all_ranks
from megatron.core.models.mimo.training.agreement import gathered
from mimo_colocated.cli import evaluating, generating, models
from mimo_colocated.cli.options import read
from mimo_colocated.launch.errors import JobError
from tests.unit_tests.mimo.data import small
from tests.unit_tests.mimo.huggingface.harness import randomise
from tests.unit_tests.mimo.train.by_transformers import ByTransformers, Message

pytestmark = [pytest.mark.ranks(8), pytest.mark.once]

LAYOUTS = {
    "fan-in": ("--vision", "tp=2,dp=4", "--language", "tp=2,cp=2,dp=2"),
    "fan-out": ("--vision", "tp=4,dp=2", "--language", "dp=8"),
    "stages": ("--vision", "dp=8", "--language", "tp=2,pp=2,cp=2"),
    "encoder-cp": ("--vision", "tp=2,cp=2,dp=2", "--language", "tp=2,cp=2,dp=2"),
}
NEW = 12
SHADES = (10, 90, 200)
ASKED: dict[str, tuple[Sequence[int], str]] = {
    "one image": (SHADES[:1], "what is this"),
    "several images": (SHADES, "is it a red square"),
    "text alone": ((), "what is a circle"),
}
PAIRED = {"fan-out": ["several images"], "stages": ["one image", "text alone"],
          "encoder-cp": ["several images", "text alone"]}
ANSWERS = ("yes", "a red circle", "blue", "no it is a square", "yes it is")
"""Fewer than are asked at once, and no multiple of any number of replicas."""


@pytest.fixture
def folder(shared_tmp_path: Path) -> Path:
    """A LLaVA folder with weights drawn at random, images and held-out data."""
    on_all_ranks(lambda: write(shared_tmp_path) if dist.get_rank() == 0 else None, "write")
    return shared_tmp_path / "model"


def write(place: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 8}
    tokenizer = small.save_text(place / "model").tokenizer
    vision = transformers.SiglipVisionConfig(
        **sizes, num_hidden_layers=2, image_size=small.SIDE, patch_size=small.PATCH
    )
    text = transformers.Qwen2Config(
        **sizes,
        num_hidden_layers=2,
        num_key_value_heads=4,
        vocab_size=len(tokenizer) + 1,  # odd: shards have padding
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = transformers.LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    )
    made = randomise(transformers.LlavaForConditionalGeneration(config), seed=2)
    made.save_pretrained(place / "model")
    lines = []
    for number, answer in enumerate(ANSWERS):
        shade = SHADES[number % len(SHADES)]
        (place / f"{shade}.png").write_bytes(small.png(shade))
        image = {"type": "image", "image": f"{shade}.png"}
        words = {"type": "text", "text": f"what is this {'a ' * number}"}
        asked = {"role": "user", "content": [*[image] * (number % 3), words]}
        said = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
        lines.append(json.dumps({"messages": [asked, said]}))
    (place / "held_out.jsonl").write_text("\n".join(lines))


class Transformers(ByTransformers):
    """The same model by transformers, on this rank."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, transformers.LlavaForConditionalGeneration, NEW)

    def inputs(self, messages: list[Message], *, ask: bool) -> Any:
        content = [
            {"type": "image", "path": str(self.place / part["image"])}
            if part["type"] == "image"
            else part
            for part in messages[0]["content"]
        ]
        whole = [{**messages[0], "content": content}, *messages[1:]]
        how = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
        return self.processor.apply_chat_template(whole, add_generation_prompt=ask, **how)


def of_first_rank(make: Callable[[], Any]) -> Any:
    return gathered(on_all_ranks(lambda: make() if dist.get_rank() == 0 else None, "compute"))[0]


def content(case: str) -> list[dict[str, Any]]:
    shades, words = ASKED[case]
    shown = [{"type": "image", "image": f"{shade}.png"} for shade in shades]
    return [*shown, {"type": "text", "text": words}]


def generate(folder: Path, case: str, *more: object) -> str:
    """What the command prints, on every rank."""
    shades, words = ASKED[case]
    images = [each for s in shades for each in ("--image", folder.parent / f"{s}.png")]
    given = [folder, words, *images, "--max-new-tokens", NEW, *more]
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "say", said.append)
        generating.work(read("generate", [str(each) for each in given]))
    (text,) = said
    assert set(gathered(text)) == {text}
    return text


def test_greedy_text_is_that_of_transformers(folder: Path) -> None:
    def expected() -> dict[str, str]:
        theirs = Transformers(folder)
        return {case: theirs.says(content(case), special=False) for case in ASKED}

    wanted = of_first_rank(expected)
    assert len(set(wanted.values())) == len(ASKED)
    for name, layout in LAYOUTS.items():
        for case in ASKED if name == "fan-in" else PAIRED[name]:
            assert generate(folder, case, *layout) == wanted[case], (name, case)
    # The control: with another image it says something else.
    (folder.parent / f"{SHADES[0]}.png").write_bytes(small.png(250))
    dist.barrier()
    assert generate(folder, "one image", *LAYOUTS["fan-in"]) != wanted["one image"]


def test_a_seed_draws_the_same_text_in_every_layout(folder: Path) -> None:
    draw = ("--temperature", "0.8", "--top-k", "50", "--top-p", "0.95", "--seed")
    found = {
        generate(folder, "one image", *layout, *draw, "3") for layout in list(LAYOUTS.values())[:2]
    }
    assert len(found) == 1
    assert generate(folder, "one image", *LAYOUTS["fan-in"], *draw, "4") not in found


def evaluate(folder: Path, name: str, *more: object) -> dict[str, Any]:
    out = folder.parent / name
    data = f"{{kind: chat, settings: {{path: {folder.parent / 'held_out.jsonl'}}}}}"
    given = [folder, "--data", data, "--out", out, *more]
    for change in ("batch=8", f"answer_tokens={NEW}"):
        given += ["--set", f"evaluation.{change}"]
    evaluating.work(read("eval", [str(each) for each in given]))
    return json.loads((out / evaluating.RESULT).read_text())


def test_loss_and_answers_are_those_of_transformers(folder: Path) -> None:
    """Five samples in batches of eight: three of them fill up, and count nowhere."""
    file = folder.parent / "held_out.jsonl"

    def mean(losses: list[tuple[float, int]]) -> float:
        return sum(loss for loss, _ in losses) / sum(count for _, count in losses)

    def expected() -> tuple[float, float, list[str]]:
        theirs = Transformers(folder)
        messages = [json.loads(line)["messages"] for line in file.read_text().splitlines()]
        said = [theirs.says(each[0]["content"], special=True) for each in messages]
        # One of the model's own answers to an image is wanted, so that not all are wrong.
        right = next(
            n for n, words in enumerate(said) if n % 3 and words.strip() and "<" not in words
        )
        messages[right][1]["content"][0]["text"] = said[right]
        file.write_text("\n".join(json.dumps({"messages": each}) for each in messages))
        losses = [theirs.losses(each) for each in messages]
        filled = [*losses, *[losses[-1]] * 3]
        return mean(losses), mean(filled), said

    loss, filled, said = of_first_rank(expected)
    # The control: samples that fill up would show.
    assert filled != pytest.approx(loss, rel=1e-3)
    more = ("--set", "data.packed=true", "--set", "evaluation.without_images=true")
    for name, layout in LAYOUTS.items():
        found = evaluate(folder, name, *layout, *more * (name == "fan-in"))
        assert found["held_out_loss"] == pytest.approx(loss, rel=1e-5), layout
        assert [each["said"] for each in found["answers"]] == said
        assert found["questions"] == len(ANSWERS)
        assert found["exact_match"] == 1 / len(ANSWERS)
        assert found.get("exact_match_without_images", 0) == 0
        assert ("exact_match_without_images" in found) is (name == "fan-in")
        assert found["skipped"] == {}


def test_numbers_that_are_none_are_one_error_on_all(folder: Path) -> None:
    broken = folder.with_name("broken")
    on_all_ranks(lambda: break_weights(folder, broken) if dist.get_rank() == 0 else None, "break")
    with pytest.raises(JobError, match=r"the model's logits are not numbers \(nan\), so it says"):
        generate(broken, "text alone", *LAYOUTS["fan-in"])


def break_weights(folder: Path, broken: Path) -> None:
    made = transformers.LlavaForConditionalGeneration.from_pretrained(folder)
    with torch.no_grad():
        made.lm_head.weight[7] = torch.nan
    shutil.copytree(folder, broken)
    made.save_pretrained(broken)
