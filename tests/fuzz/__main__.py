"""`python -m tests.fuzz [--cases N] [--seed S] [--output DIR] [KIND…]`: so many cases of every kind; 1 if any is wrong.

With `--output`, how all of them ended goes to `DIR/fuzz.json`, beside what it holds of other kinds, and to a table.
"""

from __future__ import annotations

import json
import platform
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import click

from tests.fuzz.cases import KINDS, Source, Tried, try_case
from tests.fuzz.child import DOCUMENTED
from tests.support import ROOT
from tpcheck.run import provenance


@click.command()
@click.option("--cases", default=1000, help="How many of each kind.")
@click.option("--seed", default=1, help="Number of the first.")
@click.option("--output", type=click.Path(path_type=Path), help="Folder of the figures.")
@click.argument("kinds", nargs=-1, type=click.Choice(list(KINDS)))
def run(cases: int, seed: int, output: Path | None, kinds: tuple[str, ...]) -> None:
    wrong = 0
    with tempfile.TemporaryDirectory() as scratch:
        source = Source.unpacked(Path(scratch, "source"))
        for kind in kinds or KINDS:
            began, tried = time.monotonic(), list[Tried]()
            for number in range(seed, seed + cases):
                ended = try_case(kind, number, source, Path(scratch))
                tried += ended
                for case in ended:
                    if case.wrong:
                        click.echo(case)
            bad = [str(case) for case in tried if case.wrong]
            wrong += len(bad)
            seconds = time.monotonic() - began
            click.echo(f"{kind:<11} {cases} cases, {len(tried)} commands, {len(bad)} wrong, {seconds:.0f} s")
            if output:
                ends = Counter(str(case.code) for case in tried if not case.wrong)
                _keep(output, kind, {"cases": cases, "seed": seed, "commands": len(tried), "ends": ends, "wrong": bad})
    sys.exit(1 if wrong else 0)


def _keep(output: Path, kind: str, figures: dict[str, Any]) -> None:
    output.mkdir(parents=True, exist_ok=True)
    file = output / "fuzz.json"
    kept = json.loads(file.read_text()) if file.exists() else {}
    kept[kind] = {**figures, "python": platform.python_version(), "code": provenance.git(ROOT)}
    file.write_text(json.dumps({kind: kept[kind] for kind in KINDS if kind in kept}, indent=1) + "\n")
    head = ["mutated", "cases", "commands", *(f"exit {code}" for code in DOCUMENTED), "wrong"]
    lines = [head, ["---"] * len(head)]
    for name, row in kept.items():
        ends = [row["ends"].get(str(code), 0) for code in DOCUMENTED]
        lines.append([name, row["cases"], row["commands"], *ends, len(row["wrong"])])
    (output / "fuzz.md").write_text("".join(f"| {' | '.join(map(str, line))} |\n" for line in lines))


if __name__ == "__main__":
    run()
