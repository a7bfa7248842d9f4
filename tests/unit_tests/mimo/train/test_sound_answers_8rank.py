# SPDX-License-Identifier: Apache-2.0
"""``mimo generate`` and ``mimo eval`` about sounds on 8 ranks, against transformers."""

from __future__ import annotations

import json
import wave
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist
import transformers

from megatron.core.models.mimo.huggingface.all_ranks import on_all_ranks
from megatron.core.models.mimo.job.key_value_cache import KeyValueCache
from megatron.core.models.mimo.training.agreement import gathered
from mimo_colocated.cli import evaluating, generating, models
from mimo_colocated.cli.options import read
from tests.unit_tests.mimo.huggingface.harness import randomise
from tests.unit_tests.mimo.train import strangers
from tests.unit_tests.mimo.train.by_transformers import ByTransformers, Message

pytestmark = [pytest.mark.ranks(8), pytest.mark.once]

LAYOUTS = {
    "fan-in": ("--audio", "tp=2,dp=4", "--language", "tp=2,cp=2,dp=2"),
    "stages": ("--audio", "dp=8", "--language", "tp=2,pp=2,cp=2"),
    "fan-out": ("--audio", "tp=4,dp=2", "--language", "dp=8"),
}
NEW = 8
TONES = {"low": (5_000, 3), "high": (9_999, 17), "short": (3_300, 8)}
"""Name -> numbers of the sound, and turns in it: neither whole steps nor one length."""
ASKED: dict[str, tuple[Sequence[str], str]] = {
    "one sound": (("low",), "which tone is it"),
    "two sounds": (("high", "short"), "is it high"),
    "text alone": ((), "which tone"),
}
ANSWERS = ("low", "it is high", "low tone", "high", "it is it")


@pytest.fixture
def folder(shared_tmp_path: Path) -> Path:
    """A Qwen2-Audio folder with weights drawn at random, sounds and held-out data."""
    on_all_ranks(lambda: write(shared_tmp_path) if dist.get_rank() == 0 else None, "write")
    return shared_tmp_path / "model"


def write(place: Path) -> None:
    strangers.write_qwen_audio(place / "model")
    kind = transformers.Qwen2AudioForConditionalGeneration
    randomise(kind.from_pretrained(place / "model"), seed=3).save_pretrained(place / "model")
    for name, (length, turns) in TONES.items():
        strangers.write_wav(place / f"{name}.wav", tone(length, turns))
    lines = []
    for number, answer in enumerate(ANSWERS):
        heard = list(TONES)[: number % 3]
        asked = {"role": "user", "content": content(heard, f"which {'tone ' * number}")}
        lines.append({"messages": [asked, {"role": "assistant", "content": answer}]})
    (place / "held_out.jsonl").write_text("\n".join(map(json.dumps, lines)))


def tone(length: int, turns: int) -> np.ndarray:
    return np.sin(np.linspace(0, turns * 2 * np.pi, length))


def content(heard: Sequence[str], words: str) -> list[dict[str, Any]]:
    sounds = [{"type": "audio", "audio": f"{name}.wav"} for name in heard]
    return [*sounds, {"type": "text", "text": words}]


class Transformers(ByTransformers):
    """The same model by transformers, on this rank."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, transformers.Qwen2AudioForConditionalGeneration, NEW)

    def _wave(self, name: str) -> np.ndarray:
        with wave.open(str(self.place / name)) as file:
            raw = file.readframes(file.getnframes())
        return np.frombuffer(raw, "<i2").astype(np.float32) / 2**15

    def inputs(self, messages: list[Message], *, ask: bool) -> Any:
        text = self.processor.apply_chat_template(messages, add_generation_prompt=ask)
        parts = messages[0]["content"]
        heard = [self._wave(part["audio"]) for part in parts if part["type"] == "audio"]
        how = {"sampling_rate": strangers.RATE, "return_tensors": "pt"}
        return self.processor(text=text, audio=heard or None, **how)


def generate(folder: Path, case: str, *more: object) -> tuple[str, bool]:
    """What the command prints, on every rank, and whether keys and values were kept."""
    heard, words = ASKED[case]
    played = [each for name in heard for each in ("--sound", folder.parent / f"{name}.wav")]
    given = [folder, words, *played, "--max-new-tokens", NEW, *more]
    said: list[str] = []
    kept: list[Any] = []
    own = KeyValueCache.logits
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "say", said.append)
        patch.setattr(KeyValueCache, "logits", lambda *a: kept.append(a[2]) or own(*a))
        generating.work(read("generate", [str(each) for each in given]))
    (text,) = said
    assert set(gathered(text)) == {text}
    return text, bool(kept)


def on_first(folder: Path, compute: Any) -> Any:
    first = dist.get_rank() == 0
    found = on_all_ranks(lambda: compute(Transformers(folder)) if first else None, "ask")
    return gathered(found)[0]


def test_greedy_text_is_that_of_transformers(folder: Path) -> None:
    def answers(theirs: Transformers) -> dict[str, str]:
        return {case: theirs.says(content(*asked), special=False) for case, asked in ASKED.items()}

    wanted = on_first(folder, answers)
    assert len(set(wanted.values())) == len(ASKED)
    for name, layout in LAYOUTS.items():
        for case in ASKED:
            found = generate(folder, case, *layout)
            # Where every rank has the whole language model it reads each token once.
            assert found == (wanted[case], name == "fan-out"), (name, case)
    # The control: of another sound it says something else.
    strangers.write_wav(folder.parent / "low.wav", tone(5_000, 90))
    dist.barrier()
    for layout in LAYOUTS.values():
        assert generate(folder, "one sound", *layout)[0] != wanted["one sound"]


def evaluate(folder: Path, name: str, *more: object) -> dict[str, Any]:
    out, file = folder.parent / name, folder.parent / "held_out.jsonl"
    given = [folder, "--data", f"{{kind: chat, settings: {{path: {file}}}}}", "--out", out, *more]
    for change in ("batch=8", f"answer_tokens={NEW}"):
        given += ["--set", f"evaluation.{change}"]
    evaluating.work(read("eval", [str(each) for each in given]))
    return json.loads((out / evaluating.RESULT).read_text())


def test_loss_and_answers_are_those_of_transformers(folder: Path) -> None:
    """Samples with no sound, one and two; one layout takes them packed."""
    file = folder.parent / "held_out.jsonl"
    messages = [json.loads(line)["messages"] for line in file.read_text().splitlines()]

    def expected(theirs: Transformers) -> tuple[float, float, list[str]]:
        said = [theirs.says(each[0]["content"], special=True) for each in messages]
        losses = [theirs.losses(each) for each in messages]
        deaf = [theirs.losses([{**q, "content": q["content"][-1:]}, a]) for q, a in messages]
        mean, without = (sum(x for x, _ in e) / sum(n for _, n in e) for e in (losses, deaf))
        return mean, without, said

    loss, deaf, said = on_first(folder, expected)
    # The control: without sounds it would show.
    assert deaf != pytest.approx(loss, rel=1e-3)
    for name, layout in LAYOUTS.items():
        packed = ("--set", f"data.packed={str(name == 'stages').lower()}")
        found = evaluate(folder, name, *layout, *packed)
        assert found["held_out_loss"] == pytest.approx(loss, rel=1e-5), layout
        assert [each["said"] for each in found["answers"]] == said
        assert found["skipped"] == {}
