"""A study's folder: what each part found, with the settings, versions and machine that it was found with."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tpcheck.errors import TpcheckError
from tpcheck.files.json_files import read_object, write_object
from tpcheck.files.records import Record
from tpcheck.run import provenance
from tpcheck.study.study import Part, Settings, Study

__all__ = ["Footer", "footer", "read", "versions", "write"]

FORMAT = 1


class PartRecord(Record):
    """<part>.json."""

    settings: dict[str, Any]
    versions: dict[str, str]
    machine: str
    seconds: float
    result: dict[str, Any]


@dataclass(frozen=True)
class Footer:
    """What stands below every page: how it is run, how long it took and where, with which versions."""

    command: str
    took: str
    versions: tuple[tuple[str, str], ...]


def versions(study: Study) -> dict[str, str]:
    """Of everything that a study's numbers may depend on."""
    return provenance.versions() | {name: importlib.metadata.version(name) for name in study.requires}


def read(file: Path, part: Part, settings: Settings, versions: Mapping[str, str]) -> dict[str, Any] | None:
    """What is on record for this part, settings and versions; None where something else is, or nothing."""
    if not file.exists():
        return None
    try:
        found = read_object(file, FORMAT, PartRecord)
    except TpcheckError as error:
        raise TpcheckError(f"{error}, or delete it") from error
    same = found["settings"] == _read_by(part, settings) and found["versions"] == dict(versions)
    return found if same else None


def write(
    file: Path, part: Part, settings: Settings, versions: Mapping[str, str], seconds: float, result: dict[str, Any]
) -> None:
    """Put a part's result on record."""
    machine = f"{os.cpu_count()} cores of {provenance.cpu_name()}"
    write_object(file, {
        "format": FORMAT, "settings": _read_by(part, settings), "versions": dict(versions), "machine": machine,
        "seconds": round(seconds, 1), "result": result,
    })  # fmt: skip


def footer(study: Study, settings: Settings, records: Mapping[str, Mapping[str, Any]]) -> Footer:
    """From the records of all parts."""
    defaults = study.settings()
    changed = {
        name: value for name, value in settings.model_dump(mode="json").items()
        if value != defaults.model_dump(mode="json")[name]
    }  # fmt: skip
    options = ["--quick"] if settings == study.settings.quick() else [f"{k}={_plain(v)}" for k, v in changed.items()]
    times = ", ".join(f"{name} {_duration(record['seconds'])}" for name, record in records.items())
    machines = dict.fromkeys(record["machine"] for record in records.values())
    used = dict.fromkeys(pair for record in records.values() for pair in record["versions"].items())
    return Footer(" ".join(["tpcheck study", study.name, *options]), f"On {'; '.join(machines)}: {times}.", tuple(used))


def _read_by(part: Part, settings: Settings) -> dict[str, Any]:
    return settings.model_dump(mode="json", include=set(part.reads) if part.reads else None)


def _plain(value: Any) -> str:
    return str(value).replace(" ", "").replace("'", "")


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.1f} min"
