"""Every variant of every kernel that a training step launches; what holds for bfloat16 holds for float16."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product as combinations

import torch

from patches.order.kernels import cross_entropy, embedding, norm, ranks, softmaxes, squares, sums
from patches.order.kernels.gemm_kernel import COUNTS, kernel
from patches.order.kernels.plans import NAMES, How, constants
from patches.order.kernels.tiles import Tile, tiles_of
from tests.patches.kernels.variant import Variant, divisible, variant
from tests.patches.kernels.variants_of_attention import of_attention
from tests.patches.kernels.variants_of_trees import laid_out, of_trees


def all_variants() -> list[Variant]:
    kinds = (
        of_products,
        of_groups,
        of_trees,
        of_ranks,
        of_sums,
        of_norms,
        of_softmaxes,
        of_embeddings,
        of_squares,
        of_attention,
    )
    return [one for variants in kinds for one in variants()]


def of_products() -> Iterator[Variant]:
    """What the layers launch: by TMA or by pointers, every layout, number of leaves and pieces, result and tile."""
    one, tree = (1,), (1, 2, 4, 8)
    loads = ((torch.bfloat16, True), (torch.bfloat16, False), (torch.float16, True), (torch.float32, False))
    for dtype, tma in loads:
        name = NAMES[dtype]
        results = (name, "fp32") if dtype == torch.bfloat16 and tma else (name,)
        some = tree if dtype == torch.bfloat16 else (1, 8)
        for layout, leaves, pieces, result in (
            *combinations(("abᵀ",), some, one, results),  # forward
            *combinations(("ab",), some, (1, 2), results),  # dgrad; 2 pieces where the layer is gated
            *combinations(("aᵀb",), one, one, (*results, "added", "in units")),  # wgrad
            ("aᵀbᵀ", 1, 1, name),
            *([("abᵀ", 1, 1, f"scaled {name}")] if tma else []),  # attention's scores
        ):
            largest, *smaller = tiles_of(dtype, leaves, tma)
            # Of the smaller ones 1 and 8 leaves of bfloat16 are enough: others are the same code, cut elsewhere.
            few = dtype == torch.bfloat16 and leaves in (1, 8)
            for tile in (largest, *(smaller if few else ())):
                yield of_product(dtype, layout, leaves, pieces, tma, result, tile)


# dtype, layout, leaves, pieces, result of several products in one launch, as a layer of experts has them.
GROUPS = [
    (dtype, *one)
    for dtype in (torch.bfloat16, torch.float32)
    for one in (
        *(("abᵀ", leaves, 1, dtype if leaves in (1, 8) else torch.float32) for leaves in (1, 2, 4, 8)),
        *(("ab", leaves, pieces, dtype if leaves in (1, 8) else torch.float32)
          for leaves, pieces in combinations((1, 2, 4, 8), (1, 2))),
        ("aᵀb", 1, 1, "in units"),
    )
]  # fmt: skip


def of_groups() -> Iterator[Variant]:
    """The variants of GROUPS."""
    for dtype, layout, leaves, pieces, result in GROUPS:
        tile, units = tiles_of(dtype, leaves, False)[0], result == "in units"
        name = result if units else NAMES[result]
        yield of_product(dtype, layout, leaves, pieces, False, name, tile, "K" if units else "M")


def of_product(
    dtype: torch.dtype, layout: str, leaves: int, pieces: int, tma: bool, result: str, tile: Tile, varies: str = ""
) -> Variant:
    """A product as it is launched for operands of models' sizes; `result`: a dtype's name, scaled, added, in units."""
    a_along_k, b_along_k = "aᵀ" not in layout, "bᵀ" in layout
    scaled, in_units = result.startswith("scaled "), result == "in units"
    added = in_units or result == "added"
    a_BRK, b_BRK = (laid_out(dtype, along_k) for along_k in (a_along_k, b_along_k))
    constexprs = constants(
        tile, leaves, pieces, tma, a_BRK, b_BRK, How(added, in_units, scaled, False, varies, bool(varies))
    )
    constexprs |= {"a_K" if a_along_k else "a_M": 1, "b_K" if b_along_k else "b_N": 1, "out_N": 1}
    if leaves >> tile.register_levels <= 1:
        constexprs["scratch"] = None
    if not in_units:
        constexprs["largest"] = None
    constexprs["b" if varies else "products"] = None
    out = "i64" if in_units else "fp32" if added else result.removeprefix("scaled ")
    pointers = {
        "a": NAMES[dtype],
        "b": NAMES[dtype],
        "out": out,
        "scratch": "fp32",
        "largest": "i32",
        "products": "i64",
    }
    signature = dict.fromkeys(kernel.arg_names, "i32") | {"scale": "fp32"}
    signature |= {argument: f"*{element}" for argument, element in pointers.items()}
    signature |= dict.fromkeys(constexprs, "constexpr")
    if tma:
        for argument, rows, along_k in (("a", tile.m, a_along_k), ("b", tile.n, b_along_k)):
            block = f"1,1,{rows},{tile.k}" if along_k else f"1,1,{tile.k},{rows}"
            signature[argument] = f"tensordesc<{NAMES[dtype]}[{block}]>"
    how = f"{'tma' if tma else 'grouped' if varies else 'pointers'} {tile.m}x{tile.n}"
    return Variant(
        name=f"gemm {NAMES[dtype]} {layout} leaves={leaves} pieces={pieces} {how} {result}",
        kernel=kernel,
        signature=signature,
        constexprs=constexprs,
        # Sizes and strides of models are multiples of 16; one that is not compiles a variant of its own.
        attrs=divisible(signature, [x for x, kind in signature.items() if kind == "i32" and x not in COUNTS]),
        num_warps=tile.warps,
        num_stages=tile.stages,
        expects="" if dtype == torch.float32 else "mma",
        families=(90, 100) if dtype == torch.float32 else (90, 100, 103),
    )


def of_ranks() -> Iterator[Variant]:
    """Sums over 2 to 16 ranks, of either kind of parts, as a training step launches them."""
    aligned = [["tt.divisibility", 16]]
    for peers in (False, True):
        for dtype in ("bf16", "fp32"):
            for count in (2, 4, 8, ranks.MAX_PARTS):
                constexprs = {"RANKS": count, "PEERS": peers, "DIVIDE": False, "BLOCK": ranks.BLOCK}
                yield Variant(
                    name=f"tree_sum of {count} {'peers' if peers else 'parts'} {dtype}",
                    kernel=ranks.tree_sum_kernel,
                    signature={
                        "parts": "*i64" if peers else "*fp32",
                        "out": f"*{dtype}",
                        **dict.fromkeys(("size", "start", "divide_by"), "i32"),
                        **dict.fromkeys(constexprs, "constexpr"),
                    },
                    constexprs=constexprs,
                    attrs={(argument,): aligned for argument in range(4)},
                    num_warps=ranks.WARPS,
                )


def of_sums() -> Iterator[Variant]:
    """Every kind of sum, aligned or not; what holds for bfloat16 holds for float16."""
    for name, aligned in combinations(("fp32", "bf16"), (True, False)):
        how = "" if aligned else " unaligned"
        types = {"x": f"*{name}", "out": "*fp32"}
        both = types | {"y": f"*{name}"}
        multiples = "n" if aligned else ""
        for kind, product, rows in (("rows", False, 1), ("rows of products", True, 1), ("short rows", False, 32)):
            meta = {"PRODUCT": product, "ROWS": rows, "BLOCK": sums.ROW_BLOCK // rows}
            yield variant(f"{kind} {name}{how}", sums._rows, both, meta, 4, multiples)
        for normed, centered, one in (
            (False, False, True),
            (True, False, True),
            (True, True, True),
            (True, False, False),
        ):
            kind = ("layernorm" if centered else "rmsnorm") + (" of heads" if not one else "") if normed else "sum"
            yield variant(
                f"columns {kind} {name}{how}",
                sums._columns,
                types | {"z": f"*{name}", "mean": "*fp32", "rstd": "*fp32"},
                {"ONE": one, "NORMED": normed, "CENTERED": centered}
                | {"LANES": sums.LANES, "TILES": sums.TILES, "COLUMNS": sums.COLUMNS},
                4,
                "B" if aligned else "",
            )


def of_norms() -> Iterator[Variant]:
    """RMSNorm and LayerNorm of tokens and of heads; what holds for bfloat16 holds for float16."""
    for name in ("fp32", "bf16"):
        for (h, kind), centered in combinations(((4096, "tokens"), (128, "heads")), (False, True)):
            kind_of_norm = "layernorm" if centered else "rmsnorm"
            meta = norm._tile(h) | {"CENTERED": centered}
            warps = meta.pop("num_warps")
            types = {"x": name, "gamma": name, "mean": "fp32", "rstd": "fp32"}
            ends = {"forward": {"beta": name, "y": name}, "backward": {"dy": name, "dx": name}}
            for end, function in (("forward", norm._forward), ("backward", norm._backward)):
                pointers = {argument: f"*{element}" for argument, element in (types | ends[end]).items()}
                if end == "forward":
                    pointers["eps"] = "fp32"
                more = {"BETA": centered} if end == "forward" else {}
                yield variant(f"{kind_of_norm} of {kind} {end} {name}", function, pointers, meta | more, warps, "h")


def of_softmaxes() -> Iterator[Variant]:
    """Short and long rows, aligned and not; what holds for bfloat16 holds for float16."""
    for name, aligned in combinations(("fp32", "bf16"), (True, False)):
        how, multiples = ("", "columns") if aligned else (" unaligned", "")
        stats = {"top": "*fp32", "total": "*fp32"}
        for columns, log in combinations(
            (1024, softmaxes.SHORT, 2 * softmaxes.SHORT), (False, True) if aligned else (False,)
        ):
            meta = softmaxes._meta(columns) | {"LOG": log}
            warps = meta.pop("num_warps")
            kind = f"{'log_' if log else ''}softmax of {columns} {name}{how}"
            short = {"top": f"*{name}", "total": f"*{name}"} if meta["WHOLE"] else stats
            pointers = {"x": f"*{name}", "y": f"*{name}"} | short
            yield variant(kind, softmaxes._softmax, pointers, meta, warps, multiples)
            total = {"total": short["total"]}
            pointers = {"dy": f"*{name}", "y": f"*{name}", "dx": f"*{name}"} | total
            yield variant(f"{kind} backward", softmaxes._softmax_gradient, pointers, meta, warps, multiples)
        pointers = {"z": f"*{name}", "tops": "*fp32", "sums": "*fp32"}
        yield variant(
            f"exponentials {name}{how}",
            cross_entropy._exponentials,
            pointers,
            {"ALIGNED": aligned, "CHUNK": cross_entropy.CHUNK},
            8,
            multiples,
        )
        pointers = {"z": f"*{name}", "target": "*i64", "dloss": "*fp32", "dz": f"*{name}"} | stats
        yield variant(
            f"logits gradient {name}{how}",
            cross_entropy._logits_gradient,
            pointers,
            {"BLOCK": cross_entropy.TILE},
            8,
            multiples,
        )
    pointers = dict.fromkeys(("top", "total", "picked", "loss"), "*fp32")
    yield variant("losses", cross_entropy._losses, pointers, {"BLOCK": cross_entropy.TILE}, 8)
    pointers = dict.fromkeys(("tops", "sums", "top", "total"), "*fp32")
    yield variant("joined exponentials", cross_entropy._joined, pointers, {"ROWS": 16, "LEAVES": 8, "CHUNKS": 8}, 4)


def of_embeddings() -> Iterator[Variant]:
    """Gradients, rounded to their own dtype; what holds for bfloat16 holds for float16."""
    for name in ("fp32", "bf16"):
        places = dict.fromkeys(("ids", "start", "end"), "*i64") | {"out": f"*{name}", "sums": "*fp32"}
        meta = {"CHUNK": embedding.CHUNK, "COLUMNS": embedding.COLUMNS}
        chunk = places | {"dy": f"*{name}", "order": "*i64"}
        yield variant(f"embedding {name}", embedding._chunks, chunk, meta, 8, "features")
        yield variant(f"embedding of frequent rows {name}", embedding._frequent, places, meta, 8, "features")


def of_squares() -> Iterator[Variant]:
    """Gradients; what holds for bfloat16 holds for float16."""
    for name in ("fp32", "bf16"):
        pointers = {"table": "*i64", "bins": "*i64", "like": f"*{name}"}
        yield variant(f"squares {name}", squares._squares, pointers, {"TILE": squares.TILE}, 8)
