"""Which collectives XLA put into a compiled program, read from its text."""

from __future__ import annotations

import re

__all__ = ["collectives", "summary"]

NAMES = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
CALL = re.compile(rf"= (\([^)]*\)|\S+) ({NAMES})(?:-start)?\(")
LAYOUT = re.compile(r"\{[\d,]*\}")


def collectives(program: str) -> list[list[str]]:
    """[name, shape] of each, in the program's order; a shape as in `f32[32,256]`."""
    return [[name, LAYOUT.sub("", shape)] for shape, name in CALL.findall(program)]


def summary(found: list[list[str]]) -> str:
    """How many there are of each, in words."""
    names = sorted({name for name, _ in found})
    return ", ".join(f"{sum(name == other for other, _ in found)} {name}" for name in names) or "none"
