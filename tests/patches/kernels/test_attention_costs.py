"""What the attention kernels multiply and what is held while they run, counted, against `tpcheck cost`'s formulas."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not on the path: make test-kernels")

from patches.contract import Contract
from patches.ops.attention import blockwise_attention
from patches.ops.sharded import Shards
from patches.order import backend
from patches.order.kernels import attention_kernels, attentions
from patches.order.visible import Visible
from tests.support.live_bytes import LiveBytes
from tpcheck.config.load import parse_run
from tpcheck.cost.attention import attention_terms

MODEL = {"preset": "qwen3-tiny", "num_layers": 1, "hidden_size": 48, "head_dim": 24, "num_attention_heads": 4,
         "num_query_groups": 2, "ffn_hidden_size": 40}  # fmt: skip


def config_of(**model):
    return parse_run(
        {"model": MODEL | model, "seq_length": 256, "micro_batch_size": 1, "global_batch_size": 1, "strategy": "stock"}
    )


def values(config, quantity):
    return [t.value for t in attention_terms(config) if (t.quantity, t.kernel) == (quantity, "blockwise")]


def operands(config, device):
    model, S = config.model, config.seq_length
    return [
        torch.randn(S, 1, heads, model.head_dim, device=device).bfloat16().requires_grad_(learns)
        for heads, learns in (
            (model.num_attention_heads, True), (model.num_query_groups, True), (model.num_query_groups, True),
            (model.num_attention_heads, False),
        )
    ]  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter alone tells what a kernel multiplies")
@pytest.mark.parametrize("width", (24, 64))
def test_kernels_multiply_as_often_as_the_formulas_say(width, device, monkeypatch):
    config = config_of(head_dim=width, num_attention_heads=2, num_query_groups=1)
    dot, launch, flops = attention_kernels.dot, attentions._launch, {}

    def launched(name, *rest):
        flops[name] = 0

        def counted(x, y, z):
            flops[name] += 2 * x.shape[0].value * x.shape[1].value * y.shape[1].value
            return dot(x, y, z)

        monkeypatch.setattr(attention_kernels, "dot", counted)
        launch(name, *rest)

    monkeypatch.setattr(attentions, "_launch", launched)
    q, k, v, dy = operands(config, device)
    y, top, inverse = attentions.attention(q, k, v, Visible(right=0), 0.3)
    attentions.attention_gradient(dy, q, k, v, y, top, inverse, Visible(right=0), 0.3)
    assert [flops["forward"], flops["dq"], flops["dkdv"]] == values(config, "flops")


@pytest.mark.parametrize(("groups", "heads"), ((2, 4), (8, 8), (4, 8), (1, 8)))
def test_what_is_held_at_once_is_what_the_formulas_say(groups, heads, device, monkeypatch):
    config = config_of(num_attention_heads=heads, num_query_groups=groups, head_dim=8)
    package = backend.backend(torch.device("cuda"))
    monkeypatch.setattr(backend, "backend", lambda device: package)
    monkeypatch.setattr("patches.ops.attention.backend", lambda device: package)
    monkeypatch.setattr(backend, "check", lambda device: None)
    monkeypatch.setattr(backend, "_check_attention", lambda *kind: None)
    q, k, v, dy = operands(config, device)
    shards = Shards(Contract(leaves=8))
    with LiveBytes() as forward:
        y = blockwise_attention(q, k, v, Visible(right=0), 0.3, groups, shards)
    with LiveBytes() as backward:
        torch.autograd.grad(y, (q, k, v), dy)
    assert [forward.peak, backward.peak] == values(config, "peak")
