"""The logical digest of a checkpoint: a function of the tensors alone, whatever the ranks that saved them.

    per tensor   BLAKE3 of its bytes in row-major order
    in total     BLAKE3 of one line `["name","dtype",[shape],"digest"]` per tensor, sorted by name

Model and optimizer have a total each. Opaque objects (`_extra_state`, random-number states) do not enter; the
optimizer's step counts, which Megatron keeps apart from its tensors, do, as `optimizer.step`. Hyper-parameters
do not: they are the configuration's. Checkpoints are streamed: no tensor is ever held in memory.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3

from tpcheck.checkpoint.beside import beside
from tpcheck.checkpoint.main_parameters import count_unlike, weight_of
from tpcheck.checkpoint.reader import Checkpoint, LogicalTensor
from tpcheck.checkpoint.unpickle import Stored, number
from tpcheck.errors import TpcheckError
from tpcheck.files import result_dir
from tpcheck.files.names import DIGESTS

__all__ = ["PARTS", "Digests", "TensorDigest", "command", "digest_checkpoint", "digest_with_progress", "require_equal"]

ALGORITHM = "blake3"
PARTS = ("model", "optimizer")
FULLY_RESHARDABLE = "fully_reshardable"  # Megatron's name of a format
FLAT_BUFFERS = re.compile(r"(chained_\d+\.)?optimizer\.distributed\.")


@dataclass(frozen=True)
class TensorDigest:
    """One logical tensor and the digest of its bytes."""

    dtype: str
    shape: tuple[int, ...]
    digest: str


@dataclass(frozen=True)
class Digests:
    """A checkpoint's digests: in total, and by part and tensor name.

    `beside` is what else the checkpoint holds, by name (`beside.py`): part of neither total.
    `optimizer` is None where no optimizer was saved, or none that can be digested; `notes` say which.
    """

    model: str
    optimizer: str | None
    tensors: Mapping[str, Mapping[str, TensorDigest]]
    notes: tuple[str, ...] = ()
    beside: Mapping[str, str] = field(default_factory=dict, compare=False)
    algorithm: str = ALGORITHM

    def to_json(self) -> dict[str, Any]:
        """What digests.json holds, less the step."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any], where: str) -> Digests:
        """The inverse of `to_json`; `where` names the file in an error."""
        if value.get("algorithm") != ALGORITHM:
            raise TpcheckError(f"{where} has {value.get('algorithm')!r} digests: this tpcheck compares {ALGORITHM}")
        try:
            tensors = {
                part: {
                    name: TensorDigest(str(t["dtype"]), tuple(t["shape"]), str(t["digest"]))
                    for name, t in value["tensors"][part].items()
                }
                for part in PARTS
            }
            rest = {str(name): str(text) for name, text in value.get("beside", {}).items()}
            found = cls(value["model"], value["optimizer"], tensors, tuple(value.get("notes", ())), rest)
        except (KeyError, TypeError, AttributeError) as error:
            raise TpcheckError(f"{where} does not hold digests ({error!r}): damaged") from error
        for part, total in zip(PARTS, (found.model, found.optimizer), strict=True):
            if total and tensors[part] and total != _total(tensors[part]):
                raise TpcheckError(
                    f"{where}: {part}'s digest is not that of the tensors that it lists: changed by hand"
                )
        return found


def digest_checkpoint(path: Path, on_bytes: Callable[[int, int], None] | None = None) -> Digests:
    """Digest the torch_dist checkpoint in `path`.

    Args:
        on_bytes: called with the bytes done so far and their total, after each tensor.

    Raises:
        TpcheckError: when `path` is no such checkpoint, or is damaged.
    """
    checkpoint = Checkpoint(path)
    logical = [tensor for name, tensor in checkpoint.tensors.items() if part_of(name)]
    total, done = sum(tensor.nbytes for tensor in logical), 0
    tensors: dict[str, dict[str, TensorDigest]] = {part: {} for part in PARTS}
    unlike: dict[str, str] = {}
    for tensor, digest, strangers in _digests(checkpoint, logical):
        tensors[part_of(tensor.name)][tensor.name] = digest
        if strangers:
            unlike[tensor.name] = f"{strangers} of {math.prod(tensor.shape)} elements of {tensor.name}"
        done += tensor.nbytes
        if on_bytes:
            on_bytes(done, total)
    if not any(tensors.values()):
        raise TpcheckError(f"{path} holds no tensors: not a checkpoint of a model")
    misplaced = bool(unlike) and FULLY_RESHARDABLE in _sharding_types(checkpoint)
    if misplaced:
        tensors["optimizer"] = {}
    if tensors["optimizer"] and (steps := _optimizer_steps(checkpoint)):
        tensors["optimizer"]["optimizer.step"] = _values(steps)
    return Digests(
        _total(tensors["model"]),
        _total(tensors["optimizer"]) if tensors["optimizer"] else None,
        {part: dict(sorted(by_name.items())) for part, by_name in tensors.items()},
        (*_notes(checkpoint, tensors), *_notes_on_weights(unlike, misplaced)),
        beside(checkpoint),
    )


def require_equal(recorded: Digests, found: Digests, checkpoint: Path) -> None:
    """Refuse digests on record that are not those of the checkpoint."""
    for part, was, now in zip(PARTS, (recorded.model, recorded.optimizer), (found.model, found.optimizer), strict=True):
        if was != now:
            strangers = sorted(
                name for name, tensor in found.tensors[part].items() if recorded.tensors[part].get(name) != tensor
            )
            raise TpcheckError(
                f"{checkpoint}: {part} has digest {str(now)[:12]}, on record is {str(was)[:12]}"
                f"{f' (first of all {strangers[0]})' if strangers else ''}: one of them was changed"
            )


def digest_with_progress(path: Path) -> Digests:
    """`digest_checkpoint`, with a progress bar on standard error where that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        return digest_checkpoint(path)
    columns = (BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(path.name)
        return digest_checkpoint(path, lambda done, total: progress.update(task, completed=done, total=total))


def _digests(checkpoint: Checkpoint, tensors: list[LogicalTensor]) -> Iterator[tuple[LogicalTensor, TensorDigest, int]]:
    """Every tensor with its digest and `count_unlike` of a main weight, one tensor a thread, the big ones first."""

    def digest(tensor: LogicalTensor) -> tuple[LogicalTensor, TensorDigest, int]:
        hasher = blake3()  # one thread: the threads of its own pool would not survive a fork

        def hashed() -> Iterator[memoryview]:
            for block in checkpoint.blocks(tensor):
                hasher.update(block)
                yield block

        unlike = 0
        if weight := weight_of(tensor, checkpoint.tensors):
            unlike = count_unlike(hashed(), checkpoint.blocks(weight), weight.dtype)
        else:
            for _ in hashed():
                pass
        return tensor, TensorDigest(tensor.dtype, tensor.shape, hasher.hexdigest()), unlike

    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        yield from pool.map(digest, sorted(tensors, key=lambda tensor: -tensor.nbytes))
    finally:
        pool.shutdown(cancel_futures=True)


def part_of(name: str) -> str:
    """Which part a tensor belongs to; empty for what has no place in a logical digest."""
    if "_extra_state" in name or FLAT_BUFFERS.match(name):
        return ""
    return "optimizer" if re.match(r"(chained_\d+\.)?optimizer\.", name) else "model"


def command(path: Path, *, tensors: bool, everything: bool = False, as_json: bool) -> int:
    """`tpcheck hash`: one line a part, or a tensor, or what else there is, in the manner of b3sum."""
    digests, where = _find(path)
    if as_json:
        print(json.dumps({"checkpoint": str(where), **digests.to_json()}, indent=1))
        return 0
    if tensors:
        for by_name in digests.tensors.values():
            for name, tensor in by_name.items():
                print(f"{tensor.digest}  {name}  {tensor.dtype}{list(tensor.shape)}")
    if everything:
        for name, text in digests.beside.items():
            print(f"{text}  {name}")
    print(f"{digests.model}  model")
    print(f"{digests.optimizer}  optimizer" if digests.optimizer else "# no optimizer to digest")
    for note in digests.notes:
        print(f"# {note}")
    return 0


def _find(path: Path) -> tuple[Digests, Path]:
    """Digests of a checkpoint or of a result directory's last one, which may be deleted: then those on record."""
    if (path / ".metadata").exists() or not result_dir.is_result(path):
        return digest_with_progress(path), path
    if saved := result_dir.checkpoints(path):
        step, last = saved[-1]
        digests = digest_with_progress(last)
        with contextlib.suppress(TpcheckError):  # what is on record may be what is in doubt
            if (recorded := result_dir.read_digests(path)) and recorded["step"] != step:
                note = f"these are of step {step}, the last checkpoint here; those on record are of {recorded['step']}"
                digests = dataclasses.replace(digests, notes=(*digests.notes, note))
        return digests, last
    recorded = result_dir.read_digests(path)
    if recorded is None:
        raise TpcheckError(f"{path} has neither a complete checkpoint nor digests: train it first, or with --resume")
    file = path / DIGESTS
    return Digests.from_json(recorded, str(file)), file


def _total(tensors: Mapping[str, TensorDigest]) -> str:
    lines = (
        json.dumps([name, tensor.dtype, list(tensor.shape), tensor.digest], separators=(",", ":")) + "\n"
        for name, tensor in sorted(tensors.items())
    )
    return blake3("".join(lines).encode()).hexdigest()


def _values(numbers: list[float]) -> TensorDigest:
    return TensorDigest("float64", (len(numbers),), blake3(np.array(numbers, "<f8").tobytes()).hexdigest())


def _optimizer_steps(checkpoint: Checkpoint) -> list[float]:
    """The distinct step counts of the optimizer's parameter groups: one, unless it is a strange run."""
    common, view = checkpoint.common
    found = _values_in(common, ("step", "common_step"), (Stored, int, float))
    return sorted({number(step, view) if isinstance(step, Stored) else float(step) for step in found})


def _sharding_types(checkpoint: Checkpoint) -> set[str]:
    """The formats in which distributed optimizers say that they were saved."""
    return set(_values_in(checkpoint.common[0], ("param_state_sharding_type",), (str,)))


def _values_in(common: Any, keys: tuple[str, ...], types: tuple[type, ...]) -> Iterator[Any]:
    """What the optimizer's part of the common state has under `keys`, at any depth, if it is of `types`."""
    waiting = [common.get("optimizer")] if isinstance(common, dict) else []
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            for key, inner in value.items():
                if key in keys and isinstance(inner, types):
                    yield inner
                else:
                    waiting.append(inner)
        elif isinstance(value, list):
            waiting.extend(value)


def _notes(checkpoint: Checkpoint, tensors: Mapping[str, Mapping[str, TensorDigest]]) -> Iterator[str]:
    names = (*checkpoint.tensors, *checkpoint.objects)
    if any(FLAT_BUFFERS.match(name) for name in names):
        yield (
            "the optimizer was saved as flat buffers, whose layout depends on TP and DP: it has no logical digest; "
            f"save it as {FULLY_RESHARDABLE} to compare it"
        )
    elif tensors["optimizer"] and "optimizer.step" not in tensors["optimizer"]:
        yield "the optimizer's step count was not found and is not part of its digest"


def _notes_on_weights(unlike: Mapping[str, str], misplaced: bool) -> Iterator[str]:
    if not unlike:
        return
    found = f"{unlike[min(unlike)]} (tensors like it: {len(unlike)}) do not round to the model's weights"
    if misplaced:
        yield (
            f"the optimizer is not to be trusted and has no digest: {found}. Megatron's {FULLY_RESHARDABLE} format "
            "drops the padding between DDP buckets: save it without --overlap-grad-reduce, with one bucket "
            "(--ddp-bucket-size above the parameter count), or under the patches; of FP8 weights, or of remainders "
            "in place of main weights, nothing can be told"
        )
    else:
        yield f"{found}: model and optimizer are of different steps, or the model's weights are quantized"
