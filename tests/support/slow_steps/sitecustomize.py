"""Put on PYTHONPATH: a run waits after each of its steps for as many seconds as `slow` in its directory says.

It waits in the file system's call that puts the step on record, so that nothing of tpcheck is replaced.
"""

import contextlib
import os
import time
from pathlib import Path

on_disk = os.fsync


def fsync(file) -> None:
    on_disk(file)
    path = Path(os.readlink(f"/proc/self/fd/{file if isinstance(file, int) else file.fileno()}"))
    if path.name == "steps.jsonl":
        began = time.monotonic()
        with contextlib.suppress(OSError, ValueError):
            while time.monotonic() < began + float(path.with_name("slow").read_text()):
                time.sleep(0.05)


os.fsync = fsync
