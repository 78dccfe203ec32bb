"""The figures of the analysis that this study repeats: "TP vs DP Numerical Equivalence Analysis", a public note.

It had 28 layers of hidden size 1024 with 16 heads, two sequences of 4096 tokens, TP=4 against TP=1, on H100s.
Rows of tables are (largest, mean, median) or (largest, mean) absolute difference.
"""

from __future__ import annotations

__all__ = ["ATOL", "LAYERS", "RATIO_OF_MAXIMA", "RATIO_OF_MEANS", "ROW", "SETTING", "STACK"]

SETTING = "28 layers, two sequences of 4096 tokens, H100"

ROW = {"max_abs": 0.03125, "mean_abs": 0.00195487, "median_abs": 0.00006104, "over": [0.5, 0.416, 0.081, 0.013]}

STACK: dict[int, tuple[float, float, float]] = {
    0: (0.03125, 0.00194148, 0.00007629),
    1: (0.03125, 0.00382236, 0.00390625),
    2: (0.039062, 0.00497189, 0.00390625),
    3: (0.046875, 0.00585712, 0.00488281),
    4: (0.046875, 0.00659324, 0.00585938),
    5: (0.0625, 0.00719865, 0.0078125),
    9: (0.0625, 0.00895941, 0.0078125),
    13: (0.072266, 0.010106, 0.0078125),
    15: (0.078125, 0.01049999, 0.0078125),
}  # max, mean, median

LAYERS: dict[str, dict[int, tuple[float, float]]] = {
    "bf16": {
        0: (0.03125, 0.00014072), 1: (0.03125, 0.00031284), 2: (0.03125, 0.00049002), 3: (0.03125, 0.00066876),
        4: (0.0625, 0.00084779), 9: (0.0625, 0.00173278), 13: (0.078125, 0.0024173), 19: (0.09375, 0.00340257),
        27: (0.109375, 0.00463839),
    },
    "fp32": {
        0: (0.000044, 0.00000046), 1: (0.000068, 0.00000383), 4: (0.000143, 0.00001659), 9: (0.000262, 0.00003254),
        13: (0.000328, 0.00004308), 19: (0.000369, 0.00005704), 27: (0.000547, 0.00007358),
    },
}  # fmt: skip

RATIO_OF_MAXIMA, RATIO_OF_MEANS = 200, 66  # bf16 to fp32 after 28 layers
ATOL = 0.15  # of the note's bfloat16 test
