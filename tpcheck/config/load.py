"""A run file becomes a `RunConfig` in which everything is decided, with `key=value` overrides from the command line.

What cannot work is one `TpcheckError` that says what was found, what is allowed and what to do.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from tpcheck.config.check import check
from tpcheck.config.dotted import put
from tpcheck.config.presets import PRESETS
from tpcheck.config.schema import RunConfig, TraceConfig
from tpcheck.config.yaml_text import parse_yaml
from tpcheck.errors import LETTERS, TpcheckError, shown

__all__ = ["load_run", "load_run_or_preset", "override", "parse_run", "parse_trace", "read_yaml", "unknown_key",
           "validated"]  # fmt: skip


Model = TypeVar("Model", bound=BaseModel)
NAMED = 16  # keys that a message lists at most


def load_run(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read the run file at `path`, apply `key=value` and `nested.key=value` overrides, check everything."""
    settings = read_yaml(Path(path))
    if settings is None:
        settings = {}
    if not isinstance(settings, dict):
        raise TpcheckError(f"{path} holds a {type(settings).__name__}, not a mapping of settings")
    return parse_run(settings, str(path), overrides)


def load_run_or_preset(target: str, overrides: Sequence[str], of_preset: Mapping[str, Any]) -> RunConfig:
    """The run file `target`, or the run `of_preset` of the model of that name, with `overrides`."""
    if target in PRESETS:
        return parse_run({"model": target, **of_preset}, target, overrides)
    if not Path(target).is_file():
        raise TpcheckError(f"{target}: neither a preset ({', '.join(PRESETS)}) nor a run file")
    return load_run(target, overrides)


def read_yaml(path: Path) -> Any:
    """What the YAML file at `path` holds."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:  # the second for what is not UTF-8, or no path
        raise TpcheckError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    try:
        return parse_yaml(text)
    except ValueError as error:
        raise TpcheckError(f"{path} is not YAML that can be settings: {error}") from error


def unknown_key(location: Sequence[str | int], where: str, allowed: Sequence[str]) -> str:
    """What to say of pydantic's `location`, shown as `where`, whose last key is none of `allowed`."""
    close = difflib.get_close_matches(str(location[-1]), allowed, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    more = ", …" if len(allowed) > NAMED else ""
    return f"unknown key {where[:LETTERS]}: {hint}allowed are {', '.join(allowed[:NAMED])}{more}"


def parse_run(settings: Mapping[str, Any], origin: str = "run", overrides: Sequence[str] = ()) -> RunConfig:
    """`settings` with `overrides` as a checked `RunConfig`; `origin` names them in errors."""
    overridden = copy.deepcopy(dict(settings))
    for text in overrides:
        override(overridden, text)
    config = validated(RunConfig, overridden, origin)
    check(config)
    return config


def validated(model: type[Model], settings: Mapping[str, Any], origin: str) -> Model:
    """`settings` as a `model`, or an error that names `origin` and what is allowed."""
    try:
        return model.model_validate(settings)
    except ValidationError as error:
        raise TpcheckError(f"{origin}: {_explain(error, model)}") from error


def parse_trace(options: Mapping[str, Any]) -> TraceConfig:
    """The options of `tpcheck.trace`, checked."""
    if unknown := options.keys() - TraceConfig.model_fields:
        raise TpcheckError(f"trace has no option {min(unknown)}: it has {', '.join(TraceConfig.model_fields)}")
    try:
        return TraceConfig.model_validate(options)
    except ValidationError as error:
        raise TpcheckError(error.errors()[0]["msg"].removeprefix("Value error, ")) from error


def override(settings: dict[str, Any], assignment: str) -> None:
    """Change the key that `key=value` or `nested.key=value` names; the value is YAML."""
    name, equals, text = assignment.partition("=")
    if not equals or not name:
        raise TpcheckError(f"{shown(assignment)} is not an override: write key=value, for example tp=4")
    try:
        value = parse_yaml(text)
    except ValueError as error:
        raise TpcheckError(f"the value in {shown(assignment)} is not YAML") from error
    put(settings, name, value, said=assignment)


def _explain(error: ValidationError, model: type[BaseModel]) -> str:
    """The first problem that pydantic found, as one line that names what is allowed."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return unknown_key(first["loc"], where, _keys(model, first["loc"][:-1]))
    if first["type"] == "missing":
        preset = f", or name a preset ({', '.join(PRESETS)})" if first["loc"][0] == "model" else ""
        return f"{where} is missing: give it{preset}"
    told = first["type"] == "value_error" or isinstance(first["input"], dict)
    found = "" if told else f", not {shown(first['input'])}"
    prefix = f"{where}: " if where else ""
    return f"{prefix}{first['msg'].removeprefix('Value error, ')}{found}"


def _keys(model: type[BaseModel], location: Sequence[str | int]) -> list[str]:
    section: Any = model
    for part in location:
        section = section.model_fields[str(part)].annotation
        section = next((one for one in get_args(section) if one is not type(None)), section)  # Section | None
    return list(section.model_fields)
