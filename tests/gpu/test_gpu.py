"""The same bits on a GPU: whatever M and N, split, layout, alignment and TP size. On a CPU the same at tiny shapes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from patches.aten.overrides import LocalInvariance
from patches.order.backend import backend
from patches.order.grad_norm import gradient_norm
from patches.order.products import add_product, product
from patches.order.tree import tree_sum
from patches.order.visible import Visible
from tests.support import ROOT, attention_bounds
from tests.support.ranks import on_ranks
from tests.support.staged import stage

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
EPSILON = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-24}
QWEN3_06B = {"hidden_size": 1024, "num_attention_heads": 16, "num_query_groups": 8, "kv_channels": 128,
             "ffn_hidden_size": 3072}  # fmt: skip

on_either = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
of_every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])


def size(device: str, large: tuple[int, int, int] = (3000, 4096, 2304)) -> tuple[int, int, int]:
    """M, K, N: on a GPU with ragged tiles."""
    return large if device == "cuda" else (37, 64, 40)


def operands(device: str, dtype: torch.dtype, m: int, k: int, n: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator(device).manual_seed(0)
    return tuple(torch.randn(s, generator=g, device=device).to(dtype) for s in ((m, k), (k, n)))  # type: ignore[return-value]


def misaligned(x: Tensor) -> Tensor:
    """The same values one element off any alignment, where TMA cannot go."""
    storage = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)
    return storage[1:].view(x.shape).copy_(x)


@on_either
@of_every_dtype
@pytest.mark.parametrize("leaves", (1, 8))
def test_element_depends_on_its_own_row_and_column_alone(device, dtype, leaves):
    m, k, n = size(device)
    a, b = operands(device, dtype, m, k, n)
    whole = product(a, b, leaves)
    for rows in (1, 17, 128, m // 2):
        assert product(a[-rows:], b, leaves).equal(whole[-rows:]), f"last {rows} rows"
    for columns in (1, 24, n // 2):
        assert product(a, b[:, -columns:], leaves).equal(whole[:, -columns:]), f"last {columns} columns"
    assert product(a[5:30], b[:, 3:20], leaves).equal(whole[5:30, 3:20])


@on_either
@of_every_dtype
@pytest.mark.parametrize("pieces", (1, 2))
def test_ranks_subtrees_add_up_to_the_whole_tree(device, dtype, pieces):
    m, k, n = size(device)
    a, b = operands(device, dtype, m, k, n)
    whole = product(a, b, 8, pieces)
    for tp in (2, 4, 8):
        shares = [
            (torch.cat(x.chunk(tp * pieces, 1)[r::tp], 1), torch.cat(y.chunk(tp * pieces)[r::tp]))
            for x, y in ((a, b),)
            for r in range(tp)
        ]
        assert tree_sum(product(x, y, 8 // tp, pieces) for x, y in shares).equal(whole), f"TP={tp}"


@on_either
@of_every_dtype
@pytest.mark.parametrize("leaves", (1, 8))
def test_layout_and_alignment_change_no_bit(device, dtype, leaves):
    a, b = operands(device, dtype, *size(device))
    whole = product(a, b, leaves)
    by_column = a.t().contiguous().t(), b.t().contiguous().t()
    padded = F.pad(a, (0, 8))[:, : a.shape[1]], F.pad(b, (0, 8))[:, : b.shape[1]]
    for x, y in (by_column, (a, by_column[1]), (by_column[0], b), padded, (misaligned(a), misaligned(b))):
        assert product(x, y, leaves).equal(whole)


def accumulated(dtype: torch.dtype, k: int, leaves: int) -> float:
    """What the sums of a product of random numbers may lose, relative to its norm.

    A tensor core cuts each group's sum towards zero, half a unit of 2^-23 of it on average, and these losses have the
    sum's sign: they add up, over K/16 groups of a leaf, to at most K/16 · 2^-24. (The model of `kernels.tensor_core`
    loses 9e-6 at K=8192, of 3e-5 allowed.) In float32 each of K additions is rounded either way: √K · 2^-24.
    """
    return (k**0.5 if dtype == torch.float32 else k / 16 / leaves) * 2**-24


@on_either
@of_every_dtype
@pytest.mark.parametrize("leaves", (1, 8))
def test_product_is_right(device, dtype, leaves):
    m, k, n = size(device, (2048, 8192, 4096))
    a, b = operands(device, dtype, m, k, n)
    rows = slice(0, m, max(1, m // 64))
    want = a[rows].double() @ b.double()
    for out in (torch.float32, dtype):
        got = product(a, b, leaves, dtype=out)[rows].double()
        error = (got - want).norm() / want.norm()
        assert error < max(EPSILON[out], accumulated(dtype, k, leaves)), f"{error:.1e}"


@on_either
def test_product_is_added_to_main_grad_in_one_addition(device):
    m, k, n = size(device)
    a, b = operands(device, torch.bfloat16, m, k, n)
    main_grad = torch.randn(m, n, device=device)
    want = main_grad + product(a, b)
    add_product(main_grad, a, b)
    assert main_grad.equal(want)


@on_either
def test_batches_of_a_product_are_products(device):
    a, b = (torch.randn(6, *s, device=device).bfloat16() for s in ((70, 64), (64, 48)))
    whole = product(a, b)
    assert all(whole[i].equal(product(a[i], b[i])) for i in range(6))


@pytest.mark.gpu
def test_offsets_beyond_2_to_the_31_elements_are_reached():
    m, k, n = 1 << 17, 64, (1 << 14) + 256
    a, b = operands("cuda", torch.bfloat16, m, k, n)
    whole = product(a, b, dtype=torch.bfloat16)
    assert whole.numel() > 2**31
    assert whole[-100:].equal(product(a[-100:], b, dtype=torch.bfloat16))


@on_either
@of_every_dtype
def test_attention_is_right_and_a_head_depends_on_itself_alone(device, dtype):
    s, d = (2100, 128) if device == "cuda" else (70, 16)
    compute, visible = backend(torch.device(device)), Visible(left=s // 2, right=0)
    qkvd = attention_bounds.operands(s, s, 2, 4, 2, d, dtype, device)
    whole = attention_bounds.results(compute, qkvd, visible)
    q, k, v, dy = qkvd
    one = [q[:, 1:, 2:], k[:, 1:, 1:], v[:, 1:, 1:], dy[:, 1:, 2:]]
    for part, alone in zip(whole, attention_bounds.results(compute, one, visible), strict=True):
        assert part[:, 1:, 2:].equal(alone)
    attention_bounds.assert_right(compute, one, visible)


@pytest.mark.gpu
def test_attention_of_128k_tokens_takes_memory_for_its_rows_alone():
    s, d = 1 << 17, 128
    compute = backend(torch.device("cuda"))
    q, k, v, dy = (torch.randn(s, 1, 2, d, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    y, dq, *_ = attention_bounds.results(compute, [q, k, v, dy], Visible(right=0))
    assert torch.cuda.max_memory_allocated() - before < 8 * q.nbytes  # y, dq; dk and dv in float32; numbers of rows
    start = s - 1000
    last = attention_bounds.results(compute, [q[start:], k, v, dy[start:]], Visible(right=0, offset=start))
    assert y[start:].equal(last[0]) and dq[start:].equal(last[1])


@contextmanager
def local_invariance(device: str) -> Iterator[None]:
    local = LocalInvariance(device.upper())
    try:
        yield
    finally:
        local.remove()


ELEMENTWISE = {
    "exp": torch.exp,
    "silu": F.silu,
    "gelu": F.gelu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "rsqrt": lambda x: torch.rsqrt(x.abs() + 1),
    "silu backward": lambda x: torch.ops.aten.silu_backward(x, x),
    "gelu backward": lambda x: torch.ops.aten.gelu_backward(x, x),
    "addcmul": lambda x: torch.addcmul(x, x, x, value=0.1),
    "sum with its bfloat16 self": lambda x: x + x.bfloat16(),
    "division": lambda x: x / (x.abs() + 3),
}


@on_either
@of_every_dtype
@pytest.mark.parametrize("name", ELEMENTWISE)
def test_elementwise_function_does_not_depend_on_place(device, dtype, name):
    count = 100_003 if device == "cuda" else 1003
    x = torch.randn(count, device=device).to(dtype)
    with local_invariance(device):
        whole = ELEMENTWISE[name](x)
        for lo, hi in ((1, count), (3, 20), (7, count - 5), (count // 2, count), (count - 1, count)):
            assert ELEMENTWISE[name](x[lo:hi]).equal(whole[lo:hi]), f"a view of {lo}:{hi}"
            assert ELEMENTWISE[name](x[lo:hi].clone()).equal(whole[lo:hi]), f"a copy of {lo}:{hi}"


@on_either
def test_optimizer_step_does_not_depend_on_place(device):
    """torch's AdamW, which Megatron takes where there is no fused one; a GPU steps many tensors in one kernel."""
    count = 200_003 if device == "cuda" else 1003
    start, *gradients = torch.randn(3, count, device=device)

    def stepped(lo: int, hi: int) -> Tensor:
        weights = [torch.nn.Parameter(x) for x in (start[:77].clone(), misaligned(start[lo:hi]))]
        optimizer = torch.optim.AdamW(weights, lr=1e-2, weight_decay=0.1)
        for gradient in gradients:
            weights[0].grad, weights[1].grad = gradient[:77].clone(), gradient[lo:hi].clone()
            optimizer.step()
        return weights[1].detach()

    with local_invariance(device):
        whole = stepped(0, count)
        for lo, hi in ((1, count), (0, count // 2), (count // 2, count), (5, 18)):
            assert stepped(lo, hi).equal(whole[lo:hi]), f"{lo}:{hi}"


@on_either
@of_every_dtype
def test_row_sums_do_not_depend_on_the_rows_beside_them(device, dtype):
    rows, length = (300, 4096) if device == "cuda" else (9, 50)
    x = torch.randn(rows, length, device=device).to(dtype)
    sums = {"softmax": lambda x: torch.softmax(x, -1), "sum": lambda x: x.sum(-1), "mean": lambda x: x.mean(-1)}
    with local_invariance(device):
        for name, function in sums.items():
            whole = function(x)
            assert all(function(x[lo:hi]).equal(whole[lo:hi]) for lo, hi in ((0, 1), (5, 8), (1, rows))), name


@on_either
def test_gradient_norm_is_right_and_does_not_depend_on_the_cut(device):
    count = 10_000_019 if device == "cuda" else 1009
    x = torch.randn(count, device=device)
    on = torch.device(device)
    whole = gradient_norm([x], [], on)
    assert whole == pytest.approx(float(x.double().norm()), rel=2**-40)
    for parts in (2, 7):
        assert gradient_norm(list(x.chunk(parts)), [], on) == whole


@pytest.mark.timeout(300)  # kernels are compiled
@on_either
@pytest.mark.parametrize("strategy", ("tree", "gather"))
def test_qwen3_layer_trains_to_the_same_bits_at_every_tp(device, strategy):
    """Loss, every gradient, gradient norm and main parameters; on a GPU with Qwen3-0.6B's shape, ranks sharing it."""
    model = QWEN3_06B if device == "cuda" else {}
    options = {"steps": 1, "microbatches": 1} | ({"seq": 512, "vocab": 4096, "micro_batch": 1} if model else {})
    layouts = "1,2sp" if device == "cpu" else "1,2sp,4,8sp" if strategy == "tree" else "1,4sp"
    records = trained(device, strategy, layouts, model, options)
    one = records.pop("1")
    for layout, other in records.items():
        assert other == one, f"TP={layout}: {[key for key in one if one[key] != other[key]]}"


def trained(device: str, strategy: str, layouts: str, model: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.gpu.tp_on_one_device", "--device", device, "--strategy", strategy]
    command += ["--layouts", layouts, "--model", json.dumps(model), "--options", json.dumps(options)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def collected() -> list[Tensor]:
    """What staged collectives leave behind, and that their inputs are left alone."""
    stage(is_far=lambda tensor: True)
    rank, group = dist.get_rank(), dist.group.WORLD
    mine = torch.arange(4.0) + 10 * rank
    before = mine._version
    gathered, scattered, exchanged = torch.empty(8), torch.empty(2), torch.empty(4)
    dist.all_gather_into_tensor(gathered, mine, group=group)
    dist.reduce_scatter_tensor(scattered, mine, group=group)
    dist.all_to_all_single(exchanged, mine, group=group)
    listed = [torch.empty(4) for _ in range(2)]
    dist.all_gather(listed, mine)
    assert mine._version == before
    total, first = mine.clone(), mine.clone()
    dist.all_reduce(total, op=dist.ReduceOp.SUM, group=group, async_op=True).wait()
    dist.broadcast(first, 0)
    return [gathered, scattered, exchanged, torch.cat(listed), total, first]


def test_staged_collectives_do_what_they_are_named_for():
    zero, one = torch.arange(4.0), torch.arange(4.0) + 10
    both = torch.cat([zero, one])
    for rank, found in enumerate(on_ranks(2, collected)):
        half = slice(2 * rank, 2 * rank + 2)
        want = [both, (zero + one)[half], torch.cat([zero[half], one[half]]), both, zero + one, zero]
        assert all(torch.equal(x, y) for x, y in zip(found, want, strict=True))
