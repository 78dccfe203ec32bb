"""What computes on a device: `exact` on a CPU, `kernels` on a GPU. Nothing else asks which.

CPU    exact leaves and sums in torch: the bits are those of any CPU, BLAS and thread count
CUDA   Triton kernels of one fixed order: the bits are those of one class of tensor cores
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from patches.contract import Attention, UnsupportedError
from patches.order import exact
from patches.order.handle import AsyncResult
from patches.order.visible import Visible

__all__ = ["Backend", "CrossEntropy", "attention_backend", "backend", "check", "pin_device",
           "product_backend", "training_device"]  # fmt: skip


class CrossEntropy(Protocol):
    """The functions of `kernels.cross_entropy`: R rows, V columns, L leaves, C chunks of a leaf."""

    def exponentials(self, z_RV: Tensor, leaves: int) -> tuple[Tensor, Tensor]: ...

    def joined(self, tops_RLC: Tensor, sums_RLC: Tensor, top_R: Tensor | None = None) -> tuple[Tensor, Tensor]: ...

    def losses(self, top_R: Tensor, total_R: Tensor, picked_R: Tensor) -> Tensor: ...

    def logits_gradient(
        self, z_RV: Tensor, target_R: Tensor, top_R: Tensor, total_R: Tensor, dloss_R: Tensor
    ) -> Tensor: ...


class Backend(Protocol):
    """What `exact` and `kernels` both have: functions whose bits follow from operands and `leaves` alone."""

    def check(self, device: torch.device) -> None:
        """Try on this very `device` that products keep the contract; `UnsupportedError` if they don't."""

    def provenance(self, device: torch.device) -> Mapping[str, Any]:
        """What bits on `device` depend on besides the operands, for the manifest."""

    def product(
        self, a_MK: Tensor, b_KN: Tensor, leaves: int = 1, pieces: int = 1, dtype: torch.dtype = torch.float32,
        scale: float = 1.0, beside_collective: bool = False,
    ) -> Tensor:  # fmt: skip
        """The tree over `leaves` products, rounded once to `dtype`; leaf j takes its share of each of K's `pieces`.

        Args:
            a_MK: [M, K], or of one leaf [..., M, K]; float32, bfloat16 or float16, any strides.
            b_KN: [K, N] or [..., K, N], same dtype.
            pieces: 2 where K holds [gate | up]: leaf j is gate[j] ∪ up[j].
            scale: what the float32 root is multiplied by, in float32, before it is rounded.
            beside_collective: one is under way, and needs some of the device; the same bits.
        """

    def add_product(self, into: Tensor, a_MK: Tensor, b_KN: Tensor, beside_collective: bool = False) -> None:
        """into += a·b, one addition in float32 per element."""

    def add_product_in_units(
        self, total: Tensor, bound: Tensor, a_MK: Tensor, b_KN: Tensor, beside_collective: bool = False
    ) -> None:
        """total += a·b in units of the batch's `grid`, int64 [M, N]; bound += max|a·b|, a float64 scalar."""

    def grouped_product(
        self, x_RK: Tensor, matrices_KN: Sequence[Tensor], sizes: Sequence[int], leaves: int = 1, pieces: int = 1,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:  # fmt: skip
        """`product` of each run of x's rows and the matrix that belongs to it: [R, N].

        Args:
            matrices_KN: all laid out alike.
            sizes: rows of each run, 0 or more; all of them together.
        """

    def add_grouped_products_in_units(
        self, totals_MN: Sequence[Tensor], bounds: Sequence[Tensor], dy_RM: Tensor, x_RN: Tensor,
        runs: Sequence[Sequence[int]],
    ) -> None:  # fmt: skip
        """`add_product_in_units` of dyᵀ·x of every run of rows, each total's runs one after the other."""

    def attention(
        self, q_SBHD: Tensor, k_SBGD: Tensor, v_SBGD: Tensor, visible: Visible, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """softmax(scale·q·kᵀ)·v by blocks of keys; and of each query its largest score and one over its sum.

        Args:
            q_SBHD: [Sq, B, H, D], or [rows, 1, H, D] of packed sequences.
            k_SBGD: [Sk, B, G, D], G a divisor of H: query heads g·H/G to (g+1)·H/G - 1 share group g.
            scale: above 0.

        Returns:
            [Sq, B, H, D] in the dtype of q, and float32 [H, B·Sq] twice; all 0 of a query that sees no key.
        """

    def attention_gradient(
        self, dy_SBHD: Tensor, q_SBHD: Tensor, k_SBGD: Tensor, v_SBGD: Tensor, y_SBHD: Tensor, top: Tensor,
        inverse: Tensor, visible: Visible, scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """dq in its dtype; what every query head gives dk and dv, float32 [Sk, B, H, D] each, not yet summed over G."""

    def check_attention(
        self, device: torch.device, width: int, dtype: torch.dtype, packed: bool, windowed: bool
    ) -> None:
        """Try on this very `device` that attention of such heads keeps the contract; `UnsupportedError` if not."""

    @property
    def attention_unless_named(self) -> Attention:
        """What `patches.enable()` makes attention of where nothing is said."""

    def row_sums(self, x: Tensor, dims: Sequence[int], keepdim: bool = False) -> Tensor:
        """Σx over `dims`, not yet rounded to a tensor's dtype."""

    def tree_of_sums(self, x: Tensor, dim: int, leaves: int, exact_dims: tuple[int, ...] = ()) -> Tensor:
        """float32 root of the tree over `leaves` sums along `dim`; `exact_dims` are summed inside every leaf."""

    def rounded(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """`x` rounded to `dtype`, with every zero +0 and every NaN the canonical one."""

    def softmax(self, x: Tensor, dim: int, dtype: torch.dtype, log: bool = False) -> Tensor:
        """Softmax of `x` along `dim`, or its logarithm, in `dtype`."""

    def softmax_gradient(self, dy: Tensor, y: Tensor, dim: int, dtype: torch.dtype, log: bool = False) -> Tensor:
        """The gradient that `dy` gives the input of `y = softmax(…)`, or of its logarithm, in `dtype`."""

    def normalised(
        self, x: Tensor, gamma: Tensor, beta: Tensor | None, eps: float, centered: bool
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Rows of `x` normalised, in its dtype, and each row's mean (None unless `centered`) and rstd, [.., 1]."""

    def input_gradient(self, dy: Tensor, x: Tensor, gamma: Tensor, mean: Tensor | None, rstd: Tensor) -> Tensor:
        """The gradient that `dy` gives the input `x` of `normalised`, in its dtype."""

    def tree_of_gamma_gradients(
        self, dy: Tensor, x: Tensor, mean: Tensor | None, rstd: Tensor, dim: int, leaves: int,
        exact_dims: tuple[int, ...],
    ) -> Tensor:  # fmt: skip
        """float32 root of `tree_of_sums` of dy·x̂; the last dimension alone is kept."""

    def euclidean_norm(
        self, tensors: Sequence[Tensor], device: torch.device, all_reduce: Callable[[Tensor, Any], None]
    ) -> float:
        """√Σx² over the tensors of all ranks, whatever their order and cut.

        Args:
            all_reduce: reduces a tensor on `device` over the ranks, in place, by a `ReduceOp`.
        """

    def rounded_tree_sum(self, parts_tN: Tensor, dtype: torch.dtype, divide_by: int = 1) -> Tensor:
        """`tree_sum` of float32 [t, N] over t, divided, rounded once to `dtype`: [N]."""

    def begin_reading_peers(
        self, root: Tensor, group: dist.ProcessGroup, dtype: torch.dtype, divide_by: int = 1
    ) -> AsyncResult:
        """`begin_reduce_scatter` over symmetric memory; `UnsupportedError` where there is none."""

    def check_symmetric_memory(self, device: torch.device) -> None:
        """Raise `UnsupportedError` where torch can tell that ranks cannot read each other's memory."""

    @property
    def cross_entropy(self) -> CrossEntropy | None:
        """How to compute the softmax again for backward; None where it is kept."""

    @property
    def embedding_gradient(self) -> Callable[[Tensor, Tensor, int, torch.dtype], Tensor] | None:
        """[rows, H] in a dtype, of dy [T, H] and ids [T]: each row's own tokens summed; None where ATen's does so."""


@cache
def _kernels() -> Backend:
    try:
        from patches.order import kernels
    except ImportError as error:
        raise UnsupportedError(
            f"products on a GPU need Triton ({error}): install the version that torch {torch.__version__} asks for"
        ) from error
    return kernels


_BACKENDS: dict[str, Callable[[], Backend]] = {"cpu": lambda: exact, "cuda": _kernels}
_pinned: str | None = None


def backend(device: torch.device) -> Backend:
    """What computes on `device`; on one of another kind, torch does as on a CPU.

    Raises:
        UnsupportedError: it is a GPU, and Triton is missing.
    """
    return _BACKENDS.get(device.type, _BACKENDS["cpu"])()


def training_device() -> torch.device:
    """Where this process trains: on its GPU where torch sees one, else on the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pin_device(kind: str | None) -> None:
    """Refuse products on any other kind of device from now on: "cpu", "cuda", or None for no such promise.

    Raises:
        UnsupportedError: nothing computes there.
    """
    global _pinned
    if kind is not None:
        backend(torch.device(kind))
    _pinned = kind


def product_backend(*operands: Tensor) -> Backend:
    """What multiplies `operands`, once it has been tried on their device.

    Raises:
        ValueError: they lie on different kinds of devices.
        UnsupportedError: they lie on another kind than training was patched for.
    """
    kinds = {x.device.type for x in operands}
    if len(kinds) > 1:
        raise ValueError(f"operands of one product lie on different devices: {', '.join(sorted(kinds))}")
    (kind,) = kinds
    if _pinned not in (None, kind):
        way_out = ', or set CUDA_VISIBLE_DEVICES="" to train on CPU' if kind == "cpu" else ""
        raise UnsupportedError(
            f"a product on {kind} in a run that was patched for {_pinned}: move its operands to {_pinned}{way_out}"
        )
    check(operands[0].device)
    return backend(operands[0].device)


def attention_backend(q: Tensor, k: Tensor, v: Tensor, visible: Visible) -> Backend:
    """What computes attention of these operands, once products and attention have been tried on their device.

    Raises as `product_backend` does.
    """
    found = product_backend(q, k, v)
    _check_attention(q.device, q.shape[-1], q.dtype, visible.packed is not None, visible.left is not None)
    return found


@cache
def _check_attention(device: torch.device, width: int, dtype: torch.dtype, packed: bool, windowed: bool) -> None:
    backend(device).check_attention(device, width, dtype, packed, windowed)


@cache
def check(device: torch.device) -> None:
    """Try on this very `device`, once, that products keep the contract; raise `UnsupportedError` if they don't."""
    backend(device).check(device)
