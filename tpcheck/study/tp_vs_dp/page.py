"""The page of `tp-vs-dp`: the analysis' sections, each with its figures beside ours."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tpcheck.run.dtypes import DTYPES
from tpcheck.study.page import Block, Heading, Page, Paragraph, Picture, Table
from tpcheck.study.study import Results
from tpcheck.study.text import percent, small
from tpcheck.study.tp_vs_dp import published
from tpcheck.study.tp_vs_dp.drawings import growth, stacked, trees
from tpcheck.study.tp_vs_dp.findings import derived_error, ratios
from tpcheck.study.tp_vs_dp.roundings import bfloat16_sum
from tpcheck.study.tp_vs_dp.settings import SIZES, TpVsDp

__all__ = ["page"]

DISTANCE = ("max", "mean", "median", "> 1e-4", "> 1e-3", "> 5e-3", "> 1e-2")
SHOWN_LAYERS = (0, 1, 2, 3, 4, 9, 13, 19, 27)


def page(settings: TpVsDp, results: Results) -> Page:
    """Question and answer are about the model; what explains them follows."""
    bf16 = results["layers-bf16"]
    last = bf16["layers"][-1]["out"]
    tree = results["tree-bf16"]
    answer = (
        "Every sum that is cut over ranks changes, which are row-parallel outputs and column-parallel input gradients, "
        f"and all that follows them: after {settings.layers} layers by {small(last['mean_abs'])} on average in "
        f"bfloat16, {ratios(results)['model']:.0f} times less in float32, and no tensor by more than rounding "
        f"explains. It need not: with one order for every sum, {tree['differing']} of {tree['elements']} elements "
        "differ."
    )
    caption = (
        f"Mean difference between TP=4 and TP=1 after each of {settings.layers} layers, stock Megatron, beside the "
        f"analysis ({published.SETTING}); below, the same under `tree`."
    )
    summary: list[Block] = [
        Heading(f"{settings.layers} layers, bfloat16, TP=4 against TP=1"), _layers_table(bf16, "bf16", "out"),
        Paragraph(
            f"A sequence of {settings.seq_length} tokens, hidden size {settings.hidden}, {settings.heads} heads; the "
            "analysis had two of 4096. Its float32 grows faster than float32 does: see the page."
        ),
    ]  # fmt: skip
    blocks: list[Block] = [*_isolated(settings, results), *_exactness(results), *_pairs(settings, results),
                           *_model(settings, results), *_tolerances(settings, results), *_machine(results)]  # fmt: skip
    return Page(answer, Picture(growth(results), caption), blocks, summary)


def _isolated(settings: TpVsDp, results: Results) -> Iterator[Block]:
    inner, outer = settings.ffn, settings.hidden
    yield Heading("One layer")
    yield Paragraph(
        f"Megatron's own `RowParallelLinear`, {settings.tokens} tokens of {inner} features to {outer}, and "
        f"`ColumnParallelLinear`, {outer} to {inner}, on gloo ranks, forward and backward, against TP=1. A sum over "
        "what TP cuts differs; one over what it leaves whole does not, at this shape. Outputs have a standard "
        "deviation of 1."
    )
    compared = [row for dtype in DTYPES for row in results[f"isolated-{dtype}"]["layers"]]
    for kind in ("row", "column"):
        rows = [_distance(f"{row['dtype']} {row['strategy']}, TP={row['tp']}, {row['tensor']}", row)
                for row in compared if row["kind"] == kind and row["strategy"] == "stock"]  # fmt: skip
        theirs = [["analysis: bf16, TP=4, y", *_numbers(published.ROW)]] if kind == "row" else []
        if kind == "column":
            theirs = [["analysis: bf16, TP=4, y", *["0"] * len(DISTANCE)]]
        yield Table(
            (f"{kind}-parallel", *DISTANCE), [*theirs, *rows], "y: output, dx, dw: gradients of input and weight"
        )
    tree = [row for row in compared if row["strategy"] == "tree"]
    differing = sum(row["differing"] for row in tree)
    yield Paragraph(
        f"Under `tree`, all of these {len(tree)} comparisons together: {differing} of "
        f"{sum(row['size'] for row in tree)} elements differ."
    )


def _exactness(results: Results) -> Iterator[Block]:
    yield Heading("Is column-parallel exact?")
    yield Paragraph(
        "A rank multiplies by fewer columns, and each column's sum is over the same features. Equal bits then follow "
        "only if the library adds them in the same order for a narrower matrix, and libraries choose kernels, and with "
        "them orders, by shape. Here a plain product of 1024 features, its columns cut into TP parts:"
    )
    local = results["columns"]["products"]
    sizes = sorted({(row["dtype"], row["width"]) for row in local}, key=lambda one: (one[0], one[1]))
    tokens = sorted({row["tokens"] for row in local})
    rows = []
    for dtype, width in sizes:
        cells = []
        for count in tokens:
            found = [row for row in local if (row["dtype"], row["width"], row["tokens"]) == (dtype, width, count)]
            cells.append(", ".join(f"TP={row['tp']}: {percent(row['differing'] / row['size'])}"
                                   for row in found if row["differing"]) or "exact")  # fmt: skip
        rows.append([f"{dtype}, {width} columns", *cells])
    yield Table(("", *(f"{count} tokens" for count in tokens)), rows, "elements that differ from the whole product's")
    yield Paragraph(
        "`tpcheck order` shows the orders themselves. The first picture is one rank's product of 32 features and 8 "
        "columns; the others are a row-parallel sum, stock and under `tree`, where boxes are exact sums, which have no "
        "order."
    )
    for case, title in (("gemm stock", "A rank's own product"), ("row-parallel stock", "Row-parallel, stock"),
                        ("row-parallel tree", "Row-parallel, tree")):  # fmt: skip
        orders = results["orders"][case]
        yield Picture(trees(results, case, title), f"{title}, in order of TP: {len(orders)} in all over TP=1, 2, 4, 8")
        rows = [[one["places"], one["formula"]] for one in orders]
        yield Table(("where", "order"), rows, f"{title}, as formulas", folded=True)


def _pairs(settings: TpVsDp, results: Results) -> Iterator[Block]:
    found = results["stack"]["stock bf16"]
    apart = [one["out"]["mean_abs"] / published.STACK[n][1] - 1 for n, one in enumerate(found) if n in published.STACK]
    yield Heading(f"{settings.stacked} pairs of layers on top of each other")
    yield Paragraph(
        f"Column- and row-parallel, {settings.hidden} to {settings.ffn} and back, {settings.stacked_tokens} tokens, "
        f"nothing between them; TP=4 against TP=1. Mean differences in bfloat16 are {apart[0]:+.0%} from the analysis' "
        f"in the first pair and {apart[-1]:+.0%} in the last; the curve flattens, since errors of separate layers add "
        "like a random walk."
    )
    rows = []
    for number, one in enumerate(found):
        theirs = published.STACK.get(number)
        rows.append([str(number), *map(small, _three(one["out"])), *(map(small, theirs) if theirs else ["", "", ""])])
    yield Table(("pair", "max", "mean", "median", "analysis: max", "mean", "median"), rows, "bfloat16, outputs")
    yield Picture(
        stacked(results), "Relative difference of outputs, and dotted of their gradients, whose error grows downwards."
    )
    rows = [[case, *(small(found[number][kind]["relative"]) if kind in found[number] else "–"
                     for kind in ("out", "dout") for number in (0, len(found) // 2, len(found) - 1))]
            for case, found in results["stack"].items()]  # fmt: skip
    some = (0, len(found) // 2, len(found) - 1)
    yield Table(("", *(f"out {n}" for n in some), *(f"dout {n}" for n in some)), rows, "relative differences")
    yield Paragraph(
        "The analysis' float32 starts as float32 does, at a mean of 4.6e-7 in layer 0, and has grown eightfold one "
        "layer on. Float32 does not do that; operands rounded to TF32 do, whose rounding takes inputs that are a "
        "millionth apart to neighbours that are a thousandth apart. Tensor cores do so wherever "
        "`torch.backends.cuda.matmul.allow_tf32` or the environment lets them."
    )


def _model(settings: TpVsDp, results: Results) -> Iterator[Block]:
    yield Heading(f"{settings.layers} layers, forward and backward")
    first = results["layers-bf16"]["first"]
    equal = ", ".join(
        f"`{name.removeprefix('decoder.layers.0.')}`" for name in results["layers-bf16"]["equal_in_layer_0"]
    )
    yield Paragraph(
        f"Qwen3-0.6B's kind: hidden size {settings.hidden}, {settings.heads} heads, one sequence of "
        f"{settings.seq_length} tokens, as long as memory and time here allow with three nudged runs beside. The first "
        f"tensor that differs is the output of `{first['name'] if first else 'none'}`; before it, equal bit for bit: "
        f"{equal}."
    )
    for dtype in DTYPES:
        found = results[f"layers-{dtype}"]
        yield _layers_table(found, dtype, "out")
        yield _layers_table(found, dtype, "dout")
    yield Table(("", "bf16", "fp32", "ratio", "analysis: ratio"), _ratio_rows(results), "after the last layer")
    samples = [[f"{dtype}, {tp}", *(f"{value:.6f}" for value in values)]
               for dtype in DTYPES for tp, values in results[f"layers-{dtype}"]["samples"].items()]  # fmt: skip
    yield Table(("", *(f"feature {n}" for n in range(5))), samples, "the first token after the last norm")
    rows = []
    for dtype in DTYPES:
        found = results[f"tree-{dtype}"]
        rows.append([f"tree {dtype}", *(str(found[key]) for key in ("tensors", "elements", "differing", "verdict"))])
    headings = ("", "tensors", "elements", "that differ", "verdict")
    yield Table(headings, rows, "the same model under the patches, TP=4 and TP=1")


def _tolerances(settings: TpVsDp, results: Results) -> Iterator[Block]:
    yield Heading("Which tolerance?")
    yield Paragraph(
        "Of one sum, the roundings can be counted: TP=1 rounds once; TP=t rounds t partial sums, and each addition of "
        "the all-reduce. Of normal numbers each rounding's mean square is known, and they add up. Gloo adds in "
        "bfloat16, one rank after the other; NCCL may do otherwise. A test of one layer may ask for the derived figure "
        "and a quarter more."
    )
    rows = []
    for tp in SIZES[1:]:
        derived = bfloat16_sum(tp)
        rows.append(
            [
                f"TP={tp}",
                small(derived_error(results, tp)[0]),
                *(small(derived[how]) for how in ("chain", "pairs", "once")),
            ]
        )
    yield Table(
        ("row-parallel, bfloat16", "measured", "derived: chain", "pairs", "rounded once"), rows, "relative, by norms"
    )
    yield Paragraph(
        "Of a model nobody counts them. `tpcheck compare` measures what rounding may do by running TP=1 again with "
        "everything nudged by a rounding, and suspects what is three times as far. A tolerance in absolute numbers has "
        "no such reason: activations grow over the layers, and the sum of a layer can lose features within it."
    )
    found = results["bugs"]
    rows = []
    for one in found["tried"]:
        said = one["verdict"] + (f": {one['named']} ({one['kind']})" if one["named"] else "")
        passes = "passes" if one["max_abs"] < published.ATOL else "fails"
        rows.append([f"{one['bug']}, {one['dtype']}", small(one["max_abs"]), passes, said])
    yield Table(
        ("bug at TP=4", "output off by at most", f"atol={published.ATOL}", "tpcheck compare"), rows,
        f"bugs in the MLP of layer {found['layer']}; lost are {found['lost']} of {found['of']} features",
    )  # fmt: skip
    yield Paragraph(
        "A sum that lacks half a percent of its features is within what bfloat16 does, and no tolerance finds it "
        "there; in float32 it stands out. Under `tree` there is nothing to be tolerated: one differing bit is a bug."
    )


def _machine(results: Results) -> Iterator[Block]:
    yield Heading("Attention that really ran, and what the environment does")
    yield Paragraph(
        "`tpcheck doctor` runs attention kernels with all heads and with the shares that TP leaves a rank, and knows "
        "which variables touch a sum. Transformer Engine and test suites set `NVTE_FLASH_ATTN` and its kin behind "
        "one's back; the patches refuse a kernel when it is called, whatever the variables say, and a run's manifest "
        "has the one that ran. Here there are no fused kernels: attention is Megatron's own, unfused."
    )
    for strategy, lines in results["machine"].items():
        rows = [[line["section"], line["name"], line["found"], line["why"]] for line in lines]
        yield Table(("", "", "found", "why"), rows, f"tpcheck doctor, {strategy}", folded=True)


def _layers_table(found: dict[str, Any], dtype: str, kind: str) -> Table:
    theirs = published.LAYERS[dtype] if kind == "out" else {}
    rows = []
    for one in [layer for layer in found["layers"] if layer["layer"] in SHOWN_LAYERS or len(found["layers"]) < 10]:
        n = one[kind]
        largest, mean = theirs.get(one["layer"], (None, None))
        beside = [small(largest) if largest else "", small(mean) if mean else ""] if theirs else []
        rows.append([str(one["layer"]), *map(small, _three(n)), *map(percent, (n["over"][1], n["over"][3])),
                     small(n["relative"]), small(n["limit"]), *beside])  # fmt: skip
    what = {"out": "outputs of the layers", "dout": "gradients of these outputs"}[kind]
    headings = ("layer", "max", "mean", "median", "> 1e-3", "> 1e-2", "relative", "limit")
    return Table((*headings, *(("analysis: max", "mean") if theirs else ())), rows, f"{dtype}: {what}")


def _ratio_rows(results: Results) -> list[list[str]]:
    rows = []
    for key, theirs in (("max_abs", published.RATIO_OF_MAXIMA), ("mean_abs", published.RATIO_OF_MEANS)):
        bf16, fp32 = (results[f"layers-{dtype}"]["layers"][-1]["out"][key] for dtype in DTYPES)
        rows.append([key.replace("_", " "), small(bf16), small(fp32), f"{bf16 / fp32:.0f}", str(theirs)])
    return rows


def _distance(name: str, row: dict[str, Any]) -> list[str]:
    return [name, *_numbers(row)]


def _numbers(row: dict[str, Any]) -> list[str]:
    return [*map(small, _three(row)), *map(percent, row["over"])]


def _three(row: dict[str, Any]) -> tuple[float, float, float]:
    return row["max_abs"], row["mean_abs"], row["median_abs"]
