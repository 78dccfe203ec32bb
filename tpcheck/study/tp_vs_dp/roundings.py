"""How far bfloat16 roundings take a row-parallel sum at one TP size from another's, derived, so as to be a tolerance.

    TP=1     y = round(Σ over all features)                    accumulated in float32, rounded once
    TP=t     p_r = round(Σ over rank r's features)             t partial sums, each of variance 1/t
             y = all-reduce of p_0 … p_{t-1}                   in bfloat16: rounded after every addition, or at the end

Each rounding is an error of its own, uniform within half a unit in the last place of what is rounded. Of a normal
number of variance v its mean square is v·c², c the same for every v that is a power of 4 and nearly for the others, so
they add up; what float32 adds to it is a millionth of that.
"""

from __future__ import annotations

import math

__all__ = ["bfloat16_sum", "rounding_error"]

DIGITS = 8  # of bfloat16's significand, the hidden one among them
BINADES = 40


def rounding_error(variance: float) -> float:
    """Mean square error of rounding a normal number of this variance to bfloat16: E[ulp²] / 12."""
    deviation = math.sqrt(variance)
    total = 0.0
    for exponent in range(-BINADES, 8):
        share = math.erf(2 ** (exponent + 1) / deviation / math.sqrt(2)) - math.erf(
            2**exponent / deviation / math.sqrt(2)
        )
        total += share * (2.0 ** (exponent - DIGITS + 1)) ** 2 / 12
    return total


def bfloat16_sum(tp: int) -> dict[str, float]:
    """Root mean square of y(TP=tp) - y(TP=1), of a y of variance 1, by what the all-reduce rounds.

    Returns:
        `once`: it adds in float32; `chain`: one part after the other; `pairs`: by halves. Each relative to y's norm.
    """
    whole, parts = rounding_error(1.0), tp * rounding_error(1 / tp)
    chain = sum(rounding_error(count / tp) for count in range(2, tp + 1))
    pairs, count = 0.0, tp
    while count > 1:
        count //= 2
        pairs += count * rounding_error(1 / count)
    sums = {"once": whole, "chain": chain, "pairs": pairs}
    return {how: math.sqrt(whole + parts + added) for how, added in sums.items()}
