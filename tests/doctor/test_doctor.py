"""`tpcheck doctor`: it says no where something asked for cannot be had, and its attention checks really run."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tpcheck.cli import main
from tpcheck.config.load import parse_run
from tpcheck.doctor import attention, command, machine
from tpcheck.doctor.findings import Finding

TINY: dict[str, Any] = {"model": {"preset": "qwen3-tiny"}, "layers": "local", "seq_length": 16, "dtype": "fp32"}


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("NVTE_")}
    call = [sys.executable, "-W", "ignore", "-m", "tpcheck", "doctor", *arguments]
    return subprocess.run(call, capture_output=True, text=True, timeout=120, env={**kept, **environment}, check=False)


def findings(text: str) -> dict[str, dict[str, str]]:
    return {one["name"]: one for one in json.loads(text)["findings"]}


def test_on_a_cpu_local_layers_keep_the_promise(tmp_path: Path):
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(TINY))
    done = run(str(path), "--json", CUDA_VISIBLE_DEVICES="", NCCL_ALGO="Ring", ATEN_CPU_CAPABILITY="default")
    assert done.returncode == 0, done.stderr
    found = findings(done.stdout)
    assert json.loads(done.stdout)["kept"] is True
    assert found["products"]["found"] == "leaf: exact"
    assert found["megatron local, patched"]["found"] == "each head by itself"
    assert found["torch sdpa math, patched"]["found"] == "each head by itself"
    assert found["torch sdpa flash, patched"]["found"] == "refused"
    assert found["NCCL_ALGO"]["verdict"] == "ok" and "adds none" in found["NCCL_ALGO"]["why"]
    assert found["ATEN_CPU_CAPABILITY"]["verdict"] == "note"


def test_what_is_asked_for_and_not_here_is_a_no(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = parse_run({**TINY, "symmetric_memory": True})
    *_, refused, last = command._lines(config, list(machine.sums(config)))
    assert "NO  patches" in refused and "symmetric_memory=True" in refused
    assert last.startswith("cannot be kept here: tree, 8 leaves, layers=local") and last.endswith("see patches")


def test_a_stock_run_needs_nothing_that_the_patches_need(monkeypatch):
    monkeypatch.delattr(torch.library, "get_kernel")
    verdicts = {}
    for strategy in ("tree", "stock"):
        found = {one.name: one.verdict for one in machine.versions(parse_run({**TINY, "strategy": strategy}))}
        verdicts[strategy] = found["torch"]
    assert verdicts == {"tree": "no", "stock": "note"}


def test_a_stock_run_that_cannot_run_is_a_no(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(attention, "_one_rank", contextlib.nullcontext)
    monkeypatch.setattr(attention, "_judged", lambda _, name, *__, **___: Finding("attention", name, ""))
    monkeypatch.setattr(command, "examine", lambda config: list(attention.attention(config)))
    assert command.command("qwen3-tiny", ("strategy=stock", "attention=flash"), as_json=False) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "cannot run here: stock; see flash"


def test_products_that_fail_are_a_line_of_the_table(monkeypatch: pytest.MonkeyPatch):
    def fails(device: torch.device) -> None:
        raise OSError("no C\ncompiler")

    monkeypatch.setattr("tpcheck.doctor.machine.check", fails)
    (found,) = machine.sums(parse_run(TINY))
    assert (found.name, found.verdict, found.why) == ("products", "no", "OSError: no C compiler")


@pytest.mark.parametrize(("classes", "verdicts"), (("aa", []), ("ab", ["no"])))
def test_gpus_of_several_classes_of_bits_are_a_no(monkeypatch, classes, verdicts):
    names = ["H100", "H100", "B300"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(names))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: names[number])
    monkeypatch.setattr(machine, "_made_of", lambda device: {"class": classes[device.index // 2]})
    monkeypatch.setattr(machine.patches, "enabled", lambda *_: contextlib.nullcontext())
    found = list(machine.sums(parse_run(TINY)))
    assert [one.found for one in found if one.name == "products"] == [f"class: {name}" for name in classes]
    assert [one.verdict for one in found if one.name == "GPUs of one run"] == verdicts


def test_bad_input_is_answered_in_one_line(capsys: pytest.CaptureFixture[str]):
    assert main(["doctor", "qwen4-tiny"]) == 2
    assert "qwen4-tiny: neither a preset" in capsys.readouterr().err


def spoilt(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return q * k * v * q.shape[2]


@pytest.mark.parametrize(("strategy", "code", "verdict"), (("tree", 1, "no"), ("stock", 0, "note")))
def test_attention_that_depends_on_tp_is_a_no_unless_the_run_is_stock(strategy, code, verdict, monkeypatch):
    config = parse_run({**TINY, "strategy": strategy})
    found = attention._judged(config, "spoilt", spoilt, True, patched=True)
    assert (found.found, found.verdict) == ("depends on TP", verdict)
    assert found.why.startswith("the output ") and " 4 heads " in found.why
    monkeypatch.setattr(command, "examine", lambda config: [found])
    monkeypatch.setattr(command, "_config", lambda target, overrides: config)
    assert command.command(None, (), as_json=False) == code


def test_an_environment_that_overrules_the_backend_asked_for_is_a_no(monkeypatch):
    monkeypatch.setenv("NVTE_FLASH_ATTN", "0")
    config = parse_run({**TINY, "layers": "te", "dtype": "bf16", "attention": "flash"})
    (found,) = [one for one in machine.settings(config) if one.name == "NVTE_FLASH_ATTN"]
    assert found.verdict == "no" and "Megatron wants 1 for attention=flash: unset it" in found.why


@pytest.mark.parametrize(
    ("changes", "words"),
    (
        ({"attention": "flash"}, "attention=flash is Transformer Engine's: use layers=te"),
        ({"attention": "fused", "layers": "te"}, "attention=fused has no fp32: use dtype=bf16"),
        ({"attention": "fast"}, "attention: Input should be 'blockwise', 'unfused', 'flash' or 'fused'"),
    ),
)
def test_attention_that_cannot_run_is_refused_before_a_run_is_started(changes, words):
    with pytest.raises(Exception, match=words):
        parse_run({**TINY, **changes})
