"""`tpcheck doctor`: what this machine has, and whether a run's promise can be kept on it.

Asked for is what the run file says: strategy, layers, attention, symmetric memory. What of it cannot be had here is
marked `no` and ends the command with 1; everything else is said for information.
"""

from __future__ import annotations

import json
import os
import platform
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from typing import Literal

import torch

from tpcheck.config import RunConfig, load_run_or_preset, parse_run

__all__ = ["Finding", "Verdict", "command", "examine", "unless_stock"]

Verdict = Literal["ok", "no", "note"]

FIRST_TORCH = "2.9"  # torch.library.get_kernel

# Variables that change nothing in a patched run, and why not.
WITHOUT_EFFECT = {
    "CUBLAS_WORKSPACE_CONFIG": "no sum of a patched run is cuBLAS's",
    "NVIDIA_TF32_OVERRIDE": "no float32 product of a patched run is cuBLAS's or cuDNN's",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "no float32 product of a patched run is cuBLAS's",
    "PYTORCH_TUNABLEOP_ENABLED": "it tunes cuBLAS alone",
    "TRITON_F32_DEFAULT": "the kernels name their precision",
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "the patches make fused attention deterministic themselves",
    "NCCL_ALGO": "NCCL moves sums but adds none, except zeros and whole numbers below 2^53",
    "NCCL_PROTO": "NCCL moves sums but adds none, except zeros and whole numbers below 2^53",
    "NCCL_NVLS_ENABLE": "NCCL moves sums but adds none, except zeros and whole numbers below 2^53",
    "CUDA_DEVICE_MAX_CONNECTIONS": "it orders launches, not sums",
    "OMP_NUM_THREADS": "exact leaves have no order, and elementwise functions no tail",
    "MKL_CBWR": "the products of exact leaves are exact in any order",
    "ONEDNN_MAX_CPU_ISA": "the products of exact leaves are exact in any order",
}
# Variables that change bits at every TP size alike: runs that are compared must agree on them.
ALIKE = {
    "ATEN_CPU_CAPABILITY": "it picks the CPU's exp and silu",
    "TRITON_DEFAULT_FP_FUSION": "it decides where multiplications and additions are fused",
}
MOST_CHARACTERS = 500  # of somebody else's error message
NVTE_BACKENDS = ("flash", "fused", "unfused")


@dataclass(frozen=True)
class Finding:
    """One line of the table; `no` means that something asked for cannot be had."""

    section: Literal["versions", "devices", "sums", "settings", "attention"]
    name: str
    found: str
    verdict: Verdict = "ok"
    why: str = ""


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
    from tpcheck.doctor.attention import attention

    return [*_versions(config), *_devices(config), *_sums(config), *_settings(config), *attention(config)]


def _config(target: str | None, overrides: Sequence[str]) -> RunConfig:
    return load_run_or_preset(target, overrides, {}) if target else parse_run({}, overrides=overrides)


def _versions(config: RunConfig) -> Iterator[Finding]:
    from patches.registry import SUPPORTED
    from tpcheck.run.provenance import versions

    installed = versions()
    on_gpu = torch.cuda.is_available()
    yield Finding("versions", "python", platform.python_version())
    recent = hasattr(torch.library, "get_kernel")
    verdict: Verdict = "ok" if recent else unless_stock(config)
    yield Finding("versions", "torch", torch.__version__, verdict, f"known: >={FIRST_TORCH}")
    for library, supported in SUPPORTED.items():
        needed = library == "megatron-core" or config.layers == "te" or config.attention in ("flash", "fused")
        found = installed.get(library)
        known = found is not None and supported.contains(found, prereleases=True)
        verdict = "ok" if known else unless_stock(config) if needed or found else "note"
        why = f"known: {supported}" if found or needed else "only layers=te and fused attention need it"
        yield Finding("versions", library, found or "not installed", verdict, why)
    triton = installed.get("triton")
    if on_gpu or triton:
        verdict = "ok" if triton else unless_stock(config)
        yield Finding("versions", "triton", triton or "not installed", verdict, "products on a GPU")
    if on_gpu:
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
        yield Finding("versions", "CUDA", str(torch.version.cuda))
        yield Finding("versions", "NCCL", nccl, "ok", "moves sums, adds none")


def _devices(config: RunConfig) -> Iterator[Finding]:
    from tpcheck.run.provenance import cpu_name

    if not torch.cuda.is_available():
        yield Finding(
            "devices", "CPU", f"{cpu_name()}, {torch.backends.cpu.get_cpu_capability()}", "ok",
            "the vector width picks exp and silu: ranks, and runs to be compared, must have the same",
        )  # fmt: skip
        return
    gpus = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    kinds = dict.fromkeys(f"{gpu.name}, sm_{gpu.major}{gpu.minor}" for gpu in gpus)
    alike = len({gpu.major for gpu in gpus}) == 1
    yield Finding(
        "devices", f"{len(gpus)} GPU{'s' * (len(gpus) > 1)}", "; ".join(kinds), "ok" if alike else unless_stock(config),
        "" if alike else "GPUs of one run must be of one architecture: their products differ",
    )  # fmt: skip
    if config.world_size > len(gpus):
        yield Finding("devices", "ranks", str(config.world_size), "note", "more than the GPUs of this machine")


def _sums(config: RunConfig) -> Iterator[Finding]:
    import patches
    from patches.order.backend import backend, check

    strategy = "tree" if config.strategy == "stock" else config.strategy
    try:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        check(device)
        made_of = backend(device).provenance()
    except Exception as error:  # Triton has many: no C compiler, no driver, a kernel that does not compile
        why = " ".join(f"{type(error).__name__}: {error}".split())
        yield Finding("sums", "products", "cannot be made", unless_stock(config), why[:MOST_CHARACTERS])
        return
    try:
        yield Finding("sums", "products", ", ".join(f"{name}: {_short(value)}" for name, value in made_of.items()))
        with patches.enabled(strategy, config.leaves, config.attention or "unfused", config.symmetric_memory):
            applied = sum(row.applied for row in patches.status())
        yield Finding("sums", "patches", f"{applied} apply", "ok", "patches.status() lists them")
    except (patches.UnsupportedError, ValueError) as error:
        yield Finding("sums", "patches", "cannot be enabled", unless_stock(config), str(error))


def _settings(config: RunConfig) -> Iterator[Finding]:
    found = {name: os.environ[name] for name in (*WITHOUT_EFFECT, *ALIKE) if name in os.environ}
    for name, value in found.items():
        why = f"no effect: {WITHOUT_EFFECT[name]}" if name in WITHOUT_EFFECT else f"same everywhere: {ALIKE[name]}"
        yield Finding("settings", name, value, "ok" if name in WITHOUT_EFFECT else "note", why)
    on_gpu = torch.cuda.is_available()
    if os.environ.get("TRITON_INTERPRET") == "1" and on_gpu:
        yield Finding("settings", "TRITON_INTERPRET", "1", unless_stock(config), "kernels would not run on the GPU")
    asked = config.attention or "unfused"
    te = config.layers == "te" or (config.layers is None and on_gpu and find_spec("transformer_engine") is not None)
    for backend in NVTE_BACKENDS:
        name, needed = f"NVTE_{backend.upper()}_ATTN", str(int(backend == asked))
        if name in os.environ:
            fits = os.environ[name] == needed
            why = "" if fits else f"Megatron wants {needed} for attention={asked}: unset it"
            verdict: Verdict = "ok" if fits else unless_stock(config) if te else "note"
            yield Finding("settings", name, os.environ[name], verdict, why)
    if not found and not any(name.startswith("NVTE_") for name in os.environ):
        yield Finding("settings", "environment", "nothing that touches sums")


def unless_stock(config: RunConfig) -> Verdict:
    """Of what the patches need: a stock run asks for no patches."""
    return "note" if config.strategy == "stock" else "no"


def _short(value: object) -> str:
    return f"{len(value)} kinds" if isinstance(value, dict) else str(value)


def _asked(config: RunConfig) -> str:
    if config.strategy == "stock":
        return "stock"
    leaves = f", {config.leaves} leaves" if config.strategy == "tree" else ""
    layers = f", layers={config.layers}" if config.layers else ""
    symmetric = ", symmetric memory" if config.symmetric_memory else ""
    return f"{config.strategy}{leaves}{layers}, {config.attention or 'unfused'} attention{symmetric}, {config.dtype}"


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
