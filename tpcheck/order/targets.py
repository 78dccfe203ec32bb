"""The sums whose order `tpcheck order` reveals: Megatron's own layers on real gloo ranks, with weights of one.

    row-parallel      y = Σ_k x_k · 1            features k spread over ranks
    column-parallel   dx = Σ_n dy_n · 1          likewise; gated: [gate | up] pieces of a SwiGLU's first layer
    norm              dgamma = Σ_t dy_t · 1      tokens t spread over ranks by sequence parallelism
    gemm              y = Σ_k x_k · 1            features whole, results spread: only the product's shape changes
    all-reduce        y = Σ_r x_r                ranks

What is probed (`tpcheck.order.fprev`) enters as x or dy, in logical order. Observed are a result's first and last
element: libraries treat edges otherwise, and a ring adds every chunk in another order.
"""

from __future__ import annotations

import importlib
import json
import tempfile
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.distributed import FileStore, ProcessGroup  # type: ignore[attr-defined]
from torch.multiprocessing.spawn import start_processes

import patches
from patches.order.collectives import all_gather, tree_all_reduce
from tpcheck.errors import TpcheckError
from tpcheck.order.fprev import Tree, from_lists, reveal_each, to_lists
from tpcheck.order.setting import Setting
from tpcheck.run.dtypes import DTYPES

__all__ = ["check", "trees"]

Sum = Callable[[list[float]], Sequence[float]]
FINALIZE = importlib.import_module("megatron.core.distributed.finalize_model_grads")  # a function of its name hides it
TIMEOUT = timedelta(seconds=300)


def check(s: Setting) -> None:
    """Raise `TpcheckError` where the ranks cannot have equal parts, or another setting makes no sense."""
    if s.sp and s.target in ("gemm", "all-reduce"):
        raise TpcheckError(f"{s.target} has no sequence parallelism: leave --sp out")
    cut: dict[str, tuple[str, int]] = {"gemm": ("columns", s.columns), "all-reduce": ("size", s.tp)}
    name, length = cut.get(s.target, ("size", s.size))
    parts = 2 * s.tp if s.target == "gated" else s.tp
    if length % parts:
        raise TpcheckError(f"tp={s.tp} does not cut {name}={length} into equal parts: use a multiple of {parts}")
    if s.sp and s.rows % s.tp:
        raise TpcheckError(f"tp={s.tp} does not cut rows={s.rows}, the tokens, into equal parts: use a multiple")
    if s.strategy != "stock":
        try:
            patches.Contract(s.strategy).check_tp(s.ranks)
        except patches.UnsupportedError as error:
            raise TpcheckError(str(error)) from error


def trees(setting: Setting) -> list[Tree]:
    """The order of the setting's first and last element; of every element for `all-reduce`."""
    check(setting)
    with tempfile.TemporaryDirectory(prefix="tpcheck-") as scratch:
        start_processes(_rank, (setting, Path(scratch)), nprocs=setting.ranks, start_method="fork")
        found, error = json.loads((Path(scratch) / "answer").read_bytes())
    if error is not None:
        raise TpcheckError(error)
    return list(map(from_lists, found))


def _rank(rank: int, setting: Setting, scratch: Path) -> None:
    torch.set_num_threads(setting.threads)
    store = FileStore(str(scratch / "store"), setting.ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=setting.ranks, timeout=TIMEOUT)
    if setting.strategy == "stock":
        patches.cpu.enable()
    else:
        patches.enable(setting.strategy)
    answer: tuple[Any, str | None]
    try:  # a result is the same on every rank, so all ranks ask the same next question
        found = reveal_each(SUMS[setting.target](setting), setting.size)
        answer = [to_lists(tree) for tree in found], None
    except (TpcheckError, patches.UnsupportedError) as error:
        answer = None, str(error)
    if rank == 0:
        (scratch / "answer").write_text(json.dumps(answer))
    dist.destroy_process_group()


def _row_parallel(s: Setting) -> Sum:
    layer: Any = RowParallelLinear(
        s.size, s.columns, config=_megatron(s), init_method=torch.nn.init.ones_, bias=False, input_is_parallel=True,
        skip_bias_add=False,
    )  # fmt: skip

    def total(x: list[float]) -> list[float]:
        y, _ = layer(_share(_rows(x, s), s))
        return _ends(y, s)

    return total


def _column_parallel(s: Setting) -> Sum:
    pieces = 2 if s.target == "gated" else 1
    layer: Any = ColumnParallelLinear(
        s.columns, s.size, config=_megatron(s), init_method=torch.nn.init.ones_, bias=False, stride=pieces
    )

    def total(x: list[float]) -> list[float]:
        rows = s.rows // s.tp if s.sp else s.rows
        inputs = torch.ones(rows, 1, s.columns, dtype=DTYPES[s.dtype], requires_grad=True)
        layer(inputs)[0].backward(_share(_rows(x, s), s, pieces))
        assert inputs.grad is not None
        return _ends(inputs.grad, s)

    return total


def _norm(s: Setting) -> Sum:
    config = _megatron(s)
    norm: Any = WrappedTorchNorm(config, s.columns, eps=1e-12)  # rows of ones then stay ones
    norm.ddp_config = SimpleNamespace(use_megatron_fsdp=False)

    def total(x: list[float]) -> list[float]:
        tokens = torch.ones(s.size // s.tp, 1, s.columns, dtype=DTYPES[s.dtype])
        mine = torch.tensor(x, dtype=tokens.dtype).chunk(s.tp)[dist.get_rank()]
        norm.zero_grad()
        norm(tokens).backward(mine.view(-1, 1, 1).expand_as(tokens))
        norm.weight.main_grad = norm.weight.grad.float()
        FINALIZE._allreduce_non_tensor_model_parallel_grads([norm], config)
        return [norm.weight.main_grad[0].item(), norm.weight.main_grad[-1].item()]

    return total


def _gemm(s: Setting) -> Sum:
    weight_NK = torch.ones(s.columns // s.tp, s.size, dtype=DTYPES[s.dtype])

    def total(x: list[float]) -> list[float]:
        y_TN = torch.mm(_rows(x, s).squeeze(1), weight_NK.t())
        return [y_TN[0, 0].item(), y_TN[-1, -1].item()]

    return total


def _all_reduce(s: Setting) -> Sum:
    def total(x: list[float]) -> list[float]:
        y = torch.full((s.columns,), x[dist.get_rank()], dtype=DTYPES[s.dtype])
        if s.strategy == "stock":
            dist.all_reduce(y)
        else:
            y = tree_all_reduce(y.float(), _world(), y.dtype)
        return y.tolist()

    return total


SUMS: dict[str, Callable[[Setting], Sum]] = {
    "row-parallel": _row_parallel,
    "column-parallel": _column_parallel,
    "gated": _column_parallel,
    "norm": _norm,
    "gemm": _gemm,
    "all-reduce": _all_reduce,
}


def _megatron(s: Setting) -> Any:
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=s.tp)
    return TransformerConfig(
        num_layers=1, hidden_size=s.columns, num_attention_heads=s.tp, kv_channels=1, normalization="RMSNorm",
        tensor_model_parallel_size=s.tp, sequence_parallel=(s.sp or s.target == "norm") and s.tp > 1,
        params_dtype=DTYPES[s.dtype], use_cpu_initialization=True, gradient_accumulation_fusion=False,
        persist_layer_norm=False, hidden_dropout=0.0, attention_dropout=0.0,
    )  # fmt: skip


def _world() -> ProcessGroup:
    assert dist.group.WORLD is not None
    return dist.group.WORLD


def _rows(x: list[float], s: Setting) -> Tensor:
    """The probe as every token's features: [s, 1, K]."""
    return torch.tensor(x, dtype=DTYPES[s.dtype]).expand(s.rows, 1, s.size)


def _share(x_TK: Tensor, s: Setting, pieces: int = 1) -> Tensor:
    """This rank's features, of each of K's `pieces`."""
    mine = [piece.chunk(s.tp, -1)[dist.get_rank()] for piece in x_TK.chunk(pieces, -1)]
    return torch.cat(mine, -1).contiguous()


def _ends(y: Tensor, s: Setting) -> list[float]:
    """The first and the last element of the whole result."""
    whole = all_gather(y.detach(), _world()) if s.sp else y.detach()
    return [whole[0, 0, 0].item(), whole[-1, -1, -1].item()]
