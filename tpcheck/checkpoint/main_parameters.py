"""Are an optimizer's float32 weights those of the model? Rounded to the model's dtype, they must be.

Megatron's `fully_reshardable` format gathers the distributed optimizer's buffers without the padding at the end of
each DDP bucket, but cuts parameters out of them at offsets that count it (megatron-core 0.15 to 0.19, at least):

    offsets    bucket 0 │pad│ bucket 1      │pad│ bucket 2
    gathered   bucket 0 │ bucket 1      │ bucket 2
                        └───┘ in no parameter: lost

So every later parameter comes out shifted, and nothing in the checkpoint tells the layout. Bucket 0 alone, or buckets
without padding, are saved right. A shift shows in the weights, and moments are shifted along with them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import numpy as np

from tpcheck.checkpoint.reader import LogicalTensor
from tpcheck.checkpoint.ulp import Array, side_by_side
from tpcheck.checkpoint.unpickle import ITEMSIZE

__all__ = ["count_unlike", "weight_of"]

MAIN_WEIGHT = re.compile(r"(?:chained_\d+\.)?optimizer\.state\.param\.(.+)")
ROUNDABLE = ("bfloat16", "float16", "float32")


def weight_of(tensor: LogicalTensor, tensors: Mapping[str, LogicalTensor]) -> LogicalTensor | None:
    """The model's tensor that `tensor` must round to; None where that is no main weight, or has no such tensor."""
    match = MAIN_WEIGHT.fullmatch(tensor.name)
    weight = tensors.get(match[1]) if match and tensor.dtype == "float32" else None
    return weight if weight and weight.dtype in ROUNDABLE and weight.shape == tensor.shape else None


def count_unlike(main_weights: Iterator[memoryview], weights: Iterator[memoryview], dtype: str) -> int:
    """How many float32 main weights do not round to the model's weights, which are of `dtype`.

    Both streams are of equally many elements, and are read to their ends. A NaN is any other's like.
    """
    size = ITEMSIZE[dtype]
    total = 0
    for x, y in side_by_side(main_weights, weights, (4, size)):
        main_bits, bits = np.frombuffer(x, "<u4"), np.frombuffer(y, f"<u{size}")
        unlike = _unlike(main_bits, bits, dtype)
        if unlike.any():
            main, weight = main_bits[unlike].view("<f4"), _float32(bits[unlike], dtype)
            total += int((~(np.isnan(main) & np.isnan(weight))).sum())
    return total


def _unlike(main_bits: Array, bits: Array, dtype: str) -> Array:
    if dtype == "float32":
        return main_bits != bits
    if dtype == "float16":
        with np.errstate(over="ignore", under="ignore"):
            return main_bits.view("<f4").astype("<f2").view("<u2") != bits
    # As integers, a float32 and the bfloat16 that it rounds to, widened, are at most half a bfloat16's step apart.
    # A tie may go either way: not everybody rounds it to even.
    widened = bits.astype("<u4")
    widened <<= np.uint32(16)
    widened -= np.uint32(0x8000)
    np.subtract(main_bits, widened, out=widened)
    return widened > np.uint32(0x10000)


def _float32(bits: Array, dtype: str) -> Array:
    if dtype == "bfloat16":
        return (bits.astype("<u4") << np.uint32(16)).view("<f4")
    return bits.view("<f2" if dtype == "float16" else "<f4").astype("<f4")
