"""Pages on a telephone: none is wider than the window, nor is anything on it that does not scroll by itself."""

from __future__ import annotations

import html
import io
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from rich.console import Console

from tests.test_results import MAKERS

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WIDTHS = (390, 1200)
MEASURE = """<script>
addEventListener("load", () => {
  for (const frame of document.querySelectorAll("iframe")) {
    const page = frame.contentDocument.documentElement, line = document.createElement("p");
    line.textContent = `${frame.title}: ${page.scrollWidth - page.clientWidth} pixels too wide`;
    document.body.append(line);
  }
});
</script>"""


@pytest.mark.skipif(BROWSER is None, reason="no browser is installed")
def test_no_page_scrolls_sideways(tmp_path: Path) -> None:
    pages = {f"{name} {i}": result.page() for name, make in MAKERS.items() for i, result in enumerate(make())}
    frames = "".join(
        f'<iframe title="{name} at {width}" width="{width}" height="900" srcdoc="{html.escape(page)}"></iframe>'
        for name, page in pages.items()
        for width in WIDTHS
    )
    (tmp_path / "all.html").write_text(f"<!doctype html><body>{frames}{MEASURE}", encoding="utf-8")
    command = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=4000", "--dump-dom"]
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    done = subprocess.run([*command, profile, str(tmp_path / "all.html")], capture_output=True, text=True, timeout=120)
    found = re.findall(r"<p>([^<]*): (-?\d+) pixels too wide</p>", done.stdout)
    assert len(found) == len(pages) * len(WIDTHS), done.stderr[-2000:]
    assert not [name for name, too_wide in found if int(too_wide) > 0]


@pytest.mark.parametrize("name", MAKERS)
def test_no_result_is_cut_in_a_terminal(name: str) -> None:
    for result in MAKERS[name]():
        out = io.StringIO()
        Console(width=80, file=out).print(result)
        assert "\u2026" not in out.getvalue(), f"{type(result).__name__} is cut at 80 columns"
