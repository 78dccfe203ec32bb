"""The kinds of cases: which file is mutated, and which commands are tried on it."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from pkgutil import walk_packages

import yaml

import slurm
import tpcheck
from tests.fuzz import mutations
from tests.fuzz.child import complaint, in_child
from tests.support import BEFORE, ROOT
from tpcheck.cli import main
from tpcheck.files import result_dir
from tpcheck.run import launch
from tpcheck.run.nudged import make_nudged_runs

__all__ = ["KINDS", "Source", "Tried", "try_case"]

# What commands import when they are called, imported once and not in every child.
for package in (tpcheck, slurm):
    for module in walk_packages(package.__path__, f"{package.__name__}."):
        if not module.name.endswith("__main__") and ".study." not in module.name:  # which may need other packages
            import_module(module.name)

SWEEP = (BEFORE / "sweep.yaml").read_text().replace("matrix:\n", "matrix:\n  arch: [h100]\n")
PROFILE = (ROOT / "slurm/clusters/example.yaml").read_text()
LAST = "checkpoints/step-00000004"


@dataclass(frozen=True)
class Source:
    """Results of an earlier run, unpacked once; cases get links to its files."""

    folder: Path

    @classmethod
    def unpacked(cls, folder: Path) -> Source:
        shutil.unpack_archive(BEFORE / "states.tar.xz", folder)
        shutil.copytree(BEFORE, folder, dirs_exist_ok=True)
        make_nudged_runs(folder / "stopped", seeds=1)
        return cls(folder)

    def copy(self, name: str, to: Path) -> Path:
        shutil.copytree(self.folder / name, to / name, copy_function=os.link)
        return to / name


@dataclass(frozen=True)
class Tried:
    """How a command ended; `wrong` is empty where it may end so."""

    case: str
    command: str
    code: int
    wrong: str

    def __str__(self) -> str:
        return f"{self.case}: tpcheck {self.command}: {self.wrong or f'exit code {self.code}'}"


Commands = Sequence[Sequence[str]]


def _run_file(source: Source, folder: Path, rng: random.Random, marker: Path) -> Commands:
    text = yaml.safe_dump({**yaml.safe_load((BEFORE / "run.yaml").read_text()), "output": "new"})
    (folder / "run.yaml").write_text(mutations.damage_yaml(text, rng))
    override = f"{rng.choice(['tp', 'model', 'output', 'optimizer.lr', 'x', 'data.path'])}={rng.choice(mutations.ODD)}"
    override = override.replace("\0", " ")
    return [["train", "run.yaml"], ["cost", "run.yaml"], ["train", str(BEFORE / "run.yaml"), "output=new", override]]


def _sweep_file(source: Source, folder: Path, rng: random.Random, marker: Path) -> Commands:
    (folder / "sweep.yaml").write_text(mutations.damage_yaml(SWEEP, rng))
    (folder / "cluster.yaml").write_text(PROFILE)
    return [["sweep", "sweep.yaml", "--cluster", "./cluster.yaml", "--dry-run"]]


def _profile(source: Source, folder: Path, rng: random.Random, marker: Path) -> Commands:
    (folder / "sweep.yaml").write_text(SWEEP)
    (folder / "cluster.yaml").write_text(mutations.damage_yaml(PROFILE, rng))
    return [["sweep", "sweep.yaml", "--cluster", "./cluster.yaml", "--dry-run"]]


def _results(source: Source, folder: Path, rng: random.Random, marker: Path) -> Commands:
    """A file of a finished sweep, or of a run that goes on."""
    sweep, run = source.copy("before", folder), source.copy("stopped", folder)
    cell = sweep / "tree-tp2"
    file = rng.choice([sweep / "sweep.json", *(place / name for place in (cell, run) for name in FILES)])
    _damage(file, rng)
    resumed = ["train", str(BEFORE / "run.yaml"), "--resume", "output=stopped", "stop_after=null", "trace=null"]
    on_run = [resumed, ["hash", "stopped"], ["diff", "stopped", "before/tree-tp2"]]
    on_sweep = [["verdict", "before"], ["status", "before"], ["diff", "before/tree-tp1", "before/tree-tp2"]]
    return on_run if file.parent == run else on_sweep


def _checkpoint(source: Source, folder: Path, rng: random.Random, marker: Path) -> Commands:
    cell = source.copy("before", folder) / "tree-tp2"
    mutations.damage_checkpoint(cell / LAST, marker, rng)
    if rng.random() < 0.1:
        mutations.replace_file(rng.choice(sorted((cell / LAST).iterdir())), rng)
    anew = rng.choice([["verdict", "before", "--verify"], ["diff", "before/tree-tp1", "before/tree-tp2", "--verify"]])
    return [["hash", f"before/tree-tp2/{LAST}"], ["verdict", "before"], anew]


def _trace(source: Source, folder: Path, rng: random.Random, marker: Path) -> Commands:
    run = source.copy("traced", folder)
    nudged = source.copy("stopped", folder) / "noise-1"
    of = rng.choice([run, run, nudged])
    file = rng.choice(sorted(file for file in (of / "trace").rglob("*") if file.is_file()))
    content = file.read_bytes()
    file.unlink()
    if file.suffix in (".json", ".jsonl") and rng.random() < 0.8:
        damage = mutations.damage_json if file.suffix == ".json" else mutations.damage_lines
        file.write_text(damage(content.decode(), rng))
    else:
        file.write_bytes(mutations.damage_bytes(content, rng))
    return [["compare", "stopped", "traced", "--seeds", "1"]]


FILES = ("manifest.json", "steps.jsonl", "digests.json", "submissions.jsonl", "attempts.jsonl", "ends.jsonl")
MADE = {
    "submissions.jsonl": '{"format": 1, "time": "2026-01-01T00:00:00+00:00", "profile": "p", "job_name": "s.1", '
    '"job": "1", "cells": ["tree-tp1", "tree-tp2"], "folder": "/x"}\n',
    "attempts.jsonl": '{"job": "1", "array_index": 0, "restart": 0, "nodes": "n", "began": "x", "job_name": "s.1"}\n',
    "ends.jsonl": '{"kind": "failed", "rank": 0, "why": "x"}\n',
}
KINDS: dict[str, Callable[[Source, Path, random.Random, Path], Commands]] = {
    "run": _run_file,
    "sweep": _sweep_file,
    "profile": _profile,
    "results": _results,
    "checkpoint": _checkpoint,
    "trace": _trace,
}


def _damage(file: Path, rng: random.Random) -> None:
    content = file.read_bytes() if file.exists() else MADE.get(file.name, "{}").encode()
    file.unlink(missing_ok=True)
    if (what := rng.random()) < 0.1:
        mutations.replace_file(file, rng)
    elif what < 0.25:
        file.write_bytes(mutations.damage_bytes(content, rng))
    else:
        damage = mutations.damage_lines if file.suffix == ".jsonl" else mutations.damage_json
        file.write_text(damage(content.decode(), rng))


def try_case(kind: str, seed: int, source: Source, scratch: Path) -> list[Tried]:
    """Make the case, and try every command on it."""
    rng = random.Random(f"{kind} {seed}")
    folder = scratch / f"{kind}-{seed}"
    (folder / "here").mkdir(parents=True)
    marker = folder / "executed"
    tried = []
    try:
        for words in KINDS[kind](source, folder / "here", rng, marker):
            with _no_ranks():
                code, out, errors = in_child(lambda words=words: main(words), folder / "here")  # type: ignore[misc]
            wrong = complaint(code, errors) or _wrong_verdict(words, code, out, folder / "here")
            if marker.exists():
                wrong = "something in a file was executed"
            if strangers := {entry.name for entry in folder.iterdir()} - {"here"}:
                wrong = wrong or f"written outside: {strangers}"
            tried.append(Tried(f"{kind} {seed}", " ".join(words), code, wrong))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return tried


@contextmanager
def _no_ranks() -> Iterator[None]:
    """`train` up to the point where ranks are started."""
    before = launch.fork_ranks
    launch.fork_ranks = lambda world_size, log, work: (0, None)
    try:
        yield
    finally:
        launch.fork_ranks = before


def _wrong_verdict(words: Sequence[str], code: int, out: str, folder: Path) -> str:
    """Whether a promise is said to hold whose digests on record are not equal, or to be broken though they are."""
    if words[0] != "verdict" or code == 2:
        return ""
    try:
        states = [result_dir.read_digests(folder / "before" / cell) or {} for cell in ("tree-tp1", "tree-tp2")]
    except Exception as error:
        return f"exit code {code} with digests that can't be read ({error!r})"
    same = (
        states[0].get("model") == states[1].get("model")
        and len({state.get("optimizer") for state in states} - {None}) <= 1
    )
    return "" if same == (code == 0) else f"exit code {code}, and the digests are {'equal' if same else 'different'}"
