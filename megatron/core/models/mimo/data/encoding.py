# SPDX-License-Identifier: Apache-2.0
"""A conversation into tokens and what of them is learned, by the model's own template.

The chat template, the tokenizer and the processor are those of the model's folder. Of each answer
the tokens up to its end are learned, nothing else. An item's place becomes as many tokens as the
processor makes of an item of that size, and is never cut: what is too long is skipped whole.
Where the template ends no answer, the tokenizer's ``eos_token`` ends a sample that ends with one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron.core.models.mimo.data.conversation import Conversation, SampleError, Turn, text
from megatron.core.models.mimo.data.places import Shown, foreign_tokens, places_of

_SAID = "fine"
_TAKES = {"image": "sees images", "audio": "hears sounds"}
_PROBE = Conversation((Turn("user", (text("how"),)), Turn("assistant", (text(_SAID),))))
_TEXT_FILES = ("*.json", "*.jinja", "*.model", "*.txt", "chat_templates/*")
_MADE = 2  # goes up when the same files make other tokens or rows than before


class TemplateError(RuntimeError):
    """A folder's tokenizer, template or processor cannot be used for training; one sentence."""


@dataclass(frozen=True, eq=False)
class Encoded:
    """A sample as tokens.

    Attributes:
        input_ids: int32 ``(n,)``; an item's tokens are placeholders, one per row.
        learned: bool ``(n,)``: the token is part of an answer.
        rows: of each item, int32 ``(items,)``.
        grids: frames, rows and columns of patches of each item, int32 ``(items, 3)``; zeros where
            positions do not count them.
    """

    input_ids: np.ndarray
    learned: np.ndarray
    rows: np.ndarray
    grids: np.ndarray


class ChatEncoder:
    """Encodes the conversations of one model.

    Args:
        folder: with tokenizer, chat template and, if the model sees anything, its processor.
        max_tokens: longer samples are too long.

    Attributes:
        tokenizer: of transformers.
        places: what images, or sounds, are in its text; None for a language model alone.
        end: the token that ends an answer: the template's, else the tokenizer's ``eos_token``.

    Raises:
        TemplateError: the folder has no chat template, or one that does not write answers, nothing
            ends them, or the tokenizer does not tell where its tokens stand in the text.
    """

    def __init__(self, folder: Path, max_tokens: int) -> None:
        from transformers import AutoTokenizer

        self._folder, self.max_tokens = folder, max_tokens
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self.places = places_of(folder, self.tokenizer)
        own = getattr(self.places, "chat_template", None)
        self._template = own or self.tokenizer.chat_template
        if not self._template:
            raise TemplateError(
                f"{folder} has no chat template; put one into chat_template.jinja there"
            )
        if not self.tokenizer.is_fast:
            raise TemplateError(
                f"the tokenizer in {folder} does not tell where its tokens stand in the text; save "
                "its fast version (tokenizer.json) there"
            )
        self._in_parts = self._takes_parts()
        self._foreign = foreign_tokens(folder, self.places.kind if self.places else "image")
        self._before, self._behind = self._around_answers()
        self.end, self._is_ended = self._end_of_answers()

    # ---- whole samples --------------------------------------------------------------------

    def encode(self, conversation: Conversation) -> Encoded:
        """Return a sample as tokens.

        Raises:
            SampleError: it is ``malformed``, ``unreadable``, ``too_long``, or has
                ``no_supervision``.
            TemplateError: the template does not write turns one after another.
        """
        messages = self._messages(conversation)
        pieces = self._ended(self._answers_apart(messages))
        encoded = self._tokens(pieces, conversation)
        if not encoded.learned[1:].any():
            raise SampleError("no_supervision", "no token of an answer")
        return encoded

    def prompt(self, conversation: Conversation) -> Encoded:
        """Return what comes before an answer: all turns, and how an answer begins.

        Raises:
            SampleError: as :meth:`encode`.
        """
        text = self._render(self._messages(conversation), answer_next=True)
        return self._tokens([(text, False)], conversation)

    def fingerprint(self) -> str:
        """Return text that changes when samples would be encoded in another way."""
        import hashlib

        state = hashlib.sha256(f"{_MADE} {self.max_tokens}".encode())
        for path in sorted({path for how in _TEXT_FILES for path in self._folder.glob(how)}):
            if not path.name.endswith(".index.json"):
                name = path.relative_to(self._folder).as_posix()
                content = path.read_bytes()
                state.update(f"{name} {len(content)} ".encode() + content)
        return state.hexdigest()[:16]

    @property
    def padding(self) -> int:
        """The token that fills samples up: the tokenizer's own, or the one that ends an answer."""
        own = self.tokenizer.pad_token_id
        return self.end if own is None else own

    # ---- text -----------------------------------------------------------------------------

    def _render(self, messages: Sequence[dict[str, Any]], *, answer_next: bool) -> str:
        # The processor's own method looks for files to open, which takes most of its time.
        try:
            return self.tokenizer.apply_chat_template(
                list(messages),
                chat_template=self._template,
                tokenize=False,
                add_generation_prompt=answer_next,
            )
        except MemoryError:
            raise
        except Exception as error:  # a template is a program, and may raise anything
            raise SampleError("malformed", f"the chat template refuses it: {error}") from error

    def _messages(self, conversation: Conversation) -> list[dict[str, Any]]:
        """What the chat template reads: parts, or text in which places stand for items."""
        found = []
        for turn in conversation.turns:
            parts = [
                {"type": "text", "text": part.text} if part.item is None else {"type": part.kind}
                for part in turn.parts
            ]
            place = self.places.place if self.places else ""
            text = "".join(part.text if part.item is None else place for part in turn.parts)
            found.append({"role": turn.role, "content": parts if self._in_parts else text})
        return found

    def _takes_parts(self) -> bool:
        """Whether the template reads parts; that of a language model alone would print them."""
        probe = {"role": "user", "content": [{"type": "text", "text": "probe"}]}
        try:
            found = self._render([probe], answer_next=False)
        except SampleError:  # whatever a template does to a list that it takes for text
            return False
        return self.places is not None and "probe" in found and "'type'" not in found

    def _around_answers(self) -> tuple[str, str]:
        """What the template writes before an answer that follows a question, and behind it."""
        asked = self._messages(_PROBE)
        try:
            question = self._render(asked[:1], answer_next=False)
            before = self._render(asked[:1], answer_next=True)
            whole = self._after(before, asked, answer_next=False)
        except SampleError as error:
            raise TemplateError(
                f"the chat template of {self._folder} cannot write a question and its answer: "
                f"{error}"
            ) from error
        _, found, behind = whole[len(before) :].rpartition(_SAID)
        if not found:
            raise TemplateError(
                f"the chat template of {self._folder} does not write what an assistant says; use "
                "one that does"
            )
        return before.removeprefix(question) if before.startswith(question) else "", behind

    def _end_of_answers(self) -> tuple[int, bool]:
        """The token that ends an answer, and whether the template writes it."""
        own = self.tokenizer.eos_token
        if own and own in self._behind:
            return self.tokenizer.eos_token_id, True
        added = self.tokenizer.added_tokens_decoder
        for token in self.tokenizer(self._behind, add_special_tokens=False)["input_ids"]:
            if token in added:
                return token, True
        if own is None:
            raise TemplateError(
                f"the chat template of {self._folder} writes no end after an answer, and the "
                "tokenizer there has no eos_token; set it"
            )
        return self.tokenizer.eos_token_id, False

    def _ended(self, pieces: list[tuple[str, bool]]) -> list[tuple[str, bool]]:
        """The pieces of a sample, with an end behind its last answer if the template writes none.

        Earlier turns stay what transformers makes of them, which a model will be asked with.
        """
        *before, (answer, learned), _ = [("", False), *pieces]
        if self._is_ended or not learned:
            return pieces
        return [*before, (answer + self.tokenizer.eos_token, True)]

    def _answers_apart(self, messages: list[dict[str, Any]]) -> list[tuple[str, bool]]:
        """The text in pieces, and which of them are answers."""
        pieces: list[tuple[str, bool]] = []
        done = ""
        for number, message in enumerate(messages):
            if message["role"] == "assistant":
                before = self._asked_for(done, messages[: number + 1])
                after = self._after(before, messages[: number + 1], answer_next=False)
                answer, rest = self._cut_after_end(after[len(before) :])
                pieces += [(before[len(done) :], False), (answer, True), (rest, False)]
                done = after
        if messages[-1]["role"] != "assistant":
            pieces.append((self._after(done, messages, answer_next=False)[len(done) :], False))
        return pieces

    def _asked_for(self, done: str, messages: list[dict[str, Any]]) -> str:
        """The text up to the answer that is the last message."""
        if len(messages) > 1:
            return self._after(done, messages[:-1], answer_next=True)
        # Nothing was asked, and templates write no text without messages.
        whole = self._render(messages, answer_next=False)
        at = whole.find(self._before)
        return "" if at < 0 else whole[: at + len(self._before)]

    def _after(self, done: str, messages: list[dict[str, Any]], *, answer_next: bool) -> str:
        """The text of messages, which goes on where that of fewer ended."""
        found = self._render(messages, answer_next=answer_next)
        if not found.startswith(done):
            raise TemplateError(
                f"the chat template of {self._folder} writes turns before turn {len(messages)} in "
                "another way when it follows, so it cannot be told what an answer is; use one that "
                "writes turns one after another"
            )
        return found

    def _cut_after_end(self, answer: str) -> tuple[str, str]:
        if self._is_ended:
            end = self.tokenizer.convert_ids_to_tokens(self.end)
            at = answer.rfind(end)
            stop = len(answer) if at < 0 else at + len(end)
        else:
            stop = len(answer) - len(self._behind) * answer.endswith(self._behind)
        return answer[:stop], answer[stop:]

    def _tokens(self, pieces: list[tuple[str, bool]], conversation: Conversation) -> Encoded:
        shown = self._shown(conversation)
        rows = [each.rows for each in shown]
        text, learned, left = "", [], list(rows)
        for piece, answer in pieces:
            grown = self._with_places(piece, left)
            if answer:
                learned.append((len(text), len(text) + len(grown)))
            text += grown
        if left:
            has = len(rows) - len(left)
            raise SampleError("malformed", f"{len(rows)} items, and the text has places for {has}")
        made = self._tokenized(text)
        if len(made["input_ids"]) > self.max_tokens:
            raise SampleError(
                "too_long", f"{len(made['input_ids'])} tokens are more than {self.max_tokens}"
            )
        return Encoded(
            input_ids=np.array(made["input_ids"], dtype=np.int32),
            learned=_within(np.array(made["offset_mapping"]).reshape(-1, 2), learned),
            rows=np.array(rows, dtype=np.int32),
            grids=np.array([each.grid for each in shown], dtype=np.int32).reshape(-1, 3),
        )

    def _tokenized(self, text: str) -> Any:
        try:
            made = self.tokenizer(
                text, add_special_tokens=self._adds_to(text), return_offsets_mapping=True
            )
        except (TypeError, ValueError) as error:  # halves of characters, which JSON can hold
            raise SampleError("malformed", f"the tokenizer takes no such text: {error}") from error
        for kind, token in self._foreign.items():
            if token in made["input_ids"]:
                said = self.tokenizer.convert_ids_to_tokens(token)
                raise SampleError(
                    "malformed", f"the text has {said!r}, which stands for a {kind}, and has none"
                )
        return made

    def _adds_to(self, text: str) -> bool:
        """Whether the tokenizer adds what its texts begin with, which a template may have written.

        Transformers' processors let it, and its tokenizers by themselves do not.
        """
        begin = self.tokenizer.bos_token
        return self.places is not None and not (begin and text.startswith(begin))

    def _with_places(self, piece: str, left: list[int]) -> str:
        """The text with every place grown to its item's rows, which are taken from ``left``."""
        if self.places is None:
            return piece
        place = self.places.place

        def grown(_found: re.Match[str]) -> str:
            if not left:
                raise SampleError("malformed", "the text has more places than there are items")
            return place * left.pop(0)

        return re.sub(re.escape(place), grown, piece)

    def _shown(self, conversation: Conversation) -> list[Shown]:
        kinds = {part.kind for part in conversation.item_parts()}
        if not kinds:
            return []
        if self.places is None or kinds != {self.places.kind}:
            takes = "sees text alone" if self.places is None else _TAKES[self.places.kind]
            frames = "; give a video as the list of its frames" * ("video" in kinds)
            raise SampleError(
                "malformed", f"the model {takes}, the sample has {sorted(kinds)}{frames}"
            )
        return [self.places.shown(item) for item in conversation.items()]


def _within(places: np.ndarray, spans: Sequence[tuple[int, int]]) -> np.ndarray:
    """Whether each token, at ``(start, stop)``, begins in one of the spans; bool ``(n,)``."""
    starts = places[:, 0]
    found = np.zeros(len(places), dtype=bool)
    for start, stop in spans:
        found |= (starts >= start) & (starts < stop)
    return found
