"""What holds for every study: bad input is refused before any work, what is on record is not measured again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from matplotlib import pyplot

from tests.support.browser import BROWSER, seen_in_browser
from tpcheck.cli import main
from tpcheck.errors import TpcheckError
from tpcheck.pages.figures import WIDTH, png
from tpcheck.study import command
from tpcheck.study.page import Heading, Page, Paragraph, Picture, Table
from tpcheck.study.study import Finding, Part, Progress, Settings, Study


class Counted(Settings):
    """Of the study below."""

    first: int = 3
    second: int = 5

    @classmethod
    def quick(cls) -> Counted:
        return cls(first=1)


def counting(calls: list[str], **changes: Any) -> Study:
    """A study whose parts note that they are run."""

    def part(name: str) -> Callable[[Counted, Progress], dict[str, Any]]:
        def run(settings: Counted, progress: Progress) -> dict[str, Any]:
            progress(0.5, "half")
            calls.append(name)
            return {"found": getattr(settings, name)}

        return run

    def page(settings: Counted, results: dict[str, dict[str, Any]]) -> Page:
        figure, axes = pyplot.subplots(figsize=(WIDTH, 2))
        axes.plot([results["first"]["found"], results["second"]["found"]])
        long = Table(["layer", "a < b"], [["`0`", "1 | 2 & 3"]], "All of it", folded=True)
        blocks = [Heading("Numbers"), Paragraph("See `code` and [there](https://arxiv.org/abs/1)."), long]
        return Page("It is 3. Really.", Picture(png(figure), "two <numbers>"), blocks, [Table(["x"], [["a|b"]])])

    given: dict[str, Any] = {
        "name": "counting", "question": "How many?", "settings": Counted, "requires": (),
        "memory_gib": lambda settings: 0.1, "page": page,
        "parts": (Part("first", part("first"), reads=("first",)), Part("second", part("second"))),
        "findings": lambda results: [Finding("it is three", "holds", str(results["first"]["found"]))],
    }  # fmt: skip
    return Study(**given | changes)


def test_a_part_on_record_is_run_again_only_for_other_settings_or_versions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    study = counting(calls)
    command.run_study(study, [], tmp_path / "out", quick=False)
    command.run_study(study, [], tmp_path / "out", quick=False)
    assert calls == ["first", "second"]
    assert json.loads((tmp_path / "out" / "first.json").read_text())["result"] == {"found": 3}
    command.run_study(study, ["second=7"], tmp_path / "out", quick=False)
    assert calls == ["first", "second", "second"]  # the first part does not read it
    monkeypatch.setattr(command.record.provenance, "versions", lambda: {"torch": "another"})
    command.run_study(study, ["second=7"], tmp_path / "out", quick=False)
    assert calls[3:] == ["first", "second"]


def test_an_interrupted_study_goes_on_where_it_was(tmp_path: Path) -> None:
    calls: list[str] = []

    def fails(settings: Counted, progress: Progress) -> dict[str, Any]:
        raise KeyboardInterrupt

    whole = counting(calls)
    with pytest.raises(KeyboardInterrupt):
        command.run_study(counting(calls, parts=(whole.parts[0], Part("second", fails))), [], tmp_path, quick=False)
    assert not (tmp_path / "page.html").exists()
    command.run_study(whole, [], tmp_path, quick=False)
    assert calls == ["first", "second"]


def test_page_and_readme_say_everything(tmp_path: Path) -> None:
    command.run_study(counting([]), ["first=9"], tmp_path, quick=False)
    html, readme = (tmp_path / "page.html").read_text(), (tmp_path / "README.md").read_text()
    order = ["How many?", "It is 3. Really.", "two &lt;numbers&gt;", "it is three", "Numbers", "How to run it", "torch"]
    assert [html.index(text) for text in order] == sorted(html.index(text) for text in order)
    assert "<code>code</code>" in html and '<a href="https://arxiv.org/abs/1">there</a>' in html
    assert "a &lt; b" in html and "1 | 2 &amp; 3" in html
    assert "tpcheck study counting first=9" in html and "tpcheck study counting first=9" in readme
    assert "![two <numbers>](picture.png)" in readme and "| a\\|b |" in readme
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome on this machine")
@pytest.mark.parametrize("width", [1280, 400])
def test_page_is_readable_in_a_browser(tmp_path: Path, width: int) -> None:
    command.run_study(counting([]), [], tmp_path, quick=False)
    seen = seen_in_browser((tmp_path / "page.html").read_text(), width, tmp_path)
    assert seen["scroll"] <= seen["width"] == width
    assert len(seen["pictures"]) == 1 and seen["font"] >= 14


@pytest.mark.parametrize(
    ("changes", "overrides", "message"),
    [
        ({"requires": ("no_such_package",)}, [], "needs no_such_package: pip install 'tpcheck[studies]'"),
        ({"memory_gib": lambda settings: 1e6}, [], "takes about 1000000.0 GiB of memory and"),
        ({}, ["third=1"], "counting: unknown key third: allowed are first, second"),
        ({}, ["first=much"], "counting: first: Input should be a valid integer"),
        ({}, ["first"], "'first' is not an override"),
    ],
)
def test_bad_input_is_refused_before_any_work(
    changes: dict[str, Any], overrides: list[str], message: str, tmp_path: Path, capsys: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    calls: list[str] = []
    module = SimpleNamespace(STUDY=counting(calls, **changes))
    monkeypatch.setattr(command.importlib, "import_module", lambda name: module)
    assert main(["study", "tp-vs-dp", *overrides, "--output", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
    assert not calls and not (tmp_path / "out").exists()


def test_an_unknown_study_is_one_line(capsys: Any) -> None:
    assert main(["study", "nonsense"]) == 2
    said = capsys.readouterr().err
    assert "'nonsense' is not one of 'tp-vs-dp', 'frameworks', 'keras-jax', 'communication'" in said
    assert said.count("\n") == 1


def test_two_studies_do_not_write_to_one_place(tmp_path: Path) -> None:
    def inside(settings: Counted, progress: Progress) -> dict[str, Any]:
        with pytest.raises(TpcheckError, match="is being written by another study"):
            command.run_study(counting([]), [], tmp_path, quick=False)
        return {"found": 1}

    study = counting([])
    command.run_study(counting([], parts=(Part("first", inside), study.parts[1])), [], tmp_path, quick=False)


def test_a_finding_has_one_of_three_verdicts() -> None:
    Finding("x", "holds only if the seed is 1", "y")
    with pytest.raises(ValueError, match="'perhaps' is no verdict on 'x'"):
        Finding("x", "perhaps", "y")


def test_an_output_that_is_none_is_one_line(capsys: Any) -> None:
    assert main(["study", "tp-vs-dp", "--output", "/"]) == 2
    said = capsys.readouterr().err
    assert "output=" in said and said.count("\n") == 1
