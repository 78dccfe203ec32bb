"""A sweep file, and the cells it stands for: one base run times a matrix of settings.

    name: qwen3-tiny-cpu
    base: {model: qwen3-tiny, steps: 20}      # a run, or the path of a run file beside this one
    matrix: {strategy: [stock, tree], tp: [1, 2]}
    exclude: [{strategy: stock, tp: 2}]       # optional
    layouts: [{tp: 1}, {tp: 2, dp: 3}]        # optional: settings that go together, each with all of the matrix
    invariant: [tp, pp, vpp, sequence_parallel, arch]  # what must not change a bit (these are the default)
    output: results/qwen3-tiny-cpu            # the default; one result directory per cell in it

A cell is named after its settings, `tree-tp2`. Cells that differ only in invariant settings form a group; dp, cp, ep,
etp and micro_batch_size are of these by default where a run has `batch: order-free`.
`arch: [h100, b300]` in the matrix is no setting of a run but where to run it, which only a cluster can choose.
"""

from __future__ import annotations

import copy
import difflib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tpcheck.config.dotted import flat, put
from tpcheck.config.load import override, parse_run, read_yaml
from tpcheck.config.schema import RunConfig, directory
from tpcheck.errors import TpcheckError, shown

__all__ = ["ARCH", "Cell", "Sweep", "label", "load_sweep", "only_size"]

Scalar = bool | int | float | str
ARCH = "arch"
LONGEST = 200  # letters of a name that becomes part of a directory's or a file's
# Shown as TP=2.
SIZES = {
    "tp": "TP", "cp": "CP", "pp": "PP", "vpp": "VPP", "dp": "DP", "ep": "EP", "etp": "ETP", "micro_batch_size": "MB",
}  # fmt: skip
INVARIANT = ("tp", "pp", "vpp", "sequence_parallel", ARCH)
ORDER_FREE = (*INVARIANT, "dp", "cp", "ep", "etp", "micro_batch_size")  # where sums over the batch have no order


class SweepFile(BaseModel):
    """The keys of a sweep file; unknown ones are refused."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=LONGEST)  # part of a file's name
    base: dict[str, Any] | str
    matrix: dict[str, list[Scalar]] = Field(min_length=1)
    exclude: list[dict[str, Scalar]] = []
    layouts: list[dict[str, Scalar]] = Field([{}], min_length=1)
    invariant: list[str] | None = None
    output: str | None = None


@dataclass(frozen=True)
class Cell:
    """One run of a sweep.

    `settings` are the matrix values that make it, in matrix order; `group` those that may change the bits;
    `arch` is the kind of machine it must run on, None for any.
    """

    name: str
    settings: Mapping[str, Scalar]
    group: Mapping[str, Scalar]
    config: RunConfig
    arch: str | None = None

    @property
    def path(self) -> Path:
        return Path(self.config.output)

    @property
    def promised(self) -> bool:
        """Whether the patches promise that the invariant settings do not change its bits."""
        return self.config.strategy != "stock"

    @property
    def variant(self) -> str:
        """The cell among those of its group: `TP=4`, `TP=4 sequence_parallel`."""
        rest = {key: value for key, value in self.settings.items() if key not in self.group}
        parts = [f"{SIZES[key]}={value}" if key in SIZES else label({key: value}) for key, value in rest.items()]
        return " ".join(parts) or self.name


@dataclass(frozen=True)
class Sweep:
    """A checked sweep: every cell's configuration is decided.

    `archs` are those of the file that `load_sweep` was told to make nothing of.
    """

    name: str
    output: Path
    cells: tuple[Cell, ...]
    invariant: tuple[str, ...] = INVARIANT
    archs: tuple[str, ...] = ()

    def groups(self) -> list[tuple[str, list[Cell]]]:
        """The cells by group, in the sweep's order."""
        groups: dict[str, list[Cell]] = {}
        for cell in self.cells:
            groups.setdefault(json.dumps(cell.group, sort_keys=True), []).append(cell)  # labels may be alike
        return [(label(cells[0].group) or "all", cells) for cells in groups.values()]


def load_sweep(path: Path, overrides: Sequence[str] = (), anywhere: bool = False) -> Sweep:
    """Read the sweep file at `path`; `key=value` overrides a key of the base run, `output=DIR` the sweep's output.

    `anywhere` drops the axis `arch`: where there is no choice of machines, its cells are one and the same.
    """
    file = _parse(read_yaml(path), path)
    archs = _forget_arch(file) if anywhere else ()
    base = _base(file, path)
    given: Any = f"results/{file.name}" if file.output is None else file.output
    for text in overrides:
        key = text.partition("=")[0]
        if key in file.matrix or any(key in layout for layout in file.layouts):
            raise TpcheckError(f"{text}: {key} is what the matrix of {path} varies; edit it there, or use `exclude`")
        override(base, text)
        if key == "output":
            given = base["output"]
    if not isinstance(given, str):
        raise TpcheckError(f"{path}: output={shown(given)} names no directory: quote it, or use another name")
    try:
        output = Path(directory(given))
    except ValueError as error:
        raise TpcheckError(f"{path}: {error}") from error
    cells = tuple(_cells(file, base, output, path))
    every = ORDER_FREE if any(cell.config.order_free for cell in cells) else INVARIANT
    return Sweep(file.name, output, cells, tuple(file.invariant or every), archs)


def label(settings: Mapping[str, Scalar]) -> str:
    """Settings as a name: `tree-tp4`; words stand for themselves, other values behind the last part of their key."""
    return "-".join(_word(key.rpartition(".")[2], value) for key, value in settings.items())


def only_size(variants: Sequence[str]) -> str | None:
    """`TP` of the variants `TP=1`, `TP=2`, …; None where anything else sets them apart."""
    matches = (re.fullmatch(r"([A-Z]+)=\S+", variant) for variant in variants)
    names = {match and match[1] for match in matches}
    return names.pop() if len(names) == 1 else None


def _word(key: str, value: Scalar) -> str:
    if isinstance(value, bool):
        return key if value else f"no-{key}"
    text = value if isinstance(value, str) else f"{key}{value}"
    return re.sub(r"[^A-Za-z0-9._+-]+", "_", text).strip("._-") or "_"


def _forget_arch(file: SweepFile) -> tuple[str, ...]:
    """Take the axis out of the matrix; its values."""
    file.exclude = [excluded for excluded in file.exclude if ARCH not in excluded]
    return tuple(str(value) for value in file.matrix.pop(ARCH, ()))


def _parse(content: Any, path: Path) -> SweepFile:
    if not isinstance(content, dict):
        raise TpcheckError(f"{path} holds a {type(content).__name__}, not a sweep: it needs name, base and matrix")
    try:
        file = SweepFile.model_validate(content)
    except ValidationError as error:
        raise TpcheckError(f"{path}: {_explain(error)}") from error
    for key, values in file.matrix.items():
        if key == "output":
            raise TpcheckError(f"{path}: output cannot be in the matrix; every cell has a directory of its own")
        if not values:
            raise TpcheckError(f"{path}: matrix.{key} is empty: give it at least one value, or leave the key out")
        if key == ARCH and not all(isinstance(value, str) for value in values):
            raise TpcheckError(f"{path}: matrix.arch holds {values}: name machines as the cluster's profile does")
    known = {ARCH, *file.matrix, *flat(RunConfig().model_dump())}
    if strangers := [name for name in file.invariant or () if name not in known]:
        close = difflib.get_close_matches(strangers[0], sorted(known), n=1)
        hint = f": did you mean {close[0]}?" if close else ": name settings of a run, or arch"
        raise TpcheckError(f"{path}: invariant: {shown(strangers[0])} is no setting{hint}")
    for layout in file.layouts:
        for key in layout:
            if key in ("output", ARCH) or key in file.matrix:
                what = "is in the matrix already" if key in file.matrix else "cannot be in a layout"
                raise TpcheckError(f"{path}: layouts {layout}: {key} {what}")
    for excluded in file.exclude:
        strangers = [key for key in excluded if key not in file.matrix]
        if strangers or not excluded:
            keys = ", ".join(file.matrix)
            raise TpcheckError(f"{path}: exclude {excluded}: its keys must be keys of the matrix ({keys})")
    return file


def _explain(error: ValidationError) -> str:
    """The first thing that is wrong with a sweep file, in one line."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"] if part not in ("str", "dict[str,any]"))
    if first["type"] == "extra_forbidden":
        return f"unknown key {where}: a sweep file has {', '.join(SweepFile.model_fields)}"
    if first["type"] == "missing":
        return f"{where} is missing: a sweep file needs name, base and matrix"
    if first["type"] == "too_short":
        return f"{where} is empty: name at least one setting and its values, as in tp: [1, 2]"
    return f"{where}: {first['msg']}, not {shown(first['input'])}"


def _base(file: SweepFile, path: Path) -> dict[str, Any]:
    if isinstance(file.base, dict):
        return copy.deepcopy(file.base)
    settings = read_yaml(path.parent / file.base)
    if not isinstance(settings, dict):
        raise TpcheckError(f"{path.parent / file.base} holds a {type(settings).__name__}, not a mapping of settings")
    return settings


def _cells(file: SweepFile, base: Mapping[str, Any], output: Path, path: Path) -> list[Cell]:
    cells: dict[str, Cell] = {}
    folders: dict[str, str] = {}  # what cells are called, by what must set them apart
    runs: dict[tuple[str | None, str], str] = {}
    unused = list(file.exclude)
    for values, layout in itertools.product(itertools.product(*file.matrix.values()), file.layouts):
        settings = {**dict(zip(file.matrix, values, strict=True)), **layout}
        matches = [excluded for excluded in file.exclude if excluded.items() <= settings.items()]
        unused = [excluded for excluded in unused if excluded not in matches]
        if matches:
            continue
        name = label(settings) or file.name
        if len(name) > LONGEST:
            raise TpcheckError(f"{path}: a cell would be called {shown(name)}, too long for a directory: shorten it")
        if name in cells:
            both = f"{shown(settings)} and {shown(dict(cells[name].settings))}"
            raise TpcheckError(f"{path}: {both} would both be cell {name}: remove one of them")
        config = _resolve(base, settings, output, path, name)
        arch = str(settings[ARCH]) if ARCH in settings else None
        if (other := folders.setdefault(name.casefold(), name)) != name:
            raise TpcheckError(f"{path}: {other} and {name} would be one directory on some file systems")
        if (other := runs.setdefault((arch, config.model_dump_json(exclude={"output"})), name)) != name:
            raise TpcheckError(f"{path}: cells {other} and {name} are the same run: remove one of them")
        invariant = file.invariant or (ORDER_FREE if config.order_free else INVARIANT)
        cells[name] = Cell(name, settings, _group(settings, invariant), config, arch)
    if unused:
        raise TpcheckError(f"{path}: exclude {unused[0]} matches no cell: correct it or remove it")
    if not cells:
        raise TpcheckError(f"{path}: every cell is excluded")
    return list(cells.values())


def _group(settings: Mapping[str, Scalar], invariant: Sequence[str]) -> dict[str, Scalar]:
    return {key: value for key, value in settings.items() if key not in invariant}


def _resolve(base: Mapping[str, Any], settings: Mapping[str, Scalar], output: Path, path: Path, name: str) -> RunConfig:
    run = copy.deepcopy(dict(base))
    for key, value in settings.items():
        if key != ARCH:
            put(run, key, value, said=f"{key}={value}")
    run["output"] = str(output / name)
    origin = f"{path}, cell {name}"
    try:
        return parse_run(run, origin)
    except TpcheckError as error:
        raise TpcheckError(f"{origin}: {str(error).removeprefix(origin + ': ')}") from error
