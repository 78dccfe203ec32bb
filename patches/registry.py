"""What is patched: a table of patches, and one loop that applies and reverts them.

A patch names its target (`module:qualname`), says in one line why it is there, and lists the parameters that its
target may have. A library version outside `SUPPORTED`, a missing target or an unknown parameter is an error:
nothing is ever left half patched, and no call falls through to a stock sum unnoticed.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

from packaging.specifiers import SpecifierSet

from patches.contract import Contract, UnsupportedError

__all__ = ["REGISTRY", "SUPPORTED", "Patch", "Row", "attribute", "check_versions"]

# Adding a version: run `make test` against it, then widen the range.
SUPPORTED = {
    "megatron-core": SpecifierSet(">=0.14,<0.20"),
    "transformer-engine": SpecifierSet(">=2.9,<2.21"),  # 2.9.0, 2.13.0 and 2.20.2 run in the tests
}

ANY_VERSION = SpecifierSet("")

Undo = Callable[[], None]


@dataclass(frozen=True)
class Patch:
    """One change to somebody else's library.

    Args:
        name: how status tables and tests call it.
        target: `module:qualname`.
        why: one line.
        install: applies the patch for a contract and returns what undoes it.
        versions: versions of `library` that need it.
        package: where this is not importable, the patch has nothing to do.
        library: the distribution, a key of `SUPPORTED`, whose version counts.
        parameters: those that the target may have; None if it is not a function.
    """

    name: str
    target: str
    why: str
    install: Callable[[Contract], Undo]
    versions: SpecifierSet = ANY_VERSION
    package: str = "megatron.core"
    library: str = "megatron-core"
    parameters: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Row:
    """A line of `patches.status()`."""

    name: str
    target: str
    library: str
    version: str
    needed: bool
    applied: bool
    why: str


def attribute(
    name: str,
    target: str,
    why: str,
    replacement: Callable[[Any], Any],
    parameters: str | None = None,
    versions: str = "",
    package: str = "megatron.core",
    library: str = "megatron-core",
) -> Patch:
    """A patch that replaces the attribute `target` by `replacement(original)`.

    Args:
        parameters: names of the parameters that the original may have, separated by spaces; None if not a function.
    """

    known = None if parameters is None else tuple(parameters.split())

    def install(contract: Contract) -> Undo:
        holder, attr = _resolve(target)
        original = inspect.getattr_static(holder, attr)
        if known is not None:
            _check_parameters(target, getattr(holder, attr), known)
        owned = attr in vars(holder)
        setattr(holder, attr, replacement(getattr(holder, attr)))
        return (lambda: setattr(holder, attr, original)) if owned else (lambda: delattr(holder, attr))

    return Patch(name, target, why, install, SpecifierSet(versions), package, library, known)


class Registry:
    """The patches that are applied, the only global state of this package."""

    def __init__(self) -> None:
        self.contract: Contract | None = None
        self.verified: set[Hashable] = set()  # what was seen to keep the promise, by backend and shape
        self._applied: list[tuple[Patch, Undo]] = []

    def apply(self, contract: Contract, patches: Iterable[Patch]) -> None:
        """Apply all of `patches`, or none of them."""
        if self.contract is not None:
            raise RuntimeError(f"already enabled with {self.contract}: call patches.disable() first")
        self.contract = contract
        try:
            for patch in patches:
                self._applied.append((patch, patch.install(contract)))
        except BaseException:
            self.revert()
            raise

    def revert(self) -> None:
        """Put every attribute back, latest first."""
        while self._applied:
            self._applied.pop()[1]()
        self.contract = None
        self.verified.clear()

    def rows(self, patches: Sequence[Patch]) -> list[Row]:
        applied = {patch.name for patch, _ in self._applied}
        return [
            Row(
                p.name,
                p.target,
                p.library,
                _version(p.library) or "not installed",
                _needed(p),
                p.name in applied,
                p.why,
            )
            for p in patches
        ]


REGISTRY = Registry()


def check_versions(patches: Sequence[Patch]) -> list[Patch]:
    """The patches that the installed libraries need; raise `UnsupportedError` where one is of an unknown version.

    Transformer Engine may be missing: a model without its layers needs none of its patches.
    """
    for library in dict.fromkeys(["megatron-core", *(p.library for p in patches if find_spec(p.package))]):
        _check_version(library)
    return [patch for patch in patches if _needed(patch)]


def _needed(patch: Patch) -> bool:
    found = _version(patch.library)
    return (
        found is not None and patch.versions.contains(found, prereleases=True) and find_spec(patch.package) is not None
    )


def _check_version(library: str) -> None:
    found, supported = _version(library), SUPPORTED[library]
    if found is None:
        raise UnsupportedError(f"{library} is not installed: the patches are for {library} {supported}")
    if not supported.contains(found, prereleases=True):
        raise UnsupportedError(f"{library} {found} is not known to the patches: install {library} {supported}")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _resolve(target: str) -> tuple[Any, str]:
    module, _, qualname = target.partition(":")
    *path, attr = qualname.split(".")
    try:
        holder = importlib.import_module(module)
        for name in path:
            holder = getattr(holder, name)
        getattr(holder, attr)
    except (ImportError, AttributeError) as error:
        raise UnsupportedError(
            f"{target} does not exist here ({error}): this version is not known to the patches"
        ) from error
    return holder, attr


def _check_parameters(target: str, function: Any, known: Sequence[str]) -> None:
    unknown = [name for name in inspect.signature(function).parameters if name not in (*known, "self", "cls", "ctx")]
    if unknown:
        raise UnsupportedError(
            f"{target} has parameters that the patches do not know: {', '.join(unknown)} (known: {', '.join(known)})"
        )
