"""Pads the vocabulary to a multiple of the tensor-parallel size."""

from __future__ import annotations

import math
from typing import Any


def _vocab_size_with_padding(orig_vocab_size: int, args: Any, logging_enabled: bool = True) -> int:
    multiple = args.make_vocab_size_divisible_by * args.tensor_model_parallel_size
    return math.ceil(orig_vocab_size / multiple) * multiple
