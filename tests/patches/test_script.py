"""`python -m patches script.py`: a script such as Megatron-LM's, in whichever folder it and its Megatron lie."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import megatron.core
import pytest

from tests.megatron_lm.runs import BEGIN, END, README, markdown
from tests.support import ROOT, STAND_IN

CORE = Path(megatron.core.__file__).parent


def run(script: Path, ranks: int, *flags: str, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """`script` on `ranks` ranks as torchrun starts them, from a folder that has nothing to do with it."""
    command = [
        sys.executable, "-W", "ignore", "-m", "torch.distributed.run", f"--nproc-per-node={ranks}",
        "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "-m", "patches", *options, str(script),
        "--tensor-model-parallel-size", str(ranks), *flags,
    ]  # fmt: skip
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "PYTHONPATH": path}
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd="/", timeout=240)


def found(done: subprocess.CompletedProcess[str]) -> Any:
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    assert done.returncode == 0 and len(lines) == 1, done.stderr[-3000:]
    return json.loads(lines[0])


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout of its own: the script, and a megatron-core beside it that pip knows nothing of."""
    folder = tmp_path_factory.mktemp("Megatron-LM")
    shutil.copytree(STAND_IN, folder, dirs_exist_ok=True)
    (folder / "megatron" / "core").symlink_to(CORE)
    return folder


def test_a_script_in_another_folder_has_same_weights_and_vocabulary_at_every_tp(checkout: Path) -> None:
    one, two = (found(run(checkout / "pretrain.py", tp)) for tp in (1, 2))
    assert one == two
    assert one["vocabulary"] == 1024 and one["core"].startswith(str(checkout))


def test_four_ranks_refuse_a_flag_in_one_line_that_torchrun_repeats() -> None:
    done = run(STAND_IN / "pretrain.py", 4, "--hidden-dropout", "0.1")
    reason = "hidden_dropout=0.1 is not covered by the patches: set it to 0 (--hidden-dropout 0)"
    lines = done.stderr.splitlines()
    said = lines[: next(number for number, line in enumerate(lines) if "torch/distributed/elastic" in line)]
    assert [line for line in said if not line.startswith("W")] == [f"python -m patches: {reason}"]
    summary = done.stderr.partition("FAILED")[2]
    assert "exitcode  : 2" in summary and reason in summary


def test_the_table_of_flags_is_the_one_that_is_tested() -> None:
    """`python -m tests.megatron_lm.runs` writes it."""
    assert f"{BEGIN}\n{markdown()}\n{END}" in README.read_text(encoding="utf-8")
