# SPDX-License-Identifier: Apache-2.0
"""Finds the code blocks of the project's README files and the ways they are covered.

Every ```bash and ```python block of a README is run by ``test_readme_blocks.py``, from the
repository's root, each in a process of its own. What a reader sees is what runs. An HTML comment
directly above a block, invisible to readers, changes how:

    <!-- test: make -->              lines `make TARGET …` only: checked with `make -n`, not run,
                                     since the tests are themselves run by one of them
    <!-- test: covered-by PATH -->   PATH (a test file, or FILE::test) covers it: it must exist
    <!-- test: after -->             python: runs in one process with the block before it
    <!-- test: timeout SECONDS -->   more than the usual 300 seconds

Blocks in other languages (```text, ```console, none) are not code.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
LANGUAGES = ("bash", "python")
_SKIPPED_FOLDERS = {".git", "runs", "build", "dist", "node_modules"}
_FENCE = re.compile(r"^(?P<indent> *)(?P<fence>```+|~~~+) *(?P<language>[\w+-]*).*$")
_MARK = re.compile(r"^\s*<!-- *test: *(?P<mark>.*?) *-->\s*$")
# Further pages whose blocks run as those of a README do.
PAGES = (
    "docs/bring-your-own-encoder.md",
    "docs/experts.md",
    "docs/models.md",
    "docs/parts.md",
    "docs/plan.md",
    "docs/torch-native.md",
)
_MARKS = ("make", "covered-by", "after", "timeout")


@dataclass(frozen=True)
class Block:
    """One fenced block.

    Attributes:
        path: README file, relative to the repository.
        line: line of its opening fence, from 1.
        language: the fence's info string.
        text: the lines between the fences.
        mark: first word of the comment above it, empty without one.
        argument: the rest of that comment.
    """

    path: Path
    line: int
    language: str
    text: str
    mark: str
    argument: str

    @property
    def name(self) -> str:
        """A test id: where the block is."""
        return f"{self.path}:{self.line}"


def parse(text: str, path: Path) -> list[Block]:
    """Return the code blocks of one Markdown text.

    Raises:
        ValueError: a block is not closed, or a ``test:`` comment is unknown, incomplete or not
            directly above a bash or python block.
    """
    blocks: list[Block] = []
    lines = text.splitlines()
    number, mark = 0, None
    while number < len(lines):
        fence = _FENCE.match(lines[number])
        comment = _MARK.match(lines[number])
        if fence is None:
            if mark is not None and lines[number].strip():
                raise ValueError(f"{path}:{mark[0]}: a test: comment stands directly above a block")
            if comment is not None:
                mark = (number + 1, comment["mark"])
            number += 1
            continue
        end = _end_of_block(lines, number, fence, path)
        if fence["language"] in LANGUAGES:
            body = [line.removeprefix(fence["indent"]) for line in lines[number + 1 : end]]
            word, argument = _split_mark(mark, fence["language"], path)
            code = "\n".join(body) + "\n"
            blocks.append(Block(path, number + 1, fence["language"], code, word, argument))
        elif mark is not None:
            raise ValueError(f"{path}:{mark[0]}: a test: comment belongs to a bash or python block")
        number, mark = end + 1, None
    return blocks


def _end_of_block(lines: list[str], start: int, fence: re.Match[str], path: Path) -> int:
    for number in range(start + 1, len(lines)):
        if lines[number].strip() == fence["fence"]:
            return number
    raise ValueError(f"{path}:{start + 1}: this block is not closed")


def _split_mark(mark: tuple[int, str] | None, language: str, path: Path) -> tuple[str, str]:
    if mark is None:
        return "", ""
    line, text = mark
    word, _, argument = text.partition(" ")
    good = {
        "make": language == "bash" and not argument,
        "covered-by": bool(argument),
        "after": language == "python" and not argument,
        "timeout": argument.isdigit(),
    }.get(word, False)
    if not good:
        raise ValueError(
            f"{path}:{line}: {text!r} is not a way to test a {language} block; there are {_MARKS}, "
            "see tests/functional/readme_blocks.py"
        )
    return word, argument


def readme_files(root: Path = REPO) -> list[Path]:
    """Return every README.md and page with blocks to run, relative to the repository.

    Environments are left out.
    """
    pages = [root / page for page in PAGES if (root / page).exists()]
    found = [
        path.relative_to(root)
        for path in (*root.rglob("README.md"), *pages)
        if not any(
            part in _SKIPPED_FOLDERS or part.startswith(".")
            for part in path.relative_to(root).parts
        )
    ]
    return sorted(found)


def all_blocks(root: Path = REPO) -> list[Block]:
    """Return the code blocks of all of them."""
    return [b for p in readme_files(root) for b in parse((root / p).read_text("utf-8"), p)]
