"""Attention by blocks of keys on a GPU, or in the interpreter: right, and every row a function of its own operands."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not on the path: make test-kernels")

from patches.order.kernels import attentions as kernels
from patches.order.visible import Visible, keys_at_once
from tests.support.attention_bounds import (
    assert_chunks_have_their_bits,
    assert_right,
    assert_rows_see_their_own_alone,
    operands,
    results,
)
from tests.support.bits import assert_same_bits

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
BANDS = {
    "causal": (150, 150, Visible(right=0)),
    "full": (70, 150, Visible()),
    "sliding window": (140, 140, Visible(left=50, right=0)),
    "both sides": (90, 140, Visible(left=33, right=70, offset=20)),
    "one query": (1, 131, Visible(right=0, offset=130)),
    "queries that see nothing": (150, 20, Visible(left=5, right=0)),
}


@pytest.mark.parametrize("name", BANDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_band_is_right(name, dtype, device):
    S, T, visible = BANDS[name]
    if dtype == torch.float32:  # whose blocks are shorter
        S, T = -(-S // 3), -(-T // 3)
    assert_right(kernels, operands(S, T, 1, 2, 1, 16, dtype, device), visible)


@pytest.mark.parametrize("D", (1, 64, 80, 96, 128, 192, 256))
def test_every_width_of_a_head_is_right(D, device):
    S = keys_at_once(D, torch.bfloat16) + 5
    assert_right(kernels, operands(S, S, 1, 1, 1, D, torch.bfloat16, device), Visible(right=0))


@pytest.mark.parametrize(("H", "G"), ((4, 4), (6, 2), (5, 1)))
def test_every_grouping_of_heads_is_right(H, G, device):
    assert_right(kernels, operands(20, 20, 2, H, G, 24, torch.bfloat16, device), Visible(right=0))


@pytest.mark.parametrize(("dtype", "D"), ((torch.bfloat16, 24), (torch.float32, 16)), ids=str)
def test_rows_see_their_own_alone(dtype, D, device):
    S = keys_at_once(D, dtype) + 20
    assert_rows_see_their_own_alone(kernels, device, dtype, S, D, Visible(left=S // 2, right=0))


@pytest.mark.parametrize("visible", (Visible(right=0), Visible(left=40, right=0), Visible(left=9, right=50)), ids=str)
def test_rows_of_a_program_have_no_say(visible, device, monkeypatch):
    qkvd = operands(150, 150, 1, 1, 1, 32, torch.bfloat16, device)
    whole = results(kernels, qkvd, visible)
    fewer = {name: {64: kernels.Tile(64, tiles[64].step, 4, 2)} for name, tiles in kernels.TILES.items()}
    fewer["dkdv"][64] = kernels.Tile(128, 64, 8, 2)
    monkeypatch.setattr(kernels, "TILES", fewer)
    kernels.tile_of.cache_clear()
    again = results(kernels, qkvd, visible)
    kernels.tile_of.cache_clear()
    for x, y in zip(whole, again, strict=True):
        assert_same_bits(x, y)


@pytest.mark.parametrize("visible", (Visible(right=0), Visible(left=40, right=0), Visible()), ids=str)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32), ids=str)
def test_a_chunk_of_the_queries_has_the_bits_that_it_has_among_all(dtype, visible, device):
    S = 160 if dtype == torch.bfloat16 else 64
    assert_chunks_have_their_bits(kernels, operands(S, S, 1, 2, 1, 16, dtype, device), visible, (4,), exactly=False)


def test_operands_are_read_where_they_lie(device):
    q, k, v, dy = operands(140, 140, 2, 2, 1, 24, torch.bfloat16, device)
    whole = results(kernels, [q, k, v, dy], Visible(right=0))
    mixed = torch.cat([k, v, q], 2)  # as a QKV product leaves them
    apart = [
        mixed[:, :, 2:],
        mixed[:, :, :1],
        mixed[:, :, 1:2],
        dy.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    ]
    for x, y in zip(whole, results(kernels, apart, Visible(right=0)), strict=True):
        assert_same_bits(x, y)


def test_nothing_gives_nothing(device):
    for S, T in ((0, 5), (5, 0)):
        y, dq, dk, dv = results(kernels, operands(S, T, 1, 2, 2, 16, torch.bfloat16, device), Visible())
        assert y.shape == dq.shape == (S, 1, 2, 16) and dk.shape == dv.shape == (T, 1, 2, 16)
        assert not any(x.any() for x in (y, dq, dk, dv))


def test_a_wrong_kernel_is_not_within_the_bounds(device):
    """A hidden key that is seen, a scale that is off by a hundredth, a head of another group."""

    def spoilt(which):
        def attention(q, k, v, visible, scale):
            if which == "band":
                visible = Visible(visible.left, visible.right + 1)
            return kernels.attention(
                q, k.flip(2) if which == "group" else k, v, visible, scale * (1.01 if which == "scale" else 1)
            )

        return SimpleNamespace(attention=attention, attention_gradient=kernels.attention_gradient)

    qkvd = operands(30, 30, 1, 2, 2, 16, torch.bfloat16, device)
    assert_right(spoilt(None), qkvd, Visible(right=0))
    for which in ("band", "group", "scale"):
        with pytest.raises(AssertionError, match="y: "):
            assert_right(spoilt(which), qkvd, Visible(right=0))
