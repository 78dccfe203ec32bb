"""Which settings of two runs differ."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from tpcheck.config.dotted import flat

__all__ = ["settings_differences"]


def settings_differences(
    a: Mapping[str, Any], b: Mapping[str, Any], ignore: Collection[str] = ()
) -> dict[str, tuple[Any, Any]]:
    """What `a` and `b` say of every key that they do not agree on, by dotted key in alphabetical order.

    Args:
        a: nested settings, as a manifest has them; a key that is missing is as good as null.
        b: the others.
        ignore: keys of the outermost level that may differ.
    """
    one, other = (flat({key: value for key, value in side.items() if key not in ignore}) for side in (a, b))
    pairs = {key: (one.get(key), other.get(key)) for key in sorted({*one, *other})}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}
