"""Locks: who may ask whether one is held."""

from __future__ import annotations

import os
from pathlib import Path

from tpcheck.files.lock import hold, is_locked

NOBODY = 65534


def test_whoever_may_read_a_file_may_ask_whether_it_is_locked(tmp_path: Path) -> None:
    file = tmp_path / "lock"
    assert not is_locked(file) and not file.exists()
    with hold(file):
        file.chmod(0o444)
        tmp_path.chmod(0o555)
        assert _asked_by_another_user(file) == "True"
    assert _asked_by_another_user(file) == "False"
    tmp_path.chmod(0o755)


def _asked_by_another_user(file: Path) -> str:
    """The answer of a process that may not write to `file`; root may write to everything."""
    reader, writer = os.pipe()
    if not os.fork():
        try:
            os.chdir(file.parent)
            if os.geteuid() == 0:
                os.setuid(NOBODY)
            answer = str(is_locked(Path(file.name)))
        except BaseException as error:
            answer = repr(error)
        os.write(writer, answer.encode())
        os._exit(0)
    os.close(writer)
    os.wait()
    with os.fdopen(reader) as answers:
        return answers.read()
