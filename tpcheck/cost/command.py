"""`tpcheck cost`: the account of `tpcheck.cost.terms` on the terminal or as JSON, with a floor in time on a GPU."""

from __future__ import annotations

import dataclasses
import json
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tpcheck.config.load import load_run_or_preset, read_yaml
from tpcheck.config.presets import PRESETS
from tpcheck.config.schema import RunConfig
from tpcheck.cost.attention import KERNELS, attention_terms
from tpcheck.cost.attention import Quantity as AttentionQuantity
from tpcheck.cost.datasheets import GPUS, NVLINK_DOMAIN, Gpu
from tpcheck.cost.measured import Rates, measured
from tpcheck.cost.memory import GIB, memory
from tpcheck.cost.terms import LEGEND, Quantity, Strategy, Term, step, strategies_of, symbols, total
from tpcheck.errors import TpcheckError

__all__ = ["command"]

TP, SEQUENCE = 8, 4096  # where a preset is asked for and nothing else is said
UNITS: dict[Quantity, tuple[str, float]] = {
    "flops": ("TFLOP", 1e12), "bytes": ("GB", 1e9), "memory": ("GiB", GIB),
}  # fmt: skip


def command(model: str, gpu: str, *, as_json: bool, **options: Any) -> int:
    """Print the account; the arguments are those of the command line."""
    config = _config(model, options)
    terms = step(config)
    totals = {strategy: _totals(terms, config, strategy, GPUS[gpu]) for strategy in strategies_of(config)}
    rates = measured(gpu, config.tp)
    if as_json:
        print(json.dumps({
            "model": model, "config": config.model_dump(include=_SHOWN), "gpu": dataclasses.asdict(GPUS[gpu]),
            "symbols": symbols(config), "terms": [dataclasses.asdict(term) for term in terms], "totals": totals,
            "attention": [dataclasses.asdict(term) for term in attention_terms(config)],
            "measured": rates and dataclasses.asdict(rates),
        }))  # fmt: skip
    else:
        print("\n".join(_lines(model, config, terms, totals, GPUS[gpu], rates)))
    return 0


_SHOWN = {"tp", "cp", "ep", "etp", "sequence_parallel", "dtype", "recompute", "seq_length", "micro_batch_size",
          "global_batch_size", "batch", "chunks"}  # fmt: skip


def _config(model: str, options: dict[str, Any]) -> RunConfig:
    """The preset or run file, with what the command line says of it."""
    given = {name: value for name, value in options.items() if value is not None}
    length = min(SEQUENCE, int(PRESETS.get(model, {}).get("max_positions", SEQUENCE)))
    sequences = given.get("micro_batch_size", 1)
    of_preset = {"tp": TP, "seq_length": length, "micro_batch_size": sequences, "global_batch_size": sequences}
    if given.get("cp", 1) > 1:  # what it takes
        given = {"batch": "order-free", "chunks": 2 * given["cp"], **given}
    experts = _has_experts(model)
    if experts:  # as many ranks as they take; their sums over the batch have no order
        tp = given.get("tp", TP)
        dp = max(1, given.get("ep", 1) * given.get("etp", tp) // tp)
        of_preset |= {"dp": dp, "global_batch_size": dp * sequences, "sequence_parallel": tp > 1}
        given = {"batch": "order-free", **given}
    overrides = [f"{name}={json.dumps(value)}" for name, value in given.items()]
    # A stock run is checked the least; it has no sums without an order.
    free = "batch" in given or _is_order_free(model)
    strategy = "stock" if not free else "tree" if experts else "gather"
    config = load_run_or_preset(model, [f"strategy={strategy}", *overrides], of_preset)
    if config.pp > 1:
        raise TpcheckError(f"a whole model's cost is counted, not that of pp={config.pp} stages of one: use pp=1")
    return config


def _is_order_free(model: str) -> bool:
    return _settings(model).get("batch") is not None


def _has_experts(model: str) -> bool:
    named = _settings(model).get("model", model)
    settings = named if isinstance(named, dict) else {"preset": named}
    return bool(settings.get("experts") or PRESETS.get(str(settings.get("preset")), {}).get("experts"))


def _settings(model: str) -> dict[str, Any]:
    """What a run file says; nothing of a preset."""
    found = read_yaml(Path(model)) if model not in PRESETS and Path(model).is_file() else None
    return found if isinstance(found, dict) else {}


def _totals(terms: list[Term], config: RunConfig, strategy: Strategy, gpu: Gpu) -> dict[str, float]:
    flops, sent, extra = (total(terms, quantity, strategy) for quantity in UNITS)
    config = config.model_copy(update={"strategy": strategy, "batch": None if strategy == "stock" else config.batch})
    return {
        "flops": flops,
        "bytes": sent,
        "memory": extra,
        "flops_ms": flops / gpu.tflops / 1e9,
        "bytes_ms": sent / gpu.nvlink_gbs / 1e6,
        "resident": memory(config, on_gpu=True).likely * GIB + extra,
    }


def _lines(
    model: str, config: RunConfig, terms: list[Term], totals: dict[Strategy, dict[str, float]], gpu: Gpu,
    rates: Rates | None,
) -> Iterator[str]:  # fmt: skip
    sp, strategies = "on" if config.sequence_parallel else "off", strategies_of(config)
    context = f", CP={config.cp}" if config.cp > 1 else ""
    if config.model.experts is not None:
        context += f", EP={config.ep}, ETP={config.expert_tp}"
    yield (
        f"{model}, TP={config.tp}{context}, sequence parallelism {sp}, {config.dtype}"
        f"{', recompute' if config.recompute else ''}: one step of {config.microbatches} x {config.micro_batch_size} x "
        f"{config.seq_length} tokens, per rank"
    )
    titles = {
        "flops": "products",
        "bytes": f"sent over NVLink, in the {_groups(config)}",
        "memory": "memory beyond stock's during a sum",
    }
    width = max(len(term.what) for term in terms) + 2
    for quantity, (unit, scale) in UNITS.items():
        lines = [term for term in terms if term.quantity == quantity]
        yield ""
        yield f"{f'{titles[quantity]}, {unit}':<{width}}" + _cells(strategies) + "  formula"
        for term in lines:
            values = [_number(term.value / scale) if s in term.strategies else "-" for s in strategies]
            yield f"  {term.what:<{width - 2}}{_cells(values)}  {term.formula}"
        sums = [totals[s][quantity] for s in strategies]
        yield f"{'largest' if quantity == 'memory' else 'total':<{width}}" + _cells(_number(x / scale) for x in sums)
        if quantity == "memory":
            resident = [totals[s]["resident"] / GIB for s in strategies]
            yield f"{'all of a rank, about':<{width}}" + _cells(map(_number, resident))
            if config.order_free:
                yield "in it, gradients of 8 bytes instead of stock's 4: sums over the batch without an order are"
                yield "int64, and data parallelism moves twice stock's bytes"
        elif all(sums):
            yield f"{'over stock':<{width}}" + _cells(f"{x / sums[0]:.2f}" for x in sums)
            if quantity == "flops":
                layers = [term for term in terms if "attention" not in term.what]
                sums = [total(layers, "flops", s) for s in strategies]
                yield f"{'over stock, without attention':<{width}}" + _cells(f"{x / sums[0]:.2f}" for x in sums)
    yield from _attention_lines(config, width)
    yield ""
    yield f"{f'floor on {gpu.name}, ms':<{width}}" + _cells(strategies)
    for what, key in (("products", "flops_ms"), ("NVLink", "bytes_ms")):
        yield f"  {what:<{width - 2}}" + _cells(f"{totals[s][key]:.1f}" for s in strategies)
    yield (
        f"datasheet: {gpu.tflops:g} TFLOP/s bf16 dense, {gpu.memory_gb:g} GB ({gpu.memory_gb * 1e9 / GIB:.0f} GiB), "
        f"NVLink {gpu.nvlink_gbs:g} GB/s a direction; no GPU sustains these"
    )
    if rates:
        yield f"{'at measured rates, ms':<{width}}" + _cells(strategies)
        yield f"  {'products':<{width - 2}}" + _cells(
            f"{totals[s]['flops'] / rates.tflops[s] / 1e9:.1f}" for s in strategies
        )
        yield f"measured on {rates.device}, {rates.file}:"
        yield "  " + ", ".join(f"{s} {rates.tflops[s]:.0f} TFLOP/s" for s in strategies)
    if config.tp > NVLINK_DOMAIN:
        between = f"between boards TP={config.tp} is slower than this floor"
        yield f"NVLink joins the {NVLINK_DOMAIN} GPUs of a board; {between}"
    yield ""
    legend = (f"{name}={value:g} {LEGEND[name]}" for name, value in symbols(config).items())
    yield from textwrap.wrap("; ".join(legend), 120)


ATTENTION: dict[AttentionQuantity, tuple[str, float]] = {
    "flops": ("attention multiplies, TFLOP", 1e12), "moved": ("attention moves in memory, GB", 1e9),
    "saved": ("and keeps, GiB", GIB), "peak": ("and holds at once, of a layer, GiB", GIB),
}  # fmt: skip


def _groups(config: RunConfig) -> str:
    others = ["CP"] * (config.cp > 1) + ["EP", "ETP"] * (config.model.experts is not None)
    return f"{', '.join(['TP', *others[:-1]])} and {others[-1]} groups" if others else "TP group"


def _attention_lines(config: RunConfig, width: int) -> Iterator[str]:
    """What attention costs by either kernel, whatever the strategy."""
    terms = attention_terms(config)
    for quantity, (title, scale) in ATTENTION.items():
        lines = [term for term in terms if term.quantity == quantity]
        if not lines:
            return
        yield ""
        yield f"{title:<{width}}" + _kernel_cells(KERNELS) + "  formula"
        for term in lines:
            values = [_number(term.value / scale) if term.kernel == kernel else "-" for kernel in KERNELS]
            yield f"  {term.what:<{width - 2}}{_kernel_cells(values)}  {term.formula}"
        name, total_of = ("largest", max) if quantity == "peak" else ("total", sum)
        sums = (total_of(term.value for term in lines if term.kernel == kernel) / scale for kernel in KERNELS)
        yield f"{name:<{width}}" + _kernel_cells(map(_number, sums))


def _kernel_cells(texts: Iterable[str]) -> str:
    return "".join(f"{text:>12}" for text in texts)


def _cells(texts: Iterable[str]) -> str:
    return "".join(f"{text:>9}" for text in texts)


def _number(value: float) -> str:
    """Four digits or so, without exponents above a millionth."""
    if value == 0:
        return "0"
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.3g}"
