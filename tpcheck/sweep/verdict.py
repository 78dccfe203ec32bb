"""The verdict on a sweep: for every group of cells that differ only in invariant settings, one digest or not.

What the patches promise (every strategy but stock) must hold; stock is reported, not judged. Read from the
result directories alone, so it can be given on an unfinished sweep too: it then says what is missing.
Products of another class of bits (manifest.json: exact on a CPU, tensor cores of one class or another) part a group.
So do other data.

    exit code 0   every cell is complete, everything promised held
              1   cells of a promised group differ: the first step and the tensors are named
              2   cells are missing or not what the sweep says, those of one class of bits ran with other products
                  or data, or an optimizer was saved in a way that has no digest
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rich.table import Table

from tpcheck.checkpoint import digest as checkpoint
from tpcheck.checkpoint.reader import Checkpoint
from tpcheck.errors import TpcheckError
from tpcheck.files import result_dir
from tpcheck.files.json_files import write_object
from tpcheck.files.names import DIGESTS, VERDICT
from tpcheck.sweep.completeness import Digests, differ, digests_of, other_settings
from tpcheck.sweep.spec import Cell, Sweep, only_size

__all__ = ["SHORT", "Group", "Verdict", "judge", "write"]

VERDICT_FORMAT = 1
SHORT = 12  # digits of a digest in a table
DIFFERING = 3  # tensors named where a promise is broken

Difference = Callable[[Path, Path], Iterable[str]]


@dataclass(frozen=True)
class Group:
    """Cells that differ only in invariant settings; a cell that is not complete has no digests."""

    name: str
    promised: bool
    variants: tuple[str, ...]  # what sets its cells apart: TP=1, TP=2, …
    cells: Mapping[str, Digests | None]
    difference: tuple[str, ...] = ()  # where two of them part, in lines; only for what was promised
    mixed: bool = False  # cells that belong here ran with other products of the same class of bits, or other data
    refused: Mapping[str, str] = field(default_factory=dict)  # cells that are complete and can't count, and why
    notes: tuple[str, ...] = ()  # what the digests on record do not tell

    @property
    def complete(self) -> list[Digests]:
        return [digests for digests in self.cells.values() if digests]

    @property
    def missing(self) -> list[str]:
        return [name for name, digests in self.cells.items() if not digests]

    @property
    def undigested(self) -> list[str]:
        """Why an optimizer that was saved has no digest, by cell."""
        without = ((name, digests) for name, digests in self.cells.items() if digests and not digests.optimizer)
        return [f"{name}: {note}" for name, digests in without for note in digests.notes]

    @property
    def status(self) -> Literal["different", "incomplete", "alone", "identical"]:
        if differ(self.complete):
            return "different"
        if self.missing:
            return "incomplete"
        return "identical" if len(self.cells) > 1 else "alone"


@dataclass(frozen=True)
class Verdict:
    """What can be said of a sweep."""

    sweep: str
    groups: tuple[Group, ...]
    verified: bool = False

    @property
    def broken(self) -> list[Group]:
        return [group for group in self.groups if group.promised and group.status == "different"]

    @property
    def missing(self) -> list[str]:
        return [name for group in self.groups for name in group.missing]

    @property
    def refused(self) -> dict[str, str]:
        return {name: why for group in self.groups for name, why in group.refused.items()}

    @property
    def mixed(self) -> list[Group]:
        return [group for group in self.groups if group.promised and group.mixed]

    @property
    def undigested(self) -> list[Group]:
        return [group for group in self.groups if group.promised and group.undigested]

    @property
    def exit_code(self) -> int:
        return 1 if self.broken else 2 if self.missing or self.mixed or self.undigested else 0

    def sentence(self) -> str:
        """The verdict in one line."""
        if self.broken:
            return f"BROKEN: {_names(self.broken)} promised one digest and has several"
        if self.refused:
            return f"no verdict: {', '.join(self.refused)} can't be counted"
        if self.missing:
            return f"no verdict yet: {len(self.missing)} of {sum(len(g.cells) for g in self.groups)} cells are missing"
        if self.mixed:
            return f"no verdict: {_names(self.mixed)} cannot be compared: train the cells of one of them again"
        if self.undigested:
            return f"no verdict: {_names(self.undigested)}: one digest of the model, but not every optimizer has one"
        held = [group for group in self.groups if group.promised and group.status == "identical"]
        if not held:
            return "nothing was promised and compared: no group of patched cells differs in an invariant setting"
        over = " and ".join(sorted({_over(group) for group in held}))
        digested = all(digests.optimizer for group in held for digests in group.complete)
        of = "of the model and of the optimizer" if digested else "of the model (there is none of the optimizer)"
        return f"HELD: {_names(held)}: one digest each, {of}, over {over}"

    def table(self) -> Table:
        """One row per group, for a terminal."""
        table = Table(title=f"{self.sweep}: verdict", title_justify="left")
        for heading in ("group", "cells", "model", "optimizer", "verdict"):
            table.add_column(heading)
        for row in self.rows():
            table.add_row(*row)
        return table

    def rows(self) -> list[tuple[str, str, str, str, str]]:
        """Group, cells, model digests, optimizer digests and verdict, as text."""
        return [
            (
                group.name,
                f"{len(group.complete)} of {len(group.cells)}: {_over(group)}",
                _count([digests.model for digests in group.complete]),
                _count([digests.optimizer for digests in group.complete]),
                _opinion(group),
            )
            for group in self.groups
        ]

    def details(self) -> list[str]:
        """What a reader needs beyond the table: where promised groups differ, what is missing."""
        lines = [line for group in self.broken for line in group.difference]
        lines += [line for group in self.groups for line in group.undigested]
        lines += [f"{name}: {why}" for name, why in self.refused.items()]
        lines += [line for group in self.groups for line in group.notes]
        if missing := [name for name in self.missing if name not in self.refused]:
            lines.append(f"missing: {', '.join(missing)}")
        return lines

    def evidence(self) -> str:
        """What the verdict rests on."""
        if self.verified:
            return "by digests computed anew from the checkpoints"
        return "by the digests on record; --verify computes them anew from the checkpoints"

    def as_json(self) -> dict[str, Any]:
        return {
            "format": VERDICT_FORMAT,
            "sweep": self.sweep,
            "exit_code": self.exit_code,
            "verdict": self.sentence(),
            "groups": [
                {
                    "name": group.name,
                    "promised": group.promised,
                    "status": group.status,
                    "cells": {name: _digests_as_json(digests) for name, digests in group.cells.items()},
                    "difference": list(group.difference),
                    **({"refused": dict(group.refused)} if group.refused else {}),
                }
                for group in self.groups
            ],
            **({"verified": True} if self.verified else {}),
        }


def _digests_as_json(digests: Digests | None) -> dict[str, Any] | None:
    return {"model": digests.model, "optimizer": digests.optimizer} if digests else None


def judge(sweep: Sweep, difference: Difference | None = None, verify: bool = False) -> Verdict:
    """Compare what the cells left.

    Args:
        difference: of two result directories: tells in a few lines where they part.
        verify: digest the cells' checkpoints anew.
    """
    found = {cell.name: _look(cell, verify) for cell in sweep.cells}
    groups = [part for name, cells in sweep.groups() for part in _by_products(name, cells, found)]
    return Verdict(sweep.name, tuple(_judge(*group, found, difference or _diff) for group in groups), verify)


def write(verdict: Verdict, output: Path) -> Path:
    """Leave the verdict beside the cells."""
    write_object(output / VERDICT, verdict.as_json())
    return output / VERDICT


@dataclass(frozen=True)
class _Found:
    """What a cell has left: digests, if it is complete and what the sweep says it is."""

    digests: Digests | None = None
    products: dict[str, Any] | None = None  # and the digest of the data: what is promised is said of one
    refused: str = ""
    note: str = ""


def _look(cell: Cell, verify: bool) -> _Found:
    digests = digests_of(cell)
    if digests is None:
        return _Found()
    manifest = result_dir.read_manifest(cell.path)
    products, data = result_dir.products(manifest), (manifest.get("data") or {}).get("digest")
    if products is not None and data:
        products = {**products, "data": data[:SHORT]}
    if changes := other_settings(cell, manifest["config"]):
        return _Found(refused=f"was made with other settings ({changes}): train it again")
    recorded = checkpoint.Digests.from_json(result_dir.read_digests(cell.path) or {}, str(cell.path / DIGESTS))
    state, note = result_dir.checkpoint_path(cell.path, cell.config.steps), ""
    try:
        if verify:
            checkpoint.require_equal(recorded, checkpoint.digest_with_progress(state), state)
        elif state.exists():
            Checkpoint(state)
    except TpcheckError as error:
        if verify:
            return _Found(refused=f"can't be verified: {error}")
        note = f"{cell.name}: its checkpoint can't be read, its digests are on record: {error}"
    return _Found(digests, products, note=note)


def _by_products(name: str, cells: Sequence[Cell], found: Mapping[str, _Found]) -> list[tuple[str, list[Cell], bool]]:
    """A group's cells by the products that they ran with; one that is missing joins those of its arch.

    True where another kind is of the same class of bits: nobody meant to part those.
    """
    kinds: list[tuple[dict[str, Any], list[Cell]]] = []
    missing = []
    for cell in cells:
        products = found[cell.name].products
        if products is None:
            missing.append(cell)
        elif alike := [members for kind, members in kinds if kind == products]:
            alike[0].append(cell)
        else:
            kinds.append((products, [cell]))
    if len(kinds) < 2:
        return [(name, list(cells), False)]
    for cell in missing:
        here = [members for _, members in kinds if any(member.arch == cell.arch for member in members)]
        (here or [kinds[0][1]])[0].append(cell)
    bits = [result_dir.bits_of(kind) for kind, _ in kinds]
    return [
        (f"{name} ({_distinct(kind, [one for one, _ in kinds])})", members, bits.count(own) > 1)
        for (kind, members), own in zip(kinds, bits, strict=True)
    ]


def _distinct(products: dict[str, Any], all_kinds: Sequence[dict[str, Any]]) -> str:
    """The class of these products, and whatever else differs within it."""
    name = result_dir.bits_of(products)[0]
    relatives = [kind for kind in all_kinds if result_dir.bits_of(kind)[0] == name]
    others = [key for key, value in products.items() if any(kind.get(key) != value for kind in relatives)]
    others = [key if isinstance(products[key], dict) else f"{key} {products[key]}" for key in others]
    return ", ".join([f"{name} products", *others])


def _judge(
    name: str, cells: Sequence[Cell], mixed: bool, looked: Mapping[str, _Found], difference: Difference
) -> Group:
    found = {cell.name: looked[cell.name].digests for cell in cells}
    promised = all(cell.promised for cell in cells)
    complete = [(cell, digests) for cell in cells if (digests := found[cell.name])]
    strangers = ((a, b) for (a, x), (b, y) in itertools.combinations(complete, 2) if differ((x, y)))
    lines: tuple[str, ...] = ()
    if promised and (pair := next(strangers, None)):
        a, b = pair
        lines = (f"{name}: {a.name} and {b.name} differ", *(f"  {line}" for line in difference(a.path, b.path)))
    refused = {cell.name: looked[cell.name].refused for cell in cells if looked[cell.name].refused}
    notes = tuple(looked[cell.name].note for cell in cells if looked[cell.name].note)
    return Group(name, promised, tuple(cell.variant for cell in cells), found, lines, mixed, refused, notes)


def _diff(a: Path, b: Path) -> Iterable[str]:
    from tpcheck.checkpoint.diff import diff
    from tpcheck.checkpoint.diff_text import lines

    return lines(diff(a, b), DIFFERING)


def _names(groups: Sequence[Group]) -> str:
    return ", ".join(group.name for group in groups)


def _over(group: Group) -> str:
    """`TP=1, 2, 4, 8` where only TP varies, else every variant in full."""
    if size := only_size(group.variants):
        return f"{size}=" + ", ".join(variant.removeprefix(f"{size}=") for variant in group.variants)
    return "; ".join(group.variants)


def _count(digests: Sequence[str | None]) -> str:
    known = {digest for digest in digests if digest}
    if not known:
        return "-"
    without = f", {digests.count(None)} without" if None in digests else ""
    return (f"one: {known.pop()[:SHORT]}" if len(known) == 1 else f"{len(known)} different") + without


def _opinion(group: Group) -> str:
    words = {"identical": "identical", "different": "different", "alone": "one cell, nothing to compare"}
    opinion = words.get(group.status, f"{len(group.missing)} missing")
    return opinion if group.promised else f"{opinion}, not promised"
