"""The live table of a sweep's cells; where nobody watches (a pipe, CI), one line per event instead.

All it shows is read from the result directories.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType
from typing import Literal

from rich.console import Console
from rich.live import Live
from rich.table import Table

from tpcheck.errors import TpcheckError
from tpcheck.files import result_dir
from tpcheck.sweep.completeness import digests_of
from tpcheck.sweep.spec import Cell
from tpcheck.sweep.verdict import SHORT

__all__ = ["LiveTable", "State", "progress"]

State = Literal["waiting", "running", "complete", "failed", "stopped"]
STYLE: dict[State, str] = {
    "waiting": "dim",
    "running": "yellow",
    "complete": "green",
    "failed": "bold red",
    "stopped": "magenta",
}
HEADINGS = ("cell", "state", "step", "loss", "tokens/s", "seconds", "model", "optimizer")
REFRESH_SECONDS = 1.0


class LiveTable:
    """Shows every cell's state; a context manager that owns the screen while it is open."""

    def __init__(self, cells: Sequence[Cell], console: Console) -> None:
        self.cells = {cell.name: cell for cell in cells}
        self.console = console
        self.states: dict[str, State] = dict.fromkeys(self.cells, "waiting")
        self.since: dict[str, float] = {}
        self.took: dict[str, float] = {}
        self.rows: dict[str, tuple[str, ...]] = {}
        self.drawn = 0.0
        self.live = Live(console=console, auto_refresh=False) if console.is_terminal else None

    def __enter__(self) -> LiveTable:
        if self.live:
            self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._draw()
        if self.live:
            self.live.stop()

    def set(self, name: str, state: State) -> None:
        """Record that a cell has changed its state; clocks start at `running`."""
        self.states[name] = state
        if state == "running":
            self.since[name] = time.monotonic()
        elif name in self.since:
            self.took[name] = time.monotonic() - self.since[name]
        self.rows.pop(name, None)
        if self.live:
            self._draw()
        else:
            self.console.print(self._line(name), soft_wrap=True, highlight=False)

    def tick(self) -> None:
        """Redraw once a second; call it as often as you like."""
        if self.live and time.monotonic() - self.drawn >= REFRESH_SECONDS:
            self._draw()

    def _draw(self) -> None:
        if self.live:
            self.drawn = time.monotonic()
            self.live.update(self._table(), refresh=True)

    def _table(self) -> Table:
        table = Table()
        for heading in HEADINGS:
            table.add_column(heading, justify="left" if heading in ("cell", "state", "model", "optimizer") else "right")
        for name, state in self.states.items():
            table.add_row(*self._row(name), style=STYLE[state])
        return table

    def _line(self, name: str) -> str:
        _, state, step, loss, _, seconds, model, optimizer = self._row(name)
        if state != "complete":
            return f"{name:<24} {state}"
        return f"{name:<24} {state:<9} step {step}  loss {loss}  model {model}  optimizer {optimizer}" + (
            f"  {seconds} s" if seconds else ""
        )

    def _row(self, name: str) -> tuple[str, ...]:
        if self.states[name] == "running" or name not in self.rows:
            self.rows[name] = (name, self.states[name], *progress(self.cells[name]), *self._end(name))
        return self.rows[name]

    def _end(self, name: str) -> tuple[str, str, str]:
        seconds = self.took.get(name, time.monotonic() - self.since[name] if name in self.since else None)
        digests = digests_of(self.cells[name]) if self.states[name] == "complete" else None
        return (
            "" if seconds is None else f"{seconds:.0f}",
            digests.model[:SHORT] if digests else "",
            (digests.optimizer or "")[:SHORT] if digests else "",
        )


def progress(cell: Cell) -> tuple[str, str, str]:
    """Step, loss and tokens/s, as far as the cell has come."""
    try:
        steps = result_dir.read_steps(cell.path)
    except TpcheckError:  # the run itself, or whoever reads it next, says what is wrong with it
        steps = []
    if not steps:
        return "", "", ""
    last = steps[-1]
    speed = last.get("tokens", 0) / last["seconds"] if last.get("seconds") else 0.0
    return f"{last['step']}/{cell.config.steps}", f"{last['loss']:.4f}", f"{speed:,.0f}"
