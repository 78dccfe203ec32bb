"""What made a run: its configuration, versions, code, hardware and data, for manifest.json."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from tpcheck.config.schema import RunConfig
from tpcheck.files.json_files import read_object
from tpcheck.files.names import CODE
from tpcheck.files.records import CodeRecord

__all__ = ["CODE_FORMAT", "cpu_name", "describe", "git", "versions"]

CODE_FORMAT = 1
PACKAGES = ("torch", "megatron-core", "transformer-engine", "triton", "numpy", "tpcheck")


def describe(config: RunConfig, data: Any, patches: list[dict[str, Any]]) -> dict[str, Any]:
    """The manifest of a run that starts now."""
    return {
        "config": config.model_dump(mode="json"),
        "versions": versions(),
        "git": _code(Path(__file__).parents[1]),
        "hardware": _hardware(),
        "data": {
            "kind": config.data.kind,
            "path": config.data.path,
            "digest": data.digest,
            "tokens": data.tokens,
        },
        "patches": patches,
        "products": None if config.strategy == "stock" else _products(config),
        "attention": None,  # known after the first step
        "started": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def versions() -> dict[str, str]:
    """Of Python and of everything installed that a run's bits may depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _code(package: Path) -> dict[str, Any] | None:
    """The commit that runs; of a copy made at submission (see slurm/snapshot.py), what it was made from."""
    if (package.parent / CODE).exists():
        copied = read_object(package.parent / CODE, CODE_FORMAT, CodeRecord)
        return {key: value for key, value in copied.items() if key != "format"}
    return git(package)


def git(folder: Path) -> dict[str, Any] | None:
    """The commit of the working tree that `folder` is in, and whether it was changed since."""

    def ask(*arguments: str) -> str:
        call = ["git", "-C", str(folder), *arguments]
        return subprocess.run(call, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        return {"commit": ask("rev-parse", "HEAD"), "dirty": bool(ask("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None


def _products(config: RunConfig) -> dict[str, Any]:
    """What the bits of this run's products depend on; runs where it differs were never promised to be equal."""
    import torch

    from patches.order.backend import backend, training_device

    device = training_device()
    products = dict(backend(device).provenance(device))
    if config.attention in ("flash", "fused") and device.type == "cuda":  # no class of bits describes these kernels
        products["attention"] = f"{config.attention} on {torch.cuda.get_device_name()}"
    return products


def _hardware() -> dict[str, Any]:
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return {
        "host": platform.node(),
        "machine": platform.machine(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "gpus": [torch.cuda.get_device_name(number) for number in range(count)],
    }


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
