"""Everything that needs a GPU, in one command without network and within ten minutes: `make gpu`.

Missing modules come from wheels that `make wheels` fetched elsewhere. Then, each a process of its own with a time-out
of its own, so that one that fails, hangs or leaves the GPU in an error does not cost the others' results:

    doctor      tpcheck doctor: what is here, of which class of bits, and which attention keeps heads apart
    kernels     tests/patches/kernels, compiled instead of interpreted
    tests       what is marked `gpu`: the bits
    layers      a layer against stock                                       ┐
    attention   attention against flash attention's kernels                 │ tests.gpu.bench
    products    against cuBLAS; other tiles                                 │
    sums        sums against copies                                         │
    trees       the warp-specialised kernel against ours                    ┘

The first three time nothing and run at once: most of their time, processors compile what the others launch later. The
table of layers is printed last, where one looks. Logs, bench.json, bench.md and summary.json go to a folder named
after the device. Imports nothing but Python's own.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

from tests.support import ROOT

TESTS = ROOT / "tests"
KERNELS = TESTS / "patches" / "kernels"
NEEDED = """
    blake3 click cloudpickle hypothesis megatron.core packaging psutil pydantic pytest pytest_timeout rich safetensors
    submitit xdist yaml
""".split()
MARGIN = 20  # seconds that a part has to end by itself, and to be ended
WORKERS = {"cuda": {"kernels": 10, "tests": 4}, "cpu": {"kernels": 2, "tests": 2}}  # they share the GPU
# What runs at once, and its seconds where all have SECONDS: it may take them and what earlier ones left, in proportion.
# The README of the tests says how long they take.
SECONDS = 570
STAGES = {("doctor", "kernels", "tests"): 250, ("layers",): 90, ("attention",): 50, ("products",): 100, ("sums",): 40,
          ("trees",): 40}  # fmt: skip
PARTS = [name for stage in STAGES for name in stage]
SECTIONS = {
    "layers": ("layers",),
    "attention": ("attention",),
    "products": ("products", "tiles"),
    "sums": ("sums",),
    "trees": ("trees",),
}
# The interpreter is slower than any GPU.
SECONDS_OF_A_REHEARSAL = 3600


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "results" / "gpu")
    parser.add_argument("--wheels", type=Path, default=ROOT / "wheels")
    parser.add_argument("--site", type=Path, default=ROOT / "build" / "gpu-site", help="where wheels are installed")
    parser.add_argument(
        "--seconds", type=float, help=f"of everything together: {SECONDS}, of a rehearsal {SECONDS_OF_A_REHEARSAL}"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a rehearsal at tiny shapes")
    parser.add_argument("--only", choices=PARTS, action="append", help="these parts alone")
    options = parser.parse_args()
    began = time.monotonic()
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    environment["PYTHONPATH"] = _path(ROOT, os.environ.get("PYTHONPATH"))
    if find_missing():
        environment["PYTHONPATH"] = _path(install(options.wheels, options.site), environment["PYTHONPATH"])
    folder = options.results / device_name(options.device, environment)
    outcomes = run_parts(
        [name for name in PARTS if not options.only or name in options.only],
        options.device,
        folder,
        began + (options.seconds or (SECONDS if options.device == "cuda" else SECONDS_OF_A_REHEARSAL)),
        environment,
    )
    for name, outcome in outcomes.items():
        print(f"==> {name}: {outcome['outcome']} after {outcome['seconds']:.0f} s")
    if "layers" in outcomes and (folder / "bench.md").exists():
        print((folder / "bench.md").read_text().partition("## products")[0].rstrip())
    print(f"==> results in {folder}, {time.monotonic() - began:.0f} s in all")
    return 0 if all(outcome["outcome"] == "passed" for outcome in outcomes.values()) else 1


def run_parts(
    parts: list[str], device: str, folder: Path, end: float, environment: dict[str, str]
) -> dict[str, dict[str, object]]:
    """Run parts stage by stage, so that all are over at `end`; summary.json has those that are."""
    folder.mkdir(parents=True, exist_ok=True)
    if set(parts) >= SECTIONS.keys():  # all is measured anew: nothing of an earlier run may look like this one's
        for name in ("bench.json", "bench.md", "summary.json"):
            (folder / name).unlink(missing_ok=True)
    outcomes: dict[str, dict[str, object]] = {}

    def run(name: str, seconds: float) -> None:
        try:
            outcomes[name] = run_part(name, device, folder, seconds, environment)
        except OSError as error:  # a full disk, no memory for a process
            outcomes[name] = {"outcome": f"not run: {error}", "seconds": 0.0}

    left = sum(seconds for stage, seconds in STAGES.items() if set(stage) & set(parts))
    for stage, share in STAGES.items():
        now = [name for name in stage if name in parts]
        if not now:
            continue
        seconds = max(1.0, (end - time.monotonic()) * share / left)
        left -= share
        with ThreadPoolExecutor(len(now)) as at_once:
            list(at_once.map(run, now, [seconds] * len(now)))
        with contextlib.suppress(OSError):
            (folder / "summary.json").write_text(json.dumps(outcomes, indent=1) + "\n")
    return outcomes


def find_missing() -> list[str]:
    return [module for module in NEEDED if not _is_there(module)]


def _is_there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # of a package that it lies in
        return False


def install(wheels: Path, site: Path) -> Path:
    """All wheels, since some fit only each other, into `site`, which goes before what the machine has."""
    if not any(wheels.glob("*.whl")):
        raise SystemExit(
            f"missing: {', '.join(find_missing())}; no wheels in {wheels}: run make wheels where there is a network"
        )
    print(f"==> missing: {', '.join(find_missing())}; installing {wheels} into {site}", flush=True)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index", "--no-deps"]
    subprocess.run([*pip, "--no-compile", "--upgrade", "--target", site, *sorted(wheels.glob("*.whl"))], check=True)
    return site


def device_name(device: str, environment: dict[str, str]) -> str:
    """A folder's name: nvidia-h200. Asked of another process: a GPU is not touched in this one."""
    if device == "cpu":
        return "cpu"
    code = "import torch; print(torch.cuda.get_device_name())"
    asked = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    if asked.returncode:
        raise SystemExit(f"torch sees no GPU here: {asked.stderr.strip().splitlines()[-1]}")
    return re.sub(r"[^a-z0-9]+", "-", asked.stdout.strip().lower()).strip("-")


def command(name: str, device: str, folder: Path, seconds: float) -> list[str]:
    if name == "doctor":
        shape = ["qwen3-8b", "seq_length=4096", "micro_batch_size=1", "global_batch_size=1"]
        return [sys.executable, "-m", "tpcheck", "doctor", *(shape if device == "cuda" else ["qwen3-tiny"])]
    if name in SECTIONS:
        bench = [sys.executable, "-W", "ignore", "-m", "tests.gpu.bench", "--device", device, "--out", str(folder)]
        sections = [argument for section in SECTIONS[name] for argument in ("--only", section)]
        return [*bench, *sections, "--seconds", f"{max(0.0, seconds - MARGIN):.0f}"]
    pytest = [sys.executable, "-m", "pytest", "-v", "--durations=10", "-p", "tests.gpu.at_once"]
    pytest += ["-p", "no:cacheprovider", "-p", "no:benchmark"]
    # Of one test: it ends a worker, and another takes its place. A signal would wait for the GPU, as the test does.
    pytest += [f"--timeout={max(30.0, seconds / 3):.0f}", "--timeout-method=thread"]
    pytest += [f"--junitxml={folder / name}.xml", "-n", str(WORKERS[device][name]), "--dist", "worksteal"]
    if name == "kernels":
        return [*pytest, str(KERNELS)]
    marked = "gpu" if device == "cuda" else "not gpu and not slow"
    return [*pytest, "-m", marked, *map(str, sorted(TESTS.rglob("test_gpu.py")))]


def run_part(name: str, device: str, folder: Path, seconds: float, environment: dict[str, str]) -> dict[str, object]:
    """Run one part, on the screen and into its log; whatever is left of it when time is up is killed."""
    if name == "kernels" and not KERNELS.is_dir():
        return {"outcome": "missing", "seconds": 0.0}
    print(f"==> {name}, at most {seconds:.0f} s", flush=True)
    began = time.monotonic()
    with (folder / f"{name}.log").open("w") as log:
        called = command(name, device, folder, seconds)
        process = subprocess.Popen(called, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            status = process.wait(seconds)
            outcome = "passed" if status == 0 else f"failed with status {status}"
        except subprocess.TimeoutExpired:
            outcome = f"killed after {seconds:.0f} s"
        finally:
            _kill(process)
    print((folder / f"{name}.log").read_text(errors="replace")[-6000:], flush=True)
    return {"outcome": outcome, "seconds": time.monotonic() - began}


def _kill(process: subprocess.Popen[bytes]) -> None:
    """The part and the ranks that it started: they are one session."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):  # a process that waits for a GPU may not even die
        process.wait(MARGIN)


def _path(first: Path, rest: str | None) -> str:
    return os.pathsep.join([str(first), *([rest] if rest else [])])


if __name__ == "__main__":
    raise SystemExit(main())
