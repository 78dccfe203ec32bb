"""Settings by dotted keys, and where two runs' settings differ."""

from __future__ import annotations

from typing import Any

import pytest

from tpcheck.config.differences import settings_differences
from tpcheck.config.dotted import flat, put
from tpcheck.errors import TpcheckError


def test_a_dotted_key_reaches_into_sections_and_makes_those_that_are_missing() -> None:
    settings: dict[str, Any] = {"model": "qwen3-tiny", "data": None}
    for name, value in {"model.num_layers": 1, "data.kind": "text", "optimizer.lr": 0.5, "tp": 2}.items():
        put(settings, name, value, said=name)
    assert settings == {
        "model": {"preset": "qwen3-tiny", "num_layers": 1},
        "data": {"kind": "text"},
        "optimizer": {"lr": 0.5},
        "tp": 2,
    }
    assert flat(settings)["optimizer.lr"] == 0.5


def test_a_value_has_no_keys() -> None:
    with pytest.raises(TpcheckError, match="'tp.x=1': tp is a value, it has no keys"):
        put({"tp": 2}, "tp.x", 1, said="tp.x=1")


def test_settings_differ_by_dotted_key_and_one_that_is_missing_is_null() -> None:
    a = {"tp": 1, "optimizer": {"lr": 0.5, "eps": 1}, "trace": None, "output": "x"}
    b = {"seed": 7, "optimizer": {"lr": 0.1, "eps": 1}, "tp": 1, "output": "y"}
    assert settings_differences(a, b, ignore={"output"}) == {"optimizer.lr": (0.5, 0.1), "seed": (None, 7)}


def test_keys_that_may_differ_are_whole_sections() -> None:
    assert settings_differences({"optimizer": {"lr": 1}}, {"optimizer": {"lr": 2}}, ignore={"optimizer"}) == {}
