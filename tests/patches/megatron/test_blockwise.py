"""attention="blockwise" in Megatron's local layers: the same bits at every TP size, the function that unfused is."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from packaging.version import Version

import patches
from patches.registry import REGISTRY
from tests.support.bits import assert_same_bits
from tests.support.megatron_runs import FULL_RECOMPUTE, differences, run
from tests.support.ranks import on_ranks

CASES: dict[str, dict[str, Any]] = {
    "qwen3": {"seq": 140, "micro_batch": 1, "microbatches": 1},  # two blocks of keys
    "gpt-2 shape fp32": {"shape": "gpt2", "dtype": "fp32", "seq": 40},
    "four KV groups": {"model": {"num_query_groups": 4}},
    "one KV group fp32": {"model": {"num_query_groups": 1}, "dtype": "fp32"},
    "two KV groups, sixteen heads": {"model": {"num_query_groups": 2, "num_attention_heads": 16}},
    "sliding window": {"model": {"window_size": (5, 0)}},
    "full recompute": {"model": FULL_RECOMPUTE},
    "selective recompute": {"model": {"recompute_granularity": "selective"}},
}


@pytest.mark.parametrize("name", CASES)
def test_training_by_blocks_has_same_bits_at_every_tp(name):
    options = {"attention": "blockwise", "steps": 1, **CASES[name]}
    one = run("tree", 1, **options)
    for tp, sp in ((2, True), (4, True), (8, False)):
        assert not differences(one, run("tree", tp, sp, **options)), f"tp={tp} sp={sp}"


@pytest.mark.parametrize("name", ("four KV groups", "one KV group fp32"))
def test_training_by_blocks_under_gather_has_same_bits_at_every_tp(name):
    options = {"attention": "blockwise", "steps": 1, **CASES[name]}
    one = run("gather", 1, **options)
    for tp, sp in ((2, True), (8, False)):
        assert not differences(one, run("gather", tp, sp, **options)), f"tp={tp} sp={sp}"


def test_a_cpu_has_it_where_it_is_named_alone():
    with patches.enabled():
        assert REGISTRY.contract.attention == "unfused"
    with patches.enabled(attention="blockwise"):
        assert REGISTRY.contract.attention == "blockwise"


Q, K, V = ((12, 2, 4, 8), (12, 2, 2, 8), (12, 2, 2, 8))
SETTINGS: dict[str, tuple[dict[str, Any], AttnMaskType, str]] = {
    "causal": ({}, AttnMaskType.causal, "none"),
    "causal, its mask given": ({}, AttnMaskType.causal, "causal"),
    "no mask": ({}, AttnMaskType.no_mask, "none"),
    "sliding window": ({"window_size": (3, 0)}, AttnMaskType.causal, "none"),
    "window on both sides": ({"window_size": (3, 2)}, AttnMaskType.causal, "none"),
    "layer scaling": (
        {"apply_query_key_layer_scaling": True, "attention_softmax_in_fp32": True}, AttnMaskType.causal, "none",
    ),
}  # fmt: skip


def one_rank() -> None:
    patches.cpu.enable()
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)


def module(kind: AttnMaskType, settings: dict[str, Any], **more: Any) -> DotProductAttention:
    config = TransformerConfig(
        num_layers=3, hidden_size=32, num_attention_heads=4, num_query_groups=2, kv_channels=8, hidden_dropout=0.0,
        attention_dropout=0.0, masked_softmax_fusion=False, **settings,
    )  # fmt: skip
    return DotProductAttention(config, 3, kind, "self", **more)


def mask_of(what: str) -> torch.Tensor | None:
    if what == "none":
        return None
    mask = torch.ones(2, 1, 12, 12, dtype=torch.bool).triu(1)
    if what == "other":
        mask[1, 0, 7:, :3] = True
    return mask


def operands() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in (Q, K, V, (12, 2, 32))]


def both(settings: dict[str, Any], kind: AttnMaskType, mask: str) -> list[list[torch.Tensor]]:
    """y, dq, dk and dv of the module, unfused and by blocks."""
    one_rank()
    found = []
    for attention in ("unfused", "blockwise"):
        *qkv, dy = operands()
        with patches.enabled(attention=attention):
            y = module(kind, settings)(*qkv, mask_of(mask))
            found.append([y.detach(), *torch.autograd.grad(y, qkv, dy.detach())])
    return found


@pytest.mark.parametrize("name", SETTINGS)
def test_attention_by_blocks_is_the_function_that_unfused_is(name):
    """In float32: of a dozen terms each, a few roundings."""
    if "window_size" in SETTINGS[name][0] and Version(version("megatron-core")) < Version("0.15"):
        pytest.skip("this version's own layers have no window")
    unfused, blockwise = on_ranks(1, both, *SETTINGS[name])[0]
    for x, y in zip(unfused, blockwise, strict=True):
        torch.testing.assert_close(x, y, rtol=2e-5, atol=2e-6)


def packed() -> list[list[torch.Tensor]]:
    """Two sequences in one, with two rows of padding before the second; and each by itself."""
    one_rank()
    q, k, v, dy = (x.detach()[:, 0] for x in operands())
    found = []
    with patches.enabled(attention="blockwise"):
        attention = module(AttnMaskType.causal, {})
        edges, padded = torch.tensor([0, 5, 10]), torch.tensor([0, 7, 12])
        params = PackedSeqParams("thd", edges, edges, padded, padded, 7, 7)
        for rows in (slice(12), slice(5), slice(7, 12)):
            qkv = [x[rows].clone().requires_grad_() for x in (q, k, v)]
            if rows == slice(12):
                y = attention(*qkv, None, packed_seq_params=params)
            else:
                y = attention(*(x.unsqueeze(1) for x in qkv), None).squeeze(1)
            found.append([y.detach(), *torch.autograd.grad(y, qkv, dy[rows])])
    return found


def test_packed_sequences_are_each_by_itself():
    whole, first, second = on_ranks(1, packed)[0]
    for x, a, b in zip(whole, first, second, strict=True):
        assert_same_bits(x, torch.cat([a, torch.zeros_like(a[:2]), b]))


REFUSED: dict[str, tuple[dict[str, Any], AttnMaskType, str, dict[str, Any], str]] = {
    "another mask": ({}, AttnMaskType.causal, "other", {}, "an attention mask that is not the causal one"),
    "a mask without a kind": (
        {},
        AttnMaskType.padding,
        "causal",
        {},
        "attn_mask_type='padding' with an attention mask",
    ),
    "any mask": ({}, AttnMaskType.arbitrary, "none", {}, "attn_mask_type='arbitrary' without an attention mask"),
    "dropout": (
        {},
        AttnMaskType.causal,
        "none",
        {"attention_dropout": 0.1},
        "attention dropout is not covered: set it to 0 (--attention-dropout 0)",
    ),
    "wide heads": ({"kv_channels": 288}, AttnMaskType.causal, "none", {}, "one width up to 256, not 288"),
}


def refused(settings: dict[str, Any], kind: AttnMaskType, mask: str, more: dict[str, Any]) -> str:
    one_rank()
    torch.cuda.current_device = lambda: "cpu"  # where Megatron makes the offset of a softmax
    width = settings.get("kv_channels", 8)
    q, k = torch.zeros(12, 2, 4, width), torch.zeros(12, 2, 2, width)
    with patches.enabled(attention="blockwise"):
        attention = module(kind, {name: value for name, value in settings.items() if name != "kv_channels"}, **more)
        try:
            attention(q, k, k, mask_of(mask))
        except patches.UnsupportedError as error:
            return str(error)
    return "not refused"


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_band_of_keys_is_refused_by_name(name):
    *what, message = REFUSED[name]
    assert message in on_ranks(1, refused, *what)[0]
