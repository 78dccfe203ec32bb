"""The module `transformer_engine_torch`: stand-ins by name, and a refusal for every other name."""

from __future__ import annotations

import enum
import types
from typing import Any

from tests.support.te_cpu import tensors

DTYPES = {
    "kByte": 0, "kInt32": 2, "kFloat32": 4, "kFloat16": 5, "kBFloat16": 6, "kFloat8E4M3": 7, "kFloat8E5M2": 8,
    "kFloat4E2M1": 10,
}  # fmt: skip
FORWARD_TENSORS = (
    "GEMM1_INPUT GEMM1_WEIGHT GEMM1_OUTPUT GEMM2_INPUT GEMM2_WEIGHT GEMM2_OUTPUT GEMM3_INPUT GEMM3_WEIGHT GEMM3_OUTPUT"
)
BACKWARD_TENSORS = "GRAD_OUTPUT1 GRAD_INPUT1 GRAD_OUTPUT2 GRAD_INPUT2 GRAD_OUTPUT3 GRAD_INPUT3"


def extension() -> types.ModuleType:
    module: Any = types.ModuleType("transformer_engine_torch")
    module.__file__ = __file__
    module.DType = enum.IntEnum("DType", DTYPES)
    module.FP8FwdTensors = enum.IntEnum("FP8FwdTensors", FORWARD_TENSORS, start=0)
    module.FP8BwdTensors = enum.IntEnum("FP8BwdTensors", BACKWARD_TENSORS, start=0)
    module.CommOverlapType = enum.IntEnum("CommOverlapType", "RS AG", start=0)
    for name in tensors.__all__:
        setattr(module, name, getattr(tensors, name))
    module.get_fused_attn_backend = _no_fused_backend(module)
    for name, value in (("get_cublasLt_version", 130000), ("get_cudnn_version", 91300), ("get_num_cublas_streams", 4),
                        ("get_stream_priority_range", (0, 0)), ("device_supports_multicast", False),
                        ("ubuf_built_with_mpi", False)):  # fmt: skip
        setattr(module, name, lambda *args, value=value: value)

    def __getattr__(name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = _Members(name, (), {}) if name[0].isupper() else _Absent(name)
        setattr(module, name, value)
        return value

    module.__getattr__ = __getattr__
    return module


def _no_fused_backend(module: Any) -> Any:
    def answer(*args: Any) -> Any:
        none = module.NVTE_Fused_Attn_Backend.NVTE_No_Backend
        return none if len(args) > 1 else (none, "no cuDNN here")  # one object of parameters from 2.20 on

    return answer


class _Members(type):
    """An enumeration whose members appear when asked for: TE compares them, but only the extension knows values."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        member = type("Member", (int,), {"name": name})(len(cls.__members__))
        setattr(cls, name, member)
        return member

    @property
    def __members__(cls) -> dict[str, int]:
        return {name: value for name, value in vars(cls).items() if isinstance(value, int) and name[0] != "_"}


class _Absent:
    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"transformer_engine_torch.{self.name} has no stand-in on CPU")
