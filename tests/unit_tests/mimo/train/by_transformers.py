# SPDX-License-Identifier: Apache-2.0
"""What transformers makes of conversations with a folder's model, on one rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

Message = dict[str, Any]


class ByTransformers:
    """A folder's model, asked and measured; subclasses say how it is given its messages.

    Args:
        folder: of the model; files that messages name lie beside it.
        kind: transformers' class of it.
        new_tokens: of an answer, at most.
    """

    def __init__(self, folder: Path, kind: Any, new_tokens: int) -> None:
        self.place = folder.parent
        self.processor: Any = transformers.AutoProcessor.from_pretrained(folder)
        self._model: Any = kind.from_pretrained(folder).eval()
        self._new_tokens = new_tokens

    def inputs(self, messages: list[Message], *, ask: bool) -> Any:
        """Return what the model is called with; *ask*: an answer is to follow."""
        raise NotImplementedError

    @torch.no_grad()
    def says(self, content: list[dict[str, Any]], *, special: bool) -> str:
        """Return the answer up to its end, with or without special tokens."""
        inputs = self.inputs([{"role": "user", "content": content}], ask=True)
        said = self._model.generate(**inputs, max_new_tokens=self._new_tokens, do_sample=False)
        new_ids = said[0, inputs["input_ids"].shape[1] :]
        text = self.processor.tokenizer.decode(new_ids, skip_special_tokens=not special)
        return text.partition("<|im_end|>")[0]

    @torch.no_grad()
    def losses(self, messages: list[Message]) -> tuple[float, int]:
        """Return the sum over an answer's tokens up to its end, and their number."""
        inputs = self.inputs(messages, ask=False)
        start = self.inputs(messages[:1], ask=True)["input_ids"].shape[1]
        ids = inputs["input_ids"][0]
        stop = int((ids == self.processor.tokenizer.eos_token_id).nonzero()[-1]) + 1
        logits = self._model(**inputs).logits[0, start - 1 : stop - 1]
        labels = ids[start:stop]
        loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
        return loss.item(), len(labels)
