"""Are the detection limits that `tpcheck compare` prints true? Errors of twice the limit, and none, on tiny models.

    python -m studies.detection_limits      from tests/; writes results/silent_bugs/limits.md

A computes each linear layer as one product, B as the sum of two, as tensor parallelism would. Into B goes an error of
twice what `Limits` says of the tensor, in one parameter's gradient or one layer's output: 20 seeds each; and none, 200
times.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.support import traces
from tpcheck.trace.compare.command import compare
from tpcheck.trace.compare.comparison import Comparison
from tpcheck.trace.compare.excess import limit

RESULT = Path(__file__).parents[2] / "results" / "silent_bugs" / "limits.md"
SEEDS, CLEAN = 20, 200
WIDTH, HIDDEN, SAMPLES = 32, 64, 24
TIMES = 2.0


class Split(nn.Linear):
    """A linear layer whose sum over input features may be two, added in the layer's dtype."""

    halves = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.halves:
            return super().forward(x)
        middle = self.in_features // 2
        first = nn.functional.linear(x[..., :middle], self.weight[:, :middle], self.bias)
        return first + nn.functional.linear(x[..., middle:], self.weight[:, middle:])


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"norm": nn.LayerNorm(WIDTH), "up": Split(WIDTH, HIDDEN), "down": Split(HIDDEN, WIDTH)})
            for _ in range(3)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer["down"](torch.nn.functional.silu(layer["up"](layer["norm"](x))))
        return x


def record(
    path: Path,
    seed: int,
    dtype: torch.dtype,
    halves: bool,
    spoil: Callable[[Model], None] | None = None,
    **options: Any,
) -> Path:
    """A trace of two steps; `spoil(model)` puts an error into it."""
    torch.manual_seed(seed)
    model = Model().to(dtype)
    x, target = (torch.randn(SAMPLES, WIDTH).to(dtype) for _ in range(2))
    for module in model.modules():
        if isinstance(module, Split):
            module.halves = halves
    if spoil:
        spoil(model)
    return traces.recorded(path, model, lambda: ((model(x) - target).float() ** 2).mean(), **options)


@contextlib.contextmanager
def reference(seed: int, dtype: torch.dtype) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="limits-", dir="/dev/shm") as folder:
        a = record(Path(folder, "a"), seed, dtype, halves=False)
        for nudged in (1, 2, 3):
            record(a / f"noise-{nudged}", seed, dtype, halves=False, perturb=nudged)
        yield a


def limits_of(found: Comparison, kind: str, name: str) -> tuple[float, float]:
    row = next(row for row in found.rows if (row.key.kind, row.key.name) == (kind, name))
    assert row.estimate is not None
    return limit(row.estimate, row.numbers.size, found.seeds)


def scaled_gradient(by: float) -> Callable[[Model], None]:
    return lambda model: model.layers[1]["up"].weight.register_hook(lambda g: (g.float() * (1 + by)).to(g.dtype))  # type: ignore[index, func-returns-value]


def noisy_gradient(by: float) -> Callable[[Model], None]:
    def noisy(g: torch.Tensor) -> torch.Tensor:
        noise = torch.randn(g.shape, generator=torch.Generator().manual_seed(7))
        return (g.float() + by * noise * g.float().square().mean().sqrt()).to(g.dtype)

    return lambda model: model.layers[1]["up"].weight.register_hook(noisy)  # type: ignore[index, func-returns-value]


def scaled_output(by: float) -> Callable[[Model], None]:
    return lambda model: model.layers[1]["up"].register_forward_hook(  # type: ignore[index, func-returns-value]
        lambda module, args, output: (output.float() * (1 + by)).to(output.dtype), prepend=True
    )


ERRORS: tuple[tuple[str, str, str, int, Callable[[float], Callable[[Model], None]]], ...] = (
    ("a factor, one gradient", "grad", "layers.1.up.weight", 1, scaled_gradient),
    ("noise, one gradient", "grad", "layers.1.up.weight", 0, noisy_gradient),
    ("a factor, one layer's output", "out", "layers.1.up", 1, scaled_output),
)


def main() -> int:
    lines = ["| error | dtype | twice the limit, median | found and named | seeds |", "|---|---|---|---|---|"]
    for dtype in (torch.bfloat16, torch.float32):
        word = str(dtype).removeprefix("torch.")
        tried = {name: [0, 0] for name, *_ in ERRORS}
        sizes: dict[str, list[float]] = {name: [] for name, *_ in ERRORS}
        for seed in range(SEEDS):
            with reference(seed, dtype) as a:
                clean = compare(a, record(a.parent / "clean", seed, dtype, halves=True))
                for number, (name, kind, where, which, spoil) in enumerate(ERRORS):
                    by = TIMES * limits_of(clean, kind, where)[which]
                    found = compare(a, record(a.parent / f"b{number}", seed, dtype, True, spoil(by)))
                    first = found.first
                    tried[name][0] += first is not None and (first.key.kind, first.key.name) == (kind, where)
                    tried[name][1] += 1
                    sizes[name].append(by)
        for name, (right, of) in tried.items():
            lines.append(f"| {name} | {word} | {sorted(sizes[name])[len(sizes[name]) // 2]:.1e} | {right} | {of} |")
    accused = 0
    nearest = []
    for seed in range(CLEAN):
        dtype = (torch.bfloat16, torch.float32)[seed % 2]
        with reference(1000 + seed, dtype) as a:
            found = compare(a, record(a.parent / "clean", 1000 + seed, dtype, halves=True))
            accused += found.first is not None
            nearest.append(max((row.excess for row in found.rows if row.verdict == "rounding"), default=0.0))
            if found.first is not None:
                print("accused", seed, found.first.key, found.first.why, found.first.excess, flush=True)
    half = sorted(nearest)[CLEAN // 2]
    lines += ["", f"Clean runs accused: {accused} of {CLEAN}. Their tensors nearest to the limit are at most at "
              f"{max(nearest):.0%} of it, in half of the runs below {half:.0%}."]  # fmt: skip
    text = (__doc__ or "").split("\n")[0] + "\n\nWritten by `tests/studies/detection_limits.py`.\n\n" + "\n".join(lines)
    print(text)
    RESULT.write_text(text + "\n", encoding="utf-8")
    return int(accused > 0)


if __name__ == "__main__":
    sys.exit(main())
