"""Versions, devices, sums and settings of this machine, as far as a run's promise depends on them."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import Any

import torch

import patches
from patches.order.backend import backend, check
from patches.registry import SUPPORTED
from tpcheck.config.schema import RunConfig
from tpcheck.doctor.attention import TE_BACKENDS
from tpcheck.doctor.findings import Finding, Verdict, unless_stock
from tpcheck.run import provenance

__all__ = ["devices", "settings", "sums", "versions"]

FIRST_TORCH = "2.9"  # torch.library.get_kernel

# Variables that change nothing in a patched run, and why not.
WITHOUT_EFFECT = {
    "CUBLAS_WORKSPACE_CONFIG": "no sum of a patched run is cuBLAS's",
    "NVIDIA_TF32_OVERRIDE": "no float32 product of a patched run is cuBLAS's or cuDNN's",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "no float32 product of a patched run is cuBLAS's",
    "PYTORCH_TUNABLEOP_ENABLED": "it tunes cuBLAS alone",
    "PATCHES_CUBLAS": "cuBLAS is taken only where it gave the same bits",
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


def versions(config: RunConfig) -> Iterator[Finding]:
    installed = provenance.versions()
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


def devices(config: RunConfig) -> Iterator[Finding]:
    if not torch.cuda.is_available():
        yield Finding(
            "devices", "CPU", f"{provenance.cpu_name()}, {torch.backends.cpu.get_cpu_capability()}", "ok",
            "the vector width picks exp and silu: ranks, and runs to be compared, must have the same",
        )  # fmt: skip
        return
    gpus = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    kinds = dict.fromkeys(f"{gpu.name}, sm_{gpu.major}{gpu.minor}" for gpu in gpus)
    yield Finding("devices", f"{len(gpus)} GPU{'s' * (len(gpus) > 1)}", "; ".join(kinds))
    if config.world_size > len(gpus):
        yield Finding("devices", "ranks", str(config.world_size), "note", "more than the GPUs of this machine")


def sums(config: RunConfig) -> Iterator[Finding]:
    strategy = "tree" if config.strategy == "stock" else config.strategy
    try:
        found = [_made_of(device) for device in _one_of_each_kind()]
    except Exception as error:  # Triton has many: no C compiler, no driver, a kernel that does not compile
        why = " ".join(f"{type(error).__name__}: {error}".split())
        yield Finding("sums", "products", "cannot be made", unless_stock(config), why[:MOST_CHARACTERS])
        return
    for made_of in found:
        yield Finding("sums", "products", ", ".join(f"{name}: {_short(value)}" for name, value in made_of.items()))
    if len(found) > 1 and any(made_of != found[0] for made_of in found):
        yield Finding(
            "sums", "GPUs of one run", "of several classes of bits", unless_stock(config),
            "their products differ: choose those of one kind by CUDA_VISIBLE_DEVICES",
        )  # fmt: skip
    try:
        with patches.enabled(strategy, config.leaves, config.attention, config.symmetric_memory):
            applied = sum(row.applied for row in patches.status())
        yield Finding("sums", "patches", f"{applied} apply", "ok", "patches.status() lists them")
    except (patches.UnsupportedError, ValueError) as error:
        yield Finding("sums", "patches", "cannot be enabled", unless_stock(config), str(error))


def _made_of(device: torch.device) -> Mapping[str, Any]:
    check(device)
    return backend(device).provenance(device)


def _one_of_each_kind() -> list[torch.device]:
    """The CPU, or a GPU of every name here."""
    if not torch.cuda.is_available():
        return [torch.device("cpu")]
    numbers = {torch.cuda.get_device_name(number): number for number in reversed(range(torch.cuda.device_count()))}
    return [torch.device("cuda", number) for number in sorted(numbers.values())]


def settings(config: RunConfig) -> Iterator[Finding]:
    found = {name: os.environ[name] for name in (*WITHOUT_EFFECT, *ALIKE) if name in os.environ}
    for name, value in found.items():
        why = f"no effect: {WITHOUT_EFFECT[name]}" if name in WITHOUT_EFFECT else f"same everywhere: {ALIKE[name]}"
        yield Finding("settings", name, value, "ok" if name in WITHOUT_EFFECT else "note", why)
    on_gpu = torch.cuda.is_available()
    if os.environ.get("TRITON_INTERPRET") == "1" and on_gpu:
        yield Finding("settings", "TRITON_INTERPRET", "1", unless_stock(config), "kernels would not run on the GPU")
    asked = config.attention_on(on_gpu)
    te = config.layers == "te" or (config.layers is None and on_gpu and find_spec("transformer_engine") is not None)
    for kind in TE_BACKENDS if asked in TE_BACKENDS else ():
        name, needed = f"NVTE_{kind.upper()}_ATTN", str(int(kind == asked))
        if name in os.environ:
            fits = os.environ[name] == needed
            why = "" if fits else f"Megatron wants {needed} for attention={asked}: unset it"
            verdict: Verdict = "ok" if fits else unless_stock(config) if te else "note"
            yield Finding("settings", name, os.environ[name], verdict, why)
    if not found and not any(name.startswith("NVTE_") for name in os.environ):
        yield Finding("settings", "environment", "nothing that touches sums")


def _short(value: object) -> str:
    return f"{len(value)} kinds" if isinstance(value, dict) else str(value)
