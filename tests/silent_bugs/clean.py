"""Configurations in which nothing is wrong: the detector has to keep quiet."""

from __future__ import annotations

from tests.silent_bugs.case import GPT2, MIXTURE, QWEN3, Clean

__all__ = ["CLEAN"]

FP32 = {"dtype": "fp32"}
SP = {"sequence_parallel": True}
ZERO = {"distributed_optimizer": True}
SIGMOID = {"number": 8, "per_token": 2, "ffn_hidden_size": 72, "score": "sigmoid", "shared_ffn_hidden_size": 48}

CASES = [
    Clean("tp 2", {"tp": 2}),
    Clean("tp 2, fp32", {"tp": 2}, FP32),
    Clean("tp 4, sequence parallel", {"tp": 4, **SP}),
    Clean("tp 4, sequence parallel, fp32", {"tp": 4, **SP}, FP32),
    Clean("tp 8", {"tp": 8}),
    Clean("dp 2, another seed", {"dp": 2}, {"seed": 11}),
    Clean("dp 4, distributed optimizer, fp32", {"dp": 4, "micro_batch_size": 1, **ZERO}, {**FP32, "seed": 7}),
    Clean("tp 2 x dp 2, sequence parallel, distributed optimizer", {"tp": 2, "dp": 2, **SP, **ZERO}),
    Clean("tp 2, recompute, four microbatches", {"tp": 2, "recompute": True, "micro_batch_size": 1}),
    Clean("tp 2, tight clipping", {"tp": 2}, {"optimizer": {"clip_grad": 0.05}}),
    Clean("tp 4, tied embeddings, sequence parallel", {"tp": 4, **SP}, {"model": {**QWEN3, "tied": True}}),
    Clean("tp 4, grouped queries", {"tp": 4}, {"model": {**QWEN3, "num_query_groups": 4}}),
    Clean("tp 4, fewer key groups than ranks, fp32", {"tp": 4}, {"model": {**QWEN3, "num_query_groups": 2}, **FP32}),
    Clean("gpt-2 shape, tp 4, sequence parallel", {"tp": 4, **SP}, {"model": GPT2}),
    Clean("gpt-2 shape, tp 2, recompute, fp32", {"tp": 2, "recompute": True}, {"model": GPT2, **FP32, "seed": 3}),
    Clean(
        "tp 2, tight clipping, large vocabulary, fp32",
        {"tp": 2},
        {"model": {**GPT2, "vocab_size": 20000}, "optimizer": {"clip_grad": 0.05}, **FP32},
    ),
    Clean("eight layers, tp 2", {"tp": 2}, {"model": {**QWEN3, "num_layers": 8}}),
    Clean("experts, dp 2 x ep 2", {"dp": 2, "ep": 2}, {"model": MIXTURE}),
    Clean("experts, dp 4 x ep 2", {"dp": 4, "ep": 2, "micro_batch_size": 1}, {"model": MIXTURE}),
    Clean("experts, tp 2 x ep 2, sequence parallel", {"tp": 2, "ep": 2, "etp": 1, **SP}, {"model": MIXTURE, **FP32}),
    Clean(
        "sigmoid router, shared expert, tp 2, sequence parallel",
        {"tp": 2, **SP},
        {"model": {**MIXTURE, "experts": SIGMOID}},
    ),
]
CLEAN = {case.name: case for case in CASES}
