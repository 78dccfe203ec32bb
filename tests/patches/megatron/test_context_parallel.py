"""Context parallelism (CP) in stock megatron-core under `patches.enable(batch="order-free", chunks=8)`: one set of bits
with every other axis of the layout; without it, gathered keys alone don't give one."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.dot_product_attention import DotProductAttention

import patches
from patches.ops.bias import bias_per_token
from patches.ops.norm import TOKENS, norm
from patches.ops.sequences import ATTRIBUTE
from patches.ops.sharded import Shards
from patches.order.batch_sum import BatchSum
from patches.order.chunks import own_tokens, tree_order
from tests.support import plain_megatron
from tests.support.bits import assert_same_bits
from tests.support.megatron_runs import FULL_RECOMPUTE, assert_same_order_free, differences, run
from tests.support.ranks import on_ranks

TWO = {"num_layers": 2}
SHARDED = {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}
# Eight sequences of eight chunks, in each of which another number of tokens counts.
BATCH = {"seq": 32, "global_batch": 8, "micro_batch": 1, "steps": 5, "chunks": 8}

# name: (options, layouts that must have the bits of a single rank with micro-batches of 1)
CASES: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "qwen3, tied": (
        {"model": {**TWO, "num_query_groups": 4}, "tied": True},
        [
            {"cp": 2, "micro_batch": 4},
            {"cp": 4, "tp": 2, "sp": True},
            {"cp": 2, "pp": 2, "dp": 2, "micro_batch": 2},
            {"cp": 2, "dp": 2, "ddp": SHARDED},
        ],
    ),
    "gpt-2 shape fp32": (
        {"model": TWO, "shape": "gpt2", "dtype": "fp32"},
        [{"cp": 4, "micro_batch": 2}, {"cp": 2, "tp": 4, "sp": True}, {"cp": 2, "tp": 2, "pp": 2}],
    ),
    "two KV groups fp32, full recompute": (
        {"model": {"num_query_groups": 2, **FULL_RECOMPUTE}, "dtype": "fp32", "steps": 2},
        [{"cp": 2, "tp": 4}, {"cp": 4, "ddp": SHARDED}],
    ),
    "selective recompute": (
        {"model": {"recompute_granularity": "selective"}, "steps": 2},
        [{"cp": 4}, {"cp": 2, "tp": 2, "sp": True, "micro_batch": 2}],
    ),
    "virtual stages, fused wgrad": (
        {"model": {"num_layers": 4, "gradient_accumulation_fusion": True}, "steps": 2, "tied": True},
        [{"cp": 2, "pp": 2, "vpp": 2}, {"cp": 2, "pp": 4, "ddp": {"overlap_grad_reduce": True}}],
    ),
}
SLOW = [
    {"cp": cp, "tp": tp, "pp": pp, "dp": dp, "micro_batch": micro_batch, "sp": sp}
    for cp in (1, 2, 4)
    for tp in (1, 2, 4)
    for pp in (1, 2)
    for dp in (1, 2)
    for micro_batch in (1, 4)
    for sp in {False, tp > 1}
    if cp * tp * pp * dp <= 8
]


@pytest.mark.parametrize("name", CASES)
def test_training_has_same_bits_at_every_layout(name):
    options, layouts = CASES[name]
    assert_same_order_free({**BATCH, **options}, layouts)


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("shape", ({"tied": True}, {"shape": "gpt2", "dtype": "fp32", "tied": True}), ids=str)
def test_training_has_same_bits_at_every_combination_of_sizes(shape):
    assert_same_order_free({**BATCH, **shape, "model": TWO, "steps": 2}, SLOW)


@pytest.mark.slow
def test_more_chunks_than_ranks_need_have_same_bits():
    layouts = ({"cp": 2}, {"cp": 4, "tp": 2, "sp": True}, {"tp": 8, "sp": True}, {"cp": 8})
    assert_same_order_free({**BATCH, "seq": 64, "chunks": 32, "steps": 2}, layouts)


def test_chunks_are_part_of_the_contract():
    """Other numbers of them round elsewhere: each is a run of its own."""
    eight, four, one = (run("order-free", 1, **{**BATCH, "steps": 1, "chunks": n}) for n in (8, 4, 1))
    assert differences(eight, four) and differences(four, one)
    whole = run("order-free", 1, **{**BATCH, "steps": 1, "chunks": 1, "attention": "blockwise"})
    assert whole["step0 loss"] == four["step0 loss"] == eight["step0 loss"]  # forward knows no chunks
    assert differences(eight, whole)


def test_gradients_are_those_of_whole_sequences_but_for_rounding():
    options = {**BATCH, "steps": 1, "dtype": "fp32", "model": TWO, "digested": False, "attention": "blockwise"}
    chunks, whole = (run("order-free", 1, **{**options, "chunks": n})["step0 gradients"] for n in (8, 1))
    for name, gradient in whole.items():
        # A chunk's float32 sums are rounded, eight times as many as a sequence's, and may cancel.
        close = 1e-5 * gradient.abs().max().item()
        torch.testing.assert_close(
            chunks[name], gradient, rtol=1e-4, atol=close, msg=lambda text, name=name: name + text
        )


def gathering(forward: Any) -> Any:
    """Stock attention of the rank's queries to the keys of all ranks, each step of it torch's own."""

    def attend(self: Any, query: Any, key: Any, value: Any, *unused: Any, **kwargs: Any) -> Any:
        group = parallel_state.get_context_parallel_group()
        keys = torch.arange(len(key) * group.size())
        key, value = (_Gather.apply(x, group) for x in (key, value))
        queries = own_tokens(keys, group) if group.size() > 1 else keys
        return forward(self, query, key, value, (keys > queries.unsqueeze(1))[None, None])

    return attend


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any, group: Any) -> Any:
        ctx.group = group
        parts = [torch.empty_like(x) for _ in range(group.size())]
        dist.all_gather(parts, x.contiguous(), group=group)
        halves = [part.chunk(2) if group.size() > 1 else (part, part[:0]) for part in parts]
        return torch.cat([first for first, _ in halves] + [second for _, second in reversed(halves)])

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        total = gradient.contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        return own_tokens(total, ctx.group) if ctx.group.size() > 1 else total, None


def stock(options: dict[str, Any]) -> dict[str, Any]:
    """Megatron's local layers refuse context parallelism: here they are made to take it, and nothing else."""
    patches.cpu.enable()
    build = DotProductAttention.__init__

    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        of_whole_sequences = copy.copy(config)
        of_whole_sequences.context_parallel_size = 1
        build(self, of_whole_sequences, *args, **kwargs)

    DotProductAttention.__init__ = __init__
    DotProductAttention.forward = gathering(DotProductAttention.forward)
    return plain_megatron.train(**options)


def test_stock_sums_over_context_parallel_ranks_change_bits():
    options = {key: value for key, value in BATCH.items() if key != "chunks"} | {"steps": 2, "tied": True}
    one, two, four = (on_ranks(cp, stock, {**options, "cp": cp})[0] for cp in (1, 2, 4))
    for a, b in ((one, two), (one, four), (two, four)):
        assert any(name.startswith("final/") for name in differences(a, b))
    losses = [[float.fromhex(loss) for loss in record["step0 loss"]] for record in (one, two, four)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3) and losses[2] == pytest.approx(losses[0], rel=1e-3)


def with_mask(options: dict[str, Any], spoilt: bool) -> dict[str, Any]:
    """As Megatron-LM's loader makes it where it makes one: of every query and key, its rows cut like the tokens."""
    patches.enable(batch="order-free", chunks=8)

    def forward(iterator: Any, model: Any) -> Any:
        tokens = next(iterator)
        x, y = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        mask = torch.ones(1, 1, x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        mask[..., -1, 0] |= spoilt
        batch = {"x": x, "y": y, "positions": torch.arange(x.shape[1]).expand_as(x), "attention_mask": mask}
        own = plain_megatron.of_this_cp_rank({**batch, "loss": torch.ones(x.shape)})
        loss = lambda losses: plain_megatron.masked_loss(own["loss"], losses)  # noqa: E731
        return model(own["x"], own["positions"], own["attention_mask"], labels=own["y"]), loss

    plain_megatron.forward_masked = forward
    return plain_megatron.train(**options)


def test_the_causal_mask_of_a_ranks_queries_is_taken_and_any_other_refused():
    options = {"seq": 32, "global_batch": 2, "micro_batch": 1, "steps": 1}
    one, two = (on_ranks(cp, with_mask, {**options, "cp": cp}, False)[0] for cp in (1, 2))
    assert not differences(one, two)
    with pytest.raises(AssertionError, match="UnsupportedError: an attention mask"):
        on_ranks(2, with_mask, {**options, "cp": 2}, True)


def train(chunks: int, options: dict[str, Any], batch: patches.Batch = "order-free") -> None:
    patches.enable(batch=batch, chunks=chunks)
    plain_megatron.train(**{"seq": 32, "global_batch": 2, "micro_batch": 1, "steps": 1, **options})


REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "sums in order": ((1, {}, "ordered"), "context_parallel_size=2 is not covered by batch='ordered'.*--chunks 4"),
    "no chunks": ((1, {}), "context_parallel_size=2 needs chunks"),
    "an odd length": ((8, {"seq": 36}), "sequence of 36 tokens has no 8 equal chunks"),
    "hierarchical": ((4, {"model": {"hierarchical_context_parallel_sizes": [1, 2]}}), "hierarchical_context_parallel_"),
    "hybrid": ((4, {"model": {"hybrid_context_parallel": True, "max_seqlen_per_dp_cp_rank": 32}}), "hybrid_context_pa"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_covered_is_refused_by_name(name):
    what, message = REFUSED[name]
    if name == "hybrid" and not hasattr(parallel_state, "get_hybrid_data_context_parallel_groups"):
        pytest.skip("this version has none")
    with pytest.raises(AssertionError, match=message):
        on_ranks(2, train, what[0], {**what[1], "cp": 2}, *what[2:])


def test_packed_sequences_have_no_chunks():
    from patches.ops.attention import blockwise_attention
    from patches.order.visible import Packed, Visible

    edges = torch.tensor([0, 8])
    x = torch.zeros(8, 1, 2, 8)
    shards = Shards(patches.Contract(batch="order-free", chunks=2, attention="blockwise"))
    with pytest.raises(patches.UnsupportedError, match="packed sequences are not covered with chunks=2: use chunks=1"):
        blockwise_attention(x, x, x, Visible(packed=Packed.of(edges, edges)), 1.0, 2, shards)


def model_without_ranks() -> None:
    """A model that says that it is context-parallel, on ranks that are not."""
    patches.enable(batch="order-free", chunks=4)
    initialize = parallel_state.initialize_model_parallel
    parallel_state.initialize_model_parallel = lambda *args, **sizes: initialize(*args)
    plain_megatron.train(seq=32, global_batch=2, cp=2)


def test_a_model_of_other_ranks_is_refused():
    with pytest.raises(AssertionError, match="context_parallel_size=2 in a model of 1 context-parallel ranks: give"):
        on_ranks(2, model_without_ranks)


CHUNKS, S, B, H = 8, 32, 2, 16


def sums_of_chunks(strategy: str, context: int) -> list[torch.Tensor]:
    """Gradients of gamma, beta and bias, of tokens spread over context- and over tensor-parallel ranks."""
    size = dist.get_world_size()
    groups = [dist.new_group(list(ranks)) for ranks in torch.arange(size).view(context, -1)]  # TP is inside
    across = [dist.new_group(list(ranks)) for ranks in torch.arange(size).view(context, -1).t()]
    tp = size // context
    group, over = groups[dist.get_rank() // tp], across[dist.get_rank() % tp]
    contract = patches.Contract(strategy, batch="order-free", chunks=CHUNKS, attention="blockwise")
    shards = Shards(contract, group if tp > 1 else None, over if context > 1 else None)
    x, dy = (torch.randn(S, B, H, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    if context > 1:
        x, dy = own_tokens(x, over), own_tokens(dy, over)
    x, dy = (t.chunk(tp)[group.rank()] for t in (x, dy))
    parameters = [torch.nn.Parameter(torch.ones(H)) for _ in range(3)]
    for parameter in parameters:
        setattr(parameter, ATTRIBUTE, BatchSum.of(torch.zeros(H, dtype=torch.int64)))
    gamma, beta, bias = parameters
    y = norm(x.contiguous(), gamma, beta, 1e-5, True, TOKENS, shards) + bias_per_token(bias, x.shape, shards)
    y.backward(dy)
    totals = [getattr(parameter, ATTRIBUTE).total for parameter in parameters]
    if context > 1:
        for total in totals:
            dist.all_reduce(total, group=over)
    return totals


@pytest.mark.parametrize("strategy", ("tree", "gather"))
def test_sums_of_a_chunk_are_the_same_however_ranks_share_it(strategy):
    """A rank has several chunks, one, or a part of one."""
    one = on_ranks(1, sums_of_chunks, strategy, 1)[0]
    for size, context in ((2, 1), (8, 1), (4, 2), (4, 4), (8, 2), (8, 4)):
        for totals in on_ranks(size, sums_of_chunks, strategy, context):
            for total, expected in zip(totals, one, strict=True):
                assert torch.equal(total, expected), (size, context)


def test_a_chunks_sum_is_of_its_own_tokens():
    assert tree_order(8) == [0, 7, 1, 6, 2, 5, 3, 4]
    dy = torch.randn(S, B, H, generator=torch.Generator().manual_seed(1))
    expected = sum((chunk[:, j].double().sum(0) * 2**30).round().long() for chunk in dy.chunk(CHUNKS) for j in range(B))
    found = on_ranks(1, sums_of_chunks, "gather", 1)[0][2]
    # Each of the contributions is a float32 sum of four numbers: off by half a unit in its last place.
    assert (found - expected).abs().max() <= CHUNKS * B * 2**30 * 2.0**-24 * 8
    assert_same_bits(found, on_ranks(1, sums_of_chunks, "gather", 1)[0][2])
