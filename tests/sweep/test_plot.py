"""The picture and the page of a sweep."""

from __future__ import annotations

from pathlib import Path

from matplotlib import image

from tests.support.finished import finish, sweep
from tpcheck.sweep import plot, report, verdict


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


def test_there_is_a_picture_when_everything_is_equal_when_nothing_is_and_when_a_loss_is_not_a_number(
    tmp_path: Path,
) -> None:
    cases = {"equal": (0.0, 0.0), "different": (1e-7, 1e-2), "nan": (0.0, float("nan"), float("inf"), 1e-3)}
    for name, distance in cases.items():
        found = [
            plot.Curve("fp32", "tree", "TP=2", "TP=1", distance),
            plot.Curve("bf16", "new", "TP=4 dp2", "TP=1", distance),
        ]
        plot.draw(found, "title", "subtitle", tmp_path / f"{name}.png")
        assert image.imread(tmp_path / f"{name}.png").shape[0] > 500


def test_the_page_is_one_file_with_picture_verdict_and_every_digest(tmp_path: Path) -> None:
    cells = sweep(tmp_path, name="a-b")
    for number, cell in enumerate(cells.cells):
        finish(cell, model=f"{number // 2}" * 64)
    picture, html = report.write(cells, verdict.judge(cells))
    text = html.read_text()
    assert picture.stat().st_size > 10_000
    assert "data:image/png;base64," in text
    assert "HELD: tree" in text
    assert "0" * 64 in text
    assert "1" * 64 in text
    assert "http" not in text


def test_without_two_runs_to_compare_there_is_a_page_without_a_picture(tmp_path: Path) -> None:
    cells = sweep(tmp_path)
    finish(cells.cells[0])
    assert report.write(cells, verdict.judge(cells)) == [tmp_path / "out" / "index.html"]
    assert "no verdict yet" in (tmp_path / "out" / "index.html").read_text()
