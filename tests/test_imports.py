"""Imports, those inside functions and for type checking alone, too, go one way: no circles, nothing against `ORDER`."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Collection, Iterator
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from pathlib import Path

import pytest

from tests.support import ROOT

# From low to high; names with a stroke between them do not know each other.
ORDER = """
patches.contract | patches.cpu < patches.imports < patches.registry
< patches.order.tree | patches.order.handle | patches.order.x_hat | patches.order.polynomials | patches.order.visible
| patches.order.grid
< patches.order.exact | patches.order.kernels
< patches.order < patches.ops | patches.aten < patches.call_site < patches.experts | patches.initial_weights
< patches.megatron | patches.te < patches.__init__
< tpcheck.errors < tpcheck.files < tpcheck.config < tpcheck.pages < tpcheck.checkpoint < tpcheck.trace
< tpcheck.__init__ < tpcheck.run < tpcheck.order | tpcheck.cost | tpcheck.doctor < tpcheck.sweep
< tpcheck.study | slurm < tpcheck.cli
"""
UPWARD = re.compile(r"tpcheck\.cli|.*\.__main__")  # command lines: they import from everywhere, nobody from them


def problems(root: Path, order: str) -> list[str]:
    """What is wrong with the imports of the packages in `root` that `order` names."""
    levels = {name.strip(): level for level, names in enumerate(order.split("<")) for name in names.split("|")}
    sources = sorted(file for top in {name.partition(".")[0] for name in levels} for file in (root / top).rglob("*.py"))
    files = {".".join(file.relative_to(root).with_suffix("").parts): file for file in sources}
    arrows = [(a, b) for a in files if not UPWARD.fullmatch(a) for b in sorted({*_imported(files[a], files)} - {a})]
    places = {name: max((place for place in levels if f"{name}.".startswith(f"{place}.")), key=len, default="")
              for name in files if not name.endswith(".__main__")}  # fmt: skip
    found = [f"{name} has no place in the order" for name, place in places.items() if not place]
    for a, b, low, high in ((a, b, places[a], places.get(b, "")) for a, b in arrows):
        if low != high and levels.get(low, -1) <= levels.get(high, len(levels)):
            found.append(f"{a} imports {b}, which is {'beside' if levels.get(low) == levels.get(high) else 'above'} it")
    return found + [f"circle: {circle}" for circle in _circles(arrows)]


def _imported(file: Path, known: Collection[str]) -> Iterator[str]:
    """The modules among those `known` that a file imports; a package is its `__init__`."""
    for node in ast.walk(ast.parse(file.read_text())):
        names: list[tuple[str, ...]] = []  # what each import may mean, the nearest first
        match node:
            case ast.Import():
                names = [(alias.name,) for alias in node.names]
            case ast.ImportFrom():
                assert node.module and not node.level, f"{file}:{node.lineno}: a relative import"
                names = [(f"{node.module}.{alias.name}", node.module) for alias in node.names]
            case ast.Call(func=ast.Attribute(attr="import_module") | ast.Name("import_module"), args=[ast.Constant(x)]):
                names = [(str(x),)]
        for meanings in names:
            yield from [full for name in meanings for full in (name, f"{name}.__init__") if full in known][:1]


def _circles(arrows: Collection[tuple[str, str]]) -> Iterator[str]:
    """A circle for each package whose files and sub-packages, each taken as a whole, know each other both ways."""
    inside: defaultdict[str, defaultdict[str, dict[str, tuple[str, str]]]] = defaultdict(lambda: defaultdict(dict))
    for a, b in arrows:
        x, y = a.split("."), b.split(".")
        depth = [one == other for one, other in zip(x, y, strict=False)].index(False)
        inside[".".join(x[:depth])][x[depth]].setdefault(y[depth], (a, b))
    for known in inside.values():
        try:
            TopologicalSorter(known).prepare()
        except CycleError as error:
            yield ", ".join(" imports ".join(known[a][b]) for a, b in pairwise(error.args[1][::-1]))


def test_imports_go_one_way() -> None:
    assert not problems(ROOT, ORDER)


@pytest.mark.parametrize(("file", "text", "problem"), [
    ("low.a", "", None),
    ("low.a", "def f():\n    from low.b import x", "circle: low.a imports low.b, low.b imports low.a"),
    ("low.a", "if TYPE_CHECKING:\n    import high.c", "low.a imports high.c, which is above it"),
    ("low.a", "from high import __main__", "low.a imports high.__main__, which is above it"),
    ("high.d", "importlib.import_module('beside')", "high.d imports beside.__init__, which is beside it"),
    ("low.sub.y", "from low import b", "circle: low.b imports low.sub.x, low.sub.y imports low.b"),
    ("beside.new", "", "beside.new has no place in the order"),
])  # fmt: skip
def test_what_is_wrong_is_found(file: str, text: str, problem: str | None, tmp_path: Path) -> None:
    files = {"low.a": "", "low.b": "from low.a import x\nfrom low.sub.x import y", "low.sub.x": "", "top.__init__": "",
             "beside.__init__": "", "high.c": "from low import b", "high.__main__": "import top"}  # fmt: skip
    for name, content in (files | {file: text}).items():
        path = tmp_path / f"{name.replace('.', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    assert problems(tmp_path, "low < high | beside.__init__ < top")[:1] == ([problem] if problem else [])


def test_no_test_is_imported() -> None:
    text = "".join(file.read_text() for file in (ROOT / "tests").rglob("*.py"))
    assert not re.findall(r"^\s*(?:from|import) .*\btest_.*", text, re.MULTILINE)  # in programs that tests write, too
