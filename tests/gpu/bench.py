"""Speed of the patches' products and sums on a GPU, as ratios of two things timed in turn in one run: `make gpu`.

    layers     a whole layer of Qwen3-8B, forward and backward, against stock Megatron
    attention  its attention, against flash attention's kernels
    products   the GEMMs of Qwen3-8B, one rank's share at every TP size, against torch.mm (cuBLAS), and against one leaf
    trees      the warp-specialised kernel of PATCHES_GLUON against ours, and its bits
    tiles      the same product with other tiles, where the kernel lets them be chosen
    sums       GB/s of what has to be read and written, against a copy on the device, and against torch's own

Random data; between calls a buffer larger than the L2 cache is written. What the time limit cuts off is named.
`--device cpu` runs all of it at tiny shapes, so that a machine without a GPU notices when it breaks.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from patches.order import products
from patches.order.backend import backend
from tests.gpu import bench_attention
from tests.gpu import report as gpu_report
from tests.gpu.bench_attention import attentions
from tests.gpu.bench_layer import Measured, layers
from tests.gpu.bench_sums import Sum, overridden, sums
from tests.gpu.clock import Clock
from tpcheck.config.presets import PRESETS

SECTIONS = tuple(gpu_report.TABLES)
LEAVES = 8
ERROR_ROWS = 64
TILES_SHARE = 0.3


@dataclass(frozen=True)
class Scale:
    """What is measured on a kind of device."""

    hidden: int
    queries: int
    qkv: int
    ffn: int
    vocab: int
    tokens: tuple[int, ...]  # the telling ones first: time may run out
    sizes: tuple[int, ...]
    repeat: tuple[int, int]  # calls of one kind, at least and at most


_QWEN3_8B = PRESETS["qwen3-8b"]
SCALES = {
    "cuda": Scale(
        hidden=_QWEN3_8B["hidden_size"],
        queries=_QWEN3_8B["num_attention_heads"] * _QWEN3_8B["head_dim"],
        qkv=(_QWEN3_8B["num_attention_heads"] + 2 * _QWEN3_8B["num_query_groups"]) * _QWEN3_8B["head_dim"],
        ffn=_QWEN3_8B["ffn_hidden_size"],
        vocab=_QWEN3_8B["vocab_size"],
        tokens=(8192, 2048, 16384, 4096),
        sizes=(1, 8, 2, 4),
        repeat=(5, 30),
    ),
    "cpu": Scale(hidden=32, queries=32, qkv=48, ffn=48, vocab=64, tokens=(16,), sizes=(1, 8), repeat=(2, 2)),
}


@dataclass(frozen=True)
class Product:
    """One GEMM of one rank: a [M, K] · b [K, N]."""

    layer: str
    kind: str  # forward, dgrad, wgrad
    tp: int
    tokens: int
    m: int
    k: int
    n: int
    leaves: int  # of this rank
    sharded: bool = False  # K lies on several ranks
    pieces: int = 1

    @property
    def flops(self) -> float:
        return 2.0 * self.m * self.k * self.n


def shapes(scale: Scale) -> Iterator[Product]:
    """Every GEMM of every layer; at the first number of tokens and the first TP sizes first."""
    h = scale.hidden
    for tokens in scale.tokens:
        for tp in scale.sizes:
            own = LEAVES // tp
            for layer, k, n, pieces in (
                ("fc1", h, 2 * scale.ffn, 2), ("QKV", h, scale.qkv, 1), ("output", h, scale.vocab, 1)
            ):  # fmt: skip
                yield Product(layer, "forward", tp, tokens, tokens, k, n // tp, 1)
                yield Product(layer, "dgrad", tp, tokens, tokens, n // tp, k, own, tp > 1, pieces)
                yield Product(layer, "wgrad", tp, tokens, n // tp, tokens, k, 1)
            for layer, k, n in (("fc2", scale.ffn, h), ("proj", scale.queries, h)):
                yield Product(layer, "forward", tp, tokens, tokens, k // tp, n, own, tp > 1)
                yield Product(layer, "dgrad", tp, tokens, tokens, n, k // tp, 1)
                yield Product(layer, "wgrad", tp, tokens, n, tokens, k // tp, 1)


def operands(shape: Product, device: str) -> tuple[Tensor, Tensor]:
    """As autograd hands them over: forward x·wᵀ, dgrad dy·w, wgrad dyᵀ·x, each of contiguous tensors."""
    make = {"dtype": torch.bfloat16, "device": device}
    a = torch.randn(shape.k, shape.m, **make).t() if shape.kind == "wgrad" else torch.randn(shape.m, shape.k, **make)
    b = torch.randn(shape.n, shape.k, **make).t() if shape.kind == "forward" else torch.randn(shape.k, shape.n, **make)
    return a, b


def measure(shape: Product, clock: Clock, alone: bool = False) -> dict[str, Any]:
    """Times of one GEMM: ours, unless `alone` ours with one leaf, torch's; both errors; of one leaf, if bits agree."""
    a, b = operands(shape, clock.device)
    # A rank's root stays float32 for the sum over ranks; wgrad is added into main_grad.
    dtype = torch.float32 if shape.sharded else torch.bfloat16
    calls = {"mm": lambda: torch.mm(a, b)}
    if shape.kind == "wgrad":
        main_grad = torch.zeros(shape.m, shape.n, device=clock.device)
        calls["ours"] = lambda: products.add_product(main_grad, a, b)
        calls["mm"] = lambda: added_by_torch(main_grad, a, b)
    else:
        calls["ours"] = lambda: products.product(a, b, shape.leaves, shape.pieces, dtype)
        if shape.leaves > 1 and not alone:
            calls["one leaf"] = lambda: products.product(a, b, 1, shape.pieces, dtype)
    ms = clock.times(calls)
    row = {**dataclasses.asdict(shape), "ms": ms["ours"], "mm_ms": ms["mm"], "tflops": shape.flops / ms["ours"] / 1e9,
           "over_mm": ms["mm"] / ms["ours"]}  # fmt: skip
    if "one leaf" in ms:
        row["over_one_leaf"] = ms["one leaf"] / ms["ours"]
    if shape.leaves == 1:
        row["same_bits"] = products.product(a, b, dtype=torch.bfloat16).equal(torch.mm(a, b))
    return row | _errors(shape, a, b, dtype)


def added_by_torch(main_grad: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """main_grad += a·b in one kernel of cuBLAS, as Apex's and Transformer Engine's fused gradient accumulation have it.

    On a CPU, where there is none, in two.
    """
    if main_grad.is_cuda:
        added: Tensor = torch.ops.aten.addmm.dtype_out(main_grad, a, b, torch.float32, out=main_grad)
        return added
    return main_grad.add_(torch.mm(a, b))


def _errors(shape: Product, a: Tensor, b: Tensor, dtype: torch.dtype) -> dict[str, float]:
    """Relative error of some rows against float64."""
    rows = torch.linspace(0, shape.m - 1, min(ERROR_ROWS, shape.m), device=a.device).long()
    want = a[rows].double() @ b.double()
    ours = products.product(a, b, shape.leaves, shape.pieces, dtype)[rows]
    return {"error": _relative(ours, want), "mm_error": _relative(torch.mm(a, b)[rows], want)}


def _relative(x: Tensor, want: Tensor) -> float:
    return float((x.double() - want).norm() / want.norm())


def measure_tree(shape: Product, clock: Clock) -> dict[str, Any]:
    """Times of one tree by the warp-specialised kernel, by ours and of torch's product; whether the bits are ours."""
    from patches.order.kernels import gemm, specialised

    a, b = operands(shape, clock.device)
    dtype = torch.float32 if shape.sharded else torch.bfloat16
    launch = specialised.launch(gemm.fields_of(a, b), shape.leaves, shape.pieces, dtype, False)
    assert launch is not None, "not made for a model's product"
    calls = {
        "specialised": lambda: specialised.product(a, b, launch, dtype, None),
        "ours": lambda: gemm.product(a, b, shape.leaves, shape.pieces, dtype),
        "mm": lambda: torch.mm(a, b),
    }
    same = all(torch.equal(calls["specialised"](), calls["ours"]()) for _ in range(3))
    ms = clock.times(calls)
    return {**dataclasses.asdict(shape), "ms": ms["specialised"], "tflops": shape.flops / ms["specialised"] / 1e9,
            "over_mm": ms["mm"] / ms["specialised"], "over_ours": ms["ours"] / ms["specialised"],
            "same_bits": same}  # fmt: skip


CHANGES: tuple[dict[str, int], ...] = (
    {}, {"m": 128, "n": 256, "stages": 3}, {"m": 128, "n": 128, "warps": 8, "stages": 4}, {"m": 128, "n": 64},
    {"m": 64, "n": 128, "warps": 4}, {"stages": 2}, {"register_levels": 1}, {"register_levels": 3},
)  # fmt: skip


def tiles(scale: Scale, clock: Clock) -> Iterator[dict[str, Any]]:
    """Large products of every kind with other tiles in place of the contract's, which must give the same bits."""
    if clock.device == "cpu":
        return
    from patches.order.kernels import plans

    until = time.monotonic() + TILES_SHARE * clock.seconds  # every change is compiled anew
    wanted = [(1, "fc1", "forward"), (1, "fc2", "forward")]
    for shape in shapes(dataclasses.replace(scale, tokens=scale.tokens[:1])):
        if (shape.tp, shape.layer, shape.kind) not in wanted:
            continue
        a, b = operands(shape, clock.device)
        whole = products.product(a, b, shape.leaves, shape.pieces)
        for change in CHANGES:
            if clock.is_over or time.monotonic() > until:
                return
            with _tile(plans, change):
                try:
                    row = measure(shape, clock, alone=True)
                    row["same_bits"] = whole.equal(products.product(a, b, shape.leaves, shape.pieces))
                except Exception as error:  # more registers or shared memory than there are
                    row = {**dataclasses.asdict(shape), "failed": f"{type(error).__name__}: {error}"[:120]}
            yield {**row, "change": change}


@contextmanager
def _tile(plans: Any, change: dict[str, int]) -> Iterator[None]:
    tile_of = plans.tile_of
    plans.tile_of = lambda *args: dataclasses.replace(tile_of(*args), **change)
    plans.plan.cache_clear()
    try:
        yield
    finally:
        plans.tile_of = tile_of
        plans.plan.cache_clear()


def measure_sum(one: Sum, clock: Clock) -> dict[str, Any]:
    """GB/s of one sum, as a ratio to a copy of as many bytes on the device, which takes turns with it."""
    source = torch.empty(max(1, one.bytes // 2), dtype=torch.uint8, device=clock.device)
    target = torch.empty_like(source)

    def timed(call: Callable[[], object]) -> tuple[float, float]:
        ms = clock.times({"call": call, "copy": lambda: target.copy_(source)})
        return ms["call"], ms["copy"] / ms["call"]

    with overridden(clock.device):
        ms, ours = timed(one.call)
    _, stock = timed(one.stock)
    return {"sum": one.name, "shape": one.shape, "bytes": one.bytes, "ms": ms, "gbs": one.bytes / ms / 1e6,
            "over_copy": ours, "over_stock": ours / stock}  # fmt: skip


def run(device: str, seconds: float, folder: Path, sections: Collection[str] = SECTIONS) -> int:
    """Measure these sections, writing after every row; the number of rows that failed."""
    scale = SCALES[device]
    clock = Clock(device, scale.repeat, seconds)
    report = gpu_report.Report(folder, device, sections)
    report.contract = dict(backend(torch.device(device)).provenance(torch.device(device)))
    every = list(shapes(scale))
    first = [shape for shape in every if shape.tokens == scale.tokens[0]]

    def each(
        section: str, items: Iterable[Any], name: Callable[[Any], str], call: Callable[..., dict[str, Any]]
    ) -> None:
        for item in items if section in sections else ():
            if clock.is_over:
                report.skipped.setdefault(section, []).append(name(item))
                continue
            try:
                report.add(section, call(item, clock))
            except Exception as error:
                what = f"{name(item)}: {type(error).__name__}: {' '.join(f'{error}'.split())[:200]}"
                report.failed.setdefault(section, []).append(what)

    each("layers", layers(device), lambda one: one.name, Measured())
    each("attention", attentions(device), lambda one: one.name, bench_attention.Measured())
    each("products", first, str, measure)
    # Not in the interpreter, which does not take Gluon.
    each("trees", [shape for shape in first if shape.leaves > 1 and device == "cuda"], str, measure_tree)
    each("sums", sums(device), lambda one: one.name, measure_sum)
    for row in tiles(scale, clock) if "tiles" in sections else ():
        report.add("tiles", row)
    each("products", every[len(first) :], str, measure)
    report.write()
    print(report.text())
    return sum(map(len, report.failed.values()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=list(SCALES), default="cuda")
    parser.add_argument("--seconds", type=float, default=240.0, help="no new row is begun after that")
    parser.add_argument("--out", type=Path, required=True, help="folder for bench.json and bench.md")
    parser.add_argument("--only", choices=SECTIONS, action="append", help="these sections; others are kept as they are")
    options = parser.parse_args()
    return min(1, run(options.device, options.seconds, options.out, options.only or SECTIONS))


if __name__ == "__main__":
    raise SystemExit(main())
