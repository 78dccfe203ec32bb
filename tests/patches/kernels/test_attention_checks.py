"""What is tried before attention's first use on a device passes, and finds kernels that are subtly wrong."""

from __future__ import annotations

import sys

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not on the path: make test-kernels")

import triton
import triton.language as tl

from patches.contract import Contract, UnsupportedError
from patches.ops.attention import blockwise_attention
from patches.ops.sharded import Shards
from patches.order import backend
from patches.order.kernels import attention_checks, attention_kernels, attentions
from patches.order.visible import Visible

BF16 = torch.bfloat16
of_the_interpreter = pytest.mark.skipif(
    torch.cuda.is_available(), reason="replaces functions that kernels call, which only the interpreter looks up anew"
)


def check(device, width=16, dtype=BF16, packed=False, windowed=False):
    attention_checks.check_attention(device, width, dtype, packed, windowed)


@pytest.mark.parametrize(
    ("width", "dtype", "packed", "windowed"),
    (
        (16, BF16, False, False), (128, BF16, False, True), (192, BF16, True, False), (256, BF16, False, False),
        (40, torch.float16, False, False), (24, torch.float32, True, True), (1, BF16, False, False),
    ),
    ids=str,
)  # fmt: skip
def test_kernels_pass(width, dtype, packed, windowed, device):
    before = torch.random.get_rng_state()
    check(device, width, dtype, packed, windowed)
    assert before.equal(torch.random.get_rng_state())


_forwards = None  # a kernel's own walk, which the two below call


@triton.jit
def _backwards(state, operands, start, end, EDGE: tl.constexpr, HOW: tl.constexpr):
    STEP: tl.constexpr = HOW[4]
    for i in range(0, tl.cdiv(end - start, STEP)):
        at = start + (tl.cdiv(end - start, STEP) - 1 - i) * STEP
        state = _forwards(state, operands, at, tl.minimum(at + STEP, end), EDGE, HOW)
    return state


@triton.jit
def _odd_first(state, operands, start, end, EDGE: tl.constexpr, HOW: tl.constexpr):
    """As atomics would have it where the second program is the faster one."""
    STEP: tl.constexpr = HOW[4]
    for parity in range(0, 2):
        for at in range(start + (1 - parity) * STEP, end, 2 * STEP):
            state = _forwards(state, operands, at, tl.minimum(at + STEP, end), EDGE, HOW)
    return state


@of_the_interpreter
@pytest.mark.parametrize(("kernel", "sums"), (("keys", "y"), ("back", "dq"), ("queries", "dk")))
@pytest.mark.parametrize("order", (_backwards, _odd_first), ids=("backwards", "odd first"))
def test_blocks_in_another_order_are_found(order, kernel, sums, device, monkeypatch):
    """Every row of them is right and depends on its own operands alone: only the order of its sum is another."""
    monkeypatch.setattr(sys.modules[__name__], "_forwards", getattr(attention_kernels, f"_walk_{kernel}"))
    monkeypatch.setattr(attention_kernels, f"_walk_{kernel}", order)
    with pytest.raises(UnsupportedError, match=f"{sums} is not added over (keys|queries) from position 0 on"):
        check(device)


def test_a_sum_in_two_halves_is_found(device, monkeypatch):
    """Split keys: two programs' parts, each in order, are added last."""
    right = attentions.attention

    def halves(q, k, v, visible, scale):
        y, top, inverse = right(q, k, v, visible, scale)
        if visible.right != 0 and len(k) > 2:  # uniform probabilities
            middle = len(k) // 2
            y = (right(q, k[:middle], v[:middle], Visible(), scale)[0].float() / 2).add(
                right(q, k[middle:], v[middle:], Visible(), scale)[0].float() / 2
            )
            y = y.to(q.dtype)
        return y, top, inverse

    monkeypatch.setattr(attentions, "attention", halves)
    with pytest.raises(UnsupportedError, match="y is not added over keys"):
        check(device)


def tiled_by(monkeypatch, rows):
    """From now on keys of a step follow from what else is in a call, as `rows` counts it."""
    launch, tile_of = attentions._launch, attentions.tile_of

    def launched(name, tensors, *rest):
        few = rows(tensors[0])
        with monkeypatch.context() as patch:
            if few and name == "forward":
                patch.setattr(attentions, "tile_of", lambda *of: attentions.Tile(64, tile_of(*of).step // 2, 4, 1))
            launch(name, tensors, *rest)

    monkeypatch.setattr(attentions, "_launch", launched)


@pytest.mark.parametrize(
    ("what", "rows"),
    (
        ("a head alone", lambda q: q.shape[2] == 1 and len(q) < 300),
        ("a longer sequence", lambda q: q.shape[1] == 2 and len(q) > 170),
        ("a sequence's group of heads alone", lambda q: q.shape[1] == 1 and q.shape[2] == 2),
    ),
)
def test_blocks_that_follow_from_neighbours_are_found(what, rows, device, monkeypatch):
    if device.type == "cuda":
        pytest.skip("sizes are the interpreter's")
    monkeypatch.setattr(attention_checks, "ROUNDS", 1)
    tiled_by(monkeypatch, rows)
    with pytest.raises(UnsupportedError, match=f"y of {what} has other bits"):
        check(device, 24)


def test_rows_that_read_a_neighbour_of_the_pack_are_found(device, monkeypatch):
    right = attentions.attention

    def leaking(q, k, v, visible, scale):
        y, top, inverse = right(q, k, v, visible, scale)
        if visible.packed is not None and len(visible.packed.q_starts) > 1:
            y[int(visible.packed.q_starts[1])] += 2**-6
        return y, top, inverse

    monkeypatch.setattr(attentions, "attention", leaking)
    with pytest.raises(UnsupportedError, match="y of a sequence packed beside others has other bits"):
        check(device, packed=True)


@pytest.mark.parametrize("wrong", ("scale", "mask"))
def test_wrong_values_are_found(wrong, device, monkeypatch):
    right = attentions.attention

    def spoilt(q, k, v, visible, scale):
        if wrong == "mask" and visible.right == 0:
            visible = Visible(visible.left, 1, visible.offset)
        return right(q, k, v, visible, scale * (1.02 if wrong == "scale" else 1))

    monkeypatch.setattr(attentions, "attention", spoilt)
    # A query that sees one key more is found at once, where a longer sequence has another last row.
    with pytest.raises(UnsupportedError, match="y is off by|y of a longer sequence"):
        check(device)


def test_a_device_that_has_no_answer_yet_is_tried_once_for_each_kind(device, monkeypatch):
    tried = []
    package = backend.backend(torch.device("cuda"))
    monkeypatch.setattr(package, "check_attention", lambda *kind: tried.append(kind))
    monkeypatch.setattr(backend, "backend", lambda device: package)
    monkeypatch.setattr(backend, "check", lambda device: None)
    backend._check_attention.cache_clear()
    for width, visible in ((16, Visible(right=0)), (16, Visible(right=0)), (8, Visible()), (16, Visible(left=3))):
        q, k, v = (torch.randn(5, 1, 2, width, device=device).bfloat16() for _ in range(3))
        blockwise_attention(q, k, v, visible, 0.5, 2, Shards(Contract()))
    backend._check_attention.cache_clear()
    here = q.device  # a GPU with its number
    assert tried == [(here, 16, BF16, False, False), (here, 8, BF16, False, False), (here, 16, BF16, False, True)]
