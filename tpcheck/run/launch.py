"""Starting the ranks of a run: forked from this process after one import, or as torchrun or srun started them.

    launch ── import torch and megatron-core once ── fork tp * pp * dp ranks ── wait
                                                         └─ the first that fails takes the others with it

A forked rank leads its own process group and dies with its parent, so nothing is left behind.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tpcheck.config import RunConfig, check, load_run
from tpcheck.errors import TpcheckError
from tpcheck.files import lock, result_dir
from tpcheck.files.json_files import write_object
from tpcheck.files.names import LOG
from tpcheck.run import exit_reason
from tpcheck.run.output import to_log
from tpcheck.run.provenance import resume_point
from tpcheck.run.rank import rank_from_environment

__all__ = ["command", "launch"]

POLL_SECONDS = 0.05
GRACE_SECONDS = 1.0  # for the other ranks to say why they fail, before they are killed
PR_SET_PDEATHSIG = 1
LOCK_PATIENCE_SECONDS = 480.0  # below the time that the other ranks wait for this one to connect
SIGNALS = {signal.SIGTERM, signal.SIGUSR2, signal.SIGINT}


def command(path: Path, overrides: Sequence[str] = (), resume: bool = False) -> int:
    """`tpcheck train PATH [key=value …] [--resume]`: train here, or in ranks forked from this process."""
    try:
        return launch(load_run(path, overrides), resume)
    except Exception as error:
        exit_reason.note_error(error)
        raise


def launch(config: RunConfig, resume: bool = False) -> int:
    """Train `config` and return an exit code; bad input is a `TpcheckError`, raised before any rank starts."""
    check(config)
    # A request to save may come while a busy node is still importing torch: it then waits until ranks can hear it.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
    try:
        return _launch(config, resume)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _launch(config: RunConfig, resume: bool) -> int:
    rank_settings = rank_from_environment(config)
    if rank_settings is None:
        resume_point(config, resume)
        if resume and result_dir.final_digests(Path(config.output), config.steps):
            print(f"complete already: {config.output}")
            return 0
        return _fork_ranks(config, resume)
    os.environ.update(rank_settings)
    with _quiet_imports():
        from tpcheck.run.train import Stop, train
    stop, rank = Stop(), int(os.environ["RANK"])
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    alone = contextlib.nullcontext() if rank else _exclusively(config)
    with alone, to_log(Path(config.output) / LOG, rank) as display, _refusals():
        try:
            train(config, resume, stop, display)
        except Exception:
            traceback.print_exc()
            raise
    return 0


def _fork_ranks(config: RunConfig, resume: bool) -> int:
    data = _check_before_forking(config)
    ranks: dict[int, int] = {}
    with (
        _exclusively(config),
        tempfile.TemporaryDirectory(prefix="tpcheck-") as scratch,
        _forwarded_signals(ranks),
    ):
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            for rank in range(config.world_size):
                ranks[rank] = _fork(config, resume, data, rank, Path(scratch))
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        return _supervise(ranks, Path(scratch), Path(config.output) / LOG)


@contextlib.contextmanager
def _exclusively(config: RunConfig) -> Iterator[None]:
    """Hold the result directory's lock, which forked ranks inherit, so that no two runs write to one place.

    On a cluster a lost node may still run what was started again elsewhere: a batch script's runs wait for its end.
    """
    log = Path(config.output) / LOG
    log.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(lock.hold(log, LOCK_PATIENCE_SECONDS if exit_reason.is_wanted() else 0.0))
        except BlockingIOError:
            raise TpcheckError(f"{config.output} is being written by another run: wait for it, or stop it") from None
        yield


def _check_before_forking(config: RunConfig) -> Any:
    """Import everything heavy, once for all ranks; refuse what can be refused here; open the data."""
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # asks for GPUs without starting CUDA
    with _quiet_imports():
        import psutil  # noqa: F401  without it Megatron's checkpoint writer hangs
        import torch

        import tpcheck.run.train  # noqa: F401
        from tpcheck.run.data import open_data
        from tpcheck.run.model import transformer_config

        transformer_config(config)
    if torch.cuda.is_initialized():  # by an import: Transformer Engine asks the GPU what flash-attn can do on it
        raise TpcheckError(
            "an import has started CUDA, which ranks forked from here could not use: start them with "
            f"torchrun --nproc-per-node={config.world_size} -m tpcheck train …"
        )
    return open_data(config)


@contextlib.contextmanager
def _quiet_imports() -> Iterator[None]:
    # megatron-core warns seven times that Apex and Transformer Engine are not installed.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except ModuleNotFoundError as error:
            raise TpcheckError(f"{error}: install {error.name}, which megatron-core or tpcheck needs") from error


@contextlib.contextmanager
def _refusals() -> Iterator[None]:
    """What the patches do not cover is bad input like any other."""
    from patches import UnsupportedError

    try:
        yield
    except UnsupportedError as error:
        raise TpcheckError(str(error)) from error


@contextlib.contextmanager
def _forwarded_signals(ranks: dict[int, int]) -> Iterator[None]:
    """While this lasts, a request to stop goes to every rank; a second Ctrl-C ends them at once."""
    interrupted = False

    def forward(number: int, frame: object) -> None:
        nonlocal interrupted
        if number == signal.SIGINT:
            if interrupted:
                raise KeyboardInterrupt
            interrupted = True
        for pid in ranks.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)

    before = {number: signal.signal(number, forward) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _fork(config: RunConfig, resume: bool, data: Any, rank: int, scratch: Path) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setpgid(0, 0)
        _die_with_parent()
        os.register_at_fork(after_in_child=_die_with_parent)
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(config.world_size))
        os.environ["TPCHECK_STORE"] = str(scratch / "store")
        if "lo" in (name for _, name in socket.if_nameindex()):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        code = _run_rank(config, resume, data, rank, scratch)
    finally:
        os._exit(code)


def _die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _run_rank(config: RunConfig, resume: bool, data: Any, rank: int, scratch: Path) -> int:
    from tpcheck.run.train import Stop, train

    stop = Stop()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    report: dict[str, Any] = {}
    with to_log(Path(config.output) / LOG, rank) as display:
        try:
            with _refusals():
                train(config, resume, stop, display, data)
            return 0
        except TpcheckError as error:
            report = {"refused": True, "why": str(error)}
        except BaseException as error:
            traceback.print_exc()
            report = {"refused": False, "why": exit_reason.one_line(error)}
    write_object(scratch / f"rank-{rank}.json", {"time": time.time(), **report})
    return 1


def _supervise(ranks: dict[int, int], scratch: Path, log: Path) -> int:
    """Wait for all ranks; when one fails, end the others. Bad input that a rank found is raised here."""
    waiting, failed, deadline = dict(ranks), {}, float("inf")
    try:
        while waiting and time.monotonic() < deadline:
            for rank, pid in list(waiting.items()):
                ended, status = os.waitpid(pid, os.WNOHANG)
                if not ended:
                    continue
                del waiting[rank]
                if status:
                    failed[rank] = os.waitstatus_to_exitcode(status)
                    _kill_group(pid)
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
            time.sleep(POLL_SECONDS)
    finally:
        for pid in waiting.values():
            _kill_group(pid)
            os.waitpid(pid, 0)
    if not failed:
        return 0
    reports = {rank: _report(scratch, rank, code) for rank, code in failed.items()}
    rank = min(reports, key=lambda rank: (reports[rank]["order"], reports[rank].get("time", 0.0)))
    if reports[rank].get("refused"):
        raise TpcheckError(reports[rank]["why"])
    message = f"rank {rank} {reports[rank]['why']}"
    if waiting:
        message += f" (the {len(waiting)} ranks still running were ended)"
    with open(log, "a", encoding="utf-8") as file:
        print(f"[launch] {message}", file=file)
    print(f"tpcheck: {message}; see {log}", file=sys.stderr)
    if failed[rank] < 0:
        return 128 - failed[rank]  # as a shell says it
    exit_reason.note("failed", reports[rank]["why"])
    return 1


def _report(scratch: Path, rank: int, code: int) -> dict[str, Any]:
    """Why a rank ended; a lower `order` is nearer to the cause: the others often fail because it did."""
    if code < 0:
        name = signal.Signals(-code).name
        return {"order": 2 if code == -signal.SIGABRT else 0, "why": f"was killed by {name}"}
    try:
        report = json.loads((scratch / f"rank-{rank}.json").read_text())
    except (OSError, ValueError):
        return {"order": 3, "why": f"ended with exit code {code}"}
    return {"order": 1, **report, "why": report["why"] if report["refused"] else f"failed: {report['why']}"}


def _kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
