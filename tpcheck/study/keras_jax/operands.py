"""What the contract's layers are tried with: the same numbers in every process and library."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["operands"]


def operands(tokens: int, hidden: int, ffn: int) -> dict[str, npt.NDArray[np.float64]]:
    """Gaussian operands in float64, biases among them, the same in every process and library."""
    rng = np.random.default_rng(16)
    shapes = {"w1": (hidden, ffn), "b1": (ffn,), "w2": (ffn, hidden), "b2": (hidden,), "x": (tokens, hidden),
              "dy": (tokens, hidden)}  # fmt: skip
    return {name: rng.normal(size=shape) * (0.05 if name[0] == "w" else 1.0) for name, shape in shapes.items()}
