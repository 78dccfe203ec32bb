"""ATen under `LocalInvariance`: an element's bits do not depend on the shape it is computed in."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from patches.aten.overrides import ELEMENTWISE, LocalInvariance
from patches.contract import UnsupportedError

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    **{name: getattr(torch, name) for name in "exp exp2 expm1 sin cos tanh sigmoid erf".split()},
    **{name: (lambda f: lambda x: f(x.abs() + 0.1))(getattr(torch, name))
       for name in "log log2 log1p rsqrt reciprocal sqrt".split()},
    "silu": F.silu, "elu": F.elu, "mish": F.mish, "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "softplus": F.softplus,
    "pow": lambda x: (x.abs() + 0.1).pow(1.5), "cube": lambda x: x.pow(3),
    "lerp": lambda x: torch.lerp(x, -x, 0.1), "addcmul": lambda x: torch.addcmul(x, x, x, value=0.3),
    "addcdiv": lambda x: torch.addcdiv(x, x, x * x + 1, value=0.3), "swiglu": lambda x: F.silu(x) * x,
}  # fmt: skip


@pytest.fixture
def on() -> Iterator[LocalInvariance]:
    local = LocalInvariance("CPU")
    yield local
    local.remove()


def forward_and_backward(function: Callable[[Tensor], Tensor], x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.clone().requires_grad_()
    y = function(leaf)
    y.backward(dy)
    assert leaf.grad is not None
    return y.detach(), leaf.grad


def moved_elements(name: str, dtype: torch.dtype) -> int:
    """How many values or gradients change when an element moves within its tensor, over sizes and threads."""
    function, changed = FUNCTIONS[name], 0
    for n in (15, 33, 1000, 1024, 65613):
        g = torch.Generator().manual_seed(n)
        x, dy = torch.randn(n, generator=g).to(dtype), torch.randn(n, generator=g).to(dtype)
        whole = forward_and_backward(function, x, dy)
        for lo, hi in ((1, min(n, 40)), (3, min(n, 40)), (max(0, n - 37), n)):
            part = forward_and_backward(function, x[lo:hi], dy[lo:hi])
            changed += sum(int((p != w[lo:hi]).sum()) for p, w in zip(part, whole, strict=True))
    return changed


@pytest.mark.parametrize("threads", (1, 2, 3))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_elementwise_value_does_not_depend_on_position(name, dtype, threads, on):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert moved_elements(name, dtype) == 0
    finally:
        torch.set_num_threads(before)


def test_stock_elementwise_value_depends_on_position():
    """Without this the test above could not fail."""
    assert moved_elements("silu", torch.float32) > 0


ROWS: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda x: torch.softmax(x, -1), "log_softmax": lambda x: torch.log_softmax(x, -1),
    "softmax_to_float": lambda x: torch.softmax(x, -1, dtype=torch.float32),
    "sum": lambda x: x.sum(-1), "mean": lambda x: x.mean(-1), "logsumexp": lambda x: torch.logsumexp(x, -1),
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ROWS)
def test_a_row_does_not_depend_on_the_rows_beside_it_and_is_right(name, dtype, on):
    x = torch.randn(64, 301, generator=torch.Generator().manual_seed(0)).to(dtype)
    shape = ROWS[name](x).shape
    dy = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    whole = forward_and_backward(ROWS[name], x, dy.to(ROWS[name](x).dtype))
    for lo, hi in ((0, 1), (5, 40)):
        part = forward_and_backward(ROWS[name], x[lo:hi], dy[lo:hi].to(whole[0].dtype))
        assert all(torch.equal(p, w[lo:hi]) for p, w in zip(part, whole, strict=True))
    want = forward_and_backward(ROWS[name], x.double(), dy.double())
    for got, exact in zip(whole, want, strict=True):
        assert (got.double() - exact).abs().max() <= torch.finfo(dtype).eps * 4 * exact.abs().max()


PRODUCTS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "linear": lambda x, w, b: F.linear(x, w, b), "matmul": lambda x, w, b: x @ w.t(),
    "addmm": lambda x, w, b: torch.addmm(b, x, w.t(), beta=0.5, alpha=2.0),
    "einsum": lambda x, w, b: torch.einsum("mk,nk->mn", x, w),
    "bmm": lambda x, w, b: torch.bmm(x[None], w.t()[None])[0],
    "baddbmm": lambda x, w, b: torch.baddbmm(b.expand(1, len(x), -1), x[None], w.t()[None], alpha=0.1)[0],
    "mv": lambda x, w, b: torch.stack([x @ row for row in w], 1),
    "out": lambda x, w, b: torch.mm(x, w.t(), out=torch.empty(len(x), len(w), dtype=x.dtype)),
    "in-place": lambda x, w, b: b.repeat(len(x), 1).addmm_(x, w.t()),
    "dot": lambda x, w, b: torch.stack([torch.dot(a, c) for a in x for c in w]).view(len(x), len(w)),
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PRODUCTS)
def test_every_product_is_invariant_and_right(name, dtype, on):
    g = torch.Generator().manual_seed(0)
    x, w, b = (torch.randn(s, generator=g).to(dtype) for s in ((33, 1030), (17, 1030), (17,)))
    whole = PRODUCTS[name](x, w, b)
    rows = torch.cat([PRODUCTS[name](part, w, b) for part in x.split(7)])
    columns = torch.cat([PRODUCTS[name](x, part, c) for part, c in zip(w.split(4), b.split(4), strict=True)], 1)
    assert torch.equal(whole, rows) and torch.equal(whole, columns)
    exact = PRODUCTS[name](x.double(), w.double(), b.double()) if name != "out" else x.double() @ w.t().double()
    assert (whole.double() - exact).abs().max() <= torch.finfo(dtype).eps * 2 * exact.abs().max()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_whole_sums_do_not_depend_on_shape_or_threads(dtype, on):
    x = torch.randn(300, 401, generator=torch.Generator().manual_seed(0)).to(dtype)
    for reduce in (torch.sum, torch.mean):
        want = reduce(x.double()).to(dtype)
        assert all(torch.equal(reduce(y), want) for y in (x, x.t(), x.flatten(), x[None].contiguous()))


def test_scalars_and_empty_tensors_reduce_as_in_stock_torch(on):
    scalar, empty = torch.tensor(2.0), torch.ones(0, 3)
    assert scalar.sum() == scalar.mean() == scalar.sum(0) == scalar.mean(0) == 2
    assert torch.softmax(scalar, 0) == 1 and torch.log_softmax(scalar, 0) == 0
    assert empty.sum() == 0 and torch.equal(empty.sum(0), torch.zeros(3)) and empty.mean().isnan()
    assert torch.softmax(empty, -1).shape == (0, 3)
    assert torch.ones(3).sum(0, dtype=torch.int64).dtype == torch.int64


def test_what_stock_torch_refuses_is_refused(on):
    with pytest.raises(RuntimeError):
        torch.zeros(3).addcmul_(torch.ones(2, 3), torch.ones(2, 3))
    with pytest.raises(RuntimeError, match="dtype"):
        torch.mm(torch.ones(2, 2), torch.ones(2, 2).bfloat16())


def test_elementwise_results_keep_their_operands_layout(on):
    x = torch.randn(5, 7)
    assert torch.equal(torch.exp(x.t()).t().contiguous().view(-1), torch.exp(x).view(-1))
    assert torch.exp(x.t()).stride() == x.t().stride()


def test_fused_attention_is_refused_by_name(on):
    q = torch.randn(1, 2, 8, 16)
    with pytest.raises(UnsupportedError, match="scaled_dot_product_attention"):
        F.scaled_dot_product_attention(q, q, q, is_causal=True)


def test_products_whose_sums_are_out_of_reach_are_refused_by_name(on):
    with pytest.raises(UnsupportedError, match=r"aten::_addmm_activation \(a fused product\).*use torch.mm"):
        torch._addmm_activation(torch.ones(2), torch.ones(2, 3), torch.ones(3, 2))


@pytest.mark.filterwarnings("ignore:Warning only once for all operators")
def test_kernels_that_torch_overrides_itself_are_overridden_too():
    """From 2.12 on it overrides some of CUDA's in Python, and may not let them be overridden unasked."""
    x, theirs = torch.zeros(2, 2), torch.library.Library("aten", "IMPL")
    theirs.impl("_softmax", lambda x, dim, half_to_float: torch.full_like(x, 7.0), "CPU")
    ours = LocalInvariance("CPU")
    assert torch.softmax(x, 0)[0, 0] == 0.5
    ours.remove()
    assert torch.softmax(x, 0)[0, 0] == 7
    theirs._destroy()
    assert torch.softmax(x, 0)[0, 0] == 0.5


def test_other_dtypes_run_atens_own_kernels(on):
    x = torch.arange(12).view(3, 4)
    assert torch.equal(x @ x.t(), torch.tensor([[14, 38, 62], [38, 126, 214], [62, 214, 366]]))
    assert x.sum().item() == 66 and (x > 3).sum().item() == 8
    assert torch.exp(torch.ones(3, dtype=torch.float64)).dtype == torch.float64


def test_removing_gives_aten_its_own_bits_back():
    x = torch.randn(37, 1030, generator=torch.Generator().manual_seed(0))
    calls = (lambda: x @ x.t(), lambda: F.silu(x), lambda: torch.softmax(x, -1), lambda: x.sum(0), lambda: torch.exp(x))
    before = [call() for call in calls]
    LocalInvariance("CPU").remove()
    assert all(torch.equal(a, call()) for a, call in zip(before, calls, strict=True))


def test_every_elementwise_operator_exists_in_this_torch():
    for name in ELEMENTWISE:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", "CPU"), name
