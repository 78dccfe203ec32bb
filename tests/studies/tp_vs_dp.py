"""Stock Megatron at TP=1 and TP=4, 28 layers, float32 and bfloat16: what `results/tp_vs_dp/` shows.

python -m tests.studies.tp_vs_dp        two minutes on two cores; writes tables and reports there
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from tests.support import ROOT
from tpcheck.config.load import parse_run
from tpcheck.run.launch import launch
from tpcheck.run.nudged import make_nudged_runs
from tpcheck.trace.compare.command import compare
from tpcheck.trace.compare.judge import Comparison, Row
from tpcheck.trace.compare.report import write
from tpcheck.trace.compare.text import sentence, what

OUTPUT = ROOT / "results" / "tp_vs_dp"
MODEL = {
    "preset": "qwen3-0.6b", "hidden_size": 64, "num_attention_heads": 8, "num_query_groups": 4, "head_dim": 16,
    "ffn_hidden_size": 192, "vocab_size": 512,
}  # fmt: skip
RUN = {
    "model": MODEL, "strategy": "stock", "layers": "local", "steps": 2, "seq_length": 64,
    "trace": {"steps": [0], "kinds": ["start", "input", "out", "dout", "din", "grad"]},
}  # fmt: skip


def main() -> None:
    OUTPUT.mkdir(parents=True, exist_ok=True)
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        for dtype in ("fp32", "bf16"):
            runs = {tp: Path(scratch, f"{dtype}-tp{tp}") for tp in (1, 4)}
            for tp, output in runs.items():
                if launch(parse_run({**RUN, "dtype": dtype, "tp": tp, "output": str(output)})):
                    raise SystemExit((output / "log.txt").read_text()[-2000:])
            make_nudged_runs(runs[1], seeds=3)
            found[dtype] = compare(runs[1], runs[4])
            write(found[dtype], runs[1], runs[4], OUTPUT / f"{dtype}.html")
            page = (OUTPUT / f"{dtype}.html").read_text(encoding="utf-8")
            (OUTPUT / f"{dtype}.html").write_text(page.replace(f"{scratch}/", ""), encoding="utf-8")
    (OUTPUT / "README.md").write_text(_readme(found), encoding="utf-8")


def _readme(found: dict[str, Comparison]) -> str:
    lines = [
        "# Stock Megatron, TP=1 and TP=4, on the same weights and data",
        "",
        f"28 layers of Qwen3-0.6B's kind at hidden size {MODEL['hidden_size']}, megatron-core's local layers, one step "
        "on CPU. `python -m tests.studies.tp_vs_dp` makes all of it; `fp32.html` and `bf16.html` are the reports of "
        "`tpcheck compare`, with every tensor. bfloat16 is four orders of magnitude coarser, and in both the first sum "
        "that TP cuts, the row-parallel projection of layer 0, is the first to differ; column-parallel layers, whose "
        "sums TP leaves whole, pass on what they are given.",
        "",
    ]
    for dtype, comparison in found.items():
        assert comparison.first_difference is not None
        lines += [
            f"## {dtype}",
            "",
            f"- {sentence(comparison)}",
            f"- first that differs: {what(comparison.first_difference)}",
            f"- in layer 0's forward pass, equal bit for bit: {_modules(comparison, True)}",
            f"- differing: {_modules(comparison, False)}",
            "",
            "Outputs of the layers:",
            "",
            *_table(comparison, "out"),
            "",
            "Gradients of these outputs:",
            "",
            *_table(comparison, "dout"),
            "",
        ]
    return "\n".join(lines)


def _modules(comparison: Comparison, identical: bool) -> str:
    names = [
        row.key.name.removeprefix("decoder.layers.0.")
        for row in comparison.rows
        if row.layer == 0 and row.key.kind == "out" and (row.verdict == "identical") == identical
    ]
    return ", ".join(f"`{name}`" for name in names) or "none"


def _table(comparison: Comparison, kind: str) -> list[str]:
    rows = [row for row in comparison.rows if row.key.kind == kind and row.key.name == f"decoder.layers.{row.layer}"]
    head = [
        "layer",
        "max abs",
        "mean abs",
        "median abs",
        "> 1e-4",
        "> 1e-3",
        "> 5e-3",
        "> 1e-2",
        "relative",
        "rounding",
    ]
    chosen = [row for row in sorted(rows, key=_layer) if _layer(row) in (0, 1, 3, 7, 11, 15, 19, 23, 27)]
    body = [[str(row.layer), *_cells(row)] for row in chosen]
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---:"] * len(head), *body)]


def _layer(row: Row) -> int:
    return row.layer or 0


def _cells(row: Row) -> list[str]:
    n = row.numbers
    estimate = f"{row.estimate.overall:.2e}" if row.estimate else "–"
    shares = [f"{share:.2%}" for share in n.over]
    return [
        *(f"{value:.2e}" for value in (n.max_abs, n.mean_abs, n.median_abs)),
        *shares,
        f"{n.relative:.2e}",
        estimate,
    ]


if __name__ == "__main__":
    main()
