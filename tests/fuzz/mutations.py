"""What is done to a file. Every mutation is a function of the random generator that it is given."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import zipfile
from pathlib import Path
from typing import Any

import yaml

from tests.support.pickles import Exec, SetState, Shell, Touch

__all__ = ["damage_bytes", "damage_checkpoint", "damage_json", "damage_lines", "damage_yaml", "replace_file"]

ODD: list[Any] = [
    None, True, False, 0, -1, 1, 2**63, 2**70, 10**400, -(10**400), 0.5, float("nan"), float("inf"), 1e308, "", "x",
    "tree", "../..", "/", "a/b", "a\\b", "\0", "\n", "ü" * 50, "x" * 10_000, [], {}, [[]], [0] * 50, {"x": 1},
    ["x", 1, None], "0" * 64, "1e-4", "null", "true", "nan", "2026-13-45", "%s%n{0}", "-", "--help", "$(touch x)",
]  # fmt: skip


def damage_json(text: str, rng: random.Random) -> str:
    """A value of the object in `text` replaced, removed or added, or the text itself broken."""
    if rng.random() < 0.15:
        return rng.choice(["", "[]", "null", "3", '"x"', "{}", "[" * 100_000, '{"a":' * 50_000, text[: len(text) // 2]])
    value = json.loads(text)
    _change(value, rng)
    return json.dumps(value)


def damage_lines(text: str, rng: random.Random) -> str:
    """A line of a file with an object a line replaced, doubled, removed or broken."""
    lines = text.splitlines() or ["{}"]
    at = rng.randrange(len(lines))
    what = rng.choice(["json", "json", "json", "twice", "gone", "moved"])
    if what == "json":
        lines[at] = damage_json(lines[at], rng)
    elif what == "twice":
        lines.insert(at, lines[at])
    elif what == "moved":
        lines.insert(rng.randrange(len(lines)), lines.pop(at))
    else:
        del lines[at]
    return "\n".join(lines) + rng.choice(["\n", "\n", "", '\n{"step'])


def damage_yaml(text: str, rng: random.Random) -> str:
    if rng.random() < 0.2:
        return rng.choice([_bomb(), "a: " + "[" * 3000, "- x", "x", "&a [*a]", "!!python/name:os.system", text + text])
    value = yaml.safe_load(text)
    _change(value, rng)
    return yaml.safe_dump(value, allow_unicode=True)


def damage_bytes(content: bytes, rng: random.Random) -> bytes:
    """Cut, flipped, overwritten or repeated somewhere."""
    at = rng.randrange(max(1, len(content)))
    what = rng.choice(["cut", "flip", "fill", "repeat", "none"])
    if what == "cut":
        return content[:at]
    if what == "flip" and content:
        return content[:at] + bytes([content[at] ^ (1 << rng.randrange(8))]) + content[at + 1 :]
    if what == "fill":
        return content[:at] + rng.randbytes(min(64, len(content) - at)) + content[at + 64 :]
    return content[:at] + content[at:] * 2 if what == "repeat" else b""


def damage_checkpoint(folder: Path, marker: Path, rng: random.Random) -> None:
    """One of the checkpoint's files damaged, or with something in it that runs when it is unpickled."""
    what = rng.choice(["bytes", "bytes", "pickle", "pickle", "attack", "bomb", "common", "swap"])
    files = sorted(file for file in folder.iterdir() if file.is_file())
    index = folder / ".metadata"
    if what == "bytes":
        file = rng.choice(files)
        _write(file, damage_bytes(file.read_bytes(), rng))
    elif what == "pickle":
        _write(index, pickle.dumps(_damaged_index(index, marker, rng)))
    elif what == "attack":
        _write(index, pickle.dumps(_attack(marker, rng), rng.randrange(6)))
    elif what == "swap":
        a, b = rng.sample(files, 2)
        _write(a, b.read_bytes())
    else:
        _write(folder / "common.pt", _archive(_attack(marker, rng) if what == "common" else b"0" * (1 << 26), what))


def replace_file(file: Path, rng: random.Random) -> None:
    """Something else where a file should be."""
    what = rng.choice(["gone", "folder", "pipe", "loop", "unreadable", "empty"])
    file.unlink(missing_ok=True)
    if what == "folder":
        file.mkdir()
    elif what == "pipe":
        os.mkfifo(file)
    elif what == "loop":
        file.symlink_to(file)
    elif what != "gone":
        file.touch(0o000 if what == "unreadable" else 0o644)


def _change(value: Any, rng: random.Random) -> None:
    """Change one entry of nested containers."""
    while True:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        if not keys or rng.random() < 0.08:
            if isinstance(value, dict):
                value[rng.choice(["x", "", "step", "format", "\0"])] = rng.choice(ODD)
            else:
                value.append(rng.choice(ODD))
            return
        key = rng.choice(keys)
        inner = value[key]
        if not (isinstance(inner, (dict, list)) and inner and rng.random() < 0.8):
            break
        value = inner
    if rng.random() < 0.2:
        del value[key]
    else:
        value[key] = rng.choice(ODD)


def _damaged_index(index: Path, marker: Path, rng: random.Random) -> Any:
    metadata = pickle.loads(index.read_bytes())  # our own, from the repository
    odd = rng.choice([_nested(), _nested(list), _attack(marker, rng), None, -1, "x", (), 2**70, b"x" * 100])
    entries = list(metadata.state_dict_metadata.values())
    entry = rng.choice([entry for entry in entries if hasattr(entry, "size")])
    where = rng.choice(["size", "chunks", "offsets", "storage", "planner", "entry", "file"])
    if where == "size":
        entry.size = odd
    elif where == "chunks":
        entry.chunks = odd
    elif where == "offsets":
        object.__setattr__(entry.chunks[0], "offsets", odd)
    elif where == "planner":
        metadata.planner_data = odd
    elif where == "entry":
        metadata.state_dict_metadata[next(iter(metadata.state_dict_metadata))] = odd
    else:
        info = rng.choice(list(metadata.storage_data.values()))
        setattr(info, "relative_path" if where == "file" else rng.choice(["offset", "length"]), odd)
    return metadata


def _attack(marker: Path, rng: random.Random) -> Any:
    return rng.choice([Touch, Shell, Exec, SetState])(marker)


def _nested(kind: Any = tuple) -> Any:
    value: Any = kind()
    for _ in range(40):
        value = kind((value, value))
    return value


def _bomb() -> str:
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    lines += [f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]" for a, b in zip("abcdefgh", "bcdefghi", strict=True)]
    return "\n".join(lines)


def _archive(value: Any, kind: str) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED if kind == "bomb" else zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(value))
        archive.writestr("archive/byteorder", "little")
    return file.getvalue()


def _write(file: Path, content: bytes) -> None:
    file.unlink(missing_ok=True)  # it may be a link to the one that others are made from
    file.write_bytes(content)
