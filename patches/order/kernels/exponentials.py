"""`order.polynomials` in Triton, with multiplications and additions fused where they are written so."""

from __future__ import annotations

import triton
import triton.language as tl

from patches.order import polynomials

__all__ = ["exp", "exp2", "log"]

E1, E2, E3, E4, E5, E6 = (tl.constexpr(c) for c in polynomials.EXP2)
L2, L3, L4, L5, L6, L7, L8, L9, L10 = (tl.constexpr(c) for c in polynomials.LOG)
LOG2_E = tl.constexpr(polynomials.LOG2_E)
LN2_HIGH = tl.constexpr(polynomials.LN2_HIGH)
LN2_LOW = tl.constexpr(polynomials.LN2_LOW)
SHIFT = tl.constexpr(polynomials.SHIFT)
SMALLEST = tl.constexpr(polynomials.SMALLEST)
SMALLEST_OF_E = tl.constexpr(polynomials.SMALLEST_OF_E)
SQRT_HALF_BITS = tl.constexpr(polynomials.SQRT_HALF_BITS)


@triton.jit
def exp2(x):
    """2^x of float32 up to 127; NaN of NaN and +∞."""
    x = tl.where(x < SMALLEST, SMALLEST, x)  # a maximum would lose NaN
    shifted = x + SHIFT
    return _scaled(_power(x - (shifted - SHIFT)), shifted)


@triton.jit
def exp(x):
    """e^x of float32 up to 88; NaN of NaN and +∞."""
    x = tl.where(x < SMALLEST_OF_E, SMALLEST_OF_E, x)
    shifted = x * LOG2_E + SHIFT
    n = shifted - SHIFT
    rest = (x - n * LN2_HIGH) - n * LN2_LOW
    return _scaled(_power(rest * LOG2_E), shifted)


@triton.jit
def log(x):
    """log x of normal positive float32; +∞ and NaN come through."""
    bits = x.to(tl.int32, bitcast=True)
    n = (bits - SQRT_HALF_BITS) >> 23
    f = (bits - (n << 23)).to(tl.float32, bitcast=True) - 1.0
    p = tl.fma(f, L10, L9)
    p = tl.fma(p, f, L8)
    p = tl.fma(p, f, L7)
    p = tl.fma(p, f, L6)
    p = tl.fma(p, f, L5)
    p = tl.fma(p, f, L4)
    p = tl.fma(p, f, L3)
    p = tl.fma(p, f, L2)
    wide = n.to(tl.float32)
    y = wide * LN2_HIGH + (f + (p * f * f + wide * LN2_LOW))
    return tl.where(x < float("inf"), y, x)


@triton.jit
def _power(f):
    """2^f for |f| ≤ 1/2."""
    p = tl.fma(f, E6, E5)
    p = tl.fma(p, f, E4)
    p = tl.fma(p, f, E3)
    p = tl.fma(p, f, E2)
    p = tl.fma(p, f, E1)
    return tl.fma(p, f, 1.0)


@triton.jit
def _scaled(p, shifted):
    """p·2^n, where n lies in the low bits of `shifted`."""
    return p * ((shifted.to(tl.int32, bitcast=True) << 23) + 0x3F800000).to(tl.float32, bitcast=True)
