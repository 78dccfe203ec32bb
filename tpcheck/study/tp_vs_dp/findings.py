"""What became of the analysis' claims, by the numbers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tpcheck.run.dtypes import DTYPES
from tpcheck.study.study import Finding, Results
from tpcheck.study.text import percent, small
from tpcheck.study.tp_vs_dp import published
from tpcheck.study.tp_vs_dp.layers import NO_SUM
from tpcheck.study.tp_vs_dp.roundings import bfloat16_sum
from tpcheck.study.tp_vs_dp.settings import SIZES

__all__ = ["derived_error", "findings", "isolated_row", "ratios", "worst_column"]

Row = dict[str, Any]
AGREES = 0.25  # relative, of two figures that are called the same
SAME_PRECISION = 8.0  # a factor within which two ratios of precisions are called the same
PRECISIONS = 2.0**16  # of float32 to bfloat16: 24 and 8 bits of significand


def findings(results: Results) -> list[Finding]:
    """All of them, in the order of the page."""
    return [
        *_of_weights(results),
        *_of_layers(results),
        *_of_growth(results),
        *_of_tolerances(results),
        _of_tree(results),
    ]


def isolated_row(results: Results, kind: str, dtype: str, strategy: str, tp: int, tensor: str) -> Row:
    """The row of one tensor of a layer in isolation."""
    wanted = (kind, dtype, strategy, tp, tensor)
    rows = results[f"isolated-{dtype}"]["layers"]
    return next(row for row in rows if (row["kind"], row["dtype"], row["strategy"], row["tp"], row["tensor"]) == wanted)


def worst_column(results: Results) -> Row:
    """The largest product of which most elements change when its columns are spread over ranks, if there is one."""
    return max(results["columns"]["products"], key=lambda row: (row["differing"] / row["size"] > 0.5, row["size"]))


def derived_error(results: Results, tp: int) -> tuple[float, float]:
    """Relative distance of a row-parallel bfloat16 sum from TP=1's: measured, and derived for a chain of additions."""
    return isolated_row(results, "row", "bf16", "stock", tp, "y")["relative"], bfloat16_sum(tp)["chain"]


def ratios(results: Results) -> dict[str, float]:
    """Mean difference in bfloat16 over float32's: of the last layer, of the last pair, and there over TF32's."""
    model = (results[f"layers-{dtype}"]["layers"][-1]["out"]["mean_abs"] for dtype in ("bf16", "fp32"))
    bf16, fp32, tf32 = (
        results["stack"][case][-1]["out"]["mean_abs"] for case in ("stock bf16", "stock fp32", "simulated tf32")
    )
    ours, other = model
    return {"model": ours / other, "pairs": bf16 / fp32, "pairs tf32": bf16 / tf32}


def _of_weights(results: Results) -> Iterator[Finding]:
    found = results["weights"]
    count = len(found["parameters"])
    on_cpu, on_device = (max(map(len, found["differing"][way].values()))
                         for way in ("use_cpu_initialization=True", "use_cpu_initialization=False"))  # fmt: skip
    conditional = "holds only if `use_cpu_initialization=True`" if on_device else "holds"
    yield Finding(
        "Initial weights are the same bits at every TP size",
        "does not hold" if on_cpu else conditional,
        f"{count} parameters gathered at TP=1, 2, 4, 8: {on_cpu} differ; with Megatron's default "
        f"`use_cpu_initialization=False`, where each rank draws its own part, {on_device} do",
    )


def _of_layers(results: Results) -> Iterator[Finding]:
    own = isolated_row(results, "column", "bf16", "stock", 4, "y")
    worst = worst_column(results)
    always = not own["differing"] and not worst["differing"]
    yield Finding(
        "A column-parallel layer is bit-exact",
        "holds" if always else "holds only if the library adds a narrower product in the same order",
        f"{own['differing']} of {own['size']} elements differ at the analysis' shape; of a product of "
        f"{worst['tokens']} tokens by {worst['width']} columns in {worst['dtype']}, cut by TP={worst['tp']}, "
        f"{percent(worst['differing'] / worst['size'])} do",
    )
    back = isolated_row(results, "column", "bf16", "stock", 4, "dx")
    yield Finding(
        "Row-parallel layers alone introduce a difference",
        "holds only if nobody runs backward" if back["differing"] else "holds",
        f"the gradient of a column-parallel layer's input is a sum over ranks, too: "
        f"{percent(back['differing'] / back['size'])} of its elements differ, relative {small(back['relative'])}",
    )
    row = isolated_row(results, "row", "bf16", "stock", 4, "y")
    agrees = abs(row["mean_abs"] / published.ROW["mean_abs"] - 1) < AGREES
    yield Finding(
        "One row-parallel sum at TP=4 in bfloat16: mean difference 1.95e-3, half of the elements above 1e-4",
        "holds" if agrees else "does not hold",
        f"mean {small(row['mean_abs'])}, {percent(row['over'][0])} above 1e-4, largest {small(row['max_abs'])}, "
        "on a CPU over gloo: the numbers are the format's",
    )
    ulp = 2.0**-7
    yield Finding(
        "The largest difference, 0.03125, is one unit in the last place of outputs around 1",
        "does not hold",
        f"that unit is {ulp:.5f} at 1; 0.03125 is the unit between 4 and 8, where the largest outputs are",
    )


def _of_growth(results: Results) -> Iterator[Finding]:
    pairs = results["stack"]["stock bf16"]
    growth = pairs[-1]["out"]["mean_abs"] / pairs[0]["out"]["mean_abs"]
    yield Finding(
        "The error of pairs of layers adds up, fast at first, then ever more slowly",
        "holds" if 1 < growth < len(pairs) else "does not hold",
        f"mean difference × {growth:.1f} over {len(pairs)} pairs (the analysis: × 5.4 over 16)",
    )
    layers = results["layers-bf16"]["layers"]
    absolute, relative = (layers[-1]["out"][key] / layers[0]["out"][key] for key in ("mean_abs", "relative"))
    linear = absolute / len(layers)
    yield Finding(
        "Over a model's layers the mean difference grows about linearly",
        "holds only if it is not held against the growing activations" if linear > 0.5 else "does not hold",
        f"× {absolute:.1f} over {len(layers)} layers, × {relative:.1f} relative to the layers' outputs, which grow as "
        "well",
    )
    found = ratios(results)
    explained = found["model"] > PRECISIONS / SAME_PRECISION
    yield Finding(
        "bfloat16 is 66 (mean) to 200 (largest) times coarser than float32, as their precisions say",
        "does not hold" if explained else "holds",
        f"{found['model']:.0f} times over the model and {found['pairs']:.0f} over pairs of layers; precisions say "
        "2^16 = 65536, of which float32 loses some by adding thousands of numbers. With operands rounded to TF32 it "
        f"is {found['pairs tf32']:.0f}: the analysis' float32 products were most likely TF32",
    )


def _of_tolerances(results: Results) -> Iterator[Finding]:
    measured = {tp: derived_error(results, tp) for tp in SIZES[1:]}
    agree = all(abs(ours / derived - 1) < AGREES for ours, derived in measured.values())
    yield Finding(
        "What bfloat16 does to a row-parallel sum follows from counting its roundings",
        "holds" if agree else "does not hold",
        ", ".join(
            f"TP={tp}: {small(ours)} measured, {small(derived)} derived" for tp, (ours, derived) in measured.items()
        ),
    )
    bug = next(one for one in results["bugs"]["tried"] if one["bug"] == NO_SUM)
    passes = bug["max_abs"] < published.ATOL
    yield Finding(
        f"An absolute tolerance of {published.ATOL} on the outputs is a test of TP in bfloat16",
        "does not hold" if passes and bug["verdict"] == "suspect" else "holds",
        "without the sum over ranks in one layer's backward pass the output is off by at most "
        f"{small(bug['max_abs'])}, as it is with it; `tpcheck compare` says {bug['verdict']} and names "
        f"`{bug['named']}`",
    )


def _of_tree(results: Results) -> Finding:
    model = [results[f"tree-{dtype}"] for dtype in DTYPES]
    layers = [row for dtype in DTYPES for row in results[f"isolated-{dtype}"]["layers"] if row["strategy"] == "tree"]
    pairs = [
        one[kind]
        for name, found in results["stack"].items()
        if name.startswith("tree")
        for one in found
        for kind in one
    ]
    differing = sum(one["differing"] for one in [*model, *layers, *pairs])
    compared = sum(one["elements"] for one in model) + sum(one["size"] for one in [*layers, *pairs])
    return Finding(
        "Such differences are the price of tensor parallelism",
        "holds" if differing else "does not hold",
        f"under `tree` {differing} of {compared} elements differ: layers, pairs and model, forward and backward, in "
        "bfloat16 and in float32",
    )
