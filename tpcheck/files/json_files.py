"""JSON on disk, written so that no kill leaves half a file: objects, and files with an object a line.

Whole files are replaced by `os.replace` of a synced neighbour; each kind of file has a format number of its own.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tpcheck.errors import TpcheckError

__all__ = ["Json", "append_line", "read_lines", "read_object", "readable_lines", "sync", "write_lines", "write_object"]

Json = dict[str, Any]


def write_object(file: Path, value: Mapping[str, Any]) -> None:
    """Replace `file` by `value`: readers and a crash see the old file or the new one, never a part."""
    _replace(file, json.dumps(value, indent=1) + "\n")


def read_object(file: Path, format: int, required: Mapping[str, type]) -> Json:
    """The object in `file`, which must have this format and hold `required` keys of these types."""
    if not file.exists():
        raise TpcheckError(f"{file.parent} has no {file.name}: not a result directory, or a run that never started")
    value = _parse(file.read_bytes(), str(file))
    if value.get("format") != format:
        raise TpcheckError(
            f"{file} has format {value.get('format')!r}, this tpcheck reads format {format}: "
            "use the tpcheck that wrote it, or train the run again"
        )
    for key, kind in required.items():
        if not isinstance(value.get(key), kind):
            raise TpcheckError(f"{file}: {key!r} should be a {kind.__name__}, found {value.get(key)!r}")
    return value


def append_line(file: Path, value: Mapping[str, Any]) -> None:
    """Add an object, on disk when this returns; what a kill left of an unfinished line before it is cut off."""
    line = json.dumps(value) + "\n"
    is_new = not file.exists()
    with open(file, "ab") as out:
        out.truncate(_whole(file))
        out.write(line.encode())
        out.flush()
        os.fsync(out.fileno())
    if is_new:
        sync(file.parent)


def read_lines(file: Path) -> list[Json]:
    """The objects in `file`, none where it is missing; an unfinished last line, which a kill leaves, is left out."""
    text = file.read_bytes()[: _whole(file)] if file.exists() else b""
    return [_parse(line, f"{file}:{number}") for number, line in enumerate(text.splitlines(), 1)]


def readable_lines(file: Path) -> list[Json]:
    """The objects in a file that many processes add to; lines that a kill or a full disk cut short are passed over."""
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    found = []
    for line in text.splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            found.append(value)
    return found


def write_lines(file: Path, values: Iterable[Mapping[str, Any]]) -> None:
    """Replace `file` by an object a line."""
    _replace(file, "".join(json.dumps(value) + "\n" for value in values))


def sync(path: Path) -> None:
    """Put what was written to a file, or the names in a folder, on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _replace(file: Path, text: str) -> None:
    new = file.with_name(f".{file.name}.new")
    with open(new, "wb") as out:
        out.write(text.encode())
        out.flush()
        os.fsync(out.fileno())
    os.replace(new, file)
    sync(file.parent)


def _whole(file: Path) -> int:
    """Bytes of `file` up to and with its last line end."""
    with open(file, "rb") as text:
        size = text.seek(0, os.SEEK_END)
        text.seek(max(size - 1, 0))
        if text.read(1) in (b"", b"\n"):
            return size
    return file.read_bytes().rfind(b"\n") + 1


def _parse(text: bytes, where: str) -> Json:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise TpcheckError(f"{where} is not JSON ({error}): restore it or train the run again") from error
    if not isinstance(value, dict):
        raise TpcheckError(f"{where} holds a {type(value).__name__}, not an object: not written by tpcheck")
    return value
