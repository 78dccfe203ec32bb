"""`exact` and `kernels` have the same functions, and only `order.backend` knows that there are two.

By their source: Triton, which the kernels import, is missing on most machines.
"""

from __future__ import annotations

import ast
import inspect
from pathlib import Path
from typing import Any

import pytest

import patches
from patches.order.backend import Backend

PATCHES = Path(patches.__file__).parent
PACKAGES = ("exact", "kernels")
NAMES = {name for name in vars(Backend) if not name.startswith("_")}
FUNCTIONS = sorted(name for name in NAMES if inspect.isfunction(vars(Backend)[name]))


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def exported(package: str) -> set[str]:
    for node in tree(PATCHES / "order" / package / "__init__.py").body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return set(ast.literal_eval(node.value))
    raise AssertionError(f"{package} has no __all__")


def arguments(package: str, name: str) -> tuple[list[str], list[str]]:
    """Parameters of a function that a package exports, and the values that its last ones have."""
    for node in tree(PATCHES / "order" / package / "__init__.py").body:
        for alias in node.names if isinstance(node, ast.ImportFrom) else ():
            if (alias.asname or alias.name) == name:
                module = PATCHES.parent / f"{str(node.module).replace('.', '/')}.py"
                (found,) = (x for x in tree(module).body if isinstance(x, ast.FunctionDef) and x.name == alias.name)
                return [x.arg for x in found.args.args], [ast.unparse(x) for x in found.args.defaults]
    raise AssertionError(f"{package} does not import {name}")


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_exports_what_a_backend_has(package: str) -> None:
    assert exported(package) == NAMES


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("package", PACKAGES)
def test_a_function_takes_what_the_backend_says(package: str, name: str) -> None:
    expected = [p for p in inspect.signature(vars(Backend)[name]).parameters.values() if p.name != "self"]
    names, defaults = arguments(package, name)
    more = len(names) - len(expected)  # of its own, which have defaults
    assert names[: len(expected)] == [p.name for p in expected]
    kept = defaults[: len(defaults) - more]
    assert more <= len(defaults) and kept == [_written(p.default) for p in expected if p.default is not p.empty]


def _written(default: Any) -> str:
    return str(default) if not isinstance(default, tuple) else ast.unparse(ast.parse(repr(default)))


@pytest.mark.parametrize("package", PACKAGES)
def test_only_the_backend_imports_a_package(package: str) -> None:
    own = PATCHES / "order" / package
    importing = {
        path.relative_to(PATCHES).as_posix()
        for path in PATCHES.rglob("*.py")
        if not path.is_relative_to(own)
        and any(_imports(node, f"patches.order.{package}") for node in ast.walk(tree(path)))
    }
    assert importing == {"order/backend.py"}


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("upper", ("backend", "collectives", "products", "grad_norm"))
def test_a_package_imports_nothing_above_it(package: str, upper: str) -> None:
    for path in (PATCHES / "order" / package).glob("*.py"):
        assert not any(_imports(node, f"patches.order.{upper}") for node in ast.walk(tree(path))), path


def _imports(node: ast.AST, module: str) -> bool:
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        names = [str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)]
    else:
        names = []
    return any(name == module or name.startswith(f"{module}.") for name in names)
