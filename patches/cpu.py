"""Lets stock megatron-core train on CPU and gloo; on a machine with a GPU it only mends what breaks there as well.

megatron-core writes "cuda" where it means "this rank's device". `enable()` makes those places mean the
CPU, and mends, on a GPU too, what only breaks where neither Apex nor Transformer Engine is installed: torch norms
under sequence parallelism, and the distributed optimizer's checkpoints. No section changes the bits of a sum.
Each section names one obstacle; megatron-core may be imported before or after the call.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import os
import sys
import types
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["enable"]

CPU = torch.device("cpu")
FACTORIES = (
    "tensor as_tensor zeros ones empty full arange rand randn randint randperm "
    "zeros_like ones_like empty_like full_like"
).split()


@functools.cache
def enable() -> None:
    """Make megatron-core use the CPU where torch sees no GPU, and mend it; a second call does nothing."""
    if not torch.cuda.is_available():
        _no_compiler()
        _device_is_cpu()
        _nccl_is_gloo()
        _streams_are_no_ops()
        _one_generator()
        _parameters_look_like_cuda()
        _dispatchers_read_sizes()
        _gloo_takes_uneven_parts()
        _megatron_lm_starts()
    _norms_take_sequence_parallel()
    _experts_do_without_te()
    _distributed_optimizer_reloads()


def _no_compiler() -> None:
    # torch.compile on Megatron's fused functions costs 18 s at the first step and gives other bits in bf16.
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].config.disable = True


def _device_is_cpu() -> None:
    # device=torch.cuda.current_device(), device="cuda", x.cuda() and x.to("cuda") all over megatron-core.
    torch.cuda.current_device = lambda: CPU  # type: ignore[assignment, return-value]
    torch.cuda.set_device = lambda device: None
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    torch.Tensor.to = _on_cpu(torch.Tensor.to)  # type: ignore[method-assign]
    for name in FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))


def _on_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with every CUDA device among its arguments replaced by the CPU."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if "device" in kwargs and _is_cuda(kwargs["device"]):
            kwargs["device"] = CPU
        if len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], CPU, *args[2:])
        kwargs.pop("pin_memory", None)  # for a copy to a GPU
        return function(*args, **kwargs)

    return call


def _is_cuda(value: Any) -> bool:
    if isinstance(value, torch.device):
        return value.type == "cuda"
    return isinstance(value, str) and value.startswith("cuda")


def _nccl_is_gloo() -> None:
    # Training scripts name the NCCL backend and hand it a device.
    original = torch.distributed.init_process_group

    @functools.wraps(original)
    def init_process_group(backend: str | None = None, *args: Any, **kwargs: Any) -> None:
        kwargs.pop("device_id", None)
        original("gloo" if backend and "nccl" in backend else backend, *args, **kwargs)

    torch.distributed.init_process_group = init_process_group


def _streams_are_no_ops() -> None:
    # torch.cuda.synchronize() before a checkpoint is written; streams, events and nvtx ranges elsewhere.
    class Stream:
        def __init__(self, *args: Any, **kwargs: Any) -> None: ...

        def record_event(self, *args: Any, **kwargs: Any) -> Stream:
            return Stream()

        def __getattr__(self, name: str) -> Callable[..., None]:
            return _nothing

    cuda: Any = torch.cuda
    cuda.Stream = cuda.Event = Stream
    cuda.current_stream = cuda.default_stream = lambda *args, **kwargs: Stream()
    cuda.stream = lambda *args, **kwargs: contextlib.nullcontext()
    cuda.synchronize = cuda.empty_cache = _nothing
    cuda.nvtx.range_push = cuda.nvtx.range_pop = _nothing


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


def _one_generator() -> None:
    # The device generator is the CPU's own. Without CUDA, `_lazy_call` would queue a new state for ever.
    cuda: Any = torch.cuda
    cuda.get_rng_state = cuda.random.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    cuda.set_rng_state = cuda.random.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    cuda.manual_seed = cuda.random.manual_seed = lambda seed: torch.default_generator.manual_seed(int(seed))

    from megatron.core.tensor_parallel import random

    random._set_cuda_rng_state = lambda new_state, device=-1, graph_safe=False: torch.set_rng_state(new_state)


def _parameters_look_like_cuda() -> None:
    # megatron.core.optimizer sorts parameters by `param.type() == "torch.cuda.FloatTensor"`.
    original = torch.Tensor.type

    @functools.wraps(original)
    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = original(self, *args, **kwargs)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if isinstance(answer, str) and caller.startswith("megatron.core.optimizer"):
            return answer.replace("torch.", "torch.cuda.", 1)
        return answer

    torch.Tensor.type = type_  # type: ignore[method-assign, assignment]


def _dispatchers_read_sizes() -> None:
    # How many rows each rank sends is made numbers of only where it comes from a GPU.
    from megatron.core.transformer.moe import token_dispatcher

    original = getattr(token_dispatcher, "maybe_move_tensor_to_cpu", None)
    if original is None:
        return

    @functools.wraps(original)
    def move(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    token_dispatcher.maybe_move_tensor_to_cpu = move


def _gloo_takes_uneven_parts() -> None:
    # Rows of experts are gathered and reduced over expert-tensor-parallel ranks in parts of different sizes.
    from megatron.core.tensor_parallel import mappings

    gather, scatter = mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim

    @functools.wraps(gather)
    def gather_along(input_: Any, group: Any, output_split_sizes: Any = None, *args: Any, **kwargs: Any) -> Any:
        if output_split_sizes is None or group.size() == 1:
            return gather(input_, group, output_split_sizes, *args, **kwargs)
        parts = [input_.new_empty((size, *input_.shape[1:])) for size in output_split_sizes]
        parts[group.rank()] = input_.contiguous()
        for rank, part in enumerate(parts):
            torch.distributed.broadcast(part, torch.distributed.get_global_rank(group, rank), group=group)
        return torch.cat(parts)

    @functools.wraps(scatter)
    def scatter_along(input_: Any, group: Any, input_split_sizes: Any = None, *args: Any, **kwargs: Any) -> Any:
        if input_split_sizes is None or group.size() == 1:
            return scatter(input_, group, input_split_sizes, *args, **kwargs)
        total = input_.clone()
        torch.distributed.all_reduce(total, group=group)
        return total.split(input_split_sizes)[group.rank()].clone()

    mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim = gather_along, scatter_along


def _megatron_lm_starts() -> None:
    # Megatron-LM's scripts demand CUDA, seed and connect ranks only where devices are counted, and build kernels.
    properties = types.SimpleNamespace(name="cpu", major=0, minor=0, total_memory=0)
    _answer_megatron("is_available", True, "megatron.training.initialize")
    _answer_megatron("device_count", 1, "megatron.training.initialize")
    _answer_megatron("get_device_capability", (0, 0), "megatron.training")
    _answer_megatron("get_device_properties", properties, "megatron.training")
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # asked for, if tensor parallel
    with contextlib.suppress(ImportError):  # comes with Megatron-LM before 0.17
        from megatron.legacy import fused_kernels

        fused_kernels.load = _nothing


def _answer_megatron(name: str, answer: Any, package: str) -> None:
    """Have `torch.cuda`'s function `name` give `answer` where a module of `package` asks."""
    original = getattr(torch.cuda, name)

    @functools.wraps(original)
    def ask(*args: Any, **kwargs: Any) -> Any:
        caller = sys._getframe(1).f_globals.get("__name__", "")
        return answer if caller.startswith(package) else original(*args, **kwargs)

    setattr(torch.cuda, name, ask)


def _norms_take_sequence_parallel() -> None:
    # WrappedTorchNorm refuses sequence parallelism only because nobody marks its weights for the reduction
    # of their gradients over tensor-parallel ranks.
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    original = WrappedTorchNorm.__new__

    @functools.wraps(original)
    def new(cls: type, config: Any, *args: Any, **kwargs: Any) -> torch.nn.Module:
        plain = copy.copy(config)
        plain.sequence_parallel = False
        norm = original(cls, plain, *args, **kwargs)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm

    WrappedTorchNorm.__new__ = staticmethod(new)


def _experts_do_without_te() -> None:
    # A router asks whether Transformer Engine's product is None, and it is not defined where TE is missing.
    from megatron.core.transformer.moe import moe_utils

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


def _distributed_optimizer_reloads() -> None:
    # torch's AdamW makes its state, with one `step` per parameter, at the first step; Megatron expects that
    # state before (loading into a fresh process), loses `step`, or shares one `step` between all parameters.
    from megatron.core.optimizer.distrib_optimizer import HAVE_APEX_OR_TE, DistributedOptimizer

    if HAVE_APEX_OR_TE:
        return
    shard, load = DistributedOptimizer.sharded_state_dict, DistributedOptimizer.load_state_dict
    assign = DistributedOptimizer._set_main_param_and_optimizer_states

    @functools.wraps(shard)
    def sharded_state_dict(self: Any, model: Any, is_loading: bool = False, *args: Any, **kwargs: Any) -> Any:
        if is_loading and self.optimizer is not None and not self.optimizer.state:
            for group in self.optimizer.param_groups:
                for p in group["params"]:
                    moments = {k: torch.zeros_like(p) for k in ("exp_avg", "exp_avg_sq")}
                    self.optimizer.state[p] = {"step": torch.zeros(()), **moments}
        return shard(self, model, is_loading, *args, **kwargs)

    @functools.wraps(load)
    def load_state_dict(self: Any, state_dict: Any) -> None:
        load(self, state_dict)
        if state_dict.get("optimizer"):
            step = float(state_dict["optimizer"]["param_groups"][0]["step"])
            for state in self.optimizer.state.values():
                state["step"] = torch.tensor(step)

    @functools.wraps(assign)
    def set_states(self: Any, model_param: Any, tensors: dict[str, torch.Tensor]) -> None:
        group, index = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][index]]
        step = {"step": state["step"]} if "step" in state else {}
        assign(self, model_param, {**step, **tensors})

    DistributedOptimizer.sharded_state_dict = sharded_state_dict
    DistributedOptimizer.load_state_dict = load_state_dict
    DistributedOptimizer._set_main_param_and_optimizer_states = set_states
