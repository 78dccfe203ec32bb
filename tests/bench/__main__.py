"""What the patches cost, as ratios of two things timed in one run: `make bench`.

Step times are medians over a run of the tiny Qwen3, all ranks sharing this machine's cores: with more ranks than
cores they measure overhead, not scaling. Products are timed on the shapes of Qwen3-0.6B's layers.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from patches.order.exact.products import exact_product, tree_of_products
from tests.bench import bench_hash
from tpcheck.config.load import load_run, parse_run
from tpcheck.run.launch import launch

STEPS = 12
# tokens, summed features, result features at 512 tokens; dlogits: the output layer's dgrad, over 8192 words
SHAPES = {"qkv": (512, 1024, 4096), "proj": (512, 2048, 1024), "fc1": (512, 1024, 6144), "fc2": (512, 3072, 1024),
          "dlogits": (512, 8192, 1024)}  # fmt: skip


def main() -> None:
    console = Console()
    console.print(_steps())
    console.print(_order_free())
    console.print(_products())
    console.print(_tracing())
    bench_hash.main()


def _steps() -> Table:
    table = Table(title=f"seconds per step, qwen3-tiny bf16, median of {STEPS - 2}")
    for column in ("TP", "stock", "tree", "gather", "tree / stock", "gather / tree"):
        table.add_column(column, justify="right")
    for tp in (1, 2, 4):
        stock, tree, gather = (_step_seconds(strategy, tp) for strategy in ("stock", "tree", "gather"))
        cells = [f"{s:.3f}" for s in (stock, tree, gather)]
        table.add_row(str(tp), *cells, f"{tree / stock:.2f}", f"{gather / tree:.2f}")
    return table


def _order_free() -> Table:
    """What sums over the batch without an order cost, by the sequences that a micro-batch holds."""
    table = Table(title=f"seconds per step of tree at TP=1, median of {STEPS - 2}")
    for column in ("sequences of a micro-batch", "batch in order", "order-free", "ratio"):
        table.add_column(column, justify="right")
    for size in (1, 2, 4):
        ordered, free = (_step_seconds("tree", 1, f"micro_batch_size={size}", f"batch={batch}")
                         for batch in ("null", "order-free"))  # fmt: skip
        table.add_row(str(size), f"{ordered:.3f}", f"{free:.3f}", f"{free / ordered:.2f}")
    return table


def _step_seconds(strategy: str, tp: int, *settings: str) -> float:
    with tempfile.TemporaryDirectory() as folder:
        path, output = Path(folder, "run.yaml"), Path(folder, "run")
        path.write_text("model: qwen3-tiny\n")
        overrides = (f"strategy={strategy}", f"tp={tp}", f"steps={STEPS}", f"output={output}", *settings)
        if launch(load_run(path, overrides)):
            raise SystemExit(f"{strategy} at TP={tp} failed:\n{(output / 'log.txt').read_text()[-2000:]}")
        steps = [json.loads(line) for line in (output / "steps.jsonl").read_text().splitlines()]
    return statistics.median(step["seconds"] for step in steps[2:])


def _tracing() -> Table:
    """What recording every module's outputs costs, and everything; where nothing is recorded, the hooks alone."""
    table = Table(title="tracing qwen3-tiny bf16, stock, each against the same run without")
    for column in ("TP", "recorded", "ms per step", "ratio", "MiB per step"):
        table.add_column(column, justify="right")
    asked: dict[str, dict[str, Any] | None] = {
        "nothing, no hooks": None,
        "nothing": {"steps": [STEPS]},  # one that is not timed
        "outputs": {"steps": list(range(STEPS)), "kinds": ["out"]},
        "outputs, sample=8": {"steps": list(range(STEPS)), "kinds": ["out"], "sample": 8},
        "everything": {"steps": list(range(STEPS))},
    }
    for tp in (1, 2):
        plain = 0.0
        for label, trace in asked.items():
            seconds, size = _traced_seconds(tp, trace)
            plain = plain or seconds
            table.add_row(
                str(tp), label, f"{seconds * 1e3:.0f}", f"{seconds / plain:.2f}", f"{size / STEPS / 2**20:.1f}"
            )
    return table


def _traced_seconds(tp: int, trace: dict[str, Any] | None) -> tuple[float, int]:
    """Median seconds of a step, and bytes on disk."""
    with tempfile.TemporaryDirectory() as folder:
        settings = {"model": "qwen3-tiny", "strategy": "stock", "steps": STEPS + 1, "tp": tp, "output": f"{folder}/run"}
        if launch(parse_run({**settings, "trace": trace})):
            raise SystemExit(Path(folder, "run/log.txt").read_text()[-2000:])
        steps = [json.loads(line) for line in Path(folder, "run/steps.jsonl").read_text().splitlines()]
        size = sum(file.stat().st_size for file in Path(folder, "run").glob("trace/*/*"))
    return statistics.median(step["seconds"] for step in steps[2:STEPS]), size


def _products() -> Table:
    table = Table(title=f"x·Wᵀ at 512 tokens, {torch.get_num_threads()} threads: time over torch.mm's")
    for column in ("layer", "dtype", "torch.mm", "float64 mm", "one leaf", "8 leaves", "one leaf / float64 mm"):
        table.add_column(column, justify="right")
    for name, (tokens, k, n) in SHAPES.items():
        for dtype in (torch.float32, torch.bfloat16):
            x = (_dlogits(tokens, k) if name == "dlogits" else torch.randn(tokens, k)).to(dtype)
            w = torch.randn(n, k).to(dtype)
            mm = _seconds(lambda x=x, w=w: torch.mm(x, w.t()))
            wide = _seconds(lambda x=x, w=w: torch.mm(x.double(), w.double().t()))
            leaf = _seconds(lambda x=x, w=w: exact_product(x, w.t()))
            tree = _seconds(lambda x=x, w=w: tree_of_products(x, w.t(), 8))
            ratios = (f"{t / mm:.1f}" for t in (wide, leaf, tree))
            table.add_row(name, str(dtype)[6:], f"{mm * 1e3:.1f} ms", *ratios, f"{leaf / wide:.1f}")
    return table


def _dlogits(tokens: int, vocabulary: int) -> torch.Tensor:
    """softmax - one-hot of a confident model: values from 1 down to 2^-60, the widest rows that training has."""
    softmax = torch.softmax(torch.randn(tokens, vocabulary) * 8, -1)
    return softmax - torch.nn.functional.one_hot(softmax.argmax(-1), vocabulary)


def _seconds(call: Callable[[], object], repeat: int = 5) -> float:
    call()
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


if __name__ == "__main__":
    main()
