# SPDX-License-Identifier: Apache-2.0
"""The page of a run as a browser shows it, where one is installed.

Without one this is a skip that pytest's summary names; what stands on the page, and that nothing
is loaded, is tested by parsing it in ``test_report.py`` on every machine.
"""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from mimo_colocated.train.report import write_report
from tests.unit_tests.mimo.train.test_report import ANSWERS, CODE, FIGURES, leave

pytestmark = pytest.mark.once

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
WIDE, NARROW = 1100, 390
# Every page is shown in a frame of its own. What the browser makes of it is the harness's text.
HARNESS = """<!DOCTYPE html><meta charset="utf-8">{frames}<script>
addEventListener("load", () => {{
  const found = {{}};
  for (const frame of document.querySelectorAll("iframe")) {{
    const page = frame.contentDocument, root = page.documentElement;
    found[frame.id] = {{
      title: page.title,
      headings: [...page.querySelectorAll("h2")].map(each => each.innerText),
      images: Object.fromEntries([...page.images].map(each =>
        [each.id, [each.complete && each.naturalWidth > 0, each.getBoundingClientRect().width]])),
      loaded: frame.contentWindow.performance.getEntriesByType("resource").map(each => each.name),
      ran: frame.contentWindow.ran === true,
      too_wide: root.scrollWidth - root.clientWidth,
      font: getComputedStyle(page.querySelector("h1")).fontWeight,
      text: page.body.innerText,
    }};
  }}
  document.body.textContent = JSON.stringify(found);
}});
</script>"""
FRAME = '<iframe id="{name}" srcdoc="{page}" style="width: {width}px; height: 800px"></iframe>'


def shown(pages: dict[str, tuple[str, int]], place: Path) -> dict[str, Any]:
    """What a browser makes of pages.

    Args:
        pages: name -> page, and how wide its window is.
        place: for the browser's files.
    """
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"no browser is installed, none of {', '.join(BROWSERS)}")
    frames = [
        FRAME.format(name=name, page=html.escape(page), width=width)
        for name, (page, width) in pages.items()
    ]
    (place / "harness.html").write_text(HARNESS.format(frames="".join(frames)))
    flags = [
        *("--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--dump-dom"),
        *("--disable-background-networking", f"--user-data-dir={place / 'browser'}"),
    ]
    done = subprocess.run(
        [browser, *flags, (place / "harness.html").as_uri()],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    body = re.search(r"<body>(.*)</body>", done.stdout, re.DOTALL)
    assert body is not None, done.stdout[:500]
    return json.loads(html.unescape(body[1]))


def test_what_a_browser_shows(tmp_path: Path) -> None:
    page = write_report(leave(tmp_path / "run")).read_text()
    picture = '<img id="other" src="http://127.0.0.1:9/other.png">'
    code = f"<script>window.ran = true</script>{picture}"
    bad = page.replace("</body>", f"{code}</body>")
    policy = re.compile(r"<meta http-equiv=[^>]*>")
    assert policy.search(page)
    found = shown(
        {
            "wide": (page, WIDE),
            "narrow": (page, NARROW),
            "with_code": (bad, WIDE),
            # Controls: without the policy the same code runs; a figure that is cut is seen.
            "without_policy": (policy.sub("", bad), WIDE),
            "broken": (page.replace(";base64,", ";base64,AAAA", 1), WIDE),
        },
        tmp_path,
    )
    for name, width in (("wide", WIDE), ("narrow", NARROW)):
        one = found[name]
        assert one["title"] == "<mine> & others in run"
        assert one["headings"] == [
            *("Curves", "Time and work", "Layouts", "Samples", "Answers", "Versions", "Recipe")
        ]
        assert list(one["images"]) == FIGURES
        for figure, (decoded, drawn) in one["images"].items():
            assert decoded, figure
            assert 0.6 * width < drawn <= width, (figure, drawn)
        assert one["loaded"] == []
        assert one["too_wide"] == 0  # nothing is cut off at the right, on a telephone neither
        assert one["font"] == "700"  # its style is read
        assert CODE in one["text"]
        assert one["text"].count("right") >= ANSWERS // 2
        assert not one["ran"]
    assert not found["with_code"]["ran"]
    assert found["with_code"]["images"]["other"][0] is False
    assert found["without_policy"]["ran"]
    assert "http://127.0.0.1:9/other.png" in found["without_policy"]["loaded"]
    assert found["broken"]["images"]["curves"][0] is False
