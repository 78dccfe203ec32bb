"""Call sites in versions of megatron-core that this Python cannot install: they are read, not run.

`make test-megatron` unpacks their wheels and names the folders, separated by colons, in MEGATRON_SOURCES.
"""

from __future__ import annotations

import ast
import functools
import os
from importlib.metadata import Distribution
from pathlib import Path

import pytest

import patches
from patches.registry import SUPPORTED, Patch

FOLDERS = [Path(folder) for folder in os.environ.get("MEGATRON_SOURCES", "").split(":") if folder]
IN_MEGATRON = [patch for patch in patches._all_patches() if patch.target.startswith("megatron.core")]

pytestmark = pytest.mark.skipif(not FOLDERS, reason="MEGATRON_SOURCES names no folder: make test-megatron")


def version_in(folder: Path) -> str:
    return next(iter(Distribution.discover(name="megatron-core", path=[str(folder)]))).version


@functools.cache
def parsed(folder: Path, module: str) -> ast.Module:
    path = folder.joinpath(*module.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(file.read_text(encoding="utf-8"))


def find(folder: Path, module: str, names: list[str]) -> ast.AST:
    """The definition of `module:names`, followed through imports."""
    scope: ast.AST = parsed(folder, module)
    for depth, name in enumerate(names):
        for node in ast.walk(scope):
            if node is not scope and named(node) == name:
                found: ast.AST = node
                break
            if isinstance(node, ast.ImportFrom) and any((a.asname or a.name) == name for a in node.names):
                origin = next(a.name for a in node.names if (a.asname or a.name) == name)
                return find(folder, absolute(module, node), [origin, *names[depth + 1 :]])
        else:
            raise LookupError(f"{module} has no {'.'.join(names)}")
        scope = found
    return scope


def named(node: ast.AST) -> str | None:
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return node.name
    return node.id if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) else None


def absolute(module: str, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    return ".".join([*module.split(".")[: -node.level], *([node.module] if node.module else [])])


@pytest.mark.parametrize("patch", IN_MEGATRON, ids=lambda patch: patch.name)
@pytest.mark.parametrize("folder", FOLDERS, ids=version_in)
def test_call_site_is_where_the_patch_looks_and_takes_known_parameters(folder: Path, patch: Patch):
    if not patch.versions.contains(version_in(folder), prereleases=True):
        pytest.skip(f"{patch.name} is for megatron-core {patch.versions}")
    module, _, qualname = patch.target.partition(":")
    definition = find(folder, module, qualname.split("."))
    if patch.parameters is not None:
        assert isinstance(definition, ast.FunctionDef)
        spec = definition.args
        taken = [*spec.posonlyargs, *spec.args, *spec.kwonlyargs, *filter(None, (spec.vararg, spec.kwarg))]
        assert {arg.arg for arg in taken} <= {*patch.parameters, "self", "cls", "ctx"}


@pytest.mark.parametrize("folder", FOLDERS, ids=version_in)
def test_version_is_one_that_the_patches_take(folder: Path):
    assert SUPPORTED["megatron-core"].contains(version_in(folder))


@pytest.mark.parametrize("folder", FOLDERS, ids=version_in)
def test_a_missing_call_site_is_noticed(folder: Path):
    with pytest.raises(LookupError):
        find(folder, "megatron.core.tensor_parallel.layers", ["RowParallelLinear", "forwards"])
