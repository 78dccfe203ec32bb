"""What a training step costs on paper, for stock and either strategy of the patches: per rank, of its TP group.

A term *is* its formula (`cost.formulas`). Three quantities:

    flops     of products: a product [M, K]·[K, N] is 2·M·K·N; norms, softmax and the like are not counted
    bytes     that a rank sends, each collective at the least volume that moves its data, with ρ = (t-1)/t:
              all-reduce 2·ρ·S, all-gather, reduce-scatter and all-to-all ρ·S, S the whole tensor's bytes;
              over context-parallel ranks likewise, stock's as with Megatron's cp_comm_type "all_gather"
    memory    beyond stock's, while one sum over ranks is under way; the largest term counts

Attention is unfused and not causal, as Megatron's own is: 12·T·s·q FLOP for 9 of the patches' own, which walks half of
the scores, but those of backward twice (`cost.attention` has both, and what they move and hold). Summing gradients over
data- and context-parallel ranks adds the same to all three and is left out, and so are collectives of a few scalars:
the gradient norm, the optimizer's flags.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log2
from typing import Literal

from tpcheck.config.schema import ModelConfig, RunConfig
from tpcheck.config.strategies import STRATEGIES, Strategy
from tpcheck.cost import experts
from tpcheck.cost.formulas import LOCAL, Lines, evaluate, is_small, tree_all_reduce

__all__ = ["LEGEND", "STRATEGIES", "Quantity", "Strategy", "Term", "step", "strategies_of", "symbols", "total"]

Quantity = Literal["flops", "bytes", "memory"]

LEGEND = {
    "t": "TP size",
    "p": "CP size",
    "ρ": "(t-1)/t",
    "n": "microbatches of a step",
    "T": "tokens of a microbatch, a CP rank's",
    "s": "tokens of a sequence",
    "u": "batch leaves in T",
    "L": "layers",
    "r": "forward passes of a layer (2 with recompute)",
    "h": "hidden size",
    "q": "width of all queries",
    "k": "width of all ranks' keys",
    "w": "width of QKV",
    "P": "width of all queries, each head filled up to a power of two",
    "l": "leaves of a group's heads on a rank",
    "i": "their sums that are held at once",
    "d": "width of a head",
    "f": "feed-forward width",
    "g": "its pieces in fc1 (2: gate and up)",
    "V": "padded vocabulary",
    "c": "parameters of a norm (gamma, beta)",
    "e": "bytes of an element",
    **experts.LEGEND,
}


@dataclass(frozen=True)
class Term:
    """One line of the account, and the strategies that pay it."""

    quantity: Quantity
    what: str
    strategies: tuple[Strategy, ...]
    formula: str
    value: float


def step(config: RunConfig) -> list[Term]:
    """All terms of one step of `config`, whose own strategy does not matter."""
    known, counted = symbols(config), strategies_of(config)
    quantities: dict[Quantity, list[Lines]] = {
        "flops": [_flops(config), experts.expert_flops(config)],
        "bytes": [_bytes(config, known), experts.expert_bytes(config, known)],
        "memory": [_memory(config, known), experts.expert_memory(config, known)],
    }
    return [
        Term(quantity, what, pay, formula, evaluate(formula, known))
        for quantity, parts in quantities.items()
        for lines in parts
        for what, strategies, formula in lines
        if (pay := tuple(strategy for strategy in strategies if strategy in counted))
    ]


def strategies_of(config: RunConfig) -> tuple[Strategy, ...]:
    """Those that `config` can be trained with."""
    return STRATEGIES if config.model.experts is None else LOCAL


def total(terms: list[Term], quantity: Quantity, strategy: Strategy) -> float:
    """What `strategy` pays: memory's terms are held one after the other, the others add up."""
    values = [term.value for term in terms if term.quantity == quantity and strategy in term.strategies]
    return max(values, default=0.0) if quantity == "memory" else sum(values)


def symbols(config: RunConfig) -> dict[str, float]:
    """The values of `LEGEND`'s symbols."""
    model, tp = config.model, config.tp
    shared = model.experts and model.experts.shared_ffn_hidden_size
    leaves = max(1, config.leaves // model.num_query_groups) / max(1, tp // model.num_query_groups)
    return {
        "t": tp,
        "p": config.cp,
        "ρ": (tp - 1) / tp,
        "n": config.microbatches,
        "T": config.micro_batch_size * config.seq_length // config.cp,
        "s": config.seq_length,
        "u": config.micro_batch_size * config.chunks // config.cp,
        "L": model.num_layers,
        "r": 2 if config.recompute else 1,
        "h": model.hidden_size,
        "q": model.num_attention_heads * model.head_dim,
        "k": max(model.num_query_groups, tp) * model.head_dim,
        "w": (model.num_attention_heads + 2 * model.num_query_groups) * model.head_dim,
        "P": model.num_attention_heads * max(16, 1 << (model.head_dim - 1).bit_length()),
        "l": leaves,
        "i": 1 + log2(leaves) if leaves > 2 else 1,
        "d": model.head_dim,
        "f": (shared or 0) if model.experts else model.ffn_hidden_size,
        "g": 2 if model.activation == "swiglu" else 1,
        "V": model.padded_vocab_size,
        "c": 1 if model.normalization == "RMSNorm" else 2,
        "e": 2 if config.dtype == "bf16" else 4,
        **experts.expert_symbols(config),
    }


def _every_token_meets_an_mlp(config: RunConfig) -> bool:
    """Not in a mixture of experts, unless one expert is shared."""
    return config.model.experts is None or config.model.experts.shared_ffn_hidden_size is not None


def _flops(config: RunConfig) -> Lines:
    """A sharded sum is the row-parallel layers' forward and the column-parallel ones' dgrad: gather does it whole."""
    mlp = _every_token_meets_an_mlp(config)
    fc1, fc2 = (("fc1", "·L", "·r", "·T·h·g·f"),) * mlp, (("fc2", "·L·T·f·h"),) * mlp
    for name, layer, again, size in (("QKV", "·L", "·r", "·T·h·w"), *fc1, ("output layer", "", "", "·T·h·V")):
        yield f"{name} forward", STRATEGIES, f"2·n{again}{layer}{size}/t"
        yield f"{name} dgrad", LOCAL, f"2·n{layer}{size}/t"
        yield f"{name} dgrad, whole on every rank", ("gather",), f"2·n{layer}{size}"
        yield f"{name} wgrad", STRATEGIES, f"2·n{layer}{size}/t"
    for name, size in (("proj", "·L·T·q·h"), *fc2):
        yield f"{name} forward", LOCAL, f"2·n·r{size}/t"
        yield f"{name} forward, whole on every rank", ("gather",), f"2·n·r{size}"
        yield f"{name} dgrad", STRATEGIES, f"2·n{size}/t"
        yield f"{name} wgrad", STRATEGIES, f"2·n{size}/t"
    yield "attention forward", STRATEGIES, "4·n·r·L·T·s·q/t"
    yield "attention backward", STRATEGIES, "8·n·L·T·s·q/t"


def _bytes(config: RunConfig, known: dict[str, float]) -> Lines:
    if config.cp > 1:
        yield "CP, attention: all-gather of keys and values", STRATEGIES, "2·n·(r+1)·L·(p-1)·T·k/t·e"
        yield "CP, attention: reduce-scatter of their gradients", ("stock",), "2·n·L·(p-1)·T·k/t·e"
        yield "CP, attention: all-to-all of float32 roots", ("gather", "tree"), "2·n·L·(p-1)·T·k/t·4"
    if config.tp == 1:
        return
    sp, model = config.sequence_parallel, config.model
    yield from _embedding_bytes(sp, model)
    mlp = _every_token_meets_an_mlp(config)
    yield from _sharded_sum_bytes(sp, mlp, known)
    if sp:
        row, column, twice = ("proj, fc2", "QKV, fc1", "2·") if mlp else ("proj", "QKV", "")
        yield f"{row} backward: all-gather of dy", STRATEGIES, f"{twice}n·L·ρ·T·h·e"
        yield f"{column} forward: all-gather of x", STRATEGIES, f"{twice}n·r·L·ρ·T·h·e"
        yield f"{column} wgrad: all-gather of x", STRATEGIES, f"{twice}n·L·ρ·T·h·e"
        yield "output layer forward, wgrad: all-gather of x", STRATEGIES, "2·n·ρ·T·h·e"
    yield from _cross_entropy_bytes(known)
    yield from _parameter_sum_bytes(sp, model, config.order_free, known)
    if model.num_query_groups < config.tp:
        yield from _shared_group_bytes(model)


def _embedding_bytes(sp: bool, model: ModelConfig) -> Lines:
    if sp and model.positions == "rope":
        yield "embedding forward: reduce-scatter", STRATEGIES, "n·ρ·T·h·e"
    else:
        yield "embedding forward: all-reduce", STRATEGIES, "2·n·ρ·T·h·e"
    if sp:
        yield "embedding backward: all-gather", STRATEGIES, "n·ρ·T·h·e"


def _sharded_sum_bytes(sp: bool, mlp: bool, known: dict[str, float]) -> Lines:
    """Row-parallel forward and column-parallel dgrad: what stock all-reduces, or reduce-scatters under SP."""
    row, column, twice = ("proj, fc2", "QKV, fc1", "2·") if mlp else ("proj", "QKV", "")
    for name, count, operands in (
        (f"{row} forward", f"{twice}n·r·L", ("n·r·L·ρ·T·(q+f)·e", "n·r·L·ρ·(q+f)·h·e")),
        (f"{column} dgrad", f"{twice}n·L", ("n·L·ρ·T·(w+g·f)·e", "n·L·ρ·(w+g·f)·h·e")),
        ("output layer dgrad", "n", ("n·ρ·T·V·e", "n·ρ·V·h·e")),
    ):
        if sp:
            yield f"{name}: reduce-scatter", ("stock",), f"{count}·ρ·T·h·e"
        else:
            yield f"{name}: all-reduce", ("stock",), f"{count}·2·ρ·T·h·e"
        yield f"{name}: all-gather of activations", ("gather",), operands[0]
        yield f"{name}: all-gather of weights", ("gather",), operands[1]
        if sp:
            yield f"{name}: all-to-all of float32 roots", ("tree",), f"{count}·ρ·T·h·4"
        else:
            yield from tree_all_reduce(name, count, "T·h", known)


def _cross_entropy_bytes(known: dict[str, float]) -> Lines:
    yield "cross-entropy: all-reduce of maximum and target", ("stock",), "2·n·2·ρ·T·4"
    yield "cross-entropy: all-gather of maximum and target", ("gather", "tree"), "2·n·(t-1)·T·4"
    yield "cross-entropy: all-reduce of the sum", ("stock",), "n·2·ρ·T·4"
    yield "cross-entropy: all-gather of exponentials", ("gather",), "n·ρ·T·V·4"
    yield from tree_all_reduce("cross-entropy", "n", "T", known, e="4")


def _parameter_sum_bytes(sp: bool, model: ModelConfig, order_free: bool, known: dict[str, float]) -> Lines:
    """Gradients that sum over spread tokens or heads: stock adds a step's float32 gradients, the patches each one.

    They have one a microbatch, or one a batch leaf of it, in float32, where sums over the batch have no order.
    """
    each, e = ("u·", "4") if order_free else ("", "e")
    if sp:
        yield "norms: all-reduce of gradients", ("stock",), "2·ρ·(2·L+1)·c·h·4"
        yield "norms: all-gather of dy·norm(x)", ("gather",), "n·(2·L+1)·ρ·T·h·(4+(c-1)·e)"
        yield from tree_all_reduce("norms", "n·(2·L+1)·c", f"{each}h", known, e)
    if model.qk_layernorm:
        yield "q/k-layernorm: all-reduce of gradients", ("stock",), "2·ρ·2·L·c·d·4"
        yield "q/k-layernorm: all-gather of dy·norm(x)", ("gather",), "n·L·ρ·T·(q+k)·(4+(c-1)·e)"
        yield from tree_all_reduce("q/k-layernorm", "n·2·L·c", f"{each}d", known, e)
    if sp and model.bias:
        yield "proj, fc2 bias: all-reduce of gradients", ("stock",), "2·ρ·2·L·h·4"
        yield "proj, fc2 bias: all-gather of dy", ("gather",), "n·2·L·ρ·T·h·e"
        yield from tree_all_reduce("proj, fc2 bias", "n·2·L", f"{each}h", known, e)


def _shared_group_bytes(model: ModelConfig) -> Lines:
    """KV groups that several ranks share: Megatron gathers QKV on all of them."""
    yield "shared KV groups forward: all-gather of QKV", STRATEGIES, "n·r·L·ρ·T·w·e"
    yield "shared KV groups backward: reduce-scatter of dQKV", STRATEGIES, "n·L·ρ·T·w·e"
    if model.num_query_groups != model.num_attention_heads:
        yield "shared KV groups backward: all-gather of heads' gradients", ("gather",), "2·n·L·ρ·T·q·e"
        yield "shared KV groups backward: all-gather of roots", ("tree",), "2·n·L·ρ·T·k·4"


def _memory(config: RunConfig, known: dict[str, float]) -> Lines:
    if config.tp == 1:
        return
    received = "(1+t)" if is_small("T·h", known) and not config.sequence_parallel else "2"
    yield "float32 root of a sharded sum, roots received", ("tree",), f"{received}·T·h·4"
    yield "output layer dgrad: gathered dlogits and weight", ("gather",), "T·V·e+V·h·e"
    yield "fc1 dgrad: gathered gradients and weight", ("gather",), "T·g·f·e+g·f·h·e"
    yield "cross-entropy: gathered exponentials", ("gather",), "T·V·4"
