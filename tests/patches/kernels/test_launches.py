"""What the static check compiles is what is launched: Triton's own launcher, up to the GPU, specialises to a variant.

This file is also the program that does so, in a process without the interpreter, where a driver that knows no more
than an architecture's name stands for the GPU.
"""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import nullcontext
from itertools import product as combinations

import pytest
import torch

from tests.support import ROOT


def test_every_launch_is_of_a_checked_variant():
    pytest.importorskip("triton", reason="Triton is not on the path: make test-kernels")
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.patches.kernels.test_launches"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr


class Driver:
    """As much of a driver as a launch that does not run needs."""

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


class Compiled:
    """Stands for a kernel: compiles it for the arguments it is launched with, and keeps what that came to."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            source = self.kernel.warmup(*args, grid=grid, **kwargs).src
            self.key = key(self.kernel, source.signature, source.constants, source.attrs)

        return launch


def key(kernel, signature, constants, attrs):
    names = kernel.arg_names
    constants = {names[at[0]]: value for at, value in constants.items()}
    divisible = sorted(names[at[0]] for at, found in attrs.items() if ["tt.divisibility", 16] in found)
    return {name: kind.replace(" ", "") for name, kind in signature.items()}, constants, divisible


def main():
    from triton.runtime import driver

    from patches.order.kernels import gemm
    from tests.patches.kernels.variants import of_products

    driver.set_active(Driver())
    variants = {}
    for variant in of_products():
        names = variant.kernel.arg_names
        constants = {(names.index(name),): value for name, value in variant.constexprs.items()}
        variants[variant.name] = key(variant.kernel, variant.signature, constants, variant.attrs)
    launched = gemm.kernel = Compiled(gemm.kernel)
    gemm.on = lambda x: nullcontext()
    gemm._programs = lambda device: 132
    gemm.family = lambda device: 90
    suits_tma = gemm._suits_tma
    T, K, checked = 256, 1024, 0
    for name, layout, leaves, how, N in combinations(
        ("bf16", "fp16", "fp32"), ("abᵀ", "ab", "aᵀb"), (1, 8), ("tma", "pointers"), (768, 128)
    ):
        result = "added" if layout == "aᵀb" else name
        title = f"gemm {name} {layout} leaves={leaves} pieces=1 {how} {result}"
        if N == 128:
            title = f"gemm {name} {layout} narrow {how} {result}" if leaves == 1 else ""
        if title not in variants:
            continue
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[name]
        a_MK = torch.empty(K, T, dtype=dtype).T if "aᵀ" in layout else torch.empty(T, K, dtype=dtype)
        b_KN = torch.empty(N, K, dtype=dtype).T if "bᵀ" in layout else torch.empty(K, N, dtype=dtype)
        out = torch.empty(1, T, N, dtype=torch.float32 if result == "added" else dtype)
        gemm._suits_tma = suits_tma if how == "tma" else lambda *_: False
        gemm._launch(a_MK.unsqueeze(0), b_KN.unsqueeze(0), out, leaves, 1, result == "added")
        checked += 1
        assert launched.key == variants[title], f"launched: {launched.key}\nchecked: {variants[title]}"
    assert checked == 21
    attention()


def attention():
    """Launches of the attention kernels, forward and backward."""
    from dataclasses import replace

    from patches.order.kernels import attention_kernels, attentions
    from patches.order.visible import Packed
    from tests.patches.kernels.variants_of_attention import CASES, of_attention

    variants = {variant.name: variant for variant in of_attention()}
    attentions.on = lambda x: nullcontext()
    attentions.INTERPRETED = True  # operands lie on the CPU
    attentions.KERNELS |= {name: Compiled(kernel) for name, kernel in attentions.KERNELS.items()}
    attention_kernels.deltas = Compiled(attention_kernels.deltas)
    compared: set[str] = set()
    for title, (dtype, width, visible) in CASES.items():
        q, dy, y = (torch.empty(256, 1, 4, width, dtype=dtype) for _ in range(3))
        k, v = (torch.empty(256, 1, 2, width, dtype=dtype) for _ in range(2))
        if visible.packed is not None:
            edges = torch.tensor([0, 100, 256])
            visible = replace(visible, packed=Packed.of(edges, edges))
        _, top, inverse = attentions.attention(q, k, v, visible, 0.1)
        attentions.attention_gradient(dy, q, k, v, y, top, inverse, visible, 0.1)
        launched = {f"attention {name} {title}": kernel.key for name, kernel in attentions.KERNELS.items()}
        launched[f"attention deltas {title}"] = attention_kernels.deltas.key
        compared |= launched.keys() & variants.keys()
        for name in launched.keys() & variants.keys():
            kernel, at = variants[name].kernel, variants[name].kernel.arg_names.index
            constants = {(at(argument),): value for argument, value in variants[name].constexprs.items()}
            checked = key(kernel, variants[name].signature, constants, variants[name].attrs)
            assert launched[name] == checked, f"{name}\nlaunched: {launched[name]}\nchecked: {checked}"
    assert compared == variants.keys()


if __name__ == "__main__":
    main()
