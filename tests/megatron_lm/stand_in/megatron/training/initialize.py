"""Demands CUDA, counts devices before it connects and seeds ranks, loads fused kernels, and warms functions up."""

from __future__ import annotations

import os
from typing import Any

import torch
from megatron.core import mpu, tensor_parallel
from megatron.legacy import fused_kernels


def initialize_megatron(args: Any) -> None:
    assert torch.cuda.is_available(), "Megatron requires CUDA."
    _initialize_distributed(args)
    _set_random_seed(args.seed)
    fused_kernels.load(args)
    _warmup_jit_function(args)


def _initialize_distributed(args: Any) -> None:
    devices = torch.cuda.device_count()
    if devices > 0:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    torch.distributed.init_process_group("nccl", rank=int(os.environ["RANK"]), world_size=int(os.environ["WORLD_SIZE"]))
    if devices > 0:
        mpu.initialize_model_parallel(args.tensor_model_parallel_size)


def _set_random_seed(seed: int) -> None:
    torch.manual_seed(seed)
    if torch.cuda.device_count() > 0:
        tensor_parallel.model_parallel_cuda_manual_seed(seed)


def _warmup_jit_function(args: Any) -> None:
    width = args.ffn_hidden_size // args.tensor_model_parallel_size
    length = args.seq_length // args.tensor_model_parallel_size
    for shape in ((width,), (args.seq_length, 2, width), (length, 2, 64)):
        torch.rand(shape, device="cuda")
