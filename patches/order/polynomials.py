"""exp2, exp and log as polynomials of our own: the same coefficients on every device, no library's or unit's function.

    2^x = 2^n · (1 + E1·f + … + E6·f⁶)             n = x to the nearest integer, f = x - n; 2^0 is 1, exactly
    e^x = 2^n · (the same, at r·log2 e)            n = x·log2 e likewise, r = x - n·ln 2, with ln 2 in two parts
    log x = n·ln 2 + f - f²·(1/2 - f/3 + …)        x = 2^n·(1 + f), 1 + f from √½ to √2

Coefficients are minimax, rounded to float32 one after the other and refitted: off by 2^-28 relatively. In float32 the
functions err by at most `ULPS` units of 2^-24 relatively, where neither operand nor result is subnormal; of exp2 that
is beside the rounding of its operand. Results below 2^-126 may be 0.
"""

from __future__ import annotations

__all__ = [
    "EXP2",
    "LN2_HIGH",
    "LN2_LOW",
    "LOG",
    "LOG2_E",
    "SHIFT",
    "SMALLEST",
    "SMALLEST_OF_E",
    "SQRT_HALF_BITS",
    "ULPS",
]

EXP2 = (
    0.6931471824645996, 0.24022647738456726, 0.05550359934568405, 0.009618505835533142, 0.0013390806270763278,
    0.0001532646274426952,
)  # fmt: skip
# of f², f³, …
LOG = (
    -0.49999988079071045, 0.33333322405815125, -0.2500160336494446, 0.20002205669879913, -0.16608870029449463,
    0.14177437126636505, -0.13240015506744385, 0.12929803133010864, -0.07659546285867691,
)  # fmt: skip
LOG2_E = 1.4426950216293335  # float32
LN2_HIGH = 0.693359375  # of 11 bits: its products with whole numbers below 2^13 are exact
LN2_LOW = -0.00021219444170128554
SHIFT = 12582912.0  # 1.5·2^23: added, it rounds to an integer, which then is in the low bits
SMALLEST = -127.0  # exponents of 2 from there down make 0
SMALLEST_OF_E = -88.0  # exponents of e likewise
SQRT_HALF_BITS = 0x3F3504F3
ULPS = 2
