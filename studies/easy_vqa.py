# SPDX-License-Identifier: Apache-2.0
"""Ask the exported model of ``mimo train easy-vqa`` with transformers alone.

    python -m studies.easy_vqa runs/easy-vqa --questions 500

Prints how many of the first held-out questions transformers' ``generate`` answers as the run did on
its own layout (``answers.json``). Exits 1 if one differs.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron.core.models.mimo.data.conversation import FileItem, Part
from megatron.core.models.mimo.data.easy_vqa import EasyVqa


class Exported:
    """A LLaVA folder in transformers, asked greedily, a question at a time.

    Args:
        folder: that was exported.
    """

    def __init__(self, folder: Path) -> None:
        import transformers

        self._processor: Any = transformers.AutoProcessor.from_pretrained(folder)
        model = transformers.LlavaForConditionalGeneration.from_pretrained(folder)
        self._model: Any = model.eval()

    def answer(self, parts: Iterable[Part], tokens: int = 4) -> str:
        """Return what it says to a question.

        Args:
            parts: text and images.
            tokens: of the answer at most.
        """
        content = [
            {"type": "image", "path": part.item.name}
            if isinstance(part.item, FileItem)
            else {"type": "text", "text": part.text}
            for part in parts
        ]
        inputs = self._processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        said = self._model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
        new = said[0, inputs["input_ids"].shape[1] :]
        return self._processor.tokenizer.decode(new).partition("<|im_end|>")[0]


def differing(run: Path, numbers: Iterable[int]) -> list[tuple[str, str, str]]:
    """Return (question, the run's answer, transformers' answer) where the two differ.

    Args:
        run: folder of a run of the recipe, with ``answers.json`` and ``exported``.
        numbers: of the held-out questions.
    """
    answers = json.loads((run / "answers.json").read_text())["answers"]
    source, exported = EasyVqa("test", together=False), Exported(run / "exported")
    found = []
    for number in numbers:
        said = exported.answer(source[number].turns[0].parts)
        if said != answers[number]["said"]:
            found.append((answers[number]["question"], answers[number]["said"], said))
    return found


def main() -> int:
    """Compare and print."""
    parser = argparse.ArgumentParser(prog="python -m studies.easy_vqa", description=__doc__)
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("--questions", type=int, default=500, help="the first so many")
    given = parser.parse_args()
    wrong = differing(given.run, range(given.questions))
    for question, ours, theirs in wrong:
        print(f"{question} here: {ours!r}, transformers: {theirs!r}")
    print(f"{given.questions - len(wrong)} of {given.questions} answers are the same")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
