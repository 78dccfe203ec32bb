"""megatron.core.optimizer.distrib_optimizer: what the `fully_reshardable` format saves.

Stock gathers a buffer without the padding at the end of each bucket, and cuts parameters out of it at offsets that
count it. Whatever comes after a padded bucket is saved shifted, by an amount that follows the shards' sizes, and the
elements between are lost; stock loads them so, too.
"""

from __future__ import annotations

from typing import Any

from patches.registry import attribute

__all__ = ["PATCHES"]


def _sharded_param_state_fully_reshardable(original: Any) -> Any:
    def sharded_param_state_fully_reshardable(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Stock's, with the offsets that parameters have in the gathered buffers."""
        in_buffers = [buffer.param_index_map for buffer in self.buffers]
        try:
            for buffer in self.buffers:
                buffer.param_index_map = _without_padding(buffer)
            return original(self, *args, **kwargs)
        finally:
            for buffer, param_index_map in zip(self.buffers, in_buffers, strict=True):
                buffer.param_index_map = param_index_map

    return sharded_param_state_fully_reshardable


def _without_padding(buffer: Any) -> dict[Any, tuple[int, int, int]]:
    """(start, end, bucket) of every parameter of `buffer`, if buckets followed each other without padding."""
    padding = [0]
    for bucket in buffer.buckets:
        padding.append(padding[-1] + bucket.grad_data.numel() - bucket.numel_unpadded)
    return {
        parameter: (start - padding[bucket], end - padding[bucket], bucket)
        for parameter, (start, end, bucket) in buffer.param_index_map.items()
    }


PATCHES = [
    attribute(
        "saved-optimizer",
        "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer.sharded_param_state_fully_reshardable",
        "with several buckets, stock saves optimizer state shifted by their padding, which TP changes",
        _sharded_param_state_fully_reshardable,
        parameters="model_sharded_state_dict is_loading metadata",
        versions=">=0.15",
    )
]
