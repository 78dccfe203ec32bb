"""What attention moves and keeps, on paper, against what a real step's operations do."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from torch.utils._python_dispatch import TorchDispatchMode

import patches
from patches.megatron.first_step import require_agreement
from patches.ops import attention as ops
from patches.order import exact
from tests.support.live_bytes import LiveBytes
from tests.support.ranks import on_ranks
from tpcheck.cli import main
from tpcheck.config.load import parse_run
from tpcheck.config.schema import RunConfig
from tpcheck.cost.attention import Kernel, Quantity, attention_terms
from tpcheck.cost.terms import LEGEND
from tpcheck.run.model import build_model, build_optimizer, train_step, transformer_config
from tpcheck.run.train import enable_patches

# Sizes of which no other tensor ends in [s, s].
MODEL = {"preset": "qwen3-tiny", "num_layers": 2, "hidden_size": 48, "head_dim": 8, "num_query_groups": 4,
         "ffn_hidden_size": 40}  # fmt: skip
NO_DATA = {"empty", "new_empty", "new_empty_strided", "view", "_unsafe_view", "transpose", "permute", "expand",
           "detach", "as_strided", "t", "unsqueeze", "squeeze", "slice", "select", "alias", "reshape"}  # fmt: skip


class Scores(TorchDispatchMode):
    """Counts the bytes of every operand and result that is as large as a rank's scores and ends in [s, s]."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__()
        heads = config.micro_batch_size * config.model.num_attention_heads // config.tp
        self.length, self.size, self.moved = config.seq_length, heads * config.seq_length**2, 0
        self.flops = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function._schema.name.split("::")[1]
        if name in ("bmm", "baddbmm") and any(self._is_scores(x) for x in _tensors([*args, result])):
            *_, a, b = _tensors(args)
            self.flops += 2 * a.numel() * b.shape[-1]
        if name not in NO_DATA:
            self.moved += sum(x.nbytes for x in _tensors([*args, result]) if self._is_scores(x))
        return result

    def _is_scores(self, x: torch.Tensor) -> bool:
        return x.shape[-2:] == (self.length, self.length) and x.numel() == self.size


def _tensors(values: Iterable[Any]) -> list[torch.Tensor]:
    flat = [each for value in values for each in (value if isinstance(value, (tuple, list)) else [value])]
    return [x for x in flat if isinstance(x, torch.Tensor)]


def counting(function: Any, counts: dict[str, int]) -> Any:
    """`function`, whose tensors, operands and results, are counted as moved."""

    def call(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        counts["moved"] += sum(x.nbytes for x in _tensors([*args, result]))
        return result

    return call


def summing(function: Any, counts: dict[str, int]) -> Any:
    """The sum over heads, whose result is counted as it is rounded to bfloat16 in the end."""

    def call(heads: torch.Tensor, *args: Any) -> Any:
        root = function(heads, *args)
        counts["moved"] += heads.nbytes + 2 * root.numel()
        return root

    return call


def keeping(forward: Any, counts: dict[str, int]) -> Any:
    """The forward of core attention, what it saves beside its operands counted once."""

    def call(self: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        seen = {x.untyped_storage().data_ptr() for x in (query, key, value)}
        kept = []  # alive, so that no storage takes another's place

        def pack(x: torch.Tensor) -> torch.Tensor:
            if x.untyped_storage().data_ptr() not in seen:
                seen.add(x.untyped_storage().data_ptr())
                kept.append(x)
                counts["saved"] += x.nbytes if x.dtype != torch.bool else 0
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            return forward(self, query, key, value, *args, **kwargs)

    return call


def counted(config: RunConfig) -> dict[str, int]:
    """One training step of megatron-core's own model on this rank."""
    enable_patches(config)
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=config.tp)
    _, pieces = build_model(config, transformer_config(config))
    optimizer = build_optimizer(config, pieces)
    counts = {"moved": 0, "saved": 0, "flops": 0}
    DotProductAttention.forward = keeping(DotProductAttention.forward, counts)
    if config.strategy != "stock":
        require_agreement(pieces, parallel_state.get_tensor_model_parallel_group())
        exact.attention = counting(exact.attention, counts)
        exact.attention_gradient = counting(exact.attention_gradient, counts)
        ops._root_over_heads = summing(ops._root_over_heads, counts)
    tokens = torch.randint(0, config.model.vocab_size, (config.micro_batch_size, config.seq_length + 1))
    with Scores(config) as scores:
        train_step(config, pieces, optimizer, [tokens] * config.microbatches)
    if config.strategy == "stock":
        counts |= {"moved": scores.moved, "flops": scores.flops}
    return counts


@pytest.mark.parametrize("tp", (1, 2))
@pytest.mark.parametrize("kernel", ("unfused", "blockwise"))
def test_a_step_does_what_the_formulas_say(kernel, tp):
    settings = {"strategy": "stock"} if kernel == "unfused" else {"strategy": "tree", "attention": kernel}
    config = parse_run(
        {"model": MODEL, "tp": tp, "seq_length": 24, "micro_batch_size": 2, "global_batch_size": 4} | settings
    )
    total = {quantity: sum(values(config, quantity, kernel)) for quantity in ("moved", "saved", "flops")}
    for counts in on_ranks(tp, counted, config):
        if kernel == "unfused":  # the blocks of the other one are counted where Triton is
            assert counts["flops"] == pytest.approx(total["flops"], abs=0.5)
        assert counts["moved"] == pytest.approx(total["moved"], abs=0.5)
        assert counts["saved"] == pytest.approx(config.microbatches * total["saved"], abs=0.5)


def values(config: RunConfig, quantity: Quantity, kernel: Kernel) -> list[float]:
    return [term.value for term in attention_terms(config) if (term.quantity, term.kernel) == (quantity, kernel)]


def held(config: RunConfig) -> tuple[int, int]:
    """Bytes that Megatron's own attention holds at once: in forward, and in backward beside what it saved."""
    patches.cpu.enable()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=config.tp)
    model_parallel_cuda_manual_seed(1)
    attention = DotProductAttention(transformer_config(config), 1, AttnMaskType.causal, "self")
    model, size = config.model, (config.seq_length, config.micro_batch_size)
    q, k, v = (
        torch.randn(*size, heads // config.tp, model.head_dim).bfloat16().requires_grad_()
        for heads in (model.num_attention_heads, model.num_query_groups, model.num_query_groups)
    )
    attention(q, k, v, None)  # makes Megatron's global buffer, which stays
    with LiveBytes() as forward:
        y = attention(q, k, v, None)
    dy = torch.randn_like(y)
    with LiveBytes() as backward:
        torch.autograd.grad(y, (q, k, v), dy)
    return forward.peak, backward.peak


@pytest.mark.parametrize("groups", (4, 8))
def test_unfused_attention_holds_what_the_formulas_say(groups):
    config = parse_run(
        {"model": MODEL | {"num_query_groups": groups}, "tp": 2, "seq_length": 24, "micro_batch_size": 2,
         "global_batch_size": 2, "strategy": "stock"}
    )  # fmt: skip
    for found in on_ranks(2, held, config):
        assert found == tuple(values(config, "peak", "unfused"))


def test_every_symbol_of_a_formula_is_explained() -> None:
    terms = attention_terms(parse_run({"model": "qwen3-8b", "tp": 8, "strategy": "stock"}))
    assert set(re.findall(r"[^\W\d]", " ".join(term.formula for term in terms))) <= set(LEGEND)


def test_command_shows_both(capsys: Any) -> None:
    assert main(["cost", "qwen3-8b", "--tp", "8", "--gpu", "h100"]) == 0
    lines = capsys.readouterr().out.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("attention moves in memory, GB"))
    assert lines[at].split()[-3:] == ["unfused", "blockwise", "formula"]
    moved, saved = ([float(x) for x in line.split()[1:]] for line in lines[at:] if line.startswith("total"))
    assert moved[0] > 30 * moved[1] and saved[0] > 90 * saved[1]
    (flops,) = ([float(x) for x in line.split()[1:]] for line in lines[at - 3 : at] if line.startswith("total"))
    held = [float(x) for x in next(line for line in lines[at:] if line.startswith("largest")).split()[1:]]
    assert flops[1] == pytest.approx(flops[0] * 9 / 12, rel=0.05) and held[0] > 30 * held[1]
