"""The whole model, forward and backward, traced at TP=1 and TP=4 and judged by `tpcheck compare`, layer by layer.

What rounding may do is measured: TP=1 is run again, nudged. Bugs are put in to see which tolerance finds them: in one
layer's MLP, the last rank loses some features, or the gradient of the input is not added over ranks.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.module import Float16Module

from patches.megatron import initial_weights
from tpcheck.config.schema import RunConfig
from tpcheck.run.model import seed_everything, transformer_config
from tpcheck.study.megatron import begin, random_tokens
from tpcheck.study.ranks import on_ranks
from tpcheck.study.study import Progress
from tpcheck.study.tp_vs_dp.settings import TpVsDp
from tpcheck.trace import trace
from tpcheck.trace.compare.command import compare
from tpcheck.trace.compare.comparison import Comparison, Row
from tpcheck.trace.compare.excess import limit
from tpcheck.trace.compare.logical import Key
from tpcheck.trace.compare.reader import Trace
from tpcheck.trace.record.noise import nudged_folder

__all__ = ["FEATURES", "NO_SUM", "TP", "bugs", "stock", "tree"]

TP, NUDGED = 4, 3
LOST = 16  # features of the last rank's part of one layer's second sum
FEATURES, NO_SUM = "features lost", "no sum over ranks in backward"
TRIED = {"bf16": (FEATURES, NO_SUM), "fp32": (FEATURES,)}
FINAL = "decoder.final_layernorm"
KINDS = ("out", "dout")
PATTERNS = ["decoder.layers.?", "decoder.layers.??", "decoder.layers.0.*", "*.mlp.linear_fc2", FINAL]


def stock(dtype: str, settings: TpVsDp, progress: Progress) -> dict[str, Any]:
    """TP=4 against TP=1, with an estimate of what rounding may do, and the first numbers of both."""
    with tempfile.TemporaryDirectory(prefix="tpcheck-") as scratch:
        one, four = Path(scratch, "tp1"), Path(scratch, "tp4")
        runs = [(one, 1, 0), (four, TP, 0), *((nudged_folder(one, seed), 1, seed) for seed in range(1, NUDGED + 1))]
        for number, (path, tp, perturb) in enumerate(runs):
            progress(number / len(runs), f"TP={tp}" + f", nudged, seed {perturb}" * bool(perturb))
            on_ranks(tp, _traced, settings.run(tp=tp, dtype=dtype), str(path), perturb)
        found = compare(one, four)
        samples = {f"TP={tp}": _first_numbers(path) for tp, path in ((1, one), (TP, four))}
    return {**_summary(found), "samples": samples}


def tree(dtype: str, settings: TpVsDp, progress: Progress) -> dict[str, Any]:
    """The same under the patches: how many tensors, and whether any of them differs."""
    with tempfile.TemporaryDirectory(prefix="tpcheck-") as scratch:
        one, four = Path(scratch, "tp1"), Path(scratch, "tp4")
        for number, (path, tp) in enumerate(((one, 1), (four, TP))):
            progress(number / 2, f"TP={tp}")
            on_ranks(tp, _traced, settings.run(tp=tp, dtype=dtype, strategy="tree"), str(path))
        return _summary(compare(one, four))


def bugs(settings: TpVsDp, progress: Progress) -> dict[str, Any]:
    """At TP=4, with a bug in one layer: by how much the model's output is off, and what `compare` says."""
    layer, rows = settings.layers // 2, []
    for place, (dtype, names) in enumerate(TRIED.items()):
        with tempfile.TemporaryDirectory(prefix="tpcheck-") as scratch:
            one = Path(scratch, "tp1")
            for number, path in enumerate((one, nudged_folder(one, 1))):
                progress(place / len(TRIED), f"{dtype}, TP=1")
                on_ranks(1, _traced, settings.run(dtype=dtype), str(path), number)
            for name in names:
                progress((place + 0.5) / len(TRIED), f"{dtype}, {name}")
                four = Path(scratch, name)
                on_ranks(TP, _traced, settings.run(tp=TP, dtype=dtype), str(four), 0, (name, layer))
                rows.append({"dtype": dtype, "bug": name, **_judged(compare(one, four))})
    return {"layer": layer, "lost": LOST, "of": settings.model_ffn, "tried": rows}


def _judged(found: Comparison) -> dict[str, Any]:
    named = found.first
    return {
        "verdict": found.verdict, "named": named.key.name if named else None, "kind": named.key.kind if named else None,
        "max_abs": _row(found, FINAL, "out").numbers.max_abs,
    }  # fmt: skip


def _traced(config: RunConfig, path: str, perturb: int = 0, bug: tuple[str, int] | None = None) -> None:
    """Forward and backward of the model's whole loss, recorded; with a bug of this name in this layer."""
    begin(config.strategy)
    described = transformer_config(config)
    seed_everything(config.seed)
    with initial_weights.by_name():
        bare = GPTModel(
            described, get_gpt_layer_local_spec(qk_layernorm=True, normalization="RMSNorm"),
            vocab_size=config.model.padded_vocab_size, max_sequence_length=config.seq_length,
            position_embedding_type="rope", rotary_base=config.model.rope_base,
            share_embeddings_and_output_weights=True,
        )  # fmt: skip
    if bug is not None:
        _break(bare.decoder.layers[bug[1]].mlp, bug[0])
    model: torch.nn.Module = Float16Module(described, bare) if config.dtype == "bf16" else bare
    tokens = random_tokens(config)
    inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    positions = torch.arange(config.seq_length).expand_as(inputs)
    with trace(path, model, modules=PATTERNS, kinds=list(KINDS), perturb=perturb):
        model(inputs, positions, None, labels=labels).float().mean().backward()


def _break(mlp: Any, bug: str) -> None:
    if bug == NO_SUM:
        mlp.linear_fc1.allreduce_dgrad, mlp.linear_fc1.disable_grad_reduce = False, True
    elif dist.get_rank() == dist.get_world_size() - 1:
        mlp.linear_fc2.register_forward_pre_hook(_lose)


def _lose(module: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    (x, *others) = arguments
    kept = torch.ones(x.shape[-1], dtype=x.dtype)
    kept[-LOST:] = 0
    return (x * kept, *others)


def _summary(found: Comparison) -> dict[str, Any]:
    first, layers = found.first_difference, sorted({row.layer for row in found.rows if row.layer is not None})
    inside = [row for row in found.rows if row.key.name.startswith("decoder.layers.0.") and row.key.kind == "out"]
    return {
        "verdict": found.verdict,
        "tensors": len(found.rows),
        "elements": sum(row.numbers.size for row in found.rows),
        "differing": sum(row.numbers.differing for row in found.rows),
        "first": {"name": first.key.name, "kind": first.key.kind} if first else None,
        "equal_in_layer_0": [row.key.name for row in inside if row.verdict == "identical"],
        "differing_in_layer_0": [row.key.name for row in inside if row.verdict != "identical"],
        "layers": [
            {"layer": n, **{kind: _numbers(_row(found, f"decoder.layers.{n}", kind)) for kind in KINDS}} for n in layers
        ],
        "final": {kind: _numbers(_row(found, FINAL, kind)) for kind in KINDS},
    }


def _row(found: Comparison, name: str, kind: str) -> Row:
    return next(row for row in found.rows if (row.key.name, row.key.kind) == (name, kind))


def _numbers(row: Row) -> dict[str, Any]:
    """What tables show; `limit` is the relative distance above which `tpcheck compare` would suspect a bug."""
    n = row.numbers
    return {
        "size": n.size, "differing": n.differing, "max_abs": n.max_abs, "mean_abs": n.mean_abs,
        "median_abs": n.median_abs, "over": list(n.over), "relative": n.relative,
        "limit": limit(row.estimate, n.size, NUDGED)[0] if row.estimate else None,
    }  # fmt: skip


def _first_numbers(path: Path) -> list[float]:
    """The first token's first features, after the last norm."""
    logical = Trace(path).logical_or_none(Key(0, "out", FINAL))
    assert logical is not None
    return [float(number) for number in logical.values().reshape(-1)[:5]]
