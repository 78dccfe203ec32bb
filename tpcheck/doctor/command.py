"""`tpcheck doctor`: what this machine has, and whether a run's promise can be kept on it.

Asked for is what the run file says: strategy, layers, attention, symmetric memory. What of it cannot be had here is
marked `no` and ends the command with 1; everything else is said for information.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict

import torch

from tpcheck.config.load import load_run_or_preset, parse_run
from tpcheck.config.schema import RunConfig
from tpcheck.doctor import machine
from tpcheck.doctor.attention import attention
from tpcheck.doctor.findings import Finding

__all__ = ["command", "examine"]


def command(target: str | None, overrides: Sequence[str], as_json: bool) -> int:
    """Examine this machine for a run file, a preset, or the defaults; print; 0 if all that is asked for can be had."""
    config = _config(target, overrides)
    with warnings.catch_warnings():  # megatron-core's, that neither Apex nor Transformer Engine is installed
        warnings.simplefilter("ignore")
        findings = examine(config)
    kept = all(finding.verdict != "no" for finding in findings)
    if as_json:
        print(json.dumps({"kept": kept, "asked": _asked(config), "findings": [asdict(one) for one in findings]}))
    else:
        print("\n".join(_lines(config, findings)))
    return 0 if kept else 1


def examine(config: RunConfig) -> list[Finding]:
    """Everything that there is to say, in the order of the table."""
    parts = (machine.versions, machine.devices, machine.sums, machine.settings, attention)
    return [finding for part in parts for finding in part(config)]


def _config(target: str | None, overrides: Sequence[str]) -> RunConfig:
    return load_run_or_preset(target, overrides, {}) if target else parse_run({}, overrides=overrides)


def _asked(config: RunConfig) -> str:
    if config.strategy == "stock":
        return "stock"
    leaves = f", {config.leaves} leaves" if config.strategy == "tree" else ""
    layers = f", layers={config.layers}" if config.layers else ""
    symmetric = ", symmetric memory" if config.symmetric_memory else ""
    kernel = config.attention_on(torch.cuda.is_available())
    chunks = f", {config.chunks} chunks a sequence" if config.chunks > 1 else ""
    return f"{config.strategy}{leaves}{chunks}{layers}, {kernel} attention{symmetric}, {config.dtype}"


def _lines(config: RunConfig, findings: Sequence[Finding]) -> Iterator[str]:
    marks = {"ok": "ok", "no": "NO", "note": "-"}
    width = max(len(one.name) for one in findings)
    for section in dict.fromkeys(one.section for one in findings):
        yield section
        for one in findings:
            if one.section == section:
                yield f"  {marks[one.verdict]:2}  {one.name:{width}}  {one.found}" + f"  ({one.why})" * bool(one.why)
    failed = [one.name for one in findings if one.verdict == "no"]
    if failed:
        verb = "run" if config.strategy == "stock" else "be kept"
        yield f"cannot {verb} here: {_asked(config)}; see {', '.join(failed)}"
    elif config.strategy == "stock":
        yield "nothing to keep: a stock run promises nothing"
    else:
        yield f"can be kept here: {_asked(config)}"
