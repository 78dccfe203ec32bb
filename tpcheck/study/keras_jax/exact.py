"""Exact products in JAX: `patches/order/exact/slices.py` in its terms, bit for bit.

Operands are cut into slices of few enough bits that float64 products of two slices are exact sums of integers, which
no kernel, shape, thread count or device count of XLA can change. Three slices hold all bits of numbers within 2^40 of
the largest of their row; what is smaller is cut off, which depends on that row alone, too. Needs `jax_enable_x64`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array, lax

__all__ = ["exact_product", "rounded", "sum_of_pairs"]

FLOAT64_BITS = 53
SLICES = 3


def exact_product(a_MK: Array, b_KN: Array) -> Array:
    """a·b in float32 [..., M, N] of float32 or bfloat16 operands, a function of a row and a column alone.

    Raises:
        RuntimeError: JAX computes in 32 bits.
    """
    if not jax.config.jax_enable_x64:
        raise RuntimeError("exact products need float64: set jax_enable_x64")
    m, n, bits = a_MK.shape[-2], b_KN.shape[-1], (FLOAT64_BITS - (a_MK.shape[-1] - 1).bit_length()) // 2
    a_SMK, b_KSN = jnp.concatenate(_slices(a_MK, -1, bits), -2), jnp.concatenate(_slices(b_KN, -2, bits), -1)
    all_pairs = jnp.matmul(a_SMK, b_KSN, precision=lax.Precision.HIGHEST)
    total = jnp.zeros((*a_MK.shape[:-1], n), jnp.float64)
    for i, j in sorted(((i, j) for i in range(SLICES) for j in range(SLICES)), key=lambda ij: (sum(ij), ij)):
        total = total + all_pairs[..., i * m : (i + 1) * m, j * n : (j + 1) * n]  # largest first
    return rounded(total, jnp.dtype(jnp.float32))


def rounded(x: Array, dtype: jnp.dtype) -> Array:
    """`x` rounded once to float32 or bfloat16: XLA may leave out a conversion that is undone, but not this."""
    bits = jnp.finfo(dtype)
    return lax.reduce_precision(x, bits.nexp, bits.nmant).astype(dtype) + jnp.zeros((), dtype)


def sum_of_pairs(parts_LMN: Array) -> Array:
    """Sum along axis 0, whose size is a power of two: by adjacent pairs, then pairs of pairs."""
    while len(parts_LMN) > 1:
        parts_LMN = parts_LMN[0::2] + parts_LMN[1::2]
    return parts_LMN[0]


def _slices(x: Array, axis: int, bits: int) -> list[Array]:
    """Multiples of 2^(e - bits), 2^e the power of two above the largest that is left along `axis`; largest first."""
    left, slices = x.astype(jnp.float64), []
    for _ in range(SLICES):
        _, e = jnp.frexp(jnp.abs(left).max(axis, keepdims=True))
        unit = jnp.ldexp(jnp.float64(1), e - bits)
        slices.append(jnp.round(left / unit) * unit)
        left = left - slices[-1]
    return slices
