"""Megatron-LM's own scripts under `python -m patches`: ranks forked from this process after its imports.

The checkout comes first on the path (`make test-megatron-lm` sees to it), so that its megatron-core is what runs. Run
by itself, this file writes the table of flags into patches/README.md.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import socket
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.support import ROOT

TABLE = Path(__file__).with_name("flags.yaml")
README = ROOT / "patches" / "README.md"
BEGIN, END = "<!-- made by tests/megatron_lm/runs.py from tests/megatron_lm/flags.yaml -->", "<!-- end -->"
SECONDS = 300.0
BASE = (
    "--num-layers 2 --hidden-size 64 --num-attention-heads 8 --seq-length 32 --max-position-embeddings 32 "
    "--micro-batch-size 2 --global-batch-size 4 --train-iters 3 --lr 1e-3 --min-lr 1e-4 --lr-decay-style cosine "
    "--mock-data --tokenizer-type NullTokenizer --vocab-size 1000 --transformer-impl local --hidden-dropout 0 "
    "--attention-dropout 0 --log-interval 1 --eval-iters 0 --eval-interval 100 --distributed-backend gloo "
    "--no-gradient-accumulation-fusion --no-save-rng --no-load-rng"
)


@dataclass(frozen=True)
class Case:
    """A line of the table."""

    flags: str
    what: str = ""
    needs: str = ""
    says: str = ""
    versions: str = ""
    tp: tuple[int, ...] = (2,)
    dp: int = 1
    connections: int = 1

    @property
    def all_flags(self) -> str:
        return f"{self.flags} {self.needs}".strip()


def cases(kind: str) -> list[Case]:
    rows = yaml.safe_load(TABLE.read_text())[kind]
    return [Case(**{("needs" if key == "with" else key): value for key, value in row.items()}) for row in rows]


@dataclass(frozen=True)
class Ended:
    """Exit code of the first rank that failed, else 0, and what all ranks printed."""

    code: int
    out: str


def run_script(script: Path, tp: int, flags: str, dp: int = 1, options: str = "", connections: int = 1) -> Ended:
    """Run `script` on as many ranks as its sizes want; no rank outlives the call."""
    pp = _value(flags, "--pipeline-model-parallel-size")
    ranks = tp * _value(flags, "--context-parallel-size") * dp * pp
    precision = "" if {"--fp32", "--fp16"} & set(flags.split()) else "--bf16"
    arguments = f"{options} {script} --tensor-model-parallel-size {tp} {BASE} {precision} {flags}".replace(
        " --fp32", ""
    )
    with tempfile.TemporaryDirectory() as folder, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), CUDA_DEVICE_MAX_CONNECTIONS=str(connections))
        pids = {_fork(rank, ranks, shlex.split(arguments), Path(folder)): rank for rank in range(ranks)}
        code = _wait(set(pids))
        return Ended(code, "\n".join(path.read_text(errors="replace") for path in sorted(Path(folder).iterdir())))


def _value(flags: str, name: str) -> int:
    words = flags.split()
    return int(words[words.index(name) + 1]) if name in words else 1


def _fork(rank: int, ranks: int, arguments: list[str], folder: Path) -> int:
    pid = os.fork()
    if pid:
        return pid
    code: Any = 1
    try:
        os.setpgid(0, 0)
        out = os.open(folder / f"{rank}.log", os.O_WRONLY | os.O_CREAT)
        os.dup2(out, 1)
        os.dup2(out, 2)
        sys.stdout = open(1, "w", closefd=False, buffering=1)  # noqa: SIM115  lasts as long as the process
        sys.stderr = open(2, "w", closefd=False, buffering=1)  # noqa: SIM115
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks))
        from patches.__main__ import main

        sys.argv = ["patches", *arguments]
        main()
        code = 0
    except SystemExit as done:
        code = done.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


def _wait(left: set[int]) -> int:
    """The first exit code that is not 0; the other ranks get a moment to say why, then are ended."""
    everyone, code, deadline = set(left), 0, time.monotonic() + SECONDS
    while left and time.monotonic() < deadline:
        for pid in list(left):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                left.discard(pid)
                if status and not code:
                    code, deadline = os.waitstatus_to_exitcode(status), time.monotonic() + 5
        time.sleep(0.05)
    for pid in everyone:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
    for pid in left:
        os.waitpid(pid, 0)
    return code or (124 if left else 0)


def markdown() -> str:
    """The table of flags, as patches/README.md shows it."""
    said = {"same": "same bits", "refused": "refused", "megatron": "Megatron's own demand"}
    rows = [["flags of pretrain_gpt.py", "under the patches", ""]]
    for kind, verdict in said.items():
        for case in cases(kind):
            flags = f"`{case.flags}`" if case.flags else "none beside those of the model's size"
            notes = [
                case.what,
                f"`{case.says}`" if kind == "refused" else "",
                f"with `{case.needs}`" if case.needs else "",
            ]
            notes += [f"megatron-core {case.versions}"] if case.versions else []
            rows.append([flags, verdict, "; ".join(filter(None, notes))])
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|---|---|---|", *lines[1:]])


def write_readme() -> None:
    text = README.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    README.write_text(f"{before}{BEGIN}\n{markdown()}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    write_readme()
