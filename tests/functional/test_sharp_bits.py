# SPDX-License-Identifier: Apache-2.0
"""Every error that docs/sharp-bits.md quotes is raised, in the words that it quotes.

A quote follows either a python block, which must raise it below the page's first block, or a
comment ``guard: FILE[::test]``: a test that expects it with ``match=``. Its words must then stand
in a message of the source, too, because ``match=`` names only a part of them. In a quote ``…``
stands for any text.
"""

from __future__ import annotations

import ast
import functools
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.functional.readme_blocks import REPO

pytestmark = pytest.mark.once

PAGE = REPO / "docs" / "sharp-bits.md"
_PARTS = re.compile(
    r"^#+ (?P<title>[^\n]+)$"
    r"|^<!-- guard: (?P<guard>\S+) -->$"
    r"|^```python\n(?P<python>.*?)^```$"
    r"|^```text\n(?P<quote>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
# Runs below the first block of the page: every other block in a namespace of its own.
_RUNNER = """
import json, sys, warnings
warnings.simplefilter("ignore")
prelude, *blocks = json.load(sys.stdin)
shared, raised = {}, []
exec(prelude, shared)
for block in blocks:
    try:
        exec(block, dict(shared))
    except Exception as error:
        raised.append([[t.__name__ for t in type(error).__mro__], str(error)])
    else:
        raised.append([[], "nothing"])
print("RAISED" + json.dumps(raised))
"""


@dataclass(frozen=True)
class Entry:
    """A quoted error and what stands for it: a block that raises it, or a test."""

    title: str
    quote: str
    python: str = ""
    guard: str = ""

    @property
    def error(self) -> str:
        """Name of the error's type, or of one that it is, too."""
        return self.quote.partition(":")[0]

    @property
    def message(self) -> str:
        return self.quote.partition(":")[2].strip()


def read(text: str) -> tuple[str, list[Entry]]:
    """The first block of a page, and its entries in order."""
    prelude, title, source = "", "", {}
    entries: list[Entry] = []
    for part in _PARTS.finditer(text):
        kind, value = part.lastgroup, part[part.lastgroup]
        if kind == "title":
            assert not source, f"{title!r} has a block or a guard without a quote"
            title = value
        elif kind == "quote":
            assert source, f"a quote of {title!r} has neither a block nor a guard"
            entries.append(Entry(title, " ".join(value.split()), **source))
            source = {}
        elif kind == "python" and not prelude:
            prelude = value
        else:
            assert not source, f"{title!r} has two blocks or guards before a quote"
            source = {kind: value}
    assert not source, f"{title!r} has a block or a guard without a quote"
    return prelude, entries


PRELUDE, ENTRIES = read(PAGE.read_text("utf-8"))
SHOWN = [entry for entry in ENTRIES if entry.python]
GUARDED = [entry for entry in ENTRIES if entry.guard]


def fits(quote: str, message: str) -> bool:
    """Whether ``message`` is what ``quote`` says, ``…`` standing for any text."""
    pattern = ".*".join(re.escape(part) for part in quote.split("…"))
    return re.fullmatch(pattern, " ".join(message.split()), re.DOTALL) is not None


@pytest.fixture(scope="module")
def raised() -> dict[str, tuple[list[str], str]]:
    """Entry's block -> names of the error's type and its bases, and its message."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _RUNNER],
        input=json.dumps([PRELUDE, *(entry.python for entry in SHOWN)]),
        cwd=REPO,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.rpartition("RAISED")[2])
    return {entry.python: tuple(each) for entry, each in zip(SHOWN, found, strict=True)}


@pytest.mark.parametrize("entry", SHOWN, ids=lambda entry: entry.title)
def test_block_raises_what_is_quoted(entry, raised):
    types, message = raised[entry.python]
    assert entry.error in types, message
    # A KeyError shows its message in quotes.
    assert fits(entry.message, message.strip('"')), message


@functools.cache
def messages() -> list[list[str]]:
    """All texts of the source, as words."""
    found: list[list[str]] = []
    for folder in ("megatron", "mimo_colocated", "examples"):
        for path in (REPO / folder).rglob("*.py"):
            found += map(words, texts(ast.parse(path.read_text("utf-8"))))
    return found


def texts(tree: ast.AST) -> Iterator[str]:
    """The strings below ``tree``; what is filled in is ``…``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield " ".join(node.value.split())
        elif isinstance(node, ast.JoinedStr):
            parts = (p.value if isinstance(p, ast.Constant) else "…" for p in node.values)
            yield " ".join("".join(parts).split())


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text)


def holds(text: list[str], run: list[str]) -> bool:
    """Whether ``run`` stands in ``text``, word by word."""
    return any(text[at : at + len(run)] == run for at in range(len(text) - len(run) + 1))


def unknown_words(part: str, known: list[list[str]]) -> list[str]:
    """What is left of ``part`` after the runs of two words or more that some text has."""
    rest = words(part)
    while rest:
        length = len(rest)
        while length > 1 and not any(holds(text, rest[:length]) for text in known):
            length -= 1
        if length == 1:
            break
        rest = rest[length:]
    return rest


@pytest.mark.parametrize("entry", GUARDED, ids=lambda entry: entry.title)
def test_quoted_words_stand_in_the_source(entry):
    for part in entry.message.split("…"):
        # Messages are put together from pieces, and a single word between two may be any.
        assert len(unknown_words(part, messages())) <= 1, part


@pytest.mark.parametrize("entry", GUARDED, ids=lambda entry: entry.title)
def test_guard_expects_what_is_quoted(entry):
    file, _, name = entry.guard.partition("::")
    tree: ast.AST = ast.parse((REPO / file).read_text("utf-8"))
    if name:
        tree = next(n for n in ast.walk(tree) if getattr(n, "name", None) == name)
    assert any(expects(pattern, entry.message) for pattern in texts(tree)), "no text is of it"


def expects(pattern: str, quote: str) -> bool:
    """Whether ``pattern``, a text of a test, is one of the quote: nearly all its words are there.

    A test fills in what the quote leaves open, and may end in the midst of a word.
    """
    sought = [word for word in words(pattern.replace("\\", " ")) if re.match("[^0-9]{3}", word)]
    quoted = words(quote)
    found = [word for word in sought if any(each.startswith(word) for each in quoted)]
    return sum(map(len, found)) >= 12 and len(found) >= 0.75 * len(sought)


def test_both_kinds_of_entries_are_found():
    assert PRELUDE
    assert len(SHOWN) > 10
    assert len(GUARDED) > 10


@pytest.mark.parametrize(
    ("page", "message"),
    [
        ("# A\n```text\nValueError: x\n```\n", "neither a block nor a guard"),
        ("```python\n```\n# A\n<!-- guard: x -->\n# B\n", "'A' has a block or a guard without"),
        ("```python\n1\n```\n# A\n```python\n2\n```\n", "'A' has a block or a guard without"),
        ("# A\n<!-- guard: x -->\n<!-- guard: y -->\n```text\nV: x\n```", "two blocks or guards"),
    ],
)
def test_a_page_with_entries_that_nothing_checks_is_refused(page, message):
    with pytest.raises(AssertionError, match=message):
        read(page)


def test_quotes_leave_out_what_depends_on_the_run():
    assert fits("rank … has … rows", "rank 3 has\n4 rows")
    assert not fits("rank … has … rows", "rank 3 has 4 rows too many")
    assert expects(r"rank 3 has few .* rows of \(\d, 16\) aft", "… rank … has rows of … after")
    assert not expects("has few words", "has few words")
    assert not expects("among quite other things a sentence", "a sentence among those")
    assert unknown_words("one two three", [["zero", "one", "two"]]) == ["three"]
