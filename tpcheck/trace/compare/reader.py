"""A trace on disk as logical tensors: the boxes of all ranks put together, replicas compared on the way.

    rank 0  ┌───┐       rank 1  ┌───┐                ┌───┬───┐
            │ a │               │ b │       ──►      │ a │ b │      two boxes: put side by side
            └───┘               └───┘                └───┴───┘
            │ c │               │ c'│       ──►      │ c │          one box twice: replicas, which have to be equal

Nothing is read before it is asked for, and one tensor at a time.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from tpcheck.checkpoint.tiling import Array, Index, Tile, tiles
from tpcheck.checkpoint.ulp import values
from tpcheck.checkpoint.unpickle import ITEMSIZE
from tpcheck.errors import TpcheckError, shown
from tpcheck.files.names import RANK, RECORDS, SETTINGS
from tpcheck.files.records import Json
from tpcheck.trace.compare.logical import Box, Key, Logical, encoded, in_a_row, replicas_of, resolved, slices_of
from tpcheck.trace.compare.tensorfile import tensors
from tpcheck.trace.record.store import FORMAT, rank_folder

__all__ = ["PHASES", "Trace"]


OPEN_FILES = 64
DAMAGE = (ValueError, KeyError, TypeError, AttributeError, RecursionError)
DESCRIPTION: Json = {"world": int, "tp": int, "dp": int, "pp": int, "dtype": str, "sample": int, "perturb": int,
                     "records": int}  # fmt: skip
RECORD: Json = {"name": str, "kind": str, "step": int, "file": int, "dtype": (str, type(None))}
# In the order in which a step makes them; what was wrong first is what to look at.
PHASES = {"start": 0, "resumed": 0, "input": 1, "in": 2, "out": 2, "mask": 2, "loss": 3, "again": 4, "dout": 5,
          "din": 5, "grad": 6, "clip": 7, "state": 8, "update": 9, "weight": 10}  # fmt: skip


class Trace:
    """The trace in `path`; refused unless every rank's part of it is whole.

    Attributes:
        cuts: dimensions of which only the first indices are looked at, with how many: of vocabularies that another
            trace pads differently.
        recuts: dimensions along which tensor-parallel ranks' boxes lie one after the other, though their records say
            that each is all of it (True), or the other way round (False).
        orders: by step, samples in the order in which another trace has them.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        first = _rank_json(path, 0)
        self.world: int = first["world"]
        self.ranks = [first, *(_rank_json(path, rank) for rank in range(1, self.world))]
        for key in ("world", "tp", "dp", "dtype", "steps", "sample", "perturb"):
            if len({json.dumps(rank[key]) for rank in self.ranks}) > 1:
                raise TpcheckError(f"{path}: its ranks do not agree on {key}: they are not of one run")
        self.dtype, self.tp, self.dp, self.sample = first["dtype"], first["tp"], first["dp"], first["sample"]
        self.perturb: int = first["perturb"]
        self.pp: int = first.get("pp", 1)
        self.steps: list[int] = first["steps"]
        self.megatron: bool = first.get("megatron", False)
        self.layout = (self.tp, self.dp, self.pp, bool(first.get("sequence_parallel")))
        self.cuts: dict[Key, tuple[int, int]] = {}
        self.recuts: dict[Key, tuple[int, bool]] = {}
        self.orders: dict[int, list[int]] = {}
        self.files: dict[Path, dict[str, Array]] = {}
        self.records: dict[Key, list[tuple[int, int, Json]]] = {}
        self.order: dict[Key, tuple[int, int, int, int]] = {}
        for rank, description in enumerate(self.ranks):
            self._index(rank, description["records"])
        self._separate()
        self._derive_updates()
        self.settings = [_settings(rank_folder(path, rank)) for rank in range(self.world)]

    def keys(self) -> list[Key]:
        """All logical tensors, as they came up in the run."""
        return sorted(self.order, key=lambda key: self.order[key])

    def logical(self, key: Key) -> Logical | str:
        """The tensor put together, or why it cannot be."""
        if key in self.updates:
            return self._update(key)
        records = self.records[key]
        shapes = {tuple(record["shape"]) for _, _, record in records}
        dtypes = {record["dtype"] for _, _, record in records if record["dtype"]}
        if len(shapes) != 1 or len(dtypes) != 1:
            return f"its ranks disagree on shape or dtype: {sorted(map(str, shapes | dtypes))}"
        dtype = dtypes.pop()
        boxes: dict[Box, list[tuple[int, Array]]] = {}
        for rank, number, record in records:
            for box, offset in enumerate(self._offsets(key, rank, record)):
                array = self._array(rank, record, f"{number}.{box}")
                if not len(offset) == array.ndim == len(record["shape"]):
                    return "its boxes have other dimensions than it"
                if array.itemsize != ITEMSIZE.get(dtype):
                    return f"its boxes are not of dtype {shown(dtype)}"
                boxes.setdefault((tuple(offset), array.shape), []).append((rank, array))
        if not boxes:
            return "no rank holds any of it"
        sides = self._shape(key, shapes.pop())
        batch = sides.index(None) if None in sides else None
        if batch is not None:
            boxes = in_a_row(boxes, batch)
        shape = resolved(sides, boxes)
        whole: dict[Box, Array] = {}
        partial = any(record.get("partial") for _, _, record in records) and key.kind in ("din", "dout")
        for place, held in boxes.items():
            whole[place] = (
                encoded(np.sum([values(a, dtype) for _, a in held], axis=0), dtype) if partial else held[0][1]
            )
        if not tiles([Tile(offset, array) for (offset, _), array in whole.items()], shape):
            return f"its boxes do not add up to {list(shape)}"
        bits = np.empty(shape, next(iter(whole.values())).dtype)
        for (offset, size), array in whole.items():
            bits[slices_of(offset, size)] = array
        scale = records[0][2].get("scale", 1.0)
        if scale != 1:
            bits = encoded(values(bits, dtype) * scale, dtype)
        ranks = tuple((rank, slices_of(*place)) for place, held in boxes.items() for rank, _ in held)
        assumed = any(record.get("assumed") for _, _, record in records)
        unequal = any(array.tobytes() != held[0][1].tobytes() for held in boxes.values() for _, array in held[1:])
        replicas = None if partial or not unequal else replicas_of(boxes, dtype, shape)
        if assumed and replicas:
            return "how it is cut is not known, and its ranks hold different values"
        found = Logical(dtype, bits, ranks, replicas, tuple(records[0][2]["how"]), batch)
        if key.kind == "loss":
            return found.summed()
        if batch is not None and len(order := self.orders.get(key.step, [])) == shape[batch]:
            found = replace(found, bits=np.take(bits, order, batch), ranks=())
        return found.narrowed(*self.cuts[key]) if key in self.cuts else found

    def _offsets(self, key: Key, rank: int, record: Json) -> Iterator[Index]:
        """Where a record's boxes are."""
        dim, apart = self.recuts.get(key, (-1, False))
        for offset in record["at"]:
            if dim >= 0:
                extent = record["shape"][dim]
                by = self.ranks[rank]["tp_rank"] * (extent if apart else -(extent // self.tp))
                offset = [*offset[:dim], offset[dim] + by, *offset[dim + 1 :]]
            yield tuple(offset)

    def _shape(self, key: Key, shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        dim, apart = self.recuts.get(key, (-1, False))
        if dim < 0:
            return shape
        extent = shape[dim] or 0
        return (*shape[:dim], extent * self.tp if apart else extent // self.tp, *shape[dim + 1 :])

    def _separate(self) -> None:
        """Microbatches whose sequences are of other lengths than others' are tensors by themselves."""
        for key, held in list(self.records.items()):
            shapes = {tuple(record["shape"]) for _, _, record in held}
            if len(shapes) < 2 or not all("microbatch" in record and None in record["shape"] for _, _, record in held):
                continue
            del self.records[key]
            for rank, number, record in held:
                alone = key._replace(name=f"{key.name}@{record['microbatch']}")
                self.records.setdefault(alone, []).append((rank, number, record))
                self.order.setdefault(alone, self.order[key])
            del self.order[key]

    def _derive_updates(self) -> None:
        """Of every parameter that is kept in float32, what a step moves it by."""
        self.updates: dict[Key, tuple[Key, Key]] = {}
        for key, place in list(self.order.items()):
            if key.kind not in ("state.main", "weight"):
                continue
            main = key._replace(kind="state.main")
            fine = key.kind == "state.main" or (main not in self.records and self._dtype(key) == "float32")
            ones = (
                Key(key.step - 1, key.kind, key.name),
                key._replace(kind="resumed.main"),
                key._replace(kind="start"),
            )
            before = next((one for one in ones if one in self.records), None)
            if fine and before is not None:
                update = key._replace(kind="update")
                self.updates[update] = (before, key)
                self.records[update] = self.records[key]
                self.order[update] = (place[0], PHASES["update"], *place[2:])

    def _dtype(self, key: Key) -> str:
        return next((record["dtype"] for _, _, record in self.records[key] if record["dtype"]), "")

    def _update(self, key: Key) -> Logical | str:
        before, after = (self.logical(one) for one in self.updates[key])
        if isinstance(before, str) or isinstance(after, str):
            return before if isinstance(before, str) else str(after)
        if before.bits.shape != after.bits.shape:
            return "the parameter has changed its shape"
        moved = after.values() - before.values()
        return replace(after, dtype="float64", bits=moved.view("<u8"), replicas=None)

    def logical_or_none(self, key: Key) -> Logical | None:
        found = self.logical(key) if key in self.records else None
        return None if isinstance(found, str) else found

    def microbatches(self, step: int) -> int:
        """How many microbatches a rank has in `step`."""
        found = {record["microbatch"] for key, held in self.records.items() if key.step == step
                 for rank, _, record in held if not rank and "microbatch" in record}  # fmt: skip
        return len(found)

    def _index(self, rank: int, count: int) -> None:
        file = rank_folder(self.path, rank) / RECORDS
        lines = file.read_bytes().splitlines() if file.exists() else []
        if len(lines) != count:
            raise TpcheckError(f"{file} has {len(lines)} records where {count} are due: copy the trace again")
        for number, line in enumerate(lines):
            try:
                record = json.loads(line)
                _require(record, RECORD, "shape", "at", "how")
                name = record["name"]
                if record.get("alone"):
                    name += f"@{record['microbatch']}"
                key = Key(record["step"], record["kind"], name)
                self.records.setdefault(key, []).append((rank, number, record))
                phase = PHASES[key.kind.partition(".")[0]]
                # Forward through the stages of a pipeline, and back.
                stage = record.get("stage", 0) * (-1 if phase == PHASES["dout"] else 1)
                self.order.setdefault(key, (key.step, phase, stage, number))
            except DAMAGE as error:
                raise TpcheckError(f"{file}:{number + 1} is not a record ({shown(error)}): damaged") from error

    def _array(self, rank: int, record: Json, name: str) -> Array:
        file = rank_folder(self.path, rank) / f"{record['file']:06d}.safetensors"
        if file not in self.files:
            if len(self.files) >= OPEN_FILES:
                self.files.clear()
            self.files[file] = tensors(file)
        found = self.files[file]
        if name not in found:
            raise TpcheckError(f"{file} has no {name}, which {RECORDS} says it has: damaged")
        return found[name]


def _settings(folder: Path) -> dict[int, Json]:
    """A rank's settings by step; older traces have none."""
    file = folder / SETTINGS
    if not file.exists():
        return {}
    try:
        lines = [json.loads(line) for line in file.read_bytes().splitlines()]
        for line in lines:
            _require(line, {"step": int, "run": dict, "parameters": dict}, "groups")
            known = range(len(line["groups"]))
            described = [*line["groups"], *line.get("modules", {}).values(), *line["parameters"].values()]
            if not all(isinstance(one, dict) for one in described):
                raise TypeError("what should be fields is not")
            if not all(one.get("group", 0) in known or not known for one in line["parameters"].values()):
                raise ValueError("a parameter's group is not there")
        return {line["step"]: line for line in lines}
    except DAMAGE as error:
        raise TpcheckError(f"{file} does not hold settings ({shown(error)}): copy the trace again") from error


def _rank_json(path: Path, rank: int) -> Json:
    file = rank_folder(path, rank) / RANK
    try:
        found = json.loads(file.read_bytes())
    except FileNotFoundError:
        if rank:
            raise TpcheckError(f"{path} lacks rank {rank} ({file.parent.name}): copy every rank's folder") from None
        raise TpcheckError(f"{path} is not a trace: it has no {file.parent.name}/{RANK}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise TpcheckError(f"{file} is not JSON ({error}): copy the trace again") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise TpcheckError(f"{file} is not of format {FORMAT}: trace the run again with this tpcheck")
    if "records" not in found:
        raise TpcheckError(f"{path}: rank {rank} was cut short before its trace was whole: trace the run again")
    try:
        _require({"pp": 1, **found}, DESCRIPTION, "steps")
    except DAMAGE as error:
        raise TpcheckError(f"{file} does not describe a trace ({shown(error)}): copy the trace again") from error
    return found


def _require(found: Json, types: Json, *lists: str) -> None:
    """Raise one of `DAMAGE` where a field is missing or of another type than the writer gives it."""
    for name, wanted in {**types, **dict.fromkeys(lists, list)}.items():
        if not isinstance(found[name], wanted):
            raise TypeError(f"{name} is {shown(found[name])}")
    if not all(isinstance(extent, (int, type(None))) for extent in found.get("shape", [])):
        raise TypeError(f"shape is {shown(found['shape'])}")
    if not all(isinstance(step, int) for step in found.get("steps", [])):
        raise TypeError(f"steps is {shown(found['steps'])}")
    if found.get("world", 1) < 1:
        raise ValueError(f"world is {found['world']}")
