"""Which settings of two runs differ."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from tpcheck.config.dotted import flat

__all__ = ["settings_differences"]

SINCE = {"chunks": 1, "cp": 1, "ep": 1}  # what runs did whose files don't have these settings yet


def settings_differences(
    a: Mapping[str, Any], b: Mapping[str, Any], ignore: Collection[str] = ()
) -> dict[str, tuple[Any, Any]]:
    """What `a` and `b` say of every key that they do not agree on, by dotted key in alphabetical order.

    Args:
        a: nested settings, as a manifest has them; a key that is missing is as good as null, or as what was done then.
        b: the others.
        ignore: keys of the outermost level that may differ.
    """
    one, other = (flat({key: value for key, value in side.items() if key not in ignore}) for side in (a, b))
    keys = sorted({*one, *other})
    pairs = {key: (one.get(key, SINCE.get(key)), other.get(key, SINCE.get(key))) for key in keys}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}
