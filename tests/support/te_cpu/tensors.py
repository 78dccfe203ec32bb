"""Functions of TE's compiled extension in plain torch: float32 and bfloat16, nothing quantized.

Names, parameters and results are the extension's own (transformer_engine/pytorch/csrc, the same from 2.9 on).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "generic_gemm", "layernorm_bwd", "layernorm_fwd", "multi_tensor_adam", "multi_tensor_l2norm", "multi_tensor_scale",
    "multi_tensor_scale_tensor", "rmsnorm_bwd", "rmsnorm_fwd", "swap_first_dims", "te_general_grouped_gemm",
]  # fmt: skip

DTYPES = {0: torch.uint8, 2: torch.int32, 4: torch.float32, 5: torch.float16, 6: torch.bfloat16}


def generic_gemm(
    A: Tensor, transA: bool, B: Tensor, transB: bool, D: Tensor | None, quantizer: Any, output_dtype: Any,
    bias: Tensor | None, bias_type: Any, gelu: bool, gelu_in: Any, grad: bool, workspace: Any, workspace_size: int,
    accumulate: bool, use_split_accumulator: bool, comm_overlap: Any = None, comm_type: Any = None,
    extra_output: Any = None, bulk_overlap: bool = False, alpha: float = 1.0, beta: float | None = None,
) -> list[Any]:  # fmt: skip
    """D = op(B)·op(A), in cuBLAS's column-major names; B's leading dimensions stay unless it is transposed."""
    _refuse(quantizer=quantizer, comm_overlap=comm_overlap, gelu=gelu or None)
    for operand in (A, B):
        if type(operand) not in (Tensor, torch.nn.Parameter):
            raise NotImplementedError(f"{type(operand).__name__} operand of a GEMM on CPU")
    a, b = A.detach().reshape(-1, A.shape[-1]), B.detach().reshape(-1, B.shape[-1])
    shape = ([B.shape[-1]] if transB else list(B.shape[:-1])) + [a.shape[0] if transA else a.shape[1]]
    dtype = _dtype(output_dtype, A)
    lhs, rhs = (b.t() if transB else b), (a.t() if transA else a)
    wide = accumulate or alpha != 1.0 or dtype != A.dtype or bias is not None
    y = (lhs.float() @ rhs.float() if wide else lhs @ rhs).view(shape) * alpha
    bias_grad = None
    if bias is not None and grad:
        bias_grad = b.float().sum(0).to(dtype)
    elif bias is not None:
        y = y + bias.float()
    if D is None:
        D = y.to(dtype)
    else:
        D.copy_(D.float() * (1.0 if beta is None else beta) + y.float() if accumulate else y)
    return [D, bias_grad, None, extra_output]


def te_general_grouped_gemm(
    A: list[Tensor], transa: bool, B: list[Tensor], transb: bool, D: list[Tensor], D_type: Any, m_splits: list[int],
    bias: list[Tensor], bias_type: Any, single_output: bool, pre_gelu_out: Any, grad: bool, workspace: Any,
    workspace_size: int, accumulate: bool, use_split_accumulator: bool, math_sm_count: int,
) -> list[Tensor]:  # fmt: skip
    """`generic_gemm` of each group, whose results are pieces of one tensor if `single_output`."""
    if any(one.numel() for one in bias):
        raise NotImplementedError("a grouped GEMM with biases has no stand-in on CPU")
    for a, b, out in zip(A, B, D[0].split(m_splits) if single_output else D, strict=True):
        generic_gemm(a, transa, b, transb, out, None, D_type, None, None, False, None, grad, None, 0, accumulate, False)
    return bias


def rmsnorm_fwd(
    input: Tensor, weight: Tensor, eps: float, ln_out: Any, quantizer: Any, otype: Any, sm_margin: int,
    zero_centered_gamma: bool,
) -> list[Any]:  # fmt: skip
    _refuse(quantizer=quantizer)
    x = input.detach().float()
    rsigma = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    y = (x * rsigma * _gamma(weight, zero_centered_gamma)).to(_dtype(otype, input))
    return [y if ln_out is None else ln_out.copy_(y), None, rsigma.flatten()]


def rmsnorm_bwd(
    dz: Tensor, x: Tensor, rsigma: Tensor, gamma: Tensor, sm_margin: int = 0, zero_centered_gamma: bool = False
) -> list[Any]:
    r = rsigma.view(*x.shape[:-1], 1)
    x_hat, dy = x.detach().float() * r, dz.detach().float().reshape(x.shape)
    g = dy * _gamma(gamma, zero_centered_gamma)
    dx = r * (g - x_hat * (g * x_hat).mean(-1, keepdim=True))
    return [dx.to(x.dtype), _over_tokens(dy * x_hat).to(gamma.dtype)]


def layernorm_fwd(
    input: Tensor, weight: Tensor, bias: Tensor | None, eps: float, ln_out: Any, quantizer: Any, otype: Any,
    sm_margin: int, zero_centered_gamma: bool,
) -> list[Any]:  # fmt: skip
    _refuse(quantizer=quantizer)
    x = input.detach().float()
    mu = x.mean(-1, keepdim=True)
    rsigma = torch.rsqrt((x - mu).square().mean(-1, keepdim=True) + eps)
    y = (x - mu) * rsigma * _gamma(weight, zero_centered_gamma)
    y = (y if bias is None else y + bias.detach().float()).to(_dtype(otype, input))
    return [y if ln_out is None else ln_out.copy_(y), mu.flatten(), rsigma.flatten()]


def layernorm_bwd(
    dz: Tensor, x: Tensor, mu: Tensor, rsigma: Tensor, gamma: Tensor, sm_margin: int = 0,
    zero_centered_gamma: bool = False,
) -> list[Any]:  # fmt: skip
    rows = (*x.shape[:-1], 1)
    r = rsigma.view(rows)
    x_hat, dy = (x.detach().float() - mu.view(rows)) * r, dz.detach().float().reshape(x.shape)
    g = dy * _gamma(gamma, zero_centered_gamma)
    dx = r * (g - g.mean(-1, keepdim=True) - x_hat * (g * x_hat).mean(-1, keepdim=True))
    return [dx.to(x.dtype), _over_tokens(dy * x_hat).to(gamma.dtype), _over_tokens(dy).to(gamma.dtype)]


def swap_first_dims(tensor: Tensor, out: Tensor | None = None) -> Tensor:
    y = tensor.transpose(0, 1).contiguous()
    return y if out is None else out.copy_(y)


def multi_tensor_l2norm(
    chunk_size: int, noop: Tensor, lists: list[list[Tensor]], per_tensor: bool = False
) -> tuple[Tensor, Tensor]:
    norms = torch.stack([x.float().norm() for x in lists[0]])
    return norms.norm().view(1), norms if per_tensor else norms[:0]


def multi_tensor_scale(chunk_size: int, noop: Tensor, lists: list[list[Tensor]], scale: float) -> None:
    for source, target in zip(*lists, strict=True):
        target.copy_(source.float() * scale)


def multi_tensor_scale_tensor(chunk_size: int, noop: Tensor, lists: list[list[Tensor]], scale: Tensor) -> None:
    multi_tensor_scale(chunk_size, noop, lists, float(scale))


def multi_tensor_adam(
    chunk_size: int, noop: Tensor, lists: list[list[Tensor]], lr: float, beta1: float, beta2: float, epsilon: float,
    step: int, mode: int, bias_correction: int, weight_decay: float,
) -> None:  # fmt: skip
    """`lists`: gradients, parameters, first and second moments, and float32 main parameters where there are any."""
    c1, c2 = (1 - beta1**step, 1 - beta2**step) if bias_correction else (1.0, 1.0)
    for g, p, m, v, *main in zip(*lists, strict=True):
        w, grad = (main[0] if main else p).float(), g.float()
        if mode == 0:
            grad = grad + w * weight_decay
        m.copy_(m.float() * beta1 + grad * (1 - beta1))
        v.copy_(v.float() * beta2 + grad * grad * (1 - beta2))
        update = (m.float() / c1) / ((v.float() / c2).sqrt() + epsilon)
        if mode == 1:
            update = update + w * weight_decay
        for target in (p, *main):
            target.copy_(w - update * lr)


def _softmax(x: Tensor, scale: float, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    y = x.detach().float() * scale
    if mask is not None:
        y = y.masked_fill(mask.bool(), -10000.0)
    if causal:
        sq, sk = y.shape[-2:]
        y = y.masked_fill(torch.ones(sq, sk, dtype=torch.bool).triu(1 + sk - sq), float("-inf"))
    return torch.softmax(y, -1).to(x.dtype)


def _softmax_backward(dy: Tensor, y: Tensor, scale: float) -> Tensor:
    d, p = dy.detach().float(), y.detach().float()
    return ((d - (d * p).sum(-1, keepdim=True)) * p * scale).to(dy.dtype)


_SOFTMAX: dict[str, Callable[..., Tensor]] = {
    "scaled_softmax": _softmax,
    "scaled_masked_softmax": lambda x, mask, scale: _softmax(x, scale, mask),
    "scaled_upper_triang_masked_softmax": lambda x, scale: _softmax(x, scale, causal=True),
    "scaled_aligned_causal_masked_softmax": lambda x, scale: _softmax(x, scale, causal=True),
}
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "qgelu": lambda x: x * torch.sigmoid(1.702 * x),
    "srelu": lambda x: F.relu(x) ** 2,
}
_GATED = {"geglu": "gelu", "reglu": "relu", "swiglu": "silu", "qgeglu": "qgelu", "sreglu": "srelu"}


def _activation(name: str) -> Callable[[Tensor], Tensor]:
    if name not in _GATED:
        return _ACTIVATIONS[name]

    def gated(x: Tensor) -> Tensor:
        gate, up = x.chunk(2, -1)
        return _ACTIVATIONS[_GATED[name]](gate) * up

    return gated


def _forward(name: str) -> Callable[..., Tensor]:
    def forward(input: Tensor, quantizer: Any = None) -> Tensor:
        _refuse(quantizer=quantizer)
        return _activation(name)(input.detach().float()).to(input.dtype)

    return forward


def _backward(name: str) -> Callable[..., Tensor]:
    def backward(grad: Tensor, fwd_input: Tensor, quantizer: Any = None) -> Tensor:
        _refuse(quantizer=quantizer)
        with torch.enable_grad():
            x = fwd_input.detach().float().requires_grad_()
            y = _activation(name)(x)
        return torch.autograd.grad(y, x, grad.detach().float().reshape(y.shape))[0].to(fwd_input.dtype)

    return backward


for _name, _function in _SOFTMAX.items():
    globals()[f"{_name}_forward"], globals()[f"{_name}_backward"] = _function, _softmax_backward
    __all__ += [f"{_name}_forward", f"{_name}_backward"]
for _name in (*_ACTIVATIONS, *_GATED):
    globals()[_name], globals()[f"d{_name}"] = _forward(_name), _backward(_name)
    __all__ += [_name, f"d{_name}"]


def _gamma(weight: Tensor, zero_centered: bool) -> Tensor:
    return weight.detach().float() + (1.0 if zero_centered else 0.0)


def _over_tokens(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]).sum(0)


def _dtype(otype: Any, like: Tensor) -> torch.dtype:
    if otype is None or isinstance(otype, torch.dtype):
        return otype or like.dtype
    return DTYPES[int(otype)]


def _refuse(**options: Any) -> None:
    for name, value in options.items():
        if value is not None:
            raise NotImplementedError(f"{name} has no stand-in on CPU")
