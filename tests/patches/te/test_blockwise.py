"""attention="blockwise" in Transformer Engine's layers: the bits of Megatron's local ones, whatever TE would choose."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import patches
from tests.support.bits import assert_same_bits
from tests.support.megatron_runs import differences, matrices, of_the_run, run
from tests.support.ranks import on_ranks

OPTIONS: dict[str, dict[str, Any]] = {
    "qwen3": {},
    "two KV groups fp32, recompute": {
        "dtype": "fp32",
        "model": {"num_query_groups": 2, "recompute_granularity": "selective"},
    },
    "sliding window": {"model": {"window_size": (5, 0)}},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_training_has_the_bits_of_local_layers_at_every_tp(name):
    options = {"attention": "blockwise", "steps": 2, **OPTIONS[name]}
    one = run("tree", 1, te=True, **options)
    for tp, sp in ((2, True), (4, True)):
        assert not differences(one, run("tree", tp, sp, te=True, **options)), f"tp={tp} sp={sp}"
    local = run("tree", 1, **options)
    assert not differences(of_the_run(local), of_the_run(one))
    assert matrices(local) <= matrices(one)


S, B, H, G, D = 12, 2, 4, 2, 8


def operands() -> list[Tensor]:
    """q, k, v as [s, b, heads, d] and the gradient of the output as [s, b, heads·d]."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((S, B, H, D), (S, B, G, D), (S, B, G, D), (S, B, H * D))
    return [torch.randn(shape, generator=generator) for shape in shapes]


def module(**settings: Any) -> Any:
    import transformer_engine.pytorch as te

    return te.DotProductAttention(H, D, num_gqa_groups=G, **{"attention_dropout": 0.0, "qkv_format": "sbhd"} | settings)


def result(attention: Any, operands: list[Tensor], **arguments: Any) -> list[Tensor]:
    *qkv, dy = operands
    qkv = [x.clone().requires_grad_() for x in qkv]
    y = attention(*qkv, **arguments)
    return [y.detach(), *torch.autograd.grad(y, qkv, dy)]


def in_every_format() -> tuple[list[Tensor], list[list[Tensor]], list[Tensor]]:
    """Of sbhd, by blocks; of bshd, and of thd with every sequence of the batch in it; of sbhd, unfused."""
    q = operands()
    with patches.enabled(attention="blockwise"):
        sbhd = result(module(), q)
        bshd = result(module(qkv_format="bshd"), [x.transpose(0, 1) for x in q])
        edges = torch.arange(0, (B + 1) * S, S, dtype=torch.int32)
        thd = result(
            module(qkv_format="thd", attn_mask_type="padding_causal"), [x.transpose(0, 1).flatten(0, 1) for x in q],
            cu_seqlens_q=edges, cu_seqlens_kv=edges, max_seqlen_q=S, max_seqlen_kv=S,
        )  # fmt: skip
    with patches.enabled(attention="unfused"):
        unfused = result(module(), q)
    return sbhd, [[x.transpose(0, 1) for x in bshd], [x.unflatten(0, (B, S)).transpose(0, 1) for x in thd]], unfused


def test_every_format_has_the_same_bits():
    sbhd, others, unfused = on_ranks(1, in_every_format)[0]
    for other in others:
        for x, y in zip(sbhd, other, strict=True):
            assert_same_bits(x.contiguous(), y.contiguous())
    assert not torch.equal(sbhd[0], unfused[0])  # it is not unfused that ran
    for x, y in zip(sbhd, unfused, strict=True):
        torch.testing.assert_close(x, y, rtol=2e-5, atol=2e-6)


BANDS: dict[str, dict[str, Any]] = {
    "no mask": {"attn_mask_type": "no_mask"},
    "window": {"attn_mask_type": "causal", "window_size": (3, 0)},
    "window on both sides": {"attn_mask_type": "no_mask", "window_size": (3, 2)},
}


def banded(settings: dict[str, Any]) -> list[list[Tensor]]:
    found = []
    for attention in ("blockwise", "unfused"):
        with patches.enabled(attention=attention):
            found.append(result(module(**settings), operands()))
    return found


@pytest.mark.parametrize("name", BANDS)
def test_it_is_the_function_that_unfused_is(name):
    for x, y in zip(*on_ranks(1, banded, BANDS[name])[0], strict=True):
        torch.testing.assert_close(x, y, rtol=2e-5, atol=2e-6)


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "dropout": ({"attention_dropout": 0.1}, {}, "attention dropout"),
    "bias": ({}, {"core_attention_bias_type": "alibi"}, "core_attention_bias_type is not covered"),
    "a tensor of biases": ({}, {"core_attention_bias": torch.zeros(1)}, "core_attention_bias is not covered"),
    "padding": ({}, {"attn_mask_type": "padding"}, "attn_mask_type='padding' of whole batches is not covered"),
    "a window of packed sequences": (
        {},
        {"attn_mask_type": "padding", "window_size": (3, 2), "qkv_format": "thd"},
        "a sliding window over packed sequences is covered with padding_causal alone",
    ),
    "any mask": ({}, {"attn_mask_type": "arbitrary"}, "attn_mask_type='arbitrary' of whole batches is not covered"),
    "fp8 output": ({}, {"fp8_output": True}, "fp8_output is not covered: leave it False"),
    "the largest score": ({"return_max_logit": True}, {}, "return_max_logit is not covered"),
    "splits": ({}, {"num_splits": 2}, "num_splits > 1 is not covered"),
}


def refused(settings: dict[str, Any], arguments: dict[str, Any]) -> str:
    with patches.enabled(attention="blockwise"):
        try:
            given = operands()
            if arguments.get("qkv_format") == "thd":
                edges = torch.tensor([0, S])
                given, arguments = [x[:, 0] for x in given], arguments | {"cu_seqlens_q": edges, "cu_seqlens_kv": edges}
            result(module(**settings), given, **arguments)
        except patches.UnsupportedError as error:
            return str(error)
        except TypeError:  # of an older version, which has no such argument
            return "no such argument"
    return "not refused"


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_covered_is_refused_by_name(name):
    settings, arguments, message = REFUSED[name]
    found = on_ranks(1, refused, settings, arguments)[0]
    assert message in found or found == "no such argument"
