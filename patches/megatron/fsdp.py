"""megatron.core.distributed: fully sharded data parallelism, whose sums over shards are not covered."""

from __future__ import annotations

from typing import Any

from patches.contract import UnsupportedError
from patches.registry import Patch, attribute

__all__ = ["PATCHES"]


def _refused(flag: str) -> Any:
    def replacement(original: Any) -> Any:
        def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
            raise UnsupportedError(
                f"fully sharded data parallelism is not covered: use Megatron's own DDP (without {flag})"
            )

        return __init__

    return replacement


def _patch(name: str, target: str, flag: str) -> Patch:
    return attribute(
        name,
        f"megatron.core.distributed.{target}.__init__",
        "refuses data parallelism whose sums are not covered",
        _refused(flag),
    )


PATCHES = [
    _patch("megatron-fsdp", "fsdp.mcore_fsdp_adapter:FullyShardedDataParallel", "--use-megatron-fsdp"),
    _patch("torch-fsdp", "torch_fully_sharded_data_parallel:TorchFullyShardedDataParallel", "--use-torch-fsdp2"),
]
