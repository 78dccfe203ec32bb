"""What a mixture of experts adds to `cost.terms`: a router, rows that travel, and experts' products, one by one.

Every expert gets as many rows as every other; what a rank sends and multiplies follows from where they really go.
Stock's are those of the dispatcher "alltoall". Counts of tokens that travel beside rows and losses are left out.
"""

from __future__ import annotations

from tpcheck.config.schema import RunConfig
from tpcheck.cost.formulas import LOCAL, Lines, is_small, tree_all_reduce

__all__ = ["LEGEND", "expert_bytes", "expert_flops", "expert_memory", "expert_symbols"]

LEGEND = {
    "m": "EP size",
    "x": "ETP size",
    "E": "experts",
    "a": "experts of a token",
    "F": "width of an expert",
    "z": "bytes of a router's logit",
}

SENT = "a·T/t"  # rows of a rank's tokens
OF_EXPERT = "x·a·T·m/(t·E)"  # rows of one expert


def expert_symbols(config: RunConfig) -> dict[str, float]:
    """The values of `LEGEND`'s symbols; none for a dense model."""
    experts = config.model.experts
    if experts is None:
        return {}
    wide = config.dtype != "bf16" or experts.router_dtype == "fp32"
    return {
        "m": config.ep,
        "x": config.expert_tp,
        "E": experts.number,
        "a": experts.per_token,
        "F": experts.ffn_hidden_size,
        "z": 4 if wide else 2,
    }


def expert_flops(config: RunConfig) -> Lines:
    """Products of routers, of a shared expert's gate, and of experts."""
    experts = config.model.experts
    if experts is None:
        return
    gate = experts.shared_ffn_hidden_size is not None and experts.shared_gate
    for name, size in (
        ("router", "T·h·E"), *((("shared expert's gate", "T·h"),) if gate else ()),
        ("experts' fc1", "a·T·h·g·F"), ("experts' fc2", "a·T·F·h"),
    ):  # fmt: skip
        yield f"{name} forward", LOCAL, f"2·n·r·L·{size}/t"
        yield f"{name} dgrad", LOCAL, f"2·n·L·{size}/t"
        yield f"{name} wgrad", LOCAL, f"2·n·L·{size}/t"


def expert_bytes(config: RunConfig, known: dict[str, float]) -> Lines:
    """Rows over EP and ETP, sums over ETP, and over TP those of gradients that routers have of a rank's tokens."""
    experts = config.model.experts
    if experts is None:
        return
    if config.tp > 1:
        gate = experts.shared_ffn_hidden_size is not None and experts.shared_gate
        for name, size in (("router", "E·h"), *((("shared expert's gate", "h"),) if gate else ())):
            yield f"{name}: all-reduce of gradients", ("stock",), f"2·ρ·L·{size}·4"
            yield from tree_all_reduce(name, "n·u·L", size, known, e="4")
    if config.ep > 1:
        yield "EP, forward: all-to-all of rows, there and back", LOCAL, f"2·n·r·L·(m-1)/m·{SENT}·h·e"
        yield "EP, backward: all-to-all of rows, there and back", LOCAL, f"2·n·L·(m-1)/m·{SENT}·h·e"
        yield "EP: all-to-all of weights, and of their gradients", LOCAL, f"n·(r+1)·L·(m-1)/m·{SENT}·z"
    if config.expert_tp > 1:
        yield from _bytes_over_etp(known)


def _bytes_over_etp(known: dict[str, float]) -> Lines:
    yield "ETP, forward: all-gather of rows", LOCAL, f"n·r·L·(x-1)·{SENT}·h·e"
    yield "ETP, forward: all-gather of weights", LOCAL, f"n·r·L·(x-1)·{SENT}·z"
    yield "ETP, forward: reduce-scatter of rows", ("stock",), f"n·r·L·(x-1)·{SENT}·h·z"
    yield "ETP, backward: all-gather of rows", ("stock",), f"n·L·(x-1)·{SENT}·h·z"
    yield "ETP, backward: reduce-scatter of rows", ("stock",), f"n·L·(x-1)·{SENT}·h·e"
    yield "ETP, backward: reduce-scatter of weights' gradients", ("stock",), f"n·L·(x-1)·{SENT}·z"
    yield "ETP, backward: all-gather of rows", ("tree",), f"n·L·(x-1)·{SENT}·h·e"
    yield from tree_all_reduce("ETP, fc2 forward", "n·r·L·E/m", f"{OF_EXPERT}·h", known, size="x")
    yield from tree_all_reduce("ETP, fc1 dgrad", "n·L·E/m", f"{OF_EXPERT}·h", known, size="x")
    yield from tree_all_reduce("ETP, weights' gradients", "n·L·E/m", OF_EXPERT, known, e="z", size="x")


def expert_memory(config: RunConfig, known: dict[str, float]) -> Lines:
    """Roots of one expert's sum, its own and those that are received."""
    if config.model.experts is not None and config.expert_tp > 1:
        received = "(1+x)" if is_small(f"{OF_EXPERT}·h", known) else "2"
        yield "float32 root of an expert's sum, roots received", ("tree",), f"{received}·{OF_EXPERT}·h·4"
