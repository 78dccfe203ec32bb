"""A Megatron torch_dist checkpoint as logical tensors, read in one process, as streams, executing nothing in it.

    .metadata       pickle: each tensor's dtype, global shape and chunks, and where in which file each chunk lies
    __R_I.distcp    what rank R's I-th writer saved: one torch.save archive after another
    common.pt       torch.save of what all ranks share: optimizer step, hyper-parameters, arguments; from
                    megatron-core 0.19 on an object in one of the .distcp files
    metadata.json   the name of the format

A chunk is a box of the logical tensor, and however ranks cut it, `Checkpoint.blocks` walks it in row-major order:

    ┌────────┬────────┐
    │ rank 0 │ rank 1 │  row-parallel: rows are put together from both, a block at a time
    └────────┴────────┘
    ┌─────────────────┐
    │     rank 0      │  column-parallel: each chunk is contiguous as it lies in the file, and nothing is copied
    ├─────────────────┤
    │     rank 1      │
    └─────────────────┘
"""

from __future__ import annotations

import functools
import json
import math
import mmap
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tpcheck.checkpoint.tiling import Array, Index, Tile, boxes_of_range, row_major, tiles
from tpcheck.checkpoint.unpickle import ITEMSIZE, Inert, Stored, load_archive, load_pickle
from tpcheck.errors import TpcheckError, shown

__all__ = ["COMMON_STATE", "Checkpoint", "LogicalTensor"]

# Classes that are data, in the index and objects that torch and megatron-core write.
HARMLESS = re.compile(
    r"torch\.(Size|{dtypes}|\w+Storage|serialization\._get_layout|_utils\._rebuild_(tensor_v[23]|parameter)"
    r"|distributed\.checkpoint\.(filesystem\._StorageInfo|metadata\.((Bytes|Chunk|Tensor)StorageMetadata"
    r"|Metadata(Index)?|StorageMeta|TensorProperties|_MEM_FORMAT_ENCODING)"
    r"|planner\.(SavePlan|WriteItem(Type)?|(BytesIO|Tensor)WriteData)))"
    r"|megatron\.core\.dist_checkpointing\.strategies\."
    r"(torch\.MCore(Metadata|SavePlan)|resharding\.TensorReformulationMetadata)"
    r"|collections\.(OrderedDict|defaultdict)|_codecs\.encode|argparse\.Namespace|pathlib\.\w*Path"
    r"|builtins\.(set|frozenset|list|dict|tuple|bytearray|int|float|complex|slice)".format(dtypes="|".join(ITEMSIZE))
)
# Where megatron-core from 0.19 on has what older ones write into common.pt.
COMMON_STATE = "common_state/shard_0_1"
# The float32 weights that are trained: the distributed optimizer saves them as `param`, the other as this.
MASTER_WEIGHT = re.compile(r"^((?:chained_\d+\.)?optimizer\.state\.)fp32_param\.")


class LogicalTensor(NamedTuple):
    """A tensor as the model has it, whatever the ranks that saved it."""

    name: str
    dtype: str
    shape: Index
    chunks: tuple[Chunk, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEMSIZE[self.dtype]


class Chunk(NamedTuple):
    """The box of a logical tensor from `offset` on that one saved item holds, or a flattened piece of it."""

    offset: Index
    shape: Index
    item: Item
    start: int | None = None  # first element of the item's flat data; None: the item has the box's own shape


class Item(NamedTuple):
    """Where a torch.save archive lies in the checkpoint."""

    file: str
    position: int
    length: int


class Checkpoint:
    """The logical tensors of a torch_dist checkpoint.

    Args:
        path: the folder with `.metadata`.

    Raises:
        TpcheckError: when it is not such a folder, or not a whole one. Damage within a tensor shows when it is read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        _require_torch_dist(path)
        self._maps: dict[str, memoryview] = {}
        self.names: set[str] = set()  # what the index asks to be imported
        metadata = load_pickle((path / ".metadata").read_bytes(), f"{path}/.metadata", self.names)
        try:
            self.tensors, self.objects = _contents(metadata)
        except TpcheckError as error:
            raise TpcheckError(f"{path}/.metadata: {error}") from error
        except (AttributeError, KeyError, TypeError, ValueError, IndexError) as error:
            raise TpcheckError(f"{path}/.metadata is not a torch_dist index ({shown(error)}): damaged") from error
        self._require_whole_files()

    def blocks(self, tensor: LogicalTensor) -> Iterator[memoryview]:
        """The tensor's bytes in row-major order; a block is valid only until the next one is asked for."""
        parts = [Tile(chunk.offset, self._array(tensor, chunk)) for chunk in tensor.chunks if math.prod(chunk.shape)]
        if math.prod(tensor.shape) and not tiles(parts, tensor.shape):
            raise TpcheckError(
                f"{self.path}: the chunks of {tensor.name} do not add up to its shape {list(tensor.shape)}: "
                "the save is incomplete or damaged; use another checkpoint"
            )
        for array in row_major(parts):
            yield memoryview(array.reshape(-1).view(np.uint8))  # type: ignore[arg-type]

    def require_loadable(self, share: int = 0, shares: int = 1) -> None:
        """Refuse what must not be given to torch's own reader, which runs what a pickle asks for, and damaged bytes.

        Args:
            share, shares: look at this one of so many equal parts of the tensors' bytes, as one of as many ranks.
        """
        for name, item in self.objects.items():
            where = f"{self.path}/{item.file}, {name}"
            load_archive(self._view(item), where, self.names)
        if strange := sorted(name for name in self.names if not HARMLESS.fullmatch(name)):
            raise TpcheckError(
                f"{self.path} would run {', '.join(map(shown, strange[:3]))} when it is loaded, which no checkpoint "
                "needs: use another one"
            )
        items = dict.fromkeys(chunk.item for tensor in self.tensors.values() for chunk in tensor.chunks)
        for item in sorted(items)[share::shares]:
            load_archive(self._view(item), f"{self.path}/{item.file}, byte {item.position}")

    @functools.cached_property
    def common(self) -> tuple[Any, memoryview]:
        """What all ranks shared, tensors as `Stored` in the bytes that come with it; None where nothing was."""
        file = self.path / "common.pt"
        if file.exists():
            _require_file(file)
            view = memoryview(file.read_bytes())
            return load_archive(view, str(file)), view
        if COMMON_STATE in self.objects:
            value, view = self.object_of(COMMON_STATE)
            return value[0], view
        return None, memoryview(b"")

    def object_of(self, name: str) -> tuple[Any, memoryview]:
        """What was saved as the object `name`, and the bytes that its tensors lie in."""
        item = self.objects[name]
        view = self._view(item)
        return load_archive(view, f"{self.path}/{item.file}, {name}"), view

    def _array(self, tensor: LogicalTensor, chunk: Chunk) -> Array:
        where = f"{self.path}/{chunk.item.file}, {tensor.name}"
        view = self._view(chunk.item)
        stored = load_archive(view, where)
        if not isinstance(stored, Stored) or stored.dtype != tensor.dtype:
            raise TpcheckError(f"{where}: expected a plain {tensor.dtype} tensor, found {shown(stored)}: not supported")
        size = ITEMSIZE[stored.dtype]
        kind = f"u{size}" if size <= 8 else f"V{size}"
        strides = [stride * size for stride in stored.strides]
        array: Array = np.ndarray(stored.shape, kind, view, stored.position, strides)
        if chunk.start is not None:
            array = array.reshape(-1)[chunk.start : chunk.start + math.prod(chunk.shape)]
        if array.size != math.prod(chunk.shape):
            raise TpcheckError(f"{where}: {list(chunk.shape)} elements expected, found {list(stored.shape)}: damaged")
        return array.reshape(chunk.shape)

    def _view(self, item: Item) -> memoryview:
        if not item.length:
            return memoryview(b"")
        if item.file not in self._maps:
            with open(self.path / item.file, "rb") as shard:
                self._maps[item.file] = memoryview(mmap.mmap(shard.fileno(), 0, access=mmap.ACCESS_READ))
        return self._maps[item.file][item.position : item.position + item.length]

    def _require_whole_files(self) -> None:
        ends: dict[str, int] = {}
        chunks = (chunk.item for tensor in self.tensors.values() for chunk in tensor.chunks)
        for item in (*chunks, *self.objects.values()):
            ends[item.file] = max(ends.get(item.file, 0), item.position + item.length)
        for name, end in ends.items():
            file = self.path / name
            if not file.is_file():
                raise TpcheckError(f"{file} is missing: copy the whole checkpoint, or use another one")
            if (size := file.stat().st_size) < end:
                raise TpcheckError(
                    f"{file} has {size} bytes where at least {end} are due: cut short; "
                    "copy it again, or use another checkpoint"
                )


def _contents(metadata: Inert) -> tuple[dict[str, LogicalTensor], dict[str, Item]]:
    """The tensors, and where opaque objects lie, by name."""
    items = _items(metadata.get("storage_data"))
    reshaped = metadata.get("mcore_data") or {}
    tensors, objects = {}, {}
    for name, entry in metadata.get("state_dict_metadata").items():
        if entry.qualname.endswith(".BytesStorageMetadata"):
            if item := items.get((name, None)):
                objects[name] = item
            continue
        dtype = entry.get("properties").state[0].qualname.removeprefix("torch.")
        if dtype not in ITEMSIZE:
            raise TpcheckError(f"{name} has dtype {dtype}: known are {', '.join(ITEMSIZE)}")
        shape = _index(entry.get("size"))
        boxes = dict.fromkeys((_index(c.get("offsets")), _index(c.get("sizes"))) for c in entry.get("chunks"))
        chunks = [Chunk(offset, sizes, items[name, offset]) for offset, sizes in boxes]
        if any(len(chunk.offset) != len(shape) or len(chunk.shape) != len(shape) for chunk in chunks):
            raise ValueError(f"chunks of {name}")
        original = reshaped.get(name, {}).get("nd_reformulated_orig_global_shape")
        if original is not None:
            chunks = [box for chunk in chunks for box in _unflattened(chunk, shape, _index(original))]
            shape = tuple(original)
        logical = MASTER_WEIGHT.sub(r"\1param.", name)
        tensors[logical] = LogicalTensor(logical, dtype, shape, tuple(chunks))
    return tensors, objects


def _items(storage_data: dict[Inert, Inert]) -> dict[tuple[str, Index | None], Item]:
    items = {}
    for key, info in storage_data.items():
        name, offset = key.get("fqn"), key.get("offset")
        if transforms := info.get("transform_descriptors"):
            raise TpcheckError(f"{name} is stored through {', '.join(transforms)}: save it without")
        file, (position, length) = info.get("relative_path"), _index((info.get("offset"), info.get("length")))
        if Path(file).name != file:
            raise TpcheckError(f"{name} lies in {file}, which is not a file of the checkpoint: refused")
        items[name, offset] = Item(file, position, length)
    return items


def _index(value: Any) -> Index:
    if not isinstance(value, tuple) or not all(type(number) is int and number >= 0 for number in value):
        raise ValueError(f"{shown(value)} where numbers are due")
    return value


def _unflattened(chunk: Chunk, saved_shape: Index, shape: Index) -> Iterator[Chunk]:
    """The boxes of a chunk that megatron-core before 0.16 flattened.

    Such a tensor is saved as [fragments of dim 0, fragments of dim 1, …, elements of a fragment], where a
    fragment is one rank's flat shard of the tensor, cut anywhere by the distributed optimizer.
    """
    *fragment, start = chunk.offset
    local = tuple(size // pieces for size, pieces in zip(shape, saved_shape, strict=False))
    elements = chunk.shape[-1]
    if len(fragment) != len(shape) or math.prod(local) != saved_shape[-1]:
        raise TpcheckError(f"a flattened tensor of shape {list(saved_shape)} does not fit {list(shape)}: damaged")
    done = 0
    for offset, box in boxes_of_range(local, start, start + elements):
        base = (index * size + inner for index, size, inner in zip(fragment, local, offset, strict=True))
        yield Chunk(tuple(base), box, chunk.item, done)
        done += math.prod(box)


def _require_torch_dist(path: Path) -> None:
    if not path.is_dir():
        raise TpcheckError(
            f"{path}: {'not a folder' if path.exists() else 'no such folder'}; give a checkpoint's folder"
        )
    backend = _backend(path)
    if backend not in (None, "torch_dist"):
        raise TpcheckError(
            f"{path} is a {backend} checkpoint: only torch_dist is read; save with --ckpt-format torch_dist"
        )
    if (path / ".metadata").is_file():
        return
    inside = sorted(entry.name for entry in path.iterdir())
    raise TpcheckError(f"{path} is not a torch_dist checkpoint: {_diagnosis(inside)}")


def _backend(path: Path) -> Any:
    file = path / "metadata.json"
    if not file.exists():
        return None
    _require_file(file)
    try:
        return json.loads(file.read_bytes())["sharded_backend"]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise TpcheckError(f"{file} does not name a checkpoint format ({shown(error)}): damaged") from error


def _require_file(file: Path) -> None:
    """Refuse a pipe, which would be waited for, and whatever else is no plain file."""
    if not file.is_file():
        raise TpcheckError(f"{file} is not a file: copy the checkpoint again")


def _diagnosis(inside: list[str]) -> str:
    """Why a folder with these entries and no .metadata is not what was asked for, and what to do."""
    if iterations := [name for name in inside if re.fullmatch(r"iter_\d+|step-\d+", name)]:
        return f"it holds {', '.join(iterations[-3:])}; give one of these"
    if any(name.startswith("mp_rank_") for name in inside):
        return "it has the legacy format (mp_rank_*); load it in Megatron and save with --ckpt-format torch_dist"
    if any(name.endswith(".distcp") for name in inside):
        return "it has shards but no .metadata, so its save never came to an end; use an earlier checkpoint"
    if any(name.endswith((".safetensors", ".bin")) or name == "config.json" for name in inside):
        return "it looks like a Hugging Face model; convert it, or give the checkpoint that Megatron saved"
    return f"there is no .metadata in it{'' if inside else ', it is empty'}; give the folder that Megatron saved into"
