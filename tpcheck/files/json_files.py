"""JSON on disk, written so that no kill leaves half a file: objects, and files with an object a line.

Whole files are replaced by `os.replace` of a synced neighbour; each kind of file has a format number of its own.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tpcheck.errors import TpcheckError, shown
from tpcheck.files.records import Json, Record

__all__ = ["append_line", "read_lines", "read_object", "readable_lines", "require_format", "sync", "write_lines",
           "write_object"]  # fmt: skip


def write_object(file: Path, value: Mapping[str, Any]) -> None:
    """Replace `file` by `value`: readers and a crash see the old file or the new one, never a part."""
    _replace(file, json.dumps(value, indent=1) + "\n")


def read_object(file: Path, format: int, record: type[Record]) -> Json:
    """The object in `file`, which must have this format and be a `record`."""
    if not file.exists():
        raise TpcheckError(f"{file.parent} has no {file.name}: not a result directory, or a run that never started")
    value = _parse(_bytes(file), str(file))
    require_format(value, format, str(file))
    return record.require(value, str(file))


def require_format(value: Json, format: int, where: str) -> None:
    """Raise `TpcheckError` where `value`, which is in `where`, was written in another format."""
    if value.get("format") != format:
        raise TpcheckError(
            f"{where} has format {shown(value.get('format'))}, this tpcheck reads format {format}: "
            "use the tpcheck that wrote it, or train the run again"
        )


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


def read_lines(file: Path, record: type[Record]) -> list[Json]:
    """The objects in `file`, each a `record`, none where it is missing.

    An unfinished last line, which a kill leaves, is left out.
    """
    lines = _bytes(file)[: _whole(file)].splitlines() if file.exists() else []
    places = ((line, f"{file}:{number}") for number, line in enumerate(lines, 1))
    return [record.require(_parse(line, where), where) for line, where in places]


def readable_lines(file: Path, record: type[Record]) -> list[Json]:
    """Those of a file that many processes add to; what a kill or a full disk cut short is passed over."""
    if not file.exists():
        return []
    found = []
    for line in _bytes(file).decode(errors="replace").splitlines():
        with contextlib.suppress(TpcheckError):
            found.append(record.require(_parse(line.encode(), str(file)), str(file)))
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


def _bytes(file: Path) -> bytes:
    """What `file` holds: a plain file, since a pipe would be waited for."""
    if not file.is_file():
        raise TpcheckError(f"{file} is not a file: restore it or train the run again")
    return file.read_bytes()


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
        raise TpcheckError(f"{where} is not JSON ({shown(error)}): restore it or train the run again") from error
    if not isinstance(value, dict):
        raise TpcheckError(f"{where} holds a {type(value).__name__}, not an object: not written by tpcheck")
    return value
