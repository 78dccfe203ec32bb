"""To which class of bits a device belongs: does it give the bits of the tensor core on paper (`tensor_core.K16_25`)?

`GOLDEN` holds digests of the model's results. Operands are made of integer arithmetic alone, so they are the same
everywhere; their exponents are so far apart that 24 or 26 fraction bits, groups of 8 or 32, rounding to nearest and
leaves cut elsewhere all give other bits. A device that gives all of them is of class `k16-25`, whatever its
architecture; one that does not is of a class of its own, named by its architecture.

What no model describes (float32 products, functions of ATen's and Triton's that only approximate) is not compared
with anything but recorded: `fingerprint` is one digest of it all, equal on devices that compute it alike.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from patches.order.kernels.gemm import product
from patches.order.kernels.pairs import INTERPRETED
from patches.order.kernels.plans import family
from patches.order.kernels.softmaxes import softmax
from patches.order.kernels.tensor_core import K16_25

__all__ = ["GOLDEN", "class_of", "digests", "fingerprint"]

# dtype, K, leaves, pieces: one accumulator, the tree, leaves that no tile divides (loaded by pointers), a gated layer.
CASES = (
    (torch.bfloat16, 512, 1, 1),
    (torch.bfloat16, 2048, 8, 1),
    (torch.bfloat16, 1000, 8, 1),
    (torch.bfloat16, 1024, 2, 2),
    (torch.float16, 512, 1, 1),
    (torch.float16, 1000, 4, 1),
)
M, N = 48, 40
EXPONENTS = 24  # of operands, below 2^4

GOLDEN = {
    "bfloat16 K=512 leaves=1 pieces=1": "5594fba874f1b1cf4cf3f80bcbd9fcbe34f85bdcdacd56928c5fa189202b8614",
    "bfloat16 K=2048 leaves=8 pieces=1": "7e86a5a44d670e9dbbc472e3c2247ca124c04455b5e022253ae321fc96de9ba7",
    "bfloat16 K=1000 leaves=8 pieces=1": "5a881f915d77b08c515d508a4d9955ceddea192f3ab1ca2a58d299510ddf79bd",
    "bfloat16 K=1024 leaves=2 pieces=2": "9f3ab40c507f24bbaf5947e926eb25c8a4180fa21d6fead30639f33fb670c227",
    "float16 K=512 leaves=1 pieces=1": "7196cf179c153b1c8bef8b22796b876695752bc6938635392d63f9d6910f68cc",
    "float16 K=1000 leaves=4 pieces=1": "12123e2a80445146895739657e303a091180c36059604739b147982c25a0b171",
}

Product = Callable[[Tensor, Tensor, int, int], Tensor]


@lru_cache
def class_of(device: torch.device) -> str:
    """`k16-25` where `device` gives the golden bits, else its architecture, as in sm_90; interpreted, neither."""
    if INTERPRETED:
        return "interpreter"
    return K16_25.name if digests(product, device) == GOLDEN else f"sm_{family(device)}"


def digests(of: Product, device: torch.device) -> dict[str, str]:
    """SHA-256 of the float32 results of every case, by its name."""
    found = {}
    for seed, (dtype, k, leaves, pieces) in enumerate(CASES):
        a_MK, b_KN = operands(dtype, k, seed)
        result = of(a_MK.to(device), b_KN.to(device), leaves, pieces)
        found[f"{str(dtype)[6:]} K={k} leaves={leaves} pieces={pieces}"] = _digest([result])
    return found


def operands(dtype: torch.dtype, k: int, seed: int) -> tuple[Tensor, Tensor]:
    """[M, K] and [K, N] with every fraction bit in use, exponents from -20 to 3."""
    return _numbers(dtype, (M, k), 2 * seed), _numbers(dtype, (k, N), 2 * seed + 1)


def _numbers(dtype: torch.dtype, shape: tuple[int, int], seed: int) -> Tensor:
    """Numbers whose sign, exponent and fraction are bits of a multiplicative congruential sequence."""
    fraction_bits = {torch.bfloat16: 7, torch.float16: 10}[dtype]
    x, states = 2 * seed + 1, []
    for _ in range(shape[0] * shape[1]):
        x = x * 0x5851F42D4C957F2D % (1 << 64)
        states.append(x >> 40)
    bits = torch.tensor(states).view(shape)
    sign = 1 - 2 * (bits & 1)
    fraction = 1 + (bits >> 1 & (1 << fraction_bits) - 1).double() / (1 << fraction_bits)
    exponent = (bits >> 11) % EXPONENTS
    return (sign * fraction * 8 / (1 << exponent)).to(dtype)


@lru_cache
def fingerprint(device: torch.device) -> str:
    """A digest of what float32 products and approximating functions give on `device`."""
    return _digest(_unmodelled(device))[:16]


def _unmodelled(device: torch.device) -> Iterator[Tensor]:
    a_MK, b_KN = (x.float().div(3).to(device) for x in operands(torch.bfloat16, 512, len(CASES)))
    yield product(a_MK, b_KN)
    every = torch.arange(-(1 << 15), 1 << 15).short().view(torch.bfloat16)
    every = every[every.isfinite()]
    for x in (every.to(device), every.float().div(3).to(device)):
        for function in (torch.exp, torch.log, torch.cos, torch.sin, torch.tanh, torch.sigmoid, F.silu, F.gelu):
            yield function(x)
        yield from (torch.pow(10000.0, x), F.gelu(x, approximate="tanh"))
        yield from (torch.ops.aten.silu_backward(x, x), torch.ops.aten.gelu_backward(x, x))
        rows = torch.stack([x, torch.zeros_like(x)], 1)
        yield from (softmax(rows, 1, torch.float32), softmax(rows, 1, torch.float32, log=True))


def _digest(tensors: Iterable[Tensor]) -> str:
    """SHA-256 of their bits; every NaN is the same one."""
    digest = hashlib.sha256()
    for x in tensors:
        wide = x.float()
        wide = wide.masked_fill(wide.isnan(), math.nan).contiguous().cpu()
        digest.update(wide.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
