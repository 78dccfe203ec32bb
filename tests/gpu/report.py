"""What `bench.py` measured, as JSON and as tables; written again after every row, so that a kill loses nothing."""

from __future__ import annotations

import json
import platform
import statistics
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tpcheck.cost.measured import FORMAT
from tpcheck.run import provenance

Cell = Callable[[dict[str, Any]], str]

LAYERS: dict[str, Cell] = {
    "TP": lambda r: str(r["tp"]),
    "layer of Qwen3-8B, one rank's share": lambda r: r["who"],
    "tokens": lambda r: str(r["tokens"]),
    "forward, ms": lambda r: f"{r['forward_ms']:.2f}",
    "forward and backward, ms": lambda r: f"{r['ms']:.2f}",
    "time / stock": lambda r: f"{r['over_stock']:.2f}" if "over_stock" in r else "",
    "memory, GiB": lambda r: f"{r['gib']:.2f}",
}
ATTENTION: dict[str, Cell] = {
    "TP": lambda r: str(r["tp"]),
    "tokens": lambda r: str(r["tokens"]),
    "heads": lambda r: f"{r['heads']}, {r['groups']} of keys",
    "attention": lambda r: r["who"],
    "forward, ms": lambda r: f"{r['forward_ms']:.3f}" if "forward_ms" in r else r["failed"],
    "backward, ms": lambda r: f"{r['backward_ms']:.3f}" if "backward_ms" in r else "",
    "TFLOP/s": lambda r: f"{r['forward_tflops']:.0f}, {r['backward_tflops']:.0f}" if "forward_tflops" in r else "",
    "speed / first row": lambda r: (
        f"{r['forward_over_first']:.2f}, {r['backward_over_first']:.2f}" if "forward_over_first" in r else ""
    ),
    "memory, GiB": lambda r: f"{r['gib']:.3f}" if "gib" in r else "",
    "error": lambda r: f"{r['error']:.1e}" if "error" in r else "",
}
OF_A_PRODUCT: dict[str, Cell] = {
    "layer": lambda r: r["layer"],
    "": lambda r: r["kind"],
    "TP": lambda r: str(r["tp"]),
    "M x K x N": lambda r: f"{r['m']} x {r['k']} x {r['n']}",
    "leaves": lambda r: str(r["leaves"]),
    "TFLOP/s": lambda r: f"{r['tflops']:.0f}",
    "speed / cuBLAS": lambda r: f"{r['over_mm']:.2f}",
}
PRODUCTS: dict[str, Cell] = OF_A_PRODUCT | {
    "speed / one leaf": lambda r: f"{r['over_one_leaf']:.2f}" if "over_one_leaf" in r else "",
    "cuBLAS's bits": lambda r: {True: "the same", False: "others", None: ""}[r.get("same_bits")],
    "error": lambda r: f"{r['error']:.1e}",
    "cuBLAS's error": lambda r: f"{r['mm_error']:.1e}",
}
TREES: dict[str, Cell] = OF_A_PRODUCT | {
    "speed / Triton kernel": lambda r: f"{r['over_ours']:.2f}",
    "same bits": lambda r: str(r["same_bits"]),
}
TILES: dict[str, Cell] = {
    "layer": lambda r: r["layer"],
    "": lambda r: r["kind"],
    "TP": lambda r: str(r["tp"]),
    "tile": lambda r: ", ".join(f"{k}={v}" for k, v in r["change"].items()) or "the contract's",
    "TFLOP/s": lambda r: f"{r['tflops']:.0f}" if "tflops" in r else r["failed"],
    "speed / cuBLAS": lambda r: f"{r['over_mm']:.2f}" if "over_mm" in r else "",
    "same bits": lambda r: str(r.get("same_bits", "")),
}
SUMS: dict[str, Cell] = {
    "sum": lambda r: r["sum"],
    "shape": lambda r: r["shape"],
    "GB/s": lambda r: f"{r['gbs']:.0f}",
    "speed / copy": lambda r: f"{r['over_copy']:.2f}",
    "speed / torch's": lambda r: f"{r['over_stock']:.2f}",
}
TABLES = {"layers": LAYERS, "attention": ATTENTION, "products": PRODUCTS, "trees": TREES, "tiles": TILES, "sums": SUMS}


def versions(device: str) -> dict[str, str]:
    """Everything that speed and bits depend on."""
    found = provenance.versions()
    found["torch"] = torch.__version__
    if device == "cuda":
        found |= {"cuda": torch.version.cuda or "", "device": torch.cuda.get_device_name()}
        found["capability"] = ".".join(map(str, torch.cuda.get_device_capability()))
    else:
        found["device"] = platform.machine()
    return found


@dataclass
class Report:
    """Rows by section, what failed, and what time ran out for; with what other sections left in the folder before."""

    folder: Path
    device: str
    sections: Collection[str]
    contract: dict[str, Any] = field(default_factory=dict)
    rows: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: {name: [] for name in TABLES})
    failed: dict[str, list[str]] = field(default_factory=dict)
    skipped: dict[str, list[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        try:
            before = json.loads((self.folder / "bench.json").read_text())
        except (FileNotFoundError, ValueError):
            return
        if before.get("format") != FORMAT or before.get("versions") != versions(self.device):
            return
        for section in TABLES.keys() - set(self.sections):
            self.rows[section] = before.get(section, [])
            for mine, theirs in ((self.failed, before["failed"]), (self.skipped, before["skipped"])):
                mine |= {section: theirs[section]} if section in theirs else {}

    def add(self, section: str, row: dict[str, Any]) -> None:
        self.rows[section].append(row)
        self.write()

    def write(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        answer = {"format": FORMAT, "versions": versions(self.device), "contract": self.contract, **self.rows}
        answer |= {"summary": self.summary(), "failed": self.failed, "skipped": self.skipped}
        for name, text in (("bench.json", json.dumps(answer, indent=1, default=str)), ("bench.md", self.text())):
            written = self.folder / f".{name}"
            written.write_text(text + "\n")
            written.replace(self.folder / name)  # whole, whenever this process is killed

    def summary(self) -> dict[str, float]:
        """Ratios over all products: the median, the worst, and the worst of large ones."""
        found: dict[str, float] = {}
        if ours := [row["over_stock"] for row in self.rows["layers"] if row["who"].startswith("ours")]:
            found["time of a layer / stock, least"], found["time of a layer / stock, most"] = min(ours), max(ours)
        for way in ("forward", "backward"):
            rows = [row for row in self.rows["attention"] if row["who"].startswith("ours")]
            if rows:
                found[f"speed / flash attention, {way}, least"] = min(row[f"{way}_over_first"] for row in rows)
        for name, key in (("cuBLAS", "over_mm"), ("one leaf", "over_one_leaf")):
            rows = [row for row in self.rows["products"] if key in row]
            large = [row for row in rows if min(row["m"], row["k"], row["n"]) >= 2048]
            if rows:
                found[f"speed / {name}, median"] = statistics.median(row[key] for row in rows)
                found[f"speed / {name}, least"] = min(row[key] for row in rows)
            if large:
                found[f"speed / {name}, least where M, K, N >= 2048"] = min(row[key] for row in large)
        return found

    def text(self) -> str:
        parts = [
            f"# {versions(self.device)['device']}",
            "",
            ", ".join(f"{k} {v}" for k, v in versions(self.device).items()),
        ]
        parts += ["", *(f"- {name}: {value:.2f}" for name, value in self.summary().items())]
        for section, columns in TABLES.items():
            if self.rows[section]:
                parts += ["", f"## {section}", "", *_table(columns, self.rows[section])]
        for title, by_section in (("failed", self.failed), ("not reached in time", self.skipped)):
            if names := [f"- {section}: {name}" for section, names in by_section.items() for name in names]:
                parts += ["", f"## {title}", "", *names]
        return "\n".join(parts)


def _table(columns: dict[str, Cell], rows: list[dict[str, Any]]) -> list[str]:
    lines = [list(columns), *([cell(row) for cell in columns.values()] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    written = ["| " + " | ".join(text.ljust(w) for text, w in zip(line, widths, strict=True)) + " |" for line in lines]
    return [written[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *written[1:]]
