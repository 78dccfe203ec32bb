"""Stands for Megatron-LM's `pretrain_gpt.py`: the same order of calls, the same names, random numbers drawn alike.

Prints one JSON object: what it met, and a digest of the model's initial weights.
"""

from __future__ import annotations

import argparse
import json

import megatron.core
import torch
import torch.distributed as dist
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training.initialize import initialize_megatron
from megatron.training.tokenizer.tokenizer import _vocab_size_with_padding

from tests.support.plain_megatron import QWEN3, SHARED, digest, whole


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tensor-model-parallel-size", type=int, default=1)
    parser.add_argument("--make-vocab-size-divisible-by", type=int, default=128)
    parser.add_argument("--hidden-dropout", type=float, default=0.0)
    parser.add_argument("--ffn-hidden-size", type=int, default=72)
    parser.add_argument("--seq-length", type=int, default=24)
    parser.add_argument("--seed", type=int, default=1234)
    args = parser.parse_args()
    initialize_megatron(args)
    options = {
        **SHARED, **QWEN3, "hidden_dropout": args.hidden_dropout, "use_cpu_initialization": False,
        "persist_layer_norm": True, "tensor_model_parallel_size": args.tensor_model_parallel_size,
    }  # fmt: skip
    vocabulary = _vocab_size_with_padding(1000, args)
    model = GPTModel(
        TransformerConfig(**options),
        get_gpt_layer_local_spec(qk_layernorm=True, normalization="RMSNorm"),
        vocab_size=vocabulary,
        max_sequence_length=args.seq_length,
    )
    found = {
        "core": megatron.core.__file__,
        "vocabulary": vocabulary,
        "weights": digest({name: whole(p, p.data) for name, p in model.named_parameters()}),
    }
    if dist.get_rank() == 0:
        print(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
