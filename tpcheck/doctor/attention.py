"""The attention kernels of this machine, each really run: does a head depend on the heads beside it?

At the run's own shape (on a CPU at most 128 tokens), forward and backward, with all heads and with those that other
TP sizes see (`patches.order.head_invariance`): Megatron's local attention, torch's scaled_dot_product_attention and
Transformer Engine's backends, under the patches and without.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from functools import cache, partial
from importlib.util import find_spec
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import patches
from patches.order.head_invariance import Kernel, find_head_dependence
from tpcheck.config.schema import RunConfig
from tpcheck.doctor.findings import Finding, unless_stock
from tpcheck.errors import TpcheckError

__all__ = ["TE_BACKENDS", "attention"]

MOST_TOKENS_ON_CPU = 128
TE_BACKENDS = ("unfused", "flash", "fused")
HEADS = 2  # of [s, b, heads, d]
SDPA = {
    "math": SDPBackend.MATH,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}


def attention(config: RunConfig) -> Iterator[Finding]:
    """A finding per kernel, with the patches and without; only the one that the run asks for may fail it."""
    from tpcheck.run.model import layers_of

    asked = config.attention_on(torch.cuda.is_available())
    try:
        layers = layers_of(config)
    except TpcheckError as error:
        yield Finding("attention", "layers", config.layers or "", "no", str(error))
        return
    if layers == "local" and asked in TE_BACKENDS[1:]:
        yield Finding("attention", asked, "not here", "no", "Transformer Engine's: use layers=te on a GPU")
    with _one_rank():
        own = _local(config)
        yield _judged(config, "blockwise, patched", own, asked == "blockwise", patched=True, backend="blockwise")
        kernels: list[tuple[str, Kernel, bool]] = [("megatron local", own, layers == "local" and asked == "unfused")]
        names = SDPA if torch.cuda.is_available() else ("math", "flash")
        kernels += [(f"torch sdpa {name}", partial(_sdpa, SDPA[name]), False) for name in names]
        for name, kernel, wanted in kernels:
            yield _judged(config, f"{name}, patched", kernel, wanted, patched=True)
            yield _judged(config, f"{name}, stock", kernel, False, patched=False)
        if layers == "te" or (torch.cuda.is_available() and find_spec("transformer_engine")):
            for backend in TE_BACKENDS:
                wanted = layers == "te" and backend == asked
                with _te_chooses(backend):
                    kernel = _te(config)
                    yield _judged(config, f"te {backend}, patched", kernel, wanted, patched=True, backend=backend)
                    yield _judged(config, f"te {backend}, stock", kernel, False, patched=False)


def _judged(
    config: RunConfig, name: str, kernel: Kernel, wanted: bool, patched: bool, backend: Any = "unfused"
) -> Finding:
    strategy = "tree" if config.strategy == "stock" else config.strategy
    try:
        with patches.enabled(strategy, config.leaves, backend) if patched else contextlib.nullcontext():
            like, heads = _like(config), config.model.num_attention_heads
            found = find_head_dependence(kernel, like, like, like, heads, HEADS, _parts(config))
    except patches.UnsupportedError as error:
        return Finding("attention", name, "refused", unless_stock(config) if wanted else "note", str(error))
    except (RuntimeError, ValueError, AssertionError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        return Finding("attention", name, "does not run", unless_stock(config) if wanted else "note", reason)
    if found is None:
        return Finding("attention", name, "each head by itself", "ok" if patched else "note")
    return Finding("attention", name, "depends on TP", unless_stock(config) if wanted else "note", found)


def _like(config: RunConfig) -> Tensor:
    """What q looks like on a rank: [s, b, heads, d]."""
    on_gpu = torch.cuda.is_available()
    tokens = config.seq_length if on_gpu else min(config.seq_length, MOST_TOKENS_ON_CPU)
    heads = config.model.num_attention_heads // config.tp
    dtype = torch.bfloat16 if config.dtype == "bf16" else torch.float32
    device = "cuda" if on_gpu else "cpu"
    return torch.empty(tokens, config.micro_batch_size, heads, config.model.head_dim, dtype=dtype, device=device)


def _parts(config: RunConfig) -> list[int]:
    return sorted({1, 2, 4, 8, config.leaves, config.tp})


def _sdpa(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))
    with sdpa_kernel(backend):
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    return y.permute(2, 0, 1, 3)


def _local(config: RunConfig) -> Kernel:
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    @cache
    def module(heads: int) -> Any:
        settings = TransformerConfig(
            num_layers=1, hidden_size=heads * config.model.head_dim, num_attention_heads=heads,
            kv_channels=config.model.head_dim, attention_dropout=0.0, hidden_dropout=0.0, masked_softmax_fusion=False,
            bf16=config.dtype == "bf16",
        )  # fmt: skip
        return DotProductAttention(settings, 1, AttnMaskType.causal, "self")

    return lambda q, k, v: module(q.shape[HEADS])(q, k, v, None).view(q.shape)


def _te(config: RunConfig) -> Kernel:
    import transformer_engine.pytorch as te

    @cache
    def module(heads: int) -> Any:
        return te.DotProductAttention(
            heads, config.model.head_dim, attention_dropout=0.0, attn_mask_type="causal", qkv_format="sbhd"
        )

    return lambda q, k, v: module(q.shape[HEADS])(q, k, v).view(q.shape)


@contextlib.contextmanager
def _te_chooses(backend: str) -> Iterator[None]:
    """Only one of TE's backends to choose from; it asks the environment whenever it has no choice to remember."""
    from transformer_engine.pytorch.attention.dot_product_attention import dot_product_attention

    names = {f"NVTE_{one.upper()}_ATTN": str(int(one == backend)) for one in TE_BACKENDS}
    before = {name: os.environ.pop(name, None) for name in names}
    os.environ.update(names)
    dot_product_attention._attention_backends["attention_params"] = None
    try:
        yield
    finally:
        for name, value in before.items():
            del os.environ[name]
            if value is not None:
                os.environ[name] = value
        dot_product_attention._attention_backends["attention_params"] = None


@contextlib.contextmanager
def _one_rank() -> Iterator[None]:
    """Megatron's groups, of this process alone."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    patches.cpu.enable()
    with tempfile.TemporaryDirectory(prefix="tpcheck-") as scratch:
        store = dist.FileStore(f"{scratch}/store", 1)  # type: ignore[attr-defined]
        alone = not dist.is_initialized()
        if alone:
            dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        parallel_state.initialize_model_parallel()
        model_parallel_cuda_manual_seed(1234)
        try:
            yield
        finally:
            parallel_state.destroy_model_parallel()
            if alone:
                dist.destroy_process_group()
