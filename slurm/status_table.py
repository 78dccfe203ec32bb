"""How `tpcheck status` shows its rows: a table as wide as the screen, changes for a pipe, reasons below.

A cell takes one line, or two where Slurm's reason for waiting is long. Where the screen is too narrow for all columns,
those that are needed least are left out; reasons go below the table before steps and jobs do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.cells import cell_len
from rich.console import Console, Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

__all__ = ["WAITING", "CellState", "Row", "explain", "print_changes", "table"]

CellState = Literal[
    "pending", "running", "suspended", "requeued", "preempted", "timed-out", "node-failed", "failed", "cancelled",
    "complete", "missing", "unknown",
]  # fmt: skip
WAITING: set[CellState] = {"pending", "suspended", "requeued"}
ACTIVE: set[CellState] = {*WAITING, "running", "unknown"}
STYLE: dict[CellState, str] = {"complete": "green", "running": "yellow", "failed": "bold red", "unknown": "magenta"}
HEADINGS = ("cell", "job", "state", "nodes", "step", "tokens/s", "retries", "log")
LEAST_NEEDED, NEEDED = ("tokens/s", "retries", "log", "nodes"), ("step", "job")
DROPPED = ", not in the sweep"
BORDER = 3  # between two columns


@dataclass(frozen=True)
class Row:
    """One cell, as it is now.

    `why` is Slurm's reason for waiting, or what a failed cell said last; `dropped`: the sweep no longer has it.
    """

    cell: str
    job: str
    state: CellState
    nodes: str
    step: str
    speed: str
    retries: int
    log: Path | None
    why: str
    dropped: bool = False

    @property
    def active(self) -> bool:
        """Whether the cell may still change by itself."""
        return self.state in ACTIVE


def table(rows: Sequence[Row], output: Path, width: int) -> Group:
    """The rows as a table that a screen of `width` columns can hold, with what did not fit in below it."""
    columns = _columns(rows, output, reasons=True)
    widths = _layout(columns, LEAST_NEEDED, width)
    below: list[Text] = []
    if _total(widths) > width:
        below = [Text(f"{row.cell} {_state(row)}") for row in rows if _state(row) != row.state]
        columns = _columns(rows, output, reasons=False)
        widths = _layout(columns, (*LEAST_NEEDED, *NEEDED), width)
    drawn = Table(title=escape(str(output)), title_justify="left")
    for heading, wide in widths.items():
        right = heading in ("step", "tokens/s", "retries")
        drawn.add_column(heading, justify="right" if right else "left", overflow="fold", max_width=wide)
    for number, row in enumerate(rows):
        shown = (columns[heading][number] for heading in widths)
        drawn.add_row(*map(escape, shown), style=STYLE.get(row.state, ""))
    return Group(drawn, *below)


def print_changes(rows: Sequence[Row], shown: dict[str, tuple[str, ...]], console: Console) -> None:
    """A line for every row that is not as it was last `shown`."""
    for row in rows:
        line = (row.cell, row.job, row.state, row.nodes)
        if shown.get(row.cell) != line:
            shown[row.cell] = line
            step = f"step {row.step}" if row.step else ""
            text = f"{row.cell:<24} {row.state:<11} {row.job} {row.nodes} {step}".rstrip()
            console.print(text + (DROPPED if row.dropped else ""), markup=False, soft_wrap=True)


def explain(rows: Sequence[Row], output: Path, console: Console) -> None:
    """Below the table: what went wrong, and where to read about it."""
    for row in rows:
        said = []
        if row.why and row.state not in WAITING:
            said.append(f"{row.cell} {row.state}: {row.why}{f'; see {row.log}' if row.log else ''}")
        if row.dropped:
            said.append(f"{row.cell} is no longer in the sweep: tpcheck cancel {output} {row.cell} ends its job")
        for line in said:
            console.print(line, markup=False, highlight=False, soft_wrap=True)


def _columns(rows: Sequence[Row], output: Path, reasons: bool) -> dict[str, tuple[str, ...]]:
    """The texts of each column."""
    cells = (_cells(row, output, _state(row) if reasons else row.state) for row in rows)
    return dict(zip(HEADINGS, zip(*cells, strict=True), strict=True))


def _cells(row: Row, output: Path, state: str) -> tuple[str, ...]:
    log = str(row.log.absolute()).removeprefix(f"{output.absolute()}/") if row.log else ""
    return row.cell, row.job, state, row.nodes, row.step, row.speed, str(row.retries), log


def _state(row: Row) -> str:
    """The state, with Slurm's reason for waiting and a mark on what the sweep no longer has."""
    why = f": {row.why}" if row.why and row.state in WAITING else ""
    return f"{row.state}{why}{DROPPED if row.dropped else ''}"


def _layout(columns: Mapping[str, Sequence[str]], optional: Sequence[str], width: int) -> dict[str, int]:
    """Which columns to show, and how wide: words are not broken while there is an `optional` column to leave out."""
    widths = {heading: max(map(cell_len, [heading, *texts])) for heading, texts in columns.items()}
    whole = widths["state"]
    if _total(widths) > width:
        widths["state"] = max(map(_two_lines, [*columns["state"], "state"]))
    for heading in optional:
        if _total(widths) > width:
            del widths[heading]
    widths["state"] = min(whole, widths["state"] + max(0, width - _total(widths)))
    return widths


def _total(widths: Mapping[str, int]) -> int:
    return sum(widths.values()) + BORDER * len(widths) + 1


def _two_lines(text: str) -> int:
    """The least width that holds `text` in two lines of whole words."""
    words = text.split(" ")
    halves = ((" ".join(words[:cut]), " ".join(words[cut:])) for cut in range(len(words)))
    return min(max(cell_len(first), cell_len(second)) for first, second in halves)
