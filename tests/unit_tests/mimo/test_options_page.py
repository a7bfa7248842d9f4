# SPDX-License-Identifier: Apache-2.0
"""docs/options.md is what the options say."""

from __future__ import annotations

import dataclasses

import pytest

from examples.mimo.digits.options import Options
from tools import write_options


def test_the_page_is_current() -> None:
    assert write_options.PAGE.read_text() == write_options.text()


def test_every_option_of_the_job_is_on_the_page() -> None:
    page = write_options.PAGE.read_text()
    for field in dataclasses.fields(Options):
        assert f"--{field.name.replace('_', '-')}" in page


def test_a_page_that_is_old_is_found(
    monkeypatch: pytest.MonkeyPatch, tmp_path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = tmp_path / "docs" / "options.md"
    old.parent.mkdir()
    old.write_text(write_options.text().replace("`0.0015`", "`0.002`"))
    monkeypatch.setattr(write_options, "PAGE", old)
    monkeypatch.setattr(write_options, "ROOT", tmp_path)
    monkeypatch.setattr("sys.argv", ["write_options.py", "--check"])
    assert write_options.main() == 1
    assert "docs/options.md is old; write it with" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["write_options.py"])
    assert write_options.main() == 0
    assert old.read_text() == write_options.text()
