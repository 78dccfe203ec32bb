"""Starting a run: `tpcheck train`, in ranks forked from this process or as one of those that torchrun or srun started.

launch ─┬─ nobody started ranks ── lock the output ── fork tp * cp * pp * dp ranks ── _run_rank in each
        └─ this is a rank ──────── rank 0 locks it ──────────────────────────────── _run_rank
"""

from __future__ import annotations

import contextlib
import os
import signal
import traceback
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tpcheck.config.load import load_run
from tpcheck.config.schema import RunConfig
from tpcheck.errors import TpcheckError
from tpcheck.files import lock, result_dir
from tpcheck.files.names import LOG
from tpcheck.run import exit_reason
from tpcheck.run.fork import SIGNALS, fork_ranks
from tpcheck.run.heartbeat import Pulse, Watch
from tpcheck.run.log_redirect import to_log
from tpcheck.run.place import Place, place_from_environment
from tpcheck.run.resume import resume_point

if TYPE_CHECKING:
    from tpcheck.run.train import Prepared

__all__ = ["command", "launch"]

RANKS, RANKS_PER_CORE = 32, 8  # that are started here at most: as many as the one, or the other
LOCK_PATIENCE_SECONDS = 480.0  # below the time that the other ranks wait for this one to connect


def command(path: Path, overrides: Sequence[str] = (), resume: bool = False) -> int:
    """Train the run file at `path`; what ends it is noted for the batch script."""
    place: Place | None = None
    try:
        config = load_run(path, overrides)
        place = place_from_environment(config)
        return launch(config, resume, place)
    except Exception as error:
        exit_reason.record_error(error, place.rank if place else 0)
        raise


def launch(config: RunConfig, resume: bool = False, place: Place | None = None) -> int:
    """Train `config` and return an exit code; bad input is a `TpcheckError`, raised before any rank starts.

    Args:
        config: as `parse_run` and `load_run` have checked it.
        resume: go on from the last complete checkpoint of the output.
        place: which rank this process is, where somebody else started them.
    """
    # A request to save may come while a busy node is still importing torch: it then waits until ranks can hear it.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
    try:
        return _launch_here(config, resume) if place is None else _run_as(place, config, resume)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _launch_here(config: RunConfig, resume: bool) -> int:
    cores = os.cpu_count() or 1
    if config.world_size > max(RANKS, RANKS_PER_CORE * cores):
        raise TpcheckError(f"{config.world_size} ranks on {cores} cores would never come to an end: use a cluster")
    prepared, output = _prepare(config, before_forking=True), Path(config.output)
    with _exclusively(config):
        start = resume_point(config, resume)
        if resume and result_dir.final_digests(output, config.steps):
            print(f"complete already: {output}")
            return 0

        def work(place: Place, pulse: Pulse) -> None:
            _run_rank(prepared, place, start, pulse)

        code, asked_by = fork_ranks(config.world_size, output / LOG, work)
        if asked_by and not code and not result_dir.final_digests(output, config.steps):
            return 128 + asked_by
        return code


def _run_as(place: Place, config: RunConfig, resume: bool) -> int:
    place.announce()
    with _exclusively(config) if place.rank == 0 else contextlib.nullcontext():
        start = resume_point(config, resume) if place.rank == 0 else None
        _run_rank(_prepare(config), place, start)
    return 0


@contextlib.contextmanager
def _exclusively(config: RunConfig) -> Iterator[None]:
    """Hold the result directory's lock, which forked ranks inherit, so that no two runs write to one place.

    On a cluster a lost node may still run what was started again elsewhere: a batch script's runs wait for its end.
    """
    output = Path(config.output)
    if output.exists() and not output.is_dir():
        raise TpcheckError(f"output={output} is a file: name another directory")
    output.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(lock.hold(output / LOG, LOCK_PATIENCE_SECONDS if exit_reason.is_wanted() else 0.0))
        except BlockingIOError:
            raise TpcheckError(f"{output} is being written by another run: wait for it, or stop it") from None
        yield


def _prepare(config: RunConfig, before_forking: bool = False) -> Prepared:
    """Import everything heavy, refuse what can be refused without other ranks, open the data.

    Args:
        before_forking: CUDA, which forked ranks could not use, must not be started.
    """
    if before_forking:
        os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # asks for GPUs without starting CUDA
    with _quiet_imports():
        import psutil  # noqa: F401  without it Megatron's checkpoint writer hangs
        import torch

        from tpcheck.run.data import open_data
        from tpcheck.run.model import transformer_config
        from tpcheck.run.train import Prepared

        model = transformer_config(config)
    if before_forking and torch.cuda.is_initialized():  # by TE's import, which asks what flash-attn can do on the GPU
        raise TpcheckError(
            "an import has started CUDA, which ranks forked from here could not use: start them with "
            f"torchrun --nproc-per-node={config.world_size} -m tpcheck train …"
        )
    return Prepared(config, model, open_data(config))


def _run_rank(prepared: Prepared, place: Place, start: int | None, pulse: Pulse | None = None) -> None:
    """Train as the rank at `place`; all that is printed goes to the log, errors with their traceback.

    Args:
        start: the step to go on from, 0 to begin; None on a rank that asks rank 0.
        pulse: where the launcher looks for signs of life.

    Raises:
        TpcheckError: bad input, also what the patches do not cover.
    """
    from patches import UnsupportedError
    from tpcheck.run.train import Stop, train

    stop = Stop(SIGNALS, Watch(place.rank, pulse))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    with to_log(Path(prepared.config.output) / LOG, place.rank) as display:
        try:
            train(prepared, place, start, stop, display)
        except UnsupportedError as error:
            raise TpcheckError(str(error)) from error
        except TpcheckError:
            raise
        except BaseException:
            traceback.print_exc()
            raise


@contextlib.contextmanager
def _quiet_imports() -> Iterator[None]:
    # megatron-core warns seven times that Apex and Transformer Engine are not installed.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except ModuleNotFoundError as error:
            raise TpcheckError(f"{error}: install {error.name}, which megatron-core or tpcheck needs") from error
