"""What made a run: its configuration, versions, code, hardware and data, for manifest.json.

`resume_point` reads it back and says from where a run may go on; only settings that do not change what is
computed may differ from those that the run began with.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from tpcheck.checkpoint.reader import Checkpoint
from tpcheck.config import RunConfig, settings_differences
from tpcheck.errors import TpcheckError
from tpcheck.files import result_dir
from tpcheck.files.json_files import read_object
from tpcheck.files.names import CODE

__all__ = ["CODE_FORMAT", "continued", "cpu_name", "describe", "git", "resume_point", "versions"]

CODE_FORMAT = 1
PACKAGES = ("torch", "megatron-core", "transformer-engine", "triton", "numpy", "tpcheck")
MAY_CHANGE = {
    "tp",
    "pp",
    "vpp",
    "dp",
    "sequence_parallel",
    "distributed_optimizer",
    "recompute",
    "gradient_accumulation_fusion",
    "symmetric_memory",
    "micro_batch_size",
    "threads",
    "steps",
    "stop_after",
    "trace",
    "checkpoint_every",
    "output",
}


def describe(config: RunConfig, data: Any, patches: list[dict[str, Any]]) -> dict[str, Any]:
    """The manifest of a run that starts now."""
    return {
        "config": config.model_dump(mode="json"),
        "versions": versions(),
        "git": _code(Path(__file__).parent),
        "hardware": _hardware(),
        "data": {
            "kind": config.data.kind,
            "path": config.data.path,
            "digest": data.digest,
            "tokens": data.tokens,
        },
        "patches": patches,
        "products": None if config.strategy == "stock" else _products(),
        "attention": None,  # known after the first step
        "started": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def continued(before: dict[str, Any], now: dict[str, Any], step: int) -> dict[str, Any]:
    """The manifest of a run that goes on from `step`; what it was before is kept in `history`."""
    if before["data"]["digest"] != now["data"]["digest"]:
        raise TpcheckError(
            f"the data have changed since this run began (digest {before['data']['digest'][:12]}, now "
            f"{now['data']['digest'][:12]}): restore them, or start a new run in another output"
        )
    products = result_dir.products(before)
    if products != now["products"]:
        raise TpcheckError(
            f"this run's products were of another kind, {_short(products, now['products'])}, here they are "
            f"{_short(now['products'], products)}: resume on what it began on, or start a new run"
        )
    past = {key: value for key, value in before.items() if key not in ("format", "history", "data")}
    return {**now, "history": [*before.get("history", []), {**past, "until_step": step}]}


def resume_point(config: RunConfig, resume: bool) -> int:
    """The step whose checkpoint this run goes on from, 0 to begin; refuses what would spoil an earlier run."""
    output = Path(config.output)
    if output.exists() and not output.is_dir():
        raise TpcheckError(f"output={output} is a file: name another directory")
    if not result_dir.is_result(output):
        return 0
    if not resume:
        raise TpcheckError(f"{output} holds a run already: go on with --resume, or name another output")
    before = result_dir.read_manifest(output)["config"]
    now = config.model_dump(mode="json")
    differing = {name.partition(".")[0] for name in settings_differences(before, now, ignore=_may_change())}
    for key in [key for key in now if key in differing]:
        raise TpcheckError(
            f"{output} was trained with {key}={_short(before.get(key), now[key])}, not "
            f"{_short(now[key], before.get(key))}: resume with the same {key}, or name another output"
        )
    saved = result_dir.checkpoints(output)
    step = saved[-1][0] if saved else 0
    if step > config.steps:
        raise TpcheckError(f"{output} is at step {step} already, beyond steps={config.steps}")
    if step:
        Checkpoint(result_dir.checkpoint_path(output, step))  # refuses a damaged one
    return step


def _may_change() -> set[str]:
    # megatron-core 0.14 saves the distributed optimizer's state flattened, and loads it only so.
    saved_flat = versions().get("megatron-core", "").startswith("0.14.")
    return MAY_CHANGE - {"distributed_optimizer"} if saved_flat else MAY_CHANGE


def _short(value: Any, other: Any) -> Any:
    """Only the entries of a section that differ from those of the other one."""
    if isinstance(value, dict) and isinstance(other, dict):
        return {key: value[key] for key in value if value[key] != other.get(key)}
    return value


def versions() -> dict[str, str]:
    """Of Python and of everything installed that a run's bits may depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _code(package: Path) -> dict[str, Any] | None:
    """The commit that runs; of a copy made at submission (see slurm/snapshot.py), what it was made from."""
    if (package.parent / CODE).exists():
        copied = read_object(package.parent / CODE, CODE_FORMAT, {"digest": str})
        return {key: value for key, value in copied.items() if key != "format"}
    return git(package)


def git(folder: Path) -> dict[str, Any] | None:
    """The commit of the working tree that `folder` is in, and whether it was changed since."""

    def ask(*arguments: str) -> str:
        call = ["git", "-C", str(folder), *arguments]
        return subprocess.run(call, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        return {"commit": ask("rev-parse", "HEAD"), "dirty": bool(ask("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None


def _products() -> dict[str, Any]:
    """What the bits of this run's products depend on; runs where it differs were never promised to be equal."""
    import torch

    from patches.order import products

    return products.describe("cuda" if torch.cuda.is_available() else "cpu")


def _hardware() -> dict[str, Any]:
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return {
        "host": platform.node(),
        "machine": platform.machine(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "gpus": [torch.cuda.get_device_name(number) for number in range(count)],
    }


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
