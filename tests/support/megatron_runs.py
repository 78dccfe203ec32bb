"""`plain_megatron` on ranks, stock or under the patches, and where two records of it differ."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import patches
from patches.megatron.initial_weights import by_name
from patches.registry import REGISTRY, check_versions
from tests.support import plain_megatron
from tests.support.ranks import on_ranks

FULL_RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
FOUR_LAYERS: dict[str, Any] = {"model": {"num_layers": 4}, "seq": 16, "micro_batch": 1, "microbatches": 4}
# name: (the layouts to compare with a single rank, options)
PIPELINES: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "qwen3": (
        [{"tp": 1, "pp": 2}, {"tp": 1, "pp": 4}, {"tp": 1, "pp": 2, "vpp": 2}, {"tp": 2, "sp": True, "pp": 2}],
        FOUR_LAYERS,
    ),
    "gpt-2 shape fp32": (
        [{"tp": 2, "pp": 2, "vpp": 2}],
        {**FOUR_LAYERS, "shape": "gpt2", "dtype": "fp32"},
    ),
    "distributed optimizer": (
        [{"tp": 1, "pp": 2}],
        {**FOUR_LAYERS, "dp": 2, "microbatches": 2, "ddp": {"use_distributed_optimizer": True}},
    ),
}


def run(
    strategy: str, tp: int, sp: bool = False, dp: int = 1, threads: int = 1, pp: int = 1, cp: int = 1, **options: Any
) -> dict[str, Any]:
    """Rank 0's record, after checking that every rank of its model saw the same losses, norms and tensors.

    "order-free" is `tree` with sums over the batch in no order.

    Args:
        options: of `plain_megatron.train`, and `attention` and `chunks` of `patches.enable`.
    """
    options = {"tp": tp, "sp": sp, "pp": pp, "cp": cp, **options}
    records = on_ranks(tp * cp * dp * pp, patched_training, strategy, options, threads=threads)
    for stage in range(pp):
        for record in records[stage * tp * cp * dp :][: tp * cp]:
            assert record == records[0]
    return records[0]


def patched_training(strategy: Any, options: dict[str, Any]) -> dict[str, Any]:
    if strategy == "stock, drawn by name":
        patches.cpu.enable()
        with by_name():
            return plain_megatron.train(**options)
    if strategy == "stock":
        patches.cpu.enable()
    elif strategy == "order-free":
        patches.enable(batch="order-free", attention=options.get("attention"), chunks=options.get("chunks", 1))
    else:
        patches.enable(strategy, attention=options.get("attention"))
    ours = ("attention", "chunks")
    return plain_megatron.train(**{name: value for name, value in options.items() if name not in ours})


def training_without(
    names: set[str], options: dict[str, Any], batch: patches.Batch = "ordered", te: bool = False
) -> dict[str, Any]:
    """`plain_megatron` under all patches of megatron-core, with `te` of its layers, too, but those of these `names`."""
    patches.cpu.enable()
    needed = check_versions([patch for patch in patches._all_patches() if te or patch.library == "megatron-core"])
    chunks = options.pop("chunks", 1)
    contract = patches.Contract(batch=batch, chunks=chunks, attention="blockwise" if chunks > 1 else "unfused")
    REGISTRY.apply(contract, [patch for patch in needed if patch.name not in names])
    return plain_megatron.train(**options)


def differences(a: dict[str, Any], b: dict[str, Any], prefix: str = "") -> list[str]:
    found = [] if a.keys() == b.keys() else [f"{prefix}: other tensors"]
    for key in a.keys() & b.keys():
        if isinstance(a[key], dict):
            found += differences(a[key], b[key], f"{prefix}{key}/")
        elif a[key] != b[key]:
            found.append(f"{prefix}{key}")
    return sorted(found)


def comparable(record: dict[str, Any]) -> dict[str, Any]:
    """What ranks of the distributed optimizer have, too: their shards are no whole gradients or main parameters."""
    return {key: value for key, value in record.items() if key != "final" and "gradients" not in key}


def unlike(one: dict[str, Any], strategy: str, options: dict[str, Any], layout: dict[str, Any]) -> list[str]:
    """Where the run in another layout differs from `one`."""
    other = run(strategy, **{"tp": 1, **options, **layout})
    if layout.get("ddp", {}).get("use_distributed_optimizer"):
        return differences(comparable(one), comparable(other))
    return differences(one, other)


def assert_same_order_free(options: dict[str, Any], layouts: Iterable[dict[str, Any]]) -> None:
    """The run of `options` with `batch="order-free"` has the same bits in these layouts as on a single rank."""
    one = run("order-free", 1, **options)
    last = f"step{options['steps'] - 1}"
    assert float.fromhex(one[f"{last} gradient norm"]) and one[f"{last} gradients"]
    for layout in layouts:
        assert not unlike(one, "order-free", options, layout), layout


def of_the_run(record: dict[str, Any]) -> dict[str, Any]:
    """What does not name a tensor: TE's layers keep their norms elsewhere than the local ones."""
    return {name: value for name, value in record.items() if "loss" in name or "norm" in name}


def matrices(record: dict[str, Any]) -> set[str]:
    """Digests of final parameters whose names both kinds of layers share."""
    return {f"{name} {value}" for name, value in record["final"].items() if "norm" not in name}
