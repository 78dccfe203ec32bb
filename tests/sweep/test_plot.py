"""The picture and the page of a sweep."""

from __future__ import annotations

import base64
from pathlib import Path

import numpy as np
import pytest
from matplotlib import image, pyplot
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from tests.support.finished import finish, sweep
from tpcheck.sweep import plot, report, verdict


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """What has been drawn, to be looked at after it was saved."""
    found: list[Figure] = []
    monkeypatch.setattr(pyplot, "close", found.append)
    return found


def test_curves_are_distances_from_the_first_cell_of_the_group(tmp_path: Path) -> None:
    cells = sweep(tmp_path)
    for cell, losses in zip(
        cells.cells, ([3.0, 2.0, 1.0], [3.0, 2.5, 0.5], [3.0, 2.0, 1.0], [3.0, 2.0, 1.0]), strict=True
    ):
        finish(cell, losses)
    assert plot.curves(cells) == [
        plot.Curve("", "stock", "TP=2", "TP=1", (0.0, 0.5, 0.5)),
        plot.Curve("", "tree", "TP=2", "TP=1", (0.0, 0.0, 0.0)),
    ]


def test_a_run_that_is_shorter_is_compared_as_far_as_it_goes(tmp_path: Path) -> None:
    cells = sweep(tmp_path, matrix={"strategy": ["tree"], "tp": [1, 2, 4]})
    finish(cells.cells[0], [3.0, 2.0, 1.0])
    finish(cells.cells[1], [3.0])
    assert [curve.distance for curve in plot.curves(cells)] == [(0.0,)]


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("distance", "line", "dots", "tally"),
    [
        ((0.0, 0.0), None, [1, 2], "TP=2: 0 at every step"),
        ((1e-7, 1e-2), (1e-7, 1e-2), [], "0 of 2 steps equal"),
        ((0.0, NAN, INF, 1e-3), (NAN, NAN, INF, 1e-3), [1], "1 of 4 steps equal"),
    ],
    ids=["all equal", "none equal", "not numbers"],
)
def test_what_differs_is_a_line_with_its_name_and_what_is_equal_a_dot_below_it(
    distance: tuple[float, ...],
    line: tuple[float, ...] | None,
    dots: list[int],
    tally: str,
    figures: list[Figure],
    tmp_path: Path,
) -> None:
    found = [plot.Curve("bf16", name, "TP=2", "TP=1", distance) for name in ("stock", "tree")]
    plot.draw([*found, plot.Curve("fp32", "stock", "TP=2", "TP=1", (0.5,))], "title", "subtitle", tmp_path / "x.png")
    (figure,) = figures
    upper, lower, other, _ = figure.axes
    assert [text.get_text() for text in figure.texts] == ["title", "subtitle"]
    assert [axes.get_title("left") for axes in (upper, other)] == ["bf16", "fp32"]
    assert (upper.get_ylabel(), lower.get_xlabel()) == ("|loss − loss at TP=1|", "step")

    names = [text.get_text() for text in upper.texts]
    drawn = [curve for curve in upper.lines if len(curve.get_xdata()) == len(distance)]
    if line is None:
        assert names == ["no loss differs at any step"] and not drawn
    else:
        assert names == ["stock TP=2", "tree TP=2"]
        assert len({curve.get_linestyle() for curve in drawn}) == len(drawn) == 2
        for curve in drawn:
            np.testing.assert_array_equal(curve.get_data(), (range(1, len(line) + 1), line))
    rows = [list(curve.get_xdata()) for curve in lower.lines if curve.get_marker() == "o"]
    assert rows == [dots, dots]
    assert [text.get_text() for text in lower.texts] == [tally, tally]

    pixels = image.imread(tmp_path / "x.png")[..., :3]
    colour = next(curve for curve in lower.lines if curve.get_marker() == "o").get_color()
    assert np.isclose(pixels, to_rgb(colour), atol=1 / 255).all(-1).sum() > 50


def test_the_page_is_one_file_with_picture_verdict_and_every_digest(figures: list[Figure], tmp_path: Path) -> None:
    cells = sweep(tmp_path, name="a-b")
    for number, cell in enumerate(cells.cells):
        finish(cell, model=f"{number // 2}" * 64)
    picture, html = report.write(cells, verdict.judge(cells))
    text = html.read_text()
    assert f'src="data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()}"' in text
    assert "HELD: tree" in text
    assert "0" * 64 in text
    assert "1" * 64 in text
    assert "http" not in text
    (figure,) = figures
    assert "only the tensor-parallel size differs" in figure.texts[0].get_text()
    assert figure.texts[1].get_text() == "a-b: qwen3-tiny, bf16, 3 steps"
    assert [label.get_text() for label in figure.axes[1].get_yticklabels()] == ["tree", "stock"]


def test_without_two_runs_to_compare_there_is_a_page_without_a_picture(tmp_path: Path) -> None:
    cells = sweep(tmp_path)
    finish(cells.cells[0])
    assert report.write(cells, verdict.judge(cells)) == [tmp_path / "out" / "index.html"]
    assert "no verdict" in (tmp_path / "out" / "index.html").read_text()
