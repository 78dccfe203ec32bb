"""`tpcheck compare` on one small plain model: what it may not call identical or rounding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tpcheck
from tpcheck.cli import main


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
    optimizer, x = torch.optim.AdamW(model.parameters(), lr=1e-3), torch.randn(samples, 8)
    with tpcheck.trace(path, model, **options):
        for _ in range(2):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    return path


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
