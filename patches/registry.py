"""What is patched: a table of patches, and one loop that applies and reverts them.

A patch names its target (`module:qualname`), says in one line why it is there, and lists the parameters that its
target may have. A library version outside `SUPPORTED`, a missing target or an unknown parameter is an error:
nothing is ever left half patched, and no call falls through to a stock sum unnoticed. What cannot be imported yet is
patched, or refused, when a script imports it.
"""

from __future__ import annotations

import importlib
import inspect
import itertools
import sys
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from types import ModuleType
from typing import Any, Literal

from packaging.specifiers import SpecifierSet

from patches.contract import Contract, UnsupportedError
from patches.imports import when_imported

__all__ = ["REGISTRY", "SUPPORTED", "Patch", "Row", "attribute", "check_versions", "library_version"]

# Adding a version: run `make test` against it, then widen the range.
SUPPORTED = {
    "megatron-core": SpecifierSet(">=0.14,<0.20"),
    "transformer-engine": SpecifierSet(">=2.9,<2.21"),  # 2.9.0, 2.13.0 and 2.20.2 run in the tests
}

MODULES = {"megatron-core": "megatron.core", "transformer-engine": "transformer_engine"}

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
        library: the distribution, a key of `SUPPORTED`, whose version counts.
        lazy: the target comes with a script, not with the library: it is patched when the script imports it.
        parameters: those that the target may have; None if it is not a function.
        order_free: needed only where sums over the batch have no order.
    """

    name: str
    target: str
    why: str
    install: Callable[[Contract], Undo]
    versions: SpecifierSet = ANY_VERSION
    library: str = "megatron-core"
    lazy: bool = False
    parameters: tuple[str, ...] | None = None
    order_free: bool = False

    @property
    def module(self) -> str:
        return self.target.partition(":")[0]

    @property
    def needed(self) -> bool:
        """Whether the version found of the library needs it; not known where the library has not come yet."""
        found = library_version(self.library)
        return found is None or self.versions.contains(found, prereleases=True)


@dataclass(frozen=True)
class Row:
    """A line of `patches.status()`."""

    name: str
    target: str
    library: str
    version: str
    state: Literal["applied", "waits for its import", "not needed", "off"]
    why: str

    @property
    def applied(self) -> bool:
        return self.state == "applied"


def attribute(
    name: str,
    target: str,
    why: str,
    replacement: Callable[[Any], Any],
    parameters: str | None = None,
    versions: str = "",
    library: str = "megatron-core",
    lazy: bool = False,
    order_free: bool = False,
) -> Patch:
    """A patch that replaces the attribute `target` by `replacement(original)`.

    Args:
        name, target, why, library, lazy, order_free: as of `Patch`.
        replacement: of the attribute found; what it answers takes its place.
        parameters: names of the parameters that the original may have, separated by spaces; None if not a function.
        versions: versions of `library` that need the patch, as in ">=0.15,<0.17"; empty for all.

    Returns:
        A patch whose `install` raises `UnsupportedError` where the target is missing or has other parameters.
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

    return Patch(name, target, why, install, SpecifierSet(versions), library, lazy, known, order_free)


class Registry:
    """The patches that are applied, and what they have to remember.

    Not here: on which device products are made (`order.backend.pin_device`) and, while a model is built, that it is
    (`initial_weights`).
    """

    def __init__(self) -> None:
        self.contract: Contract | None = None
        self.verified: set[Hashable] = set()  # what was seen to keep the promise, by backend and shape
        self.unnamed = itertools.count()  # numbers of layers that were built outside a model
        self._undo: list[Undo] = []
        self._state: dict[str, Literal["applied", "waits for its import"]] = {}

    def apply(self, contract: Contract, patches: Iterable[Patch]) -> None:
        """Apply all of `patches` that the contract needs, or none of them."""
        if self.contract is not None:
            raise RuntimeError(f"already enabled with {self.contract}: call patches.disable() first")
        self.contract, self.unnamed = contract, itertools.count()
        try:
            for patch in patches:
                if patch.order_free and not contract.order_free:
                    continue
                if patch.lazy or not _importable(MODULES[patch.library]):
                    self._wait(patch, contract)
                else:
                    self._install(patch, contract)
        except BaseException:
            self.revert()
            raise

    def _wait(self, patch: Patch, contract: Contract) -> None:
        def act(module: ModuleType) -> None:
            check_version(patch.library)
            self._state.pop(patch.name, None)
            if patch.needed:
                self._install(patch, contract)

        self._state[patch.name] = "waits for its import"
        self._undo.append(when_imported(patch.module if patch.lazy else MODULES[patch.library], act))

    def _install(self, patch: Patch, contract: Contract) -> None:
        self._undo.append(patch.install(contract))
        self._state[patch.name] = "applied"

    def revert(self) -> None:
        """Put every attribute back, latest first."""
        while self._undo:
            self._undo.pop()()
        self.contract = None
        self.verified.clear()
        self._state.clear()

    def _may_need(self, patch: Patch) -> bool:
        return self.contract is None or self.contract.order_free or not patch.order_free

    def rows(self, patches: Sequence[Patch]) -> list[Row]:
        return [
            Row(
                p.name,
                p.target,
                p.library,
                library_version(p.library) or "not installed",
                self._state.get(p.name, "off" if p.needed and self._may_need(p) else "not needed"),
                p.why,
            )
            for p in patches
        ]


REGISTRY = Registry()


def check_versions(patches: Sequence[Patch]) -> list[Patch]:
    """The patches that the libraries found need; raise `UnsupportedError` where one is of an unknown version.

    Transformer Engine may be missing: a model without its layers needs none of its patches.
    """
    for library, module in MODULES.items():
        if library == "megatron-core" or _importable(module):
            check_version(library)
    return [patch for patch in patches if patch.needed]


def check_version(library: str) -> None:
    """Import `library`; `UnsupportedError` if it is not there, or of a version that the patches don't know."""
    supported = SUPPORTED[library]
    if _importable(MODULES[library]):
        _import(MODULES[library])
    found = library_version(library)
    if found is None:
        raise UnsupportedError(f"{library} is not installed: the patches are for {library} {supported}")
    if not supported.contains(found, prereleases=True):
        raise UnsupportedError(f"{library} {found} is not known to the patches: install {library} {supported}")


def library_version(library: str) -> str | None:
    """What the imported package says of itself, whatever pip has noted of another copy; before, what pip has."""
    module = sys.modules.get(MODULES[library])
    if module is not None:
        return getattr(module, "__version__", None)
    try:
        return version(library)
    except PackageNotFoundError:
        return None


def _importable(module: str) -> bool:
    try:
        return module in sys.modules or find_spec(module) is not None
    except ModuleNotFoundError:  # of the package that it is in
        return False


def _import(module: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or module.startswith(error.name):
            raise
        raise UnsupportedError(
            f"{module} needs {error.name}, which is not installed: pip install {error.name}"
        ) from error


def _resolve(target: str) -> tuple[Any, str]:
    module, _, qualname = target.partition(":")
    *path, attr = qualname.split(".")
    try:
        holder: Any = _import(module)
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
