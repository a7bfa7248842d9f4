# SPDX-License-Identifier: Apache-2.0
"""Every bash and python block of every README is run; see ``readme_blocks`` for the marks."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.functional.readme_blocks import REPO, Block, all_blocks, parse, readme_files
from tests.harness import programs

BLOCKS = all_blocks()


def with_blocks_before(block: Block) -> str:
    """A python block's text, below that of the blocks it continues."""
    chain = [block]
    earlier = [b for b in BLOCKS if b.path == block.path and b.line < block.line]
    while chain[0].mark == "after":
        chain.insert(0, [b for b in earlier if b.language == "python"].pop())
        earlier = [b for b in earlier if b.line < chain[0].line]
    return "\n".join(b.text for b in chain)


def run(block: Block) -> subprocess.CompletedProcess[str]:
    # The reader's shell has the environment's programs on its path, and so has the block's.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path}
    timeout = int(block.argument) if block.mark == "timeout" else 300
    if block.language == "python":
        return programs.run(["-c", with_blocks_before(block)], REPO, environment, timeout)
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block.text],
        cwd=REPO,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        check=False,
    )


def assert_runs(block: Block) -> None:
    done = run(block)
    assert done.returncode == 0, f"{block.text}\n---\n{done.stdout}{done.stderr or ''}"


def assert_names_targets_that_make_knows(block: Block) -> None:
    lines = [line for line in block.text.splitlines() if line.split("#")[0].strip()]
    assert lines
    for line in lines:
        command = line.split("#")[0].strip()
        assert re.match(r"make( |$)", command), f"{line!r} is not a make command"
        # Inside `make test` the outer make's flags would reach this one.
        env = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}
        done = subprocess.run(
            ["bash", "-c", command.replace("make", "make --dry-run", 1)],
            cwd=REPO,
            env=env,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"
        assert done.stdout.strip(), f"{command}: make would do nothing"


def assert_covering_test_exists(block: Block) -> None:
    file, _, name = block.argument.partition("::")
    assert (REPO / file).is_file(), f"{block.name} says it is covered by {file}"
    assert name in ("", *re.findall(r"^def (test_\w+)", (REPO / file).read_text(), re.MULTILINE))


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.name)
def test_block(block: Block) -> None:
    check = {
        "make": assert_names_targets_that_make_knows,
        "covered-by": assert_covering_test_exists,
    }.get(block.mark, assert_runs)
    check(block)


def test_readme_files_are_found_and_environments_left_out(tmp_path: Path) -> None:
    for name in ("README.md", "a/b/README.md", ".venv/lib/README.md", "runs/README.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert readme_files(tmp_path) == [Path("README.md"), Path("a/b/README.md")]


def test_parse_finds_blocks_marks_and_indentation() -> None:
    text = """
```bash
echo one
```
- item
  <!-- test: covered-by tests/a.py::test_b -->

  ```python
  if True:
      pass
  ```
```text
not code
```
"""
    first, second = parse(text, Path("X.md"))
    assert (first.name, first.language, first.text, first.mark) == (
        "X.md:2",
        "bash",
        "echo one\n",
        "",
    )
    assert (second.text, second.mark) == ("if True:\n    pass\n", "covered-by")
    assert second.argument == "tests/a.py::test_b"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("```bash\nls\n", r"X\.md:1: this block is not closed"),
        ("<!-- test: skip -->\n```bash\nls\n```\n", r"X\.md:1: 'skip' is not a way to test a bash"),
        ("<!-- test: make -->\n```python\n1\n```\n", r"'make' is not a way to test a python block"),
        ("<!-- test: covered-by -->\n```bash\nls\n```\n", r"'covered-by' is not a way"),
        ("<!-- test: make -->\ntext\n```bash\nls\n```\n", r"stands directly above a block"),
        ("<!-- test: make -->\n```text\nls\n```\n", r"belongs to a bash or python block"),
    ],
)
def test_parse_refuses_what_it_would_have_to_guess(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(text, Path("X.md"))
