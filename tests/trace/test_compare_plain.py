"""`tpcheck compare` on one small plain model: what it may not call identical or rounding."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tpcheck
from tests.support import traces
from tpcheck.cli import main
from tpcheck.errors import TpcheckError
from tpcheck.files.names import MANIFEST, RECORDS
from tpcheck.trace.compare.estimate import open_noise, open_trace


class Model(nn.Module):
    """A linear layer, and one element of its output replaced by a constant that no gradient depends on."""

    def __init__(self, constant: float) -> None:
        super().__init__()
        self.linear, self.constant, self.head = nn.Linear(8, 8), Replaced(constant), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.constant(self.linear(x))[:, :4])


class Replaced(nn.Module):
    def __init__(self, constant: float) -> None:
        super().__init__()
        self.constant = constant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.where(torch.arange(8) == 7, self.constant, x)


def recorded(path: Path, constant: float = 1.0, samples: int = 4, **options: Any) -> Path:
    """A trace of two steps of `Model`."""
    torch.manual_seed(0)
    model = Model(constant)
    x = torch.randn(samples, 8)
    return traces.recorded(path, model, lambda: model(x).square().mean(), **options)


def test_infinities_of_opposite_signs_are_suspect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = recorded(tmp_path / "a", float("inf"))
    for seed in (1, 2, 3):
        recorded(a / f"noise-{seed}", float("inf"), perturb=seed)
    b = recorded(tmp_path / "b", float("-inf"))
    assert main(["compare", str(a), str(b)]) == 1
    assert "suspect: constant (output, step 0); infinite on one side" in capsys.readouterr().out


def test_what_could_not_be_compared_is_not_called_identical(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = recorded(tmp_path / "a", kinds=["out"]), recorded(tmp_path / "b", samples=6, kinds=["out"])
    assert main(["compare", str(a), str(b)]) == 2
    assert "can't tell: no tensor of one trace could be compared" in capsys.readouterr().out
    a, b = recorded(tmp_path / "c"), recorded(tmp_path / "d", kinds=["start"])
    assert main(["compare", str(a), str(b)]) == 0
    assert "identical: every tensor that has been compared, bit for bit; " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        ("rank.json", {"world": None}, "does not describe a trace (KeyError('world'))"),
        ("rank.json", {"world": 0}, "world is 0"),
        ("rank.json", {"steps": 3}, "steps is 3"),
        ("rank.json", {"pp": "x"}, "pp is 'x'"),
        ("rank.json", {"dp": "x" * 10_000}, "dp is 'xxx"),
        (RECORDS, {"shape": None}, "records.jsonl:1 is not a record"),
        (RECORDS, {"step": "0"}, "records.jsonl:1"),
        (RECORDS, {"file": "../x"}, "records.jsonl:1"),
    ],
)
def test_damaged_descriptions_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, change: dict[str, Any], words: str
) -> None:
    a = recorded(tmp_path / "a")
    path = a / "rank-00000" / file
    text = path.read_text()
    first, rest = text.split("\n", 1) if file == RECORDS else (text, "")
    fields = {key: value for key, value in {**json.loads(first), **change}.items() if value is not None}
    path.write_text(json.dumps(fields) + "\n" + rest)
    assert main(["compare", str(a), str(a)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line and len(line) < 300 + len(str(tmp_path))


@pytest.mark.filterwarnings("error")
def test_json_has_no_nan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = recorded(tmp_path / "a")
    b = recorded(tmp_path / "b", constant=float("inf"))
    torch.manual_seed(0)
    model = Model(1.0)
    with torch.no_grad():
        model.head.bias.fill_(float("nan"))
    with tpcheck.trace(tmp_path / "c", model, steps=[0]):
        model(torch.randn(4, 8)).sum().backward()
        torch.optim.SGD(model.parameters(), lr=1e-3).step()
    for other in (b, tmp_path / "c"):
        assert main(["compare", str(a), str(other), "--json"]) == 1
        assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail)["verdict"] == "suspect"


@pytest.mark.parametrize("text", [b"\xff\xfe\n", b"[" * 100_000])
def test_descriptions_that_are_not_text_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: bytes
) -> None:
    a = recorded(tmp_path / "a", kinds=["clip"])
    for file in (RECORDS, "rank.json"):
        (a / "rank-00000" / file).write_bytes(text * (2 if file == RECORDS and text.endswith(b"\n") else 1))
        assert main(["compare", str(a), str(a)]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


def test_boxes_that_do_not_fit_are_not_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = recorded(tmp_path / "a"), recorded(tmp_path / "b")
    path = b / "rank-00000" / RECORDS
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[5]["at"], lines[6]["at"], lines[8]["dtype"] = [[0]], [], "float64"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(["compare", str(a), str(b)]) == 0
    printed = capsys.readouterr().out
    assert "its boxes have other dimensions than it" in printed
    assert "no rank holds any of it" in printed
    assert "its boxes are not of dtype 'float64'" in printed


@pytest.mark.parametrize(("seed", "words"), [(0, "perturb=0, which nudges nothing"), (1, "perturb=1, as another is")])
def test_nudged_runs_that_are_not_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], seed: int, words: str
) -> None:
    a = recorded(tmp_path / "a")
    recorded(a / "noise-1", perturb=1)
    recorded(a / "noise-2", perturb=seed)
    assert main(["compare", str(a), str(a)]) == 2
    assert words in capsys.readouterr().err


def test_a_nudged_run_of_other_data_says_nothing_of_rounding(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def of_tokens(path: Path, first: int, **options: Any) -> Path:
        torch.manual_seed(0)
        model, tokens = nn.Embedding(16, 4), torch.arange(first, first + 8).view(2, 4)
        return traces.recorded(path, model, lambda: model(tokens).square().mean(), **options)

    a = of_tokens(tmp_path / "a", 0)
    of_tokens(a / "noise-1", 0, perturb=1)
    assert main(["compare", str(a), str(a)]) == 0
    of_tokens(a / "noise-2", 8, perturb=2)
    assert main(["compare", str(a), str(a)]) == 2
    assert "noise-2 is not the reference run again: input 0 of step 0 is another" in capsys.readouterr().err


def test_a_nudged_run_that_was_interrupted_is_to_be_removed(tmp_path: Path) -> None:
    trace = recorded(tmp_path / "run" / "trace")
    (tmp_path / "run" / MANIFEST).write_text("{}")
    (tmp_path / "run" / "noise-1").mkdir()
    with pytest.raises(TpcheckError, match="noise-1, a nudged run, is not whole: remove it, and it is made again"):
        open_noise(tmp_path / "run", open_trace(trace))
