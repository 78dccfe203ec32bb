"""What tensor cores compute, bit by bit, on paper: bfloat16 and float16 products added into float32.

    products   p0 p1 … p15     exact                          16 of K, counted from where a leaf starts
    sum        acc             float32, from the group before
                 │  all 17 aligned to the largest exponent, cut to 25 fraction bits (towards zero), added exactly
                 ▼
    acc        cut to float32 (towards zero)

One function describes wgmma on Hopper, tcgen05.mma kind::f16 on Blackwell, and mma.sync.m16n8k16 on both. Found on the
hardware and published twice: Xie et al., MMA-Sim (arXiv 2511.10909), and Khattak and Mikaitis, Accurate Models of
NVIDIA Tensor Cores (arXiv 2512.07004). Nothing in it depends on M, N, tile, k step or instruction, so products on
devices that compute it are of one class of bits, named `K16_25.name`. `golden` compares a device with it.
Legend: M, N result, K summed, G one group of K.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from patches.order.tree import cuts, tree_sum

__all__ = ["K16_25", "Model"]

LEAST_EXPONENT = {torch.bfloat16: -126, torch.float16: -14, torch.float32: -126}  # of normal numbers
# As MMA-Sim has it: a zero beside a factor beyond 2^100 would cut other terms. No golden bit tells whether it does.
EXPONENT_OF_ZERO = -126


@dataclass(frozen=True)
class Model:
    """A tensor core that adds `group` products at once with `bits` fraction bits: 16 and 25, but in tests."""

    group: int = 16
    bits: int = 25

    @property
    def name(self) -> str:
        """The class of bits of devices that compute this."""
        return f"k{self.group}-{self.bits}"

    def product(self, a_MK: Tensor, b_KN: Tensor, leaves: int = 1, pieces: int = 1) -> Tensor:
        """float32 [M, N] as `gemm.product` gives it: the tree over `leaves` of K, each in groups from its start.

        Args:
            a_MK: [M, K], bfloat16 or float16, on any device; it is computed on the CPU.
            b_KN: [K, N], same dtype.
            pieces: 2 where K holds [gate | up]: leaf j is gate[j], then up[j], whose groups are counted anew.
        """
        a_PMK, b_PKN = a_MK.cpu().chunk(pieces, 1), b_KN.cpu().chunk(pieces, 0)
        return tree_sum(
            self._leaf([(a[:, lo:hi], b[lo:hi]) for a, b in zip(a_PMK, b_PKN, strict=True)])
            for lo, hi in cuts(a_MK.shape[1] // pieces, leaves)
        )

    def _leaf(self, operands: list[tuple[Tensor, Tensor]]) -> Tensor:
        acc_MN = torch.zeros(operands[0][0].shape[0], operands[0][1].shape[1])
        for a_MK, b_KN in operands:
            for k in range(0, a_MK.shape[1], self.group):
                acc_MN = self.mma(a_MK[:, k : k + self.group], b_KN[k : k + self.group], acc_MN)
        return acc_MN

    def mma(self, a_MG: Tensor, b_GN: Tensor, acc_MN: Tensor) -> Tensor:
        """One instruction: acc + a·b, of at most `group` products; float32."""
        terms_MGN = a_MG.double().unsqueeze(2) * b_GN.double().unsqueeze(0)  # exact: at most 22 bits
        sum_MN = acc_MN.double()
        exponents_MGN = _exponents(a_MG).unsqueeze(2) + _exponents(b_GN).unsqueeze(0)
        top_MN = torch.maximum(exponents_MGN.amax(1), _exponents(acc_MN))
        unit_MN = _power_of_two(top_MN - self.bits)
        kept_MN = (terms_MGN / unit_MN.unsqueeze(1)).trunc().sum(1) + (sum_MN / unit_MN).trunc()
        plain_MN = terms_MGN.sum(1) + sum_MN
        return _cut(torch.where(plain_MN.isfinite(), kept_MN * unit_MN, plain_MN))


K16_25 = Model()


def _exponents(x: Tensor) -> Tensor:
    """⌊log2 |x|⌋, of subnormal numbers that of the least normal one; a product's is the sum of its factors'."""
    exponents = torch.frexp(x.double())[1] - 1
    return torch.where(x == 0, EXPONENT_OF_ZERO, exponents.clamp(min=LEAST_EXPONENT[x.dtype]))


def _power_of_two(exponent: Tensor) -> Tensor:
    """float64 2^exponent, exactly, for those between -1022 and 1023."""
    return (exponent.long() + 1023 << 52).view(torch.float64)


def _cut(x: Tensor) -> Tensor:
    """float64 cut to float32, towards zero; from 2^128 on it is infinite."""
    nearest = x.float()
    cut = torch.where(nearest.double().abs() > x.abs(), nearest.nextafter(torch.zeros_like(nearest)), nearest)
    return torch.where(x.abs() >= 2.0**128, nearest, cut)
