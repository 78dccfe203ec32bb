"""The HTML report opened in a real browser, where there is one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support.browser import BROWSER, seen_in_browser
from tests.support.traces import traced
from tpcheck.cli import main


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
    seen = seen_in_browser(text, width, tmp_path)
    assert seen["scroll"] <= seen["width"] == width
    assert len(seen["pictures"]) == 3
    for natural, shown in seen["pictures"]:
        assert natural > 600
        assert 330 <= shown <= seen["width"]
    assert seen["font"] >= 14
