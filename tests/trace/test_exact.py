"""What is exact by nature is compared exactly, before any tensor, and said in words that help."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tpcheck
from tpcheck.files.names import SETTINGS
from tpcheck.trace.compare.command import compare
from tpcheck.trace.compare.text import sentence
from tpcheck.trace.record.store import rank_folder


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.act, self.down = nn.Linear(8, 12), nn.LayerNorm(12), nn.GELU(), nn.Linear(12, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.norm(self.act(self.up(x))))


def recorded(path: Path, change: Callable[[Any, Any], None] | None = None, clip: float = 1.0, **options: Any) -> Path:
    """A trace of two steps of AdamW, on a model that decays no norm; `change(model, optimizer)` comes first."""
    torch.manual_seed(0)
    model, x = Model(), torch.randn(6, 8)
    norms = [parameter for name, parameter in model.named_parameters() if "norm" in name]
    rest = [parameter for name, parameter in model.named_parameters() if "norm" not in name]
    optimizer = torch.optim.AdamW([{"params": rest}, {"params": norms, "weight_decay": 0.0}], lr=1e-3)
    if change:
        change(model, optimizer)
    with tpcheck.trace(path, model, **options):
        for _ in range(2):
            optimizer.zero_grad()
            (model(x) - x).square().mean().backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
    return path


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = recorded(tmp_path_factory.mktemp("exact") / "a")
    for seed in (1, 2, 3):
        recorded(path / f"noise-{seed}", perturb=seed)
    return path


def faster(model: Any, optimizer: Any) -> None:
    for group in optimizer.param_groups:
        group["lr"] *= 1.01


def decaying(model: Any, optimizer: Any) -> None:
    optimizer.param_groups[1]["weight_decay"] = 0.01


def without_norms(model: Any, optimizer: Any) -> None:
    del optimizer.param_groups[1]


def frozen(model: Any, optimizer: Any) -> None:
    model.down.bias.requires_grad_(False)


def another_epsilon(model: Any, optimizer: Any) -> None:
    model.norm.eps = 1e-6


def advanced(model: Any, optimizer: Any) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            zeros = torch.zeros_like(parameter)
            optimizer.state[parameter] = {"step": torch.tensor(7.0), "exp_avg": zeros, "exp_avg_sq": zeros.clone()}


@pytest.mark.parametrize(
    ("change", "name", "words"),
    [
        (faster, "lr", "learning rate: 0.00101 in B, 0.001 in A; compare the schedules"),
        (decaying, "weight_decay norm.weight", "weight decay: 0.01 in B, 0.0 in A, of norm.weight, norm.bias"),
        (without_norms, "group norm.weight", "parameter group: in none in B, in one in A, of norm.weight, norm.bias"),
        (frozen, "requires_grad down.bias", "whether it is trained: false in B, true in A, of down.bias"),
        (another_epsilon, "eps norm", "epsilon: 1e-06 in B, 1e-05 in A, of norm"),
        (advanced, "steps", "count of updates: 8 in B, 1 in A"),
    ],
)
def test_a_setting_that_differs_is_the_first_suspect(
    reference: Path, tmp_path: Path, change: Any, name: str, words: str
) -> None:
    found = compare(reference, recorded(tmp_path / "b", change))
    assert found.first is not None
    assert (found.first.key.kind, found.first.key.name, found.first.key.step) == ("settings", name, 0)
    assert found.first.why.startswith(words)
    assert sentence(found).startswith(f"suspect: {name} (setting, step 0); {words}")


def test_another_clip_threshold_is_found_though_nothing_is_clipped(reference: Path, tmp_path: Path) -> None:
    found = compare(reference, recorded(tmp_path / "b", clip=2.0))
    assert found.first is not None
    assert found.first.why == "clip threshold: 2.0 in B, 1.0 in A; the threshold is another"


def test_ranks_that_disagree_on_a_setting_are_named(reference: Path, tmp_path: Path) -> None:
    from tpcheck.trace.compare.exact import exact_findings
    from tpcheck.trace.compare.reader import Trace

    a, b = Trace(reference), Trace(recorded(tmp_path / "b"))
    other = json.loads(json.dumps(b.settings[0]).replace("0.001", "0.002"))
    b.settings.append({int(step): line for step, line in other.items()})
    b.ranks.append(b.ranks[0])
    (found,) = exact_findings(a, b, 0)
    assert found.why.startswith("learning rate: ranks of B disagree: 0.002 on rank 1, 0.001 on rank 0")


def test_equal_runs_have_no_finding_and_old_traces_no_settings(reference: Path, tmp_path: Path) -> None:
    b = recorded(tmp_path / "b")
    assert compare(reference, b).verdict == "identical"
    (rank_folder(b, 0) / SETTINGS).unlink()
    assert compare(reference, b).verdict == "identical"
    (rank_folder(b, 0) / SETTINGS).write_text("{")
    with pytest.raises(tpcheck.errors.TpcheckError, match="does not hold settings"):
        compare(reference, b)


def test_no_gradient_in_one_run_is_a_finding_and_the_rest_is_compared(reference: Path, tmp_path: Path) -> None:
    b = recorded(tmp_path / "b")
    file = rank_folder(b, 0) / "records.jsonl"
    lines = [line for line in file.read_text().splitlines() if not ('"grad"' in line and "norm.bias" in line)]
    lines_all = file.read_text().splitlines()
    renamed = [line if line in lines else line.replace('"norm.bias"', '"gone"') for line in lines_all]
    file.write_text("\n".join(renamed) + "\n")
    found = compare(reference, b)
    assert found.first is not None and (found.first.key.kind, found.first.key.name) == ("grad", "norm.bias")
    assert found.first.why.startswith("only in A: no gradient of this parameter in the other run")
    assert sum(row.verdict == "identical" for row in found.rows) > 20
