"""Fused attention under the patches: what was asked for runs, deterministically, once it was seen to keep the promise.

No fused kernel runs without a GPU; stand-ins for TE's backends do, one that keeps the promise and some that don't.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import patches
from tests.support import plain_megatron
from tests.support.head_by_head import Spoilt, attention
from tests.support.megatron_runs import differences
from tests.support.ranks import on_ranks
from tpcheck.config.load import parse_run
from tpcheck.doctor import attention as doctor_attention

CALLS: list[int] = []


def install(chosen: str, kernel: Any) -> None:
    """TE chooses the backend `chosen`, which computes `kernel(q, k, v)`."""
    from transformer_engine.pytorch.attention.dot_product_attention import backends, utils

    def get_attention_backend(params: Any) -> tuple[Any, ...]:
        picked = [name == chosen for name in ("flash", "fused", "unfused")]
        return picked[0], None, picked[1], 1, picked[2], picked

    def forward(self: Any, q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> Any:
        assert self.deterministic and q.shape == k.shape == v.shape and q.is_contiguous() and k.is_contiguous()
        CALLS.append(q.shape[2])
        return kernel(q, k, v).flatten(2)

    utils.get_attention_backend = get_attention_backend
    backends.FlashAttention.forward = backends.FusedAttention.forward = forward


def few_heads_differ(q: Any, k: Any, v: Any) -> Any:
    return Spoilt.apply(q, k, v, 2, int(q.shape[2] == 1))


KERNELS = {"keeps the promise": attention, "does not": few_heads_differ}


def module_runs(asked: Any, chosen: str, kernel: str, times: int = 1) -> tuple[str, list[int]]:
    """What a module of eight heads says, and with how many heads the kernel was called."""
    import transformer_engine.pytorch as te

    install(chosen, KERNELS[kernel])
    q = torch.randn(6, 2, 8, 4, requires_grad=True)
    kv = torch.randn(6, 2, 4, 4, requires_grad=True)
    CALLS.clear()
    with patches.enabled(attention=asked):
        module = te.DotProductAttention(8, 4, num_gqa_groups=4, attention_dropout=0.0)
        try:
            for _ in range(times):
                module(q, kv, kv).sum().backward()
        except patches.UnsupportedError as error:
            return str(error), list(CALLS)
    return "", list(CALLS)


@pytest.mark.parametrize("backend", ("flash", "fused"))
def test_a_backend_that_keeps_the_promise_is_verified_once_and_runs(backend):
    message, heads = on_ranks(1, module_runs, backend, backend, "keeps the promise", 3)[0]
    assert not message
    assert heads == [8, 8, 4, 4, 2, 2, 2, 2, *[1] * 8, 8, 8, 8]


@pytest.mark.parametrize("backend", ("flash", "fused"))
def test_a_backend_that_does_not_is_refused_by_name_and_shape(backend):
    message, heads = on_ranks(1, module_runs, backend, backend, "does not")[0]
    assert message.startswith(
        f"attention='{backend}' does not keep the promise for queries [6, 2, 8, 4] and keys [6, 2, 8, 4] of "
        "torch.float32: dk of a head differs when 1 "
    )
    assert heads[-1] == 1


@pytest.mark.parametrize(("asked", "chosen"), (("flash", "fused"), ("fused", "unfused"), ("flash", "unfused")))
def test_a_backend_that_was_not_asked_for_is_refused(asked, chosen):
    message = on_ranks(1, module_runs, asked, chosen, "keeps the promise")[0][0]
    assert f"but attention={asked!r} was asked for" in message and f"chose its {chosen}" in message


def no_backend() -> str:
    import transformer_engine.pytorch as te

    q = torch.ones(6, 2, 8, 4)
    install("none", attention)
    with patches.enabled(attention="flash"), pytest.raises(patches.UnsupportedError) as error:
        te.DotProductAttention(8, 4, attention_dropout=0.0)(q, q, q)
    return str(error.value)


def test_no_backend_at_all_is_one_clear_refusal():
    assert "attention='flash' cannot run here: No dot product attention backend" in on_ranks(1, no_backend)[0]


def training(options: dict[str, Any]) -> dict[str, Any]:
    install("flash", attention)
    patches.enable(attention="flash")
    return plain_megatron.train(te=True, steps=1, dtype="fp32", micro_batch=1, microbatches=1, **options)


def test_training_with_a_fused_backend_has_same_bits_at_every_tp():
    options = {"model": {"num_query_groups": 4}}
    one = on_ranks(1, training, options)[0]
    for tp in (2, 8):
        assert not differences(one, on_ranks(tp, training, {**options, "tp": tp})[0]), f"tp={tp}"


def local_layers() -> str:
    patches.enable(attention="flash")
    try:
        plain_megatron.train(steps=1)
    except patches.UnsupportedError as error:
        return str(error)
    return "not refused"


def test_local_layers_have_no_fused_attention():
    assert "this layer is Megatron's local one" in on_ranks(1, local_layers)[0]


def doctor() -> dict[str, tuple[str, str]]:
    config = parse_run(
        {"model": "qwen3-tiny", "layers": "te", "attention": "flash", "seq_length": 16, "micro_batch_size": 1}
    )
    return {one.name: (one.found, one.verdict) for one in doctor_attention.attention(config)}


def test_the_doctor_runs_te_backends_that_are_here():
    """On the stand-in only the unfused one is."""
    found = on_ranks(1, doctor)[0]
    assert found["te unfused, patched"] == ("each head by itself", "ok")
    assert found["te flash, patched"] == ("refused", "no")
    assert found["te fused, patched"] == ("refused", "note")
    assert found["te flash, stock"] == ("does not run", "note")
