"""A page opened in a real browser, where there is one."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

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


def seen_in_browser(page: str, width: int, folder: Path) -> dict[str, Any]:
    """What a reader of the HTML `page` sees in a window of this `width`; nothing is said on the console.

    Returns:
        `width` and `scroll`, the page's own, in pixels; `pictures`, each [natural width, width as shown]; `font` size.
    """
    (folder / "probed.html").write_text(page.replace("</body>", PROBE + "</body>"))
    framed = folder / "framed.html"
    framed.write_text(FRAME % width)
    command = [
        str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars",
        f"--user-data-dir={folder / 'profile'}", "--window-size=1400,1700", "--enable-logging=stderr",
        "--virtual-time-budget=5000", "--dump-dom", framed.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ":CONSOLE" not in done.stderr
    title = re.search(r"<title>(.*?)</title>", done.stdout, re.DOTALL)
    assert title is not None, done.stderr[-1000:]
    seen: dict[str, Any] = json.loads(unescape(title[1]))
    return seen
