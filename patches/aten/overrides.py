"""Local products, reductions and elementwise functions that do not depend on shape: overrides in ATen itself.

Tensor parallelism changes the shapes that a rank's kernels see, and libraries choose their order of summation
by shape. While `LocalInvariance` is on, every call below (Python, autograd's backward or C++) goes through
`order.backend` or `elementwise` for float32, bfloat16 and float16; every other dtype runs ATen's own kernel.

Covered, each with its in-place and `out=` forms where ATen has them:
    products      mm, bmm, addmm, baddbmm, mv, addmv, dot, vdot (linear, matmul and einsum are made of these)
    row sums      sum, mean, softmax, log_softmax and the last two's backwards
    elementwise   exp, exp2, expm1, log, log2, log1p, sin, cos, tanh, sigmoid, silu, gelu, elu, mish, softplus, erf,
                  rsqrt, reciprocal, pow by a number, their backwards, and lerp, addcmul, addcdiv (the optimizer's)
On a GPU `elementwise` is left to ATen, whose kernels there have no tail: one function computes every element.
Refused by name: ATen's fused attention, and products with scales, groups, an activation or a result of another dtype,
whose sums are out of reach.
Exact by themselves: +, -, ×, ÷, sqrt, max, min, comparisons, indexing. Not covered: var, norm, cumsum, glu, sinh,
cosh, atan2, logaddexp, pow by a tensor, convolutions, `add(alpha=…)` in bfloat16, and embedding and scatter sums,
which ATen adds in index order at every shape on a CPU (on a GPU, `ops.embedding` does).
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from patches.aten.elementwise import without_tail
from patches.contract import DTYPES, UnsupportedError
from patches.order.backend import backend
from patches.order.products import product

__all__ = ["LocalInvariance"]

Kernel = Callable[..., Any]

ELEMENTWISE = (
    "exp exp2 expm1 log log2 log1p sin cos tanh sigmoid silu gelu softplus elu mish erf rsqrt reciprocal "
    "pow.Tensor_Scalar elu_backward mish_backward silu_backward gelu_backward sigmoid_backward tanh_backward "
    "softplus_backward lerp.Scalar lerp.Tensor addcmul addcdiv"
).split()

# operator: what it is, the way out
_ATTENTION = (
    "torch.nn.functional.scaled_dot_product_attention",
    "use Megatron's DotProductAttention, or torch.nn.attention.sdpa_kernel(SDPBackend.MATH)",
)
_PRODUCT = ("a fused product", "use torch.mm, torch.bmm or torch.nn.functional.linear")
REFUSED: dict[str, tuple[str, str]] = {
    **dict.fromkeys(
        "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention "
        "_scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention "
        "_flash_attention_forward _efficient_attention_forward _cudnn_attention_forward".split(),
        _ATTENTION,
    ),
    **dict.fromkeys(
        "mm.dtype mm.dtype_out bmm.dtype bmm.dtype_out addmm.dtype addmm.dtype_out baddbmm.dtype baddbmm.dtype_out "
        "_addmm_activation _addmm_activation.out _scaled_mm _scaled_mm.out _scaled_mm_v2 _scaled_mm_v2.out "
        "_grouped_mm _scaled_grouped_mm _scaled_grouped_mm_v2".split(),
        _PRODUCT,
    ),
}

# torch overrides some kernels of CUDA in Python itself, and takes another override of these on request only.
ON_TOP = {"allow_override": True} if "allow_override" in signature(torch.library.Library.impl).parameters else {}


class LocalInvariance:
    """The overrides, on from construction until `remove()`.

    Args:
        key: dispatch key to override, "CPU" or "CUDA".

    Raises:
        UnsupportedError: torch is too old.
    """

    def __init__(self, key: str) -> None:
        if not hasattr(torch.library, "get_kernel"):
            raise UnsupportedError(
                f"torch {torch.__version__} has no torch.library.get_kernel: the patches need torch 2.9 or newer"
            )
        self._key = key
        self._keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))
        self._library = torch.library.Library("aten", "IMPL")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Warning only once for all operators")
            for name, function in {**PRODUCTS, **REDUCTIONS}.items():
                self._override_forms(name, function)
            if key == "CPU":  # CUDA has one function for every element
                for name in ELEMENTWISE:
                    self._override_forms(name, self._elementwise(name))
            for name in REFUSED:
                if _has_kernel(name, key):
                    self._library.impl(name, _refusal(name), key, **ON_TOP)

    def remove(self) -> None:
        """Give ATen its own kernels back."""
        self._library._destroy()

    def _override_forms(self, name: str, function: Kernel) -> None:
        """Override `aten::name` and its in-place and out= forms by `function`."""
        for form, is_out, is_inplace in _forms(name):
            if not _has_kernel(form, self._key):
                continue
            override = _dispatching(self._own_kernel(form), function, is_out, is_inplace, name in PRODUCTS)
            self._library.impl(form, override, self._key, **ON_TOP)

    def _elementwise(self, name: str) -> Kernel:
        own = self._own_kernel(name)
        return lambda *args, **kwargs: without_tail(own, args, kwargs)

    def _own_kernel(self, name: str) -> Kernel:
        kernel = torch.library.get_kernel(f"aten::{name}", self._key)
        return functools.partial(kernel.call_boxed, self._keys)


def _forms(name: str) -> Iterator[tuple[str, bool, bool]]:
    """(operator, is out=, is in-place) of an operator and those that take the same arguments, and where to write."""
    base, _, overload = name.partition(".")
    yield name, False, False
    wanted = _signature(getattr(torch.ops.aten, base), overload or "default")
    for packet_name in (base, f"{base}_"):
        packet = getattr(torch.ops.aten, packet_name, None)
        for form in packet.overloads() if packet else ():
            written = [a for a in getattr(packet, form)._schema.arguments if a.alias_info and a.alias_info.is_write]
            if len(written) == 1 and _signature(packet, form) == wanted:
                operator = packet_name if form == "default" else f"{packet_name}.{form}"
                yield operator, written[0].kwarg_only, not written[0].kwarg_only


def _signature(packet: Any, overload: str) -> list[tuple[str, str]]:
    arguments = getattr(packet, overload)._schema.arguments
    return [(a.name, str(a.type)) for a in arguments if not (a.kwarg_only and a.alias_info)]


def _has_kernel(name: str, key: str) -> bool:
    try:
        return bool(torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", key))
    except RuntimeError:
        return False


def _dispatching(own: Kernel, value: Kernel, is_out: bool, is_inplace: bool, one_dtype: bool) -> Kernel:
    """An override: `value` where all tensors are of covered dtypes (the same one if need be), else ATen's `own`."""

    def override(*args: Any, **kwargs: Any) -> Any:
        if args[0].dtype not in DTYPES:  # most calls: of float64, by sums and products themselves
            return own(*args, **kwargs)
        dtypes = {arg.dtype for arg in args if isinstance(arg, Tensor)}
        if not dtypes <= DTYPES or (one_dtype and len(dtypes) > 1) or not _floating(kwargs):
            return own(*args, **kwargs)
        if is_out:
            target = kwargs.pop("out", None)
            if target is None:
                target = kwargs.pop("grad_input")
        elif is_inplace:
            target = args[0]
        else:
            return value(*args, **kwargs)
        result = value(*args, **kwargs)
        if target.shape != result.shape:
            if is_inplace:
                raise RuntimeError(f"output of shape {list(target.shape)} does not match {list(result.shape)}")
            target.resize_(result.shape)
        return target.copy_(result)

    return override


def _floating(kwargs: dict[str, Any]) -> bool:
    dtype = kwargs.get("dtype")
    return dtype is None or bool(dtype.is_floating_point)


def _refusal(name: str) -> Kernel:
    what, way_out = REFUSED[name]

    def override(*args: Any, **kwargs: Any) -> Any:
        raise UnsupportedError(f"aten::{name} ({what}) picks its sums by shape: {way_out}")

    return override


def _mm(a: Tensor, b: Tensor) -> Tensor:
    return product(a, b, dtype=a.dtype)


def _addmm(c: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    if beta == 0:
        return product(a, b, dtype=a.dtype, scale=alpha)
    total = product(a, b)
    if alpha != 1:
        total.mul_(alpha)
    total.add_(c.float() if beta == 1 else c.float() * beta)
    return total.to(a.dtype)


def _addmv(c: Tensor, a: Tensor, x: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    return _addmm(c.expand(a.shape[0]).unsqueeze(1), a, x.unsqueeze(1), beta=beta, alpha=alpha).squeeze(1)


def _dot(x: Tensor, y: Tensor) -> Tensor:
    return product(x.unsqueeze(0), y.unsqueeze(1), dtype=x.dtype).reshape(())


def _sum_dim(
    x: Tensor, dim: Sequence[int] | None, keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> Tensor:
    compute = backend(x.device)
    return compute.rounded(compute.row_sums(x, list(dim) if dim else list(range(x.dim())), keepdim), dtype or x.dtype)


def _mean_dim(
    x: Tensor, dim: Sequence[int] | None, keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> Tensor:
    compute = backend(x.device)
    total = compute.row_sums(x, list(dim) if dim else list(range(x.dim())), keepdim)
    return compute.rounded(total / (x.numel() / max(total.numel(), 1)), dtype or x.dtype)


def _softmax(log: bool) -> Kernel:
    def softmax(x: Tensor, dim: int, half_to_float: bool) -> Tensor:
        return backend(x.device).softmax(x, dim, torch.float32 if half_to_float else x.dtype, log)

    return softmax


def _softmax_backward(log: bool) -> Kernel:
    def softmax_backward(grad: Tensor, y: Tensor, dim: int, input_dtype: torch.dtype) -> Tensor:
        return backend(y.device).softmax_gradient(grad, y, dim, input_dtype, log)

    return softmax_backward


PRODUCTS: dict[str, Kernel] = {
    "mm": _mm, "bmm": _mm, "addmm": _addmm, "baddbmm": _addmm, "addmv": _addmv, "dot": _dot, "vdot": _dot,
}  # fmt: skip
REDUCTIONS: dict[str, Kernel] = {
    "sum.dim_IntList": _sum_dim, "mean.dim": _mean_dim,
    "_softmax": _softmax(log=False), "_log_softmax": _softmax(log=True),
    "_softmax_backward_data": _softmax_backward(log=False), "_log_softmax_backward_data": _softmax_backward(log=True),
}  # fmt: skip
