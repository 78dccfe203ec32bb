"""What `make gpu` runs, without a GPU: the benchmark at tiny shapes, and parts that survive each other's failure."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time

import pytest
import torch

from tests.gpu import bench, bench_attention, suite
from tests.support import ROOT

PASSES = "import pathlib, sys; pathlib.Path(sys.argv[1]).write_text('measured')"
FAILURES = {
    "raises": ("raise SystemExit(3)", "failed with status 3"),
    "crashes": ("import os; os.kill(os.getpid(), 11)", "failed with status -11"),
    "hangs": (
        "import subprocess, time; subprocess.Popen(['sleep', '600']); time.sleep(600)",
        "killed after 1 s",
    ),
    "cannot be started": (None, "not run: "),
}


def test_benchmark_and_its_report_run_without_a_gpu(tmp_path):
    command = [sys.executable, "-W", "ignore", "-m", "tests.gpu.bench", "--device", "cpu", "--out", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    answer = json.loads((tmp_path / "bench.json").read_text())
    assert answer["failed"] == answer["skipped"] == {} and answer["versions"]["torch"] == torch.__version__
    kinds = {(row["layer"], row["kind"]) for row in answer["products"]}
    assert kinds == {(x, y) for x in ("QKV", "proj", "fc1", "fc2", "output") for y in ("forward", "dgrad", "wgrad")}
    assert all(row["error"] < 2**-8 for row in answer["products"]) and len(answer["sums"]) == 8
    layers = {(row["tp"], row["who"].split(",")[0]) for row in answer["layers"]}
    assert layers == {(tp, who) for tp in (1, 8) for who in ("stock", "ours")}
    attention = {(row["tp"], row["who"]) for row in answer["attention"]}
    assert attention == {(tp, who) for tp in (1, 2) for who in ("torch's flash", "ours, blockwise")}
    assert all(row["error"] < 2**-7 and row["forward_over_first"] > 0 for row in answer["attention"])
    report = (tmp_path / "bench.md").read_text()
    headings = ("## layers", "## attention", "## products", "## sums")
    assert [report.index(heading) for heading in headings] == sorted(map(report.index, headings))


def test_a_section_that_fails_is_named_and_costs_no_other_its_rows(tmp_path, monkeypatch):
    def measured(section):
        failed = bench.run("cpu", 100, tmp_path, [section])
        return failed, json.loads((tmp_path / "bench.json").read_text())

    assert measured("sums")[0] == 0

    def out_of_memory(one):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(bench_attention, "_ours", out_of_memory)
        failed, found = measured("attention")
    assert failed == 2 and len(found["sums"]) == 8
    assert [row["who"] for row in found["attention"]] == ["torch's flash"] * 2
    (name, *_) = found["failed"]["attention"]
    assert name.startswith("attention of TP=1, 40 tokens, ours, blockwise: OutOfMemoryError: CUDA out of memory")
    assert name in (tmp_path / "bench.md").read_text()
    failed, found = measured("attention")
    assert not failed and not found["failed"] and len(found["attention"]) == 4 and len(found["sums"]) == 8


def test_a_kernel_of_others_that_is_not_here_is_no_failure_of_ours(tmp_path, monkeypatch):
    def missing(one):
        raise RuntimeError("No available kernel")

    monkeypatch.setattr(bench_attention, "_stock", lambda device: {"torch's flash": missing})
    assert bench.run("cpu", 100, tmp_path, ["attention"]) == 0
    assert "RuntimeError: No available kernel" in (tmp_path / "bench.md").read_text()


@pytest.mark.parametrize(("broken", "how"), zip(suite.PARTS, itertools.cycle(FAILURES), strict=False))
def test_every_part_survives_every_other_parts_failure(broken, how, tmp_path, monkeypatch):
    code, outcome = FAILURES[how]

    def command(name, device, folder, seconds):
        if name == broken:
            return [str(tmp_path / "nowhere")] if code is None else [sys.executable, "-S", "-c", code]
        return [sys.executable, "-S", "-c", PASSES, str(folder / f"{name}.found")]

    monkeypatch.setattr(suite, "command", command)
    monkeypatch.setattr(suite, "KERNELS", tmp_path)
    run_part = suite.run_part

    def in_a_second(name, device, folder, seconds, environment):  # what is broken, lest its hanging take long
        return run_part(name, device, folder, 1.0 if name == broken else seconds, environment)

    monkeypatch.setattr(suite, "run_part", in_a_second)
    found = tmp_path / "found"
    found.mkdir()
    (found / "bench.json").write_text("of an earlier run")
    outcomes = suite.run_parts(suite.PARTS, "cpu", found, time.monotonic() + 1200, dict(os.environ))
    if how == "hangs":
        assert outcomes[broken]["outcome"] == outcome
    else:
        assert outcomes[broken]["outcome"].startswith(outcome)
    assert {name for name, one in outcomes.items() if one["outcome"] == "passed"} == set(suite.PARTS) - {broken}
    assert all((found / f"{name}.found").exists() for name in set(suite.PARTS) - {broken})
    assert json.loads((found / "summary.json").read_text()) == outcomes and not (found / "bench.json").exists()


def test_parts_together_take_no_longer_than_they_are_given(tmp_path, monkeypatch):
    """Every one of them hangs."""
    monkeypatch.setattr(suite, "command", lambda *_: [sys.executable, "-S", "-c", "import time; time.sleep(600)"])
    monkeypatch.setattr(suite, "KERNELS", tmp_path)
    began = time.monotonic()
    outcomes = suite.run_parts(suite.PARTS, "cpu", tmp_path, began + 14, {})
    given = {name: float(str(one["outcome"]).split()[2]) for name, one in outcomes.items()}
    # Each is written rounded.
    assert sum(max(given[name] for name in stage) for stage in suite.STAGES) <= 14 + len(suite.STAGES) / 2
    assert sum(suite.STAGES.values()) == suite.SECONDS < 600
