"""Writes torch_dist checkpoints cut in any way, with torch's own metadata classes and the bytes torch.save makes."""

from __future__ import annotations

import contextlib
import itertools
import json
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

Box = tuple[tuple[int, ...], tuple[int, ...]]
Cut = Callable[[str, torch.Tensor], Sequence[Box]]


def whole(name: str, tensor: torch.Tensor) -> list[Box]:
    return [((0,) * tensor.ndim, tuple(tensor.shape))]


def along(dim: int, pieces: int) -> Cut:
    """Cuts every tensor that is long enough into `pieces` along `dim`, as TP ranks would."""

    def cut(name: str, tensor: torch.Tensor) -> list[Box]:
        if tensor.ndim <= dim or tensor.shape[dim] < pieces:
            return whole(name, tensor)
        edges = [tensor.shape[dim] * piece // pieces for piece in range(pieces + 1)]
        return list(grid([edges if axis == dim else [0, size] for axis, size in enumerate(tensor.shape)]))

    return cut


def grid(edges: Sequence[Sequence[int]]) -> Iterator[Box]:
    """The boxes between the edges of every dimension."""
    for corner in itertools.product(*(list(itertools.pairwise(sorted(set(along)))) for along in edges)):
        yield tuple(low for low, _ in corner), tuple(high - low for low, high in corner)


def save(
    path: Path,
    tensors: Mapping[str, torch.Tensor],
    cut: Cut = whole,
    *,
    files: int = 2,
    common: Any = None,
    common_in_shard: bool = False,
    mcore_data: Mapping[str, Any] | None = None,
) -> Path:
    """Save `tensors` into `path`, each cut into the boxes that `cut` says, dealt out over `files` shard files.

    Args:
        common: what all ranks share, in common.pt, or in a shard file as megatron-core has it from 0.19 on.
    """
    common = optimizer_step(1) if common is None else common
    path.mkdir(parents=True)
    storage: dict[MetadataIndex, _StorageInfo] = {}
    entries: dict[str, Any] = {}
    turn = itertools.cycle(range(files))
    with contextlib.ExitStack() as stack:
        shards = [stack.enter_context(open(path / f"__0_{index}.distcp", "wb")) for index in range(files)]
        for name, tensor in tensors.items():
            boxes = cut(name, tensor)
            for offset, size in boxes:
                part = tensor[tuple(slice(low, low + length) for low, length in zip(offset, size, strict=True))]
                shard = shards[index := next(turn)]
                start = shard.tell()
                torch.save(part.clone(), shard)
                info = _StorageInfo(f"__0_{index}.distcp", start, shard.tell() - start)
                storage[MetadataIndex(name, offset)] = info
            chunks = [ChunkStorageMetadata(torch.Size(offset), torch.Size(size)) for offset, size in boxes]
            entries[name] = TensorStorageMetadata(TensorProperties(dtype=tensor.dtype), tensor.size(), chunks)
        objects = {"decoder.layers._extra_state/shard_0_1": None}
        for name, value in (objects | ({"common_state/shard_0_1": [common]} if common_in_shard else {})).items():
            start = shards[0].tell()
            torch.save(value, shards[0])
            storage[MetadataIndex(name)] = _StorageInfo("__0_0.distcp", start, shards[0].tell() - start)
            entries[name] = BytesStorageMetadata()
    metadata = Metadata(entries, storage_data=storage)
    if mcore_data is not None:
        metadata.mcore_data = mcore_data  # type: ignore[attr-defined]
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    (path / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1}))
    if not common_in_shard:
        torch.save(common, path / "common.pt")
    return path


def optimizer_step(step: int) -> dict[str, Any]:
    return {"optimizer": {"optimizer": {"state": {"common_step": torch.tensor(float(step))}, "param_groups": []}}}
