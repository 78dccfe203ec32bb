"""The HTML report opened in a real browser, where there is one."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

import pytest

from tests.support.traces import traced
from tpcheck.cli import main

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
# What a reader would notice: a picture that is not there, letters too small, a page that has to be moved sideways.
PROBE = """<script>addEventListener("load", () => { const page = document.documentElement; parent.postMessage(
JSON.stringify({width: innerWidth, scroll: page.scrollWidth, pictures: [...document.images].map(i => [i.naturalWidth,
i.getBoundingClientRect().width]), font: parseFloat(getComputedStyle(document.querySelector("p")).fontSize)}), "*") })
</script>"""
# Windows can't be as narrow as a telephone; a frame can.
FRAME = """<title></title><script>onmessage = message => { document.title = message.data }</script>
<iframe src="probed.html" style="border: 0; width: %dpx; height: 1600px"></iframe>"""


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    for tp in (1, 2):
        traced(folder / f"tp{tp}", tp=tp, steps=1, trace={"steps": [0]})
    page = folder / "pages" / "report.html"
    assert main(["compare", str(folder / "tp1"), str(folder / "tp2"), "--seeds", "1", "--report", str(page)]) == 0
    return page


def test_report_is_one_file_with_pictures_and_every_tensor(report: Path) -> None:
    text = report.read_text()
    assert text.count("data:image/png;base64,") == 3
    assert not re.search(r'(src|href)="(?!data:)', text)
    assert "rounding: no tensor is beyond what rounding explains" in text
    assert "decoder.layers.1.mlp.linear_fc2" in text


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome on this machine")
@pytest.mark.parametrize("width", [1280, 400])
def test_report_is_whole_and_readable_in_a_browser(report: Path, tmp_path: Path, width: int) -> None:
    # Which tensor's name stands in the verdict is left to rounding: a longer one than any.
    text = report.read_text().replace('<p class="verdict held">', '<p class="verdict held">' + "decoder.layers." * 4)
    (tmp_path / "probed.html").write_text(text.replace("</body>", PROBE + "</body>"))
    framed = tmp_path / "framed.html"
    framed.write_text(FRAME % width)
    command = [
        str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars",
        f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1400,1700", "--enable-logging=stderr",
        "--virtual-time-budget=5000", "--dump-dom", framed.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ":CONSOLE" not in done.stderr
    title = re.search(r"<title>(.*?)</title>", done.stdout, re.DOTALL)
    assert title is not None, done.stderr[-1000:]
    seen = json.loads(unescape(title[1]))
    assert seen["scroll"] <= seen["width"] == width
    assert len(seen["pictures"]) == 3
    for natural, shown in seen["pictures"]:
        assert natural > 600
        assert 330 <= shown <= seen["width"]
    assert seen["font"] >= 14
