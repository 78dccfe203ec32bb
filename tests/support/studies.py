"""A study run with `--quick`, once for all that its tests ask, and its page in a browser."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.support.browser import BROWSER, seen_in_browser
from tpcheck.cli import main
from tpcheck.study.study import Finding, Results, Study


def run_quick(study: Study, folder: Path) -> Results:
    """Every part's result; the page is in `folder` as well."""
    assert main(["study", study.name, "--quick", "--output", str(folder)]) == 0
    return {part.name: json.loads((folder / f"{part.name}.json").read_text())["result"] for part in study.parts}


def by_claim(findings: list[Finding], words: str) -> Finding:
    """The one finding whose claim has these words."""
    (found,) = [one for one in findings if words in one.claim]
    return found


def check_page(study: Study, folder: Path, pictures: int, scratch: Path) -> None:
    """The page begins with the question, has all pictures, and is readable on a telephone and on a screen."""
    page, readme = (folder / "page.html").read_text(), (folder / "README.md").read_text()
    assert page.index(study.question) < page.index('class="answer"') < page.index("<img")
    assert page.count("data:image/png;base64,") == pictures
    assert f"tpcheck study {study.name} --quick" in page and f"tpcheck study {study.name} --quick" in readme
    assert readme.startswith(f"# {study.question}\n") and "](picture.png)" in readme
    if BROWSER is None:
        return
    for width in (1280, 400):
        seen: dict[str, Any] = seen_in_browser(page, width, scratch)
        assert seen["scroll"] <= seen["width"] == width
        assert seen["font"] >= 14 and len(seen["pictures"]) == pictures
        assert all(natural > 600 and 330 <= shown <= width for natural, shown in seen["pictures"])
