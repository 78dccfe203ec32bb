"""`tpcheck compare` against silent bugs in real megatron-core runs: each does something, is flagged, in its module."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import megatron.core
import pytest
import torch

from patches import initial_weights
from tests.silent_bugs import BUGS, CASES, CLEAN, Bug
from tests.silent_bugs.benchmark import Answer, Benchmark, table, to_json
from tpcheck.run import model, train

SAMPLE = ("attention output not reduced", "norm gradients not reduced over the sequence", "tp 2")
# What a float32 run differs by from one that computes the same in another order; bf16 runs only do so by more.
BEYOND_ROUNDING = 1e-4


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory: pytest.TempPathFactory) -> Benchmark:
    return Benchmark(tmp_path_factory.mktemp("silent-bugs"))


def every(name: str) -> Any:
    return name if name in SAMPLE else pytest.param(name, marks=pytest.mark.slow)


@pytest.mark.parametrize("name", [every(name) for name in CASES])
def test_bugs_are_named_and_clean_runs_are_not_flagged(benchmark: Benchmark, name: str) -> None:
    answer = benchmark.answer(CASES[name])
    if isinstance(answer.case, Bug):
        exact = answer.first_suspect.startswith("settings")  # whatever it has done within two steps
        assert exact or answer.effect > BEYOND_ROUNDING, "the bug does nothing"
        assert answer.flagged
    assert answer.right, (answer.first_suspect, answer.why)


def attributes() -> dict[str, int]:
    """All that a bug may replace, by identity: functions, classes and methods of megatron-core, torch, the trainer."""
    found = {}
    modules = [m for name, m in sys.modules.items() if name.startswith(f"{megatron.core.__name__}.")]
    for module in (*modules, torch, torch.distributed, torch.nn.Embedding, train, model, initial_weights):
        for name, value in list(vars(module).items()):
            found[f"{module.__name__}.{name}"] = id(value)
            if isinstance(value, type) and value.__module__.startswith("megatron.core"):
                found |= {f"{module.__name__}.{name}.{key}": id(item) for key, item in vars(value).items()}
    return found


@pytest.mark.parametrize("name", BUGS)
def test_bugs_leave_nothing_behind(name: str) -> None:
    before = attributes()
    with BUGS[name].inject():
        pass
    assert attributes() == before


def test_benchmark_is_as_large_as_it_says() -> None:
    assert len(BUGS) >= 90 and len({bug.kind for bug in BUGS.values()}) >= 30
    assert len(CLEAN) >= 40
    assert all(bug.sentence.endswith(".") and bug.suspects for bug in BUGS.values())


def test_results_are_told_in_a_table_and_as_json(tmp_path: Path) -> None:
    bug, clean = next(iter(BUGS.values())), next(iter(CLEAN.values()))
    answers = [Answer(bug, True, "out layer, step 0", True, "a | b", 0.5), Answer(clean, False, "", False, "", 0.0)]
    assert to_json(answers)[0].keys() == {"name", "kind", "flagged", "named", "first_suspect", "source"}
    text = table(answers)
    assert text.startswith("1 of 1 bugs flagged, 1 with the right module first, of 1 kinds; 0 of 1 clean")
    assert "a \\| b" in text
