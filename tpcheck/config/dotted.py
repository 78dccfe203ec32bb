"""Settings by dotted keys: `optimizer.lr` is the key `lr` of the section `optimizer`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tpcheck.errors import LETTERS, TpcheckError, shown

__all__ = ["flat", "put"]


def put(settings: dict[str, Any], name: str, value: Any, said: str) -> None:
    """Set the key called `name`, and make the sections that it is in where they are missing.

    Args:
        said: what the user wrote, for the error.

    Raises:
        TpcheckError: what should be a section of `settings` is a value.
    """
    *sections, key = name.split(".")
    target = settings
    for section in sections:
        inner = target.get(section)
        if section == "model" and isinstance(inner, str):
            inner = {"preset": inner}
        if inner is None:
            inner = {}
        if not isinstance(inner, dict):
            raise TpcheckError(f"{shown(said)}: {section[:LETTERS]} is a value, it has no keys")
        target[section] = target = inner
    target[key] = value


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Every value of nested `settings` by its dotted key, in their order."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return found
