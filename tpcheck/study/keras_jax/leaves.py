"""Does XLA's product of a leaf depend on the shape around it? Asked of the product itself.

The same rows and columns are multiplied whole, and in pieces as 2, 4 and 8 devices would; every element should have
the same bits. XLA chooses a kernel, its blocks and its threads by M, N and K, so it may not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tpcheck.study.keras_jax.exact import exact_product

__all__ = ["differing"]

PIECES = (2, 4, 8)


def differing(shapes: list[list[int]]) -> list[dict[str, Any]]:
    """Per product, dtype, shape [M, K, N] and cut: how many elements differ from the whole product's, in per cent."""
    jax.config.update("jax_enable_x64", True)
    rows = []
    for m, k, n in shapes:
        rng = np.random.default_rng(m + k + n)
        a, b = rng.normal(size=(m, k)), rng.normal(size=(k, n))
        for name, dtype in (("fp32", jnp.float32), ("bf16", jnp.bfloat16)):
            x, w = (jnp.asarray(v.astype(np.float32)).astype(dtype) for v in (a, b))
            for product, function in (("XLA's dot", jnp.matmul), ("exact", exact_product)):
                cuts = {f"{cut} in {p}": _share(jax.jit(function), x, w, cut, p) for cut in "NM" for p in PIECES}
                rows.append({"product": product, "dtype": name, "shape": [m, k, n], "percent": cuts})
    return rows


def _share(product: Callable[..., Any], x: Any, w: Any, cut: str, pieces: int) -> float:
    whole = np.asarray(product(x, w))
    if cut == "N":
        parts = np.concatenate([np.asarray(product(x, part)) for part in jnp.split(w, pieces, 1)], 1)
    else:
        parts = np.concatenate([np.asarray(product(part, w)) for part in jnp.split(x, pieces, 0)], 0)
    return float((whole != parts).mean() * 100)
