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

from tests.patches.kernels.driver import Driver
from tests.support import ROOT


def test_every_launch_is_of_a_checked_variant():
    pytest.importorskip("triton", reason="Triton is not on the path: make test-kernels")
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.patches.kernels.test_launches"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr


class Compiled:
    """Stands for a kernel: compiles it for the arguments it is launched with, and keeps what that came to."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            source = self.kernel.warmup(*args, grid=grid, **kwargs).src
            self.key = key(self.kernel, source.signature, source.constants, source.attrs)

        return launch


LAUNCHED = (("abᵀ", "{}"), ("ab", "{}"), ("aᵀb", "added"), ("aᵀb", "in units"), ("abᵀ", "scaled {}"))


def key(kernel, signature, constants, attrs):
    names = kernel.arg_names
    constants = {names[at[0]]: value for at, value in constants.items()}
    divisible = sorted(names[at[0]] for at, found in attrs.items() if ["tt.divisibility", 16] in found)
    return {name: kind.replace(" ", "") for name, kind in signature.items()}, constants, divisible


def main():
    from triton.runtime import driver

    from patches.order.kernels import launches, plans
    from patches.order.kernels.tiles import tiles_of
    from tests.patches.kernels.variants import of_product, of_products

    driver.set_active(Driver())
    checked = {variant.name for variant in of_products()}
    launched = plans.kernel = Compiled(plans.kernel)
    launches.on = lambda x: nullcontext()
    plans.processors = lambda device: 132
    count = 0
    for dtype, (layout, kind), leaves, tma in combinations(
        (torch.bfloat16, torch.float16, torch.float32), LAUNCHED, (1, 8), (True, False)
    ):
        name = plans.NAMES[dtype]
        result = kind.format(name)
        for tile in tiles_of(dtype, leaves, tma):
            variant = of_product(dtype, layout, leaves, 1, tma, result, tile)
            if variant.name not in checked:
                continue
            plans.tile_of = lambda *_, tile=tile: tile
            suits_tma, plans.suits_tma = plans.suits_tma, (plans.suits_tma if tma else lambda *_: False)
            launch(plans, dtype, layout, leaves, result)
            plans.suits_tma = suits_tma
            names = variant.kernel.arg_names
            constants = {(names.index(name),): value for name, value in variant.constexprs.items()}
            want = key(variant.kernel, variant.signature, constants, variant.attrs)
            assert launched.key == want, f"launched: {launched.key}\nchecked: {want}"
            count += 1
    assert count == 38
    trees(plans)
    groups()
    attention()


def launch(plans, dtype, layout, leaves, result):
    T, K, N = 256, 1024, 768
    a_MK = torch.empty(K, T, dtype=dtype).T if "aᵀ" in layout else torch.empty(T, K, dtype=dtype)
    b_KN = torch.empty(N, K, dtype=dtype).T if "bᵀ" in layout else torch.empty(K, N, dtype=dtype)
    out = torch.empty(T, N, dtype={"added": torch.float32, "in units": torch.int64}.get(result, dtype))
    a, b, into = (plans.layout_of(x) for x in (a_MK, b_KN, out))
    how = plans.How(result in ("added", "in units"), result == "in units", "scaled" in result)
    plan = plans.Plan(a, b.transposed, into, leaves, 1, how)
    plan.launch(a_MK, b_KN, out, 0.5, torch.zeros((), dtype=torch.int32) if how.in_units else None)


def trees(plans):
    """Launches of the warp-specialised kernel; those on sm_100 differ in WGMMA alone, for which it is no driver."""
    from patches.order.kernels import specialised
    from tests.patches.kernels.variants_of_trees import CASES, of_trees

    launched = specialised.kernel = Compiled(specialised.kernel)
    specialised.family = lambda device: 90
    variants = [variant for variant in of_trees() if variant.families == (90,)]
    for variant, (dtype, layout, leaves, pieces, result) in zip(variants, CASES, strict=True):
        T, K, N = 256, 2048, 768
        a_MK = torch.empty(T, K, dtype=dtype)
        b_KN = torch.empty(N, K, dtype=dtype).T if "bᵀ" in layout else torch.empty(K, N, dtype=dtype)
        fields = [field for x in (a_MK, b_KN) for field in plans.Layout(x.device, x.shape, x.stride(), dtype, 0)]
        how = specialised.launch(tuple(fields), leaves, pieces, result, False)
        specialised.product(a_MK, b_KN, how, result, None)
        names = variant.kernel.arg_names
        constants = {(names.index(name),): value for name, value in variant.constexprs.items()}
        want = key(variant.kernel, variant.signature, constants, variant.attrs)
        assert launched.key == want, f"{variant.name}\nlaunched: {launched.key}\nchecked: {want}"


def groups():
    """Launches of several products at once."""
    from patches.order.kernels import grouped
    from tests.patches.kernels.variants import GROUPS, of_groups

    launched = grouped.kernel = Compiled(grouped.kernel)
    grouped.on = lambda x: nullcontext()
    for variant, (dtype, layout, leaves, pieces, result) in zip(of_groups(), GROUPS, strict=True):
        rows, weights = torch.empty(256, 1024, dtype=dtype), [torch.empty(1024, 1024, dtype=dtype) for _ in range(2)]
        matrices = [weight.t() for weight in weights] if layout == "abᵀ" else weights
        if result == "in units":
            totals = [torch.zeros(1024, 1024, dtype=torch.int64) for _ in range(2)]
            bounds = [torch.zeros((), dtype=torch.float64) for _ in range(2)]
            grouped.add_grouped_products_in_units(totals, bounds, rows, rows, [[100, 28], [128]])
        else:
            grouped.grouped_product(rows, matrices, [100, 156], leaves, pieces, result)
        names = variant.kernel.arg_names
        constants = {(names.index(name),): value for name, value in variant.constexprs.items()}
        want = key(variant.kernel, variant.signature, constants, variant.attrs)
        assert launched.key == want, f"{variant.name}\nlaunched: {launched.key}\nchecked: {want}"


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
